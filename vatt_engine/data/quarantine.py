"""Files that could not be used, counted and named: quarantine.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from vatt_engine.data.manifest import Sample
from vatt_engine.output import LogFile

MIN_SEEN = 100  # samples before the share of bad ones means anything


class QuarantineError(ValueError):
    """Too many files of a set cannot be used."""


class Quarantine:
    """The faults of a run, each (file, reason) once, appended to a JSONL file as they are found.

    A line is `{"path", "line" (of the manifest), "reason", "epoch", "skipped"}`; `skipped` is false for a note about a
    sample that was kept. Lines of an earlier part of the run are read back, so that resuming does not repeat them. A
    line that cannot be written (the disk is full) is kept for the next time, and nothing ends for it.

    Args:
        path: the JSONL file; None keeps the entries in memory alone.

    >>> len(Quarantine())
    0
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self._file = None if path is None else LogFile(path)
        self.entries: list[dict] = []
        self.num_seen = self.num_bad = 0
        if self.path is not None and self.path.exists():
            content = self.path.read_text(encoding="utf-8", errors="replace")
            if content and not content.endswith("\n"):  # killed while writing: the next line begins afresh
                self.path.write_text(f"{content}\n", encoding="utf-8")
            self.entries = [entry for line in content.split("\n") if (entry := _entry(line))]
        self._known = {(entry["path"], entry["reason"]) for entry in self.entries}
        self._known |= {("", entry["reason"]) for entry in self.entries if not entry["skipped"]}

    def __len__(self) -> int:
        """Number of files that were skipped at least once."""
        return len({entry["path"] for entry in self.entries if entry["skipped"]})

    @property
    def num_noted(self) -> int:
        """Number of files that were used in spite of something odd."""
        return len({entry["path"] for entry in self.entries if not entry["skipped"]})

    def add(self, sample: Sample, reason: str, epoch: int, *, skipped: bool = True, once: bool = False) -> None:
        """Name one fault, or one note about a sample that was kept; `once`: the first sample stands for the set."""
        place = {"path": str(sample.path), "line": sample.line}
        entry = place | {"reason": reason, "epoch": epoch, "skipped": skipped}
        key = ("" if once else entry["path"], reason)
        if key in self._known:
            return
        self._known.add(key)
        self.entries.append(entry)
        if self._file is not None:
            self._file.add(json.dumps(entry, ensure_ascii=False))

    def count(self, *, seen: int, bad: int) -> None:
        """Count samples that were asked for, and those of them that were bad."""
        self.num_seen += seen
        self.num_bad += bad

    def check(self, max_bad_fraction: float) -> None:
        """Stop a run whose set is broken.

        Raises:
            QuarantineError: more than `max_bad_fraction` of at least 100 samples were bad.
        """
        if self.num_seen >= MIN_SEEN and self.num_bad > max_bad_fraction * self.num_seen:
            raise QuarantineError(
                f"loader: at most {max_bad_fraction:.1%} of the samples must be bad, got {self.num_bad} of"
                f" {self.num_seen}. {self.first()} See data.max_bad_fraction."
            )

    def first(self, count: int = 3) -> str:
        """The first few faults, for messages."""
        bad = [entry for entry in self.entries if entry["skipped"]]
        named = " ".join(f"{entry['path']}: {entry['reason']}" for entry in bad[:count])
        return f"The first: {named}" if bad else ""


def _entry(line: str) -> dict | None:
    """The entry of a line, or None for a line that is cut or not ours."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"path", "reason", "skipped"} <= entry.keys() else None
