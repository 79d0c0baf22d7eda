"""Pictures and tables of a run: loss curves, similarity matrices, aligned text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

LOSS_TERMS = {"total": "total", "video_audio": "video-audio NCE", "video_text": "video-text MIL-NCE"}
MONITORS = {  # title of a panel -> which numbers of metrics.jsonl it shows
    "accuracy: of batches as trained on, and of one clean batch of them": r"(clean_)?accuracy",
    "effective rank of the embeddings (1: collapsed)": r".*_rank",
    "standard deviation of the embeddings (0: collapsed)": r".*_std",
    "temperature": "temperature",
    "clips per second": "clips_per_second",
    "share of the device's FLOPs (MFU)": "mfu",
    "seconds waited for data, per record": "data_seconds",
    "memory (MB)": r".*_mb",
    "steps skipped, files quarantined": "skipped|quarantined",
}
COLORS = ("#1b1b1b", "#1f77b4", "#d1662c")
NORM_COLOR = "#6f7680"
GRID = {"color": "#d9d9d9", "linewidth": 0.6}


def plot_losses(run_dir: str | Path, out: str | Path | None = None) -> Path | None:
    """Draw a run's loss terms, learning rate and gradient norm over its steps into `plots/loss.png`.

    Args:
        run_dir: run folder with metrics.jsonl, one JSON object with `step` per line; a last line cut short is ignored,
            a value of null leaves a gap, a term that is 0 throughout (no such modality) is left out.
            Records of one step are taken as one.
        out: folder that receives `plots/`; None: the run's.

    Returns:
        The picture's path, or None where no step has been recorded yet.

    Raises:
        ValueError: metrics.jsonl is missing or has a bad line; the message has the line.
        RuntimeError: matplotlib is not installed.

    >>> plot_losses("runs/demo")  # doctest: +SKIP
    """
    run_dir = Path(run_dir)
    records = read_records(run_dir / "metrics.jsonl")
    if not records:
        return None
    steps = [record["step"] for record in records]
    figure = new_figure(8, 5.4)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    for (name, label), color in zip(LOSS_TERMS.items(), COLORS):
        values = series_of(records, name)
        if any(value and math.isfinite(value) for value in values):
            width = 2.0 if name == "total" else 1.4
            losses.plot(steps, values, color=color, linewidth=width, label=label, **markers_at(steps))
    heldout = [one for one in zip(steps, series_of(records, "heldout_total")) if math.isfinite(one[1])]
    if heldout:
        losses.plot(*zip(*heldout), "o--", color=COLORS[0], markersize=3.5, linewidth=1.0, label="held-out total")
    losses.set_ylabel("loss (nats)")
    losses.set_title(f"Training of {run_dir.name or run_dir.resolve().name}", loc="left")
    if losses.lines:
        losses.legend(frameon=False, loc="upper right")  # where a loss that falls leaves room

    rates.plot(steps, series_of(records, "lr"), color=COLORS[1], **markers_at(steps))
    rates.set_ylabel("learning rate", color=COLORS[1])
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_xlabel("step")
    norms = rates.twinx()
    norms.plot(steps, series_of(records, "grad_norm"), color=NORM_COLOR, linewidth=1.0, **markers_at(steps))
    norms.set_ylabel("gradient norm", color=NORM_COLOR)
    norms.set_ylim(bottom=0)

    for axes in (losses, rates):
        axes.grid(**GRID)
    for axes in (losses, rates, norms):
        axes.spines["top"].set_visible(False)
    losses.spines["right"].set_visible(False)
    return save_figure(figure, Path(out or run_dir) / "plots" / "loss.png")


def plot_monitors(run_dir: str | Path, out: str | Path | None = None) -> Path | None:
    """Draw what shows trouble into `plots/monitors.png`: spread of the embeddings, throughput, memory, lost data.

    A monitor that has no number is left out. Arguments, result and errors as for `plot_losses`.

    >>> plot_monitors("runs/demo")  # doctest: +SKIP
    """
    run_dir = Path(run_dir)
    records = read_records(run_dir / "metrics.jsonl")
    panels = []
    for title, pattern in MONITORS.items():
        names = sorted({name for record in records for name in record if re.fullmatch(pattern, name)})
        series = {name: series_of(records, name) for name in names}
        series = {name: values for name, values in series.items() if any(map(math.isfinite, values))}
        panels += [(title, series)] if series else []
    if not panels:
        return None
    steps = [record["step"] for record in records]
    figure = new_figure(8, 1.9 * len(panels))
    for axes, (title, series) in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels):
        for name, values in series.items():
            axes.plot(steps, values, linewidth=1.4, label=name, **markers_at(steps))
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.grid(**GRID)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("step")
    return save_figure(figure, Path(out or run_dir) / "plots" / "monitors.png")


def plot_run(run_dir: str | Path, out: str | Path | None = None) -> list[Path]:
    """All pictures that a run's metrics.jsonl gives, see `plot_losses` and `plot_monitors`."""
    return [path for draw in (plot_losses, plot_monitors) if (path := draw(run_dir, out)) is not None]


