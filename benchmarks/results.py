"""Rows on disk: one JSONL file per bench and machine, in which a case that is measured again replaces itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CASE = ("op", "shape", "dtype", "pass", "device")  # providers of one case are timed together, and kept together


def case_of(row: Row) -> tuple[Any, ...]:
    """What a row's case is called."""
    return tuple(row[field] for field in CASE)


def read(path: Path) -> list[Row]:
    """The rows of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def merge(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Write `rows` into the file in place of older ones of their cases; all others stay. Returns what it then holds."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in read(path):
        cases.setdefault(case_of(row), []).append(row)
    new: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        new.setdefault(case_of(row), []).append(row)
    kept = [row for group in (cases | new).values() for row in group]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(partial, path)  # whoever stops the run in between loses nothing
    return kept


def is_measured(path: Path, case: tuple[Any, ...], sources: str) -> bool:
    """Whether the file holds this case, measured on these sources without a failure."""
    rows = [row for row in read(path) if case_of(row) == case and row["stamp"]["sources"] == sources]
    return bool(rows) and not any(row.get("error") for row in rows)
