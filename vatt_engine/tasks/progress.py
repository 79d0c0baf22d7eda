"""How far a command is: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from vatt_engine.output import is_terminal, put

SAY_EVERY = 30.0  # seconds between lines where the output is no terminal


class Bar:
    """One thing that is worked on.

    Args:
        name: what it is called in front of the numbers.
        total: how many units it has; None: nobody knows.
        unit: "B", "files".
        stream: a terminal gets a bar that moves, anything else a line now and then.
        done: units that an earlier call has done, which say nothing about the rate.
    """

    def __init__(self, name: str, total: int | None, unit: str, stream: TextIO | None, done: int = 0):
        self.name, self.total, self.unit, self.stream = name, total, unit, stream
        self.first = self.done = done
        self.start = self.said = time.monotonic()
        form = {"unit": unit if unit == "B" else f" {unit}", "unit_scale": unit == "B", "initial": done}
        self._bar = None
        if is_terminal(stream):
            form |= {"file": stream, "delay": 0.5, "leave": False, "dynamic_ncols": True}
            self._bar = tqdm(desc=name or None, total=total, **form)

    def update(self, more: int, note: str = "") -> None:
        """So many units more are done; `note` is what else there is to say."""
        self.done += more
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(more)
        elif time.monotonic() - self.said >= SAY_EVERY:
            self.said = time.monotonic()
            put(self.stream, self.line(note) + "\n")

    def line(self, note: str = "") -> str:
        """What a log gets to read."""
        rate = (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)
        in_bytes, total = self.unit == "B", self.total
        size = tqdm.format_sizeof if in_bytes else str
        unit = "B" if in_bytes else f" {self.unit}"
        parts = [size(self.done) + ("" if total is None else f"/{size(total)}") + unit]
        parts += [note] if note else []
        parts.append(f"{size(rate) if in_bytes else f'{rate:.1f}'}{unit}/s")
        if total is not None and rate:
            parts.append(f"{tqdm.format_interval((total - self.done) / rate)} left")
        return f"{self.name}: {', '.join(parts)}" if self.name else ", ".join(parts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Reading:
    """Files and folders as they are read; see `data.datasets.source.Watch`."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stdout if stream is None else stream
        self._what: Path | None = None
        self._bar: Bar | None = None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def __call__(self, what: Path, more: int, total: int | None) -> None:
        if what != self._what:
            self._end()
            self._what, self._bar = what, Bar(what.name, total, "files" if total is None else "B", self.stream)
        self._bar.update(more)
        if more == 0 and total is not None:  # the end of the file: another pass begins anew
            self._end()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._end()
        put(self.stream, text + "\n")

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._what = self._bar = None


class Progress:
    """Files done, and rejected, of all; called after each file."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stdout if stream is None else stream
        self._bar: Bar | None = None

    def __call__(self, done: int, rejected: int, total: int) -> None:
        if self._bar is None:
            self._bar = Bar("", total, "files", self.stream, done - 1)
        self._bar.update(done - self._bar.done, f"{rejected} rejected")
        if done == total:
            self._bar.close()
            put(self.stream, self._bar.line(f"{rejected} rejected") + "\n")
