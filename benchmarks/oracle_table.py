"""The oracle's rows as a page of Markdown: what was tried, by source, and what came of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from benchmarks.oracle_check import BY_RULE, NEITHER, ONLY_OURS, Row
from benchmarks.oracle_rules import DAMAGES, REFUSALS, RULES

SOURCES = "sources.json"  # in the folder: the revision or version of each folder in it


def page(rows: list[Row], folder: Path, title: str, programs: str) -> str:
    """All rows, grouped by the first folder of their paths, "owner+name" read as "owner/name"."""
    rows = sorted(rows, key=lambda row: row.path)
    path = folder / SOURCES
    revisions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts = [f"# {title}", _summary(rows, programs)]
    for source, group in groupby(rows, lambda row: row.path.partition("/")[0]):
        revision = f" ({revisions[source]})" if source in revisions else ""
        parts += [f"## {source.replace('+', '/')}{revision}", _table(group)]
    return "\n\n".join(parts) + "\n"


def combinations(rows: Iterable[Row]) -> Counter:
    """How many files there are of each container and codecs, among those that were compared."""
    compared = (row for row in rows if row.verdict not in (NEITHER, ONLY_OURS) and row.container)
    return Counter((row.container, row.video, row.audio) for row in compared)


def _summary(rows: list[Row], programs: str) -> str:
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(row.verdict for row in rows).most_common())
    kinds = combinations(rows)
    used = Counter(name for row in rows if row.verdict == BY_RULE for name in _names(row))
    rules = {rule.name: rule.row for rule in (*RULES, *REFUSALS, *DAMAGES)}
    lines = [f"{programs}", f"{len(rows)} files: {verdicts}. {len(kinds)} combinations of container and codecs."]
    if used:
        lines += ["", "| rule | row of docs/data.md | files |", "|---|---|---:|"]
        lines += [f"| {name} | {rules[name]} | {count} |" for name, count in used.most_common()]
    return "\n".join(lines)


def _names(row: Row) -> list[str]:
    return [name for name in {rule.name: None for rule in (*RULES, *REFUSALS, *DAMAGES)} if name in row.detail]


def _table(rows: Iterable[Row]) -> str:
    lines = ["| file | container | video | sound | properties | pictures | sound | verdict |"]
    lines.append("|---|---|---|---|---|---:|---|---|")
    for row in rows:
        pictures = f"{row.frames} ({row.told_apart})" if row.frames else ""
        sound = f"{row.snr:.0f} dB, {row.lag_ms:+.2f} ms" if row.snr is not None else ""
        verdict = f"{row.verdict}: {row.detail}" if row.detail else row.verdict
        cells = [row.path.partition("/")[2], row.container, row.video, row.audio, ", ".join(row.properties)]
        cells += [pictures, sound, verdict]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
