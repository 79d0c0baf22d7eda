"""The table and the picture of an ablation: what a cell reaches against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

from vatt_engine.analysis.report import new_figure, save_figure

COSTS = ("training", "frame size", "drop %", "budget", "steps", "GFLOPs", "paper GFLOPs", "clips/s", "peak MB")
COLORS = ("#1f77b4", "#d1662c", "#2a8f5a", "#7b4fa3", "#8c6d1f", "#c2405f")
BASELINE_LINES = (":", "--", "-.")


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for `table`: means with their spread, without the columns that are empty in all of them.

    >>> shown([{"values": {"A": 2.0, "B": None}, "spread": {"A": 0.5}}])
    [{'A': '2.0 ± 0.5'}]
    """

    def text(row: Mapping[str, Any], name: str) -> Any:
        value, spread = row["values"].get(name), row.get("spread", {}).get(name)
        if value is None:
            return None
        if "GFLOPs" in name:
            return f"{value:.4g}"
        return value if spread is None else f"{value:.1f} ± {spread:.1f}"

    filled = dict.fromkeys(name for row in rows for name, value in row["values"].items() if value is not None)
    return [{name: text(row, name) for name in filled} for row in rows]


def plot_costs(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw every column that is no cost against the GFLOPs of a clip, one panel per budget; empty values are left out.

    Bars are standard deviations over seeds. A row that has no GFLOPs, a baseline, is a broken line across.

    Args:
        rows: of `vatt ablate`.
        path: the PNG to write.

    Raises:
        RuntimeError: matplotlib is not installed.

    >>> plot_costs([{"values": {"budget": "steps", "GFLOPs": 2.0, "A": 5.0}, "spread": {}}], "a.png")  # doctest: +SKIP
    """
    cells = sorted((row for row in rows if row["values"]["GFLOPs"]), key=lambda row: row["values"]["GFLOPs"])
    lines = [row for row in rows if not row["values"]["GFLOPs"]]
    columns = [name for name in rows[0]["values"] if name not in COSTS]
    colors = dict(zip([name for name in columns if any(row["values"][name] for row in rows)], cycle(COLORS)))
    budgets = list(dict.fromkeys(row["values"]["budget"] for row in cells))
    figure = new_figure(4.2 * len(budgets) + 2.4, 3.4)
    for axes, budget in zip(figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0], budgets):
        own = [row for row in cells if row["values"]["budget"] == budget]
        sizes = dict.fromkeys(row["values"].get("frame size") for row in own)
        for (name, color), (size, marker) in product(colors.items(), zip(sizes, cycle("os^v"))):
            points = [
                (row["values"]["GFLOPs"], row["values"][name], row["spread"].get(name, 0.0))
                for row in own
                if row["values"].get("frame size") == size and row["values"][name] is not None
            ]
            if points:
                x, y, spread = zip(*points)
                label = f"{name}, {size} px" if len(sizes) > 1 else name
                axes.errorbar(x, y, spread, color=color, marker=marker, markersize=3.5, capsize=2, label=label)
        for (name, color), (row, style) in product(colors.items(), zip(lines, cycle(BASELINE_LINES))):
            if row["values"][name] is not None:
                label = f"{name}, {row['values']['training']}"
                axes.axhline(row["values"][name], color=color, linestyle=style, linewidth=1, label=label)
        axes.set(title=f"equal {budget}", xlabel="GFLOPs per clip, forward", ylabel="%", ylim=(0, 103))
    if colors:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small", frameon=False)
    return save_figure(figure, Path(path))
