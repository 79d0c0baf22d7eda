"""The picture of an ablation: what a cell reaches against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vatt_engine.analysis.report import new_figure, save_figure

COSTS = ("drop %", "budget", "steps", "GFLOPs", "paper GFLOPs", "clips/s", "peak MB")


def plot_costs(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw every column that is no cost against the GFLOPs of a clip, one panel per budget; empty values are left out.

    Args:
        rows: of `vatt ablate`, with "budget" and "GFLOPs".
        path: the PNG to write.

    Raises:
        RuntimeError: matplotlib is not installed.

    >>> plot_costs([{"budget": "steps", "GFLOPs": 2.0, "HMDB51": 50.0}], "ablation.png").name  # doctest: +SKIP
    'ablation.png'
    """
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    figure = new_figure(4.2 * len(budgets), 3.4)
    for axes, budget in zip(figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0], budgets):
        own = sorted((row for row in rows if row["budget"] == budget), key=lambda row: row["GFLOPs"])
        for column in (key for key in own[0] if key not in COSTS):
            points = [(row["GFLOPs"], row[column]) for row in own if row[column] is not None]
            if points:
                axes.plot(*zip(*points), marker="o", markersize=3.5, label=column)
        axes.set(title=f"equal {budget}", xlabel="GFLOPs per clip, forward", ylabel="%")
        if axes.lines:
            axes.legend(fontsize="small")
    return save_figure(figure, Path(path))
