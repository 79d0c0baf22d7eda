"""Where a verb's results go: refused before the work where nothing can be written, and never lost after it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vatt_engine.output import say, write_text
from vatt_engine.schema import ConfigError

BLOCK = bytes(1 << 12)  # a disk that has room for this is not full


class Results:
    """The folder of a verb's results.

    It is refused at once where nothing can be written. What fails after the work (a disk that has become full) is said
    and counted in `faults`, and raises nothing, so that a verb still gives what it has found.

    Args:
        folder: need not exist.
        verb: the command, for messages.
        hint: what to do about a folder that cannot be written.

    Raises:
        ConfigError: it, or its nearest parent, is no folder or cannot be written.

    >>> results = Results("out", "vatt probe")
    >>> results.save_text("probe.json", "{}"), results.faults
    (PosixPath('out/probe.json'), [])
    """

    def __init__(self, folder: str | Path, verb: str, *, hint: str = "Name another one with --out."):
        self.folder, self.verb = Path(folder), verb
        self.faults: list[str] = []
        check_writable(self.folder, verb, hint)

    def save(self, name: str, write: Callable[[Path], object]) -> Path | None:
        """Have a file of the folder written; its path, or None where that failed."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            self.faults.append(f"{path}: {error.strerror or error}")
            say(f"{self.verb}: {path} must be written, got: {error.strerror or error}.")
            return None
        return path

    def save_text(self, name: str, text: str) -> Path | None:
        """Have a text written to a file of the folder, as `save`."""
        return self.save(name, lambda path: write_text(path, text))

    def save_json(self, name: str, value: Any) -> Path | None:
        """Have a value written to a file of the folder as JSON, as `save`."""
        return self.save_text(name, json.dumps(strict(value), indent=1, allow_nan=False) + "\n")

    @property
    def code(self) -> int:
        """The exit code of the verb: 2 where a result could not be written."""
        return 2 if self.faults else 0


def strict(value: Any) -> Any:
    """A value as JSON can hold it, which has no NaN and no infinity: null stands for both.

    >>> strict({"mAP": math.nan, "steps": [1, 2.5]})
    {'mAP': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {name: strict(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(folder: str | Path, verb: str, hint: str = "Name another one with --out.") -> None:
    """Refuse a folder in which nothing can be written; one that is missing is not made yet.

    Raises:
        ConfigError: with what the system says.
    """
    folder = Path(folder)
    # Flags of a file's mode do not tell: the disk may be mounted read-only, be full, or belong to a server that has
    # rules of its own. So something is written, into a file that has no name.
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    fault = "a file" if place == folder else f"a path through the file {place}"
    if place.is_dir():
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(BLOCK)
            return
        except OSError as error:
            fault = f"{error.strerror}"
    raise ConfigError(f"{verb}: {folder} must be a folder that can be written, got {fault}. {hint}")
