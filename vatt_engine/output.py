"""What is printed and logged beside the work: where that fails, the work goes on.

A run of days must not end because whoever watched has closed the terminal, because a log's disk is full, or because a
log in another encoding has no sign for a letter of a file's name.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from pathlib import Path
from typing import Any, TextIO


def put(stream: TextIO | None, text: str) -> bool:
    """Write text and flush it; characters that the stream's encoding does not have become `?`.

    Returns:
        False where it could not be written: the stream is closed, nobody reads it, or its disk is full.

    >>> put(sys.stdout, "step 1\\n")
    step 1
    True
    """
    if stream is None:  # as Python has it where the program was started with its output closed
        return False
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):  # ValueError: a closed file
        return False
    return True


def say(text: str) -> None:
    """A line for whoever watches, on stderr."""
    put(sys.stderr, f"{text}\n")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person watches, so that a line may be rewritten in place."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


class LogFile:
    """Lines appended to a file; those that a full disk refuses are kept and written before the next one.

    Args:
        path: its folder is made when the first line comes.

    >>> LogFile("events.jsonl").add("{}")
    >>> Path("events.jsonl").read_text()
    '{}\\n'
    """

    def __init__(self, path: str | Path):
        self.path, self.failing = Path(path), False
        self._waiting = bytearray()

    def add(self, line: str) -> None:
        self._waiting += line.encode("utf-8", "backslashreplace") + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write what waits; what stands in the way is said once, until it works again."""
        if not self._waiting:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                while self._waiting:
                    del self._waiting[: file.write(self._waiting)]
        except OSError as error:
            if not self.failing:
                say(f"warning: {self.path} must be written, got: {error.strerror}. The work goes on, its lines wait.")
            self.failing = True
        else:
            self.failing = False


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, so a reader never sees half of it."""
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def lasting_output() -> None:
    """Make this program's stdout and stderr such that printing to them never ends it; for a program's first line.

    Characters that their encoding does not have are replaced. What nobody reads any more (`| head`) is dropped.
    """
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for as long as the program
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _lasting(stream, errors))
        elif hasattr(stream, "reconfigure"):  # somebody has put another one in its place
            stream.reconfigure(errors=errors)


def _lasting(stream: io.TextIOWrapper, errors: str) -> io.TextIOWrapper:
    """The same file in the same encoding, buffered as before."""
    stream.flush()
    raw = _LastingFile(stream.fileno(), "w", closefd=False)
    options: dict[str, Any] = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    # `python -u` has no buffer between the text and the file, and neither has this.
    file = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(file, encoding=stream.encoding, errors=errors, **options)


class _LastingFile(io.FileIO):
    """An open file whose writing never fails: what cannot be written is dropped, and for what reason is said once."""

    said = False

    def write(self, content: Any) -> int:
        rest = memoryview(content).cast("B")
        size = len(rest)
        while rest:
            try:
                written = super().write(rest)
            except OSError as error:
                self._say(error)
                break
            if written is None:  # a pipe that does not wait: its reader is slower than we are
                select.select([], [self.fileno()], [])
            else:
                rest = rest[written:]
        return size

    def _say(self, error: OSError) -> None:
        if self.said or error.errno == errno.EPIPE or self.fileno() == 2:  # `| head` has read what it wanted
            return
        self.said = True
        say(f"warning: the output must be written, got: {error.strerror}. The work goes on without it.")