def plot_similarity(
    matrix: Tensor, path: str | Path, title: str, *, query: str = "text", candidate: str = "video"
) -> Path:
    """Draw a similarity matrix as an image; right answers lie on the diagonal.

    Args:
        matrix: [Nq, Nc], finite cosines; rows are queries.
        path: the PNG to write.
        title: what the picture shows.
        query: name of the rows' modality.
        candidate: name of the columns' modality.

    Raises:
        ValueError: `matrix` is not a finite [Nq, Nc].
        RuntimeError: matplotlib is not installed.

    >>> plot_similarity(torch.eye(8), "similarity.png", "Identity")  # doctest: +SKIP
    """
    if matrix.ndim != 2 or 0 in matrix.shape or not matrix.isfinite().all():
        raise ValueError(f"plot_similarity: matrix must be finite [Nq, Nc], got {list(matrix.shape)}.")
    values = matrix.detach().cpu().double().numpy()
    figure = new_figure(6.4, 5.4)
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", aspect="equal", interpolation="nearest")
    axes.set_title(title, loc="left")
    axes.set_xlabel(f"{candidate} (candidate)")
    axes.set_ylabel(f"{query} (query)")
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label("cosine similarity")
    bar.outline.set_visible(False)
    return save_figure(figure, Path(path))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as plain text in aligned columns; columns in the order in which keys first appear.

    Words are aligned left and numbers right; floats get one decimal, a missing value or None is a dash.

    >>> print(table([{"task": "text -> video", "R@1": 12.5}, {"task": "audio -> video", "R@1": 7.0}]))
    task             R@1
    --------------  ----
    text -> video   12.5
    audio -> video   7.0
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = []
    for column in columns:
        values = [row.get(column) for row in rows]
        cells = [column, *map(cell_text, values)]
        width = max(map(len, cells))
        numeric = any(isinstance(value, int | float) for value in values)
        cells.insert(1, "-" * width)
        lines.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*lines))


def cell_text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def read_records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: metrics must be a readable file of a run, got {reason}.") from None
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or cut short
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: line must be JSON, got {error.msg}.") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}:{number}: line must be an object with a step, got {line[:80]!r}.")
        same = records and records[-1]["step"] == record["step"]  # an evaluation's is beside that of the step
        records.append(records.pop() | record if same else record)
    return records


def series_of(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = (record.get(name) for record in records)
    return [float(value) if isinstance(value, int | float) else math.nan for value in values]


def markers_at(steps: Sequence[int]) -> dict[str, Any]:
    """Dots where lines alone would show nothing."""
    return {"marker": "o", "markersize": 3.5} if len(steps) < 10 else {}


def new_figure(width: float, height: float):
    """A figure of its own, drawn with Agg: no display, no global state of pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("report: matplotlib must be installed for plots. Run `pip install matplotlib`.") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
