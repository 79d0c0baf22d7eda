"""One self-contained HTML page about one or more runs: nothing is loaded from elsewhere, no script runs in it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any, NamedTuple

from torch import Tensor

from vatt_engine.analysis.report import GRID, LOSS_TERMS, cell_text, markers_at, new_figure, series_of

RUN_COLORS = ("#1f77b4", "#d1662c", "#2a8f5a", "#7b4fa3", "#8c6d1f", "#c2405f", "#4d5560")
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #d9d9d9 }}
table {{ border-collapse: collapse; margin: .5em 0 }} .wide {{ overflow-x: auto }}
td, th {{ padding: .25em .8em; text-align: left; vertical-align: top; border-bottom: 1px solid #e8e8e8 }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
.plots {{ display: flex; flex-wrap: wrap; gap: 1em }} figure {{ margin: 0; flex: 1 1 380px; max-width: 580px }}
figure.whole {{ max-width: 100% }} figure img {{ width: 100% }} figcaption {{ color: #6f7680; font-size: .85em }}
.clips {{ display: flex; flex-wrap: wrap; gap: 6px; min-width: 304px }} td:first-child {{ min-width: 9em }}
.clip {{ width: 96px; font-size: .8em; color: #6f7680 }}
.clip img {{ width: 90px; border: 3px solid transparent; border-radius: 4px }}
.right img {{ border-color: #2a8f5a }} .right {{ color: #2a8f5a }}
</style><title>{title}</title></head><body><h1>{title}</h1>
"""


class Answer(NamedTuple):
    """A clip that was found: its picture, its caption, the cosine, and whether it is the query's own."""

    image: bytes
    caption: str
    cosine: float
    right: bool


class RunReport(NamedTuple):
    """What the page shows of one run: facts by name, rows by table, answers by query, pictures by name."""

    name: str
    facts: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    results: Mapping[str, Sequence[Mapping[str, Any]]]
    answers: Mapping[str, Sequence[Answer]]
    plots: Mapping[str, bytes]


def page(title: str, runs: Sequence[RunReport]) -> str:
    """The page: facts, loss curves, results, retrieval examples and plots, with the runs side by side.

    All text is escaped, and the page's own policy forbids scripts and requests.

    >>> "<script>" in page("<script>", [RunReport("a", {}, [], {}, {}, {})])
    False
    """
    parts = [HEAD.format(title=escape(title))]
    facts = dict.fromkeys(name for run in runs for name in run.facts)
    parts += [_section("Runs", _table([{"": name} | {r.name: r.facts.get(name) for r in runs} for name in facts]))]
    curves = losses(runs)
    if curves is not None:
        parts.append(_section("Training", _figure_of(curves, "loss over steps", "whole")))
    for title in dict.fromkeys(title for run in runs for title in run.results):
        rows = [{"run": run.name} | dict(row) for run in runs for row in run.results.get(title, ())]
        parts.append(_section(title, _table(sorted(rows, key=lambda row: str(row.get("task"))))))
    queries = dict.fromkeys(query for run in runs for query in run.answers)
    if queries:
        rows = [
            {"query": escape(query)} | {escape(run.name): _clips(run.answers.get(query, ())) for run in runs}
            for query in queries
        ]
        parts.append(_section("Retrieval examples: the five nearest clips, the right one framed", _html_table(rows)))
    for name in dict.fromkeys(name for run in runs for name in run.plots):
        shown = (_figure_of(run.plots[name], f"{run.name}: {name}") for run in runs if name in run.plots)
        parts.append(_section(name, "".join(shown)))
    return "\n".join([*parts, "</body></html>\n"])


def losses(runs: Sequence[RunReport]) -> bytes | None:
    """The picture of every loss term over steps, a line for each run; None where nothing was recorded."""

    def recorded(run: RunReport, term: str) -> bool:
        return any(value and math.isfinite(value) for value in series_of(run.records, term))

    terms = [term for term in LOSS_TERMS if any(recorded(run, term) for run in runs)]
    if not terms:
        return None
    figure = new_figure(4.2 * len(terms), 3.6)
    for axes, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms):
        for run, color in zip(runs, cycle(RUN_COLORS)):
            steps = [record["step"] for record in run.records]
            label = run.name.replace("$", r"\$")  # matplotlib would read mathematics
            axes.plot(steps, series_of(run.records, term), color=color, label=label, **markers_at(steps))
        axes.set_title(LOSS_TERMS[term], loc="left", fontsize=10)
        axes.set(xlabel="step", ylabel="loss (nats)")
        axes.grid(**GRID)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def thumbnail(frame: Tensor, size: int = 96) -> bytes:
    """A uint8 frame [H, W, 3], of which every n-th pixel is kept until it fits into `size`, as a PNG."""
    from matplotlib.image import imsave

    step = -(-max(frame.shape[:2]) // size)
    buffer = io.BytesIO()
    imsave(buffer, frame[::step, ::step].contiguous().cpu().numpy(), format="png")
    return buffer.getvalue()


def _section(title: str, body: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<div class="wide plots">{body}</div>'


def _image(data: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _figure_of(data: bytes, caption: str, kind: str = "half") -> str:
    return f"<figure class={kind}>{_image(data, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _clips(answers: Iterable[Answer]) -> str:
    clips = (
        f'<div class="clip{" right" if answer.right else ""}" title="{escape(answer.caption)}">'
        f"{_image(answer.image, answer.caption)}{answer.cosine:.2f}</div>"
        for answer in answers
    )
    return f'<div class="clips">{"".join(clips)}</div>'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return _html_table([{escape(name): escape(cell_text(value)) for name, value in row.items()} for row in rows])


def _html_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of finished HTML."""
    columns = dict.fromkeys(name for row in rows for name in row)

    def cell(text: str) -> str:
        number = text.replace(".", "", 1).removeprefix("-").isdigit()
        return f'<td class="number">{text}</td>' if number else f"<td>{text}</td>"

    head = "".join(f"<th>{name}</th>" for name in columns)
    body = ("<tr>" + "".join(cell(row.get(name, "")) for name in columns) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n" + "\n".join(body) + "</table>"
