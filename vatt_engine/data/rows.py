"""Text files of rows (CSV, JSON, plain lines) in which every fault has a place: `file:line: field must ...`."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vatt_engine.schema import short

MAX_SECONDS = 1e9  # a time later than this (32 years) is a wrong unit


class ManifestError(ValueError):
    """A manifest or annotation file that cannot be read: the message says file, line, field and what was expected."""


@contextmanager
def opened(path: Path, what: str, watch: Callable[[int], None] | None = None) -> Iterator[TextIO]:
    """The text of a UTF-8 file, with or without a byte-order mark, its line ends as they are; `.gz` is unpacked.

    Args:
        what: the file's part in the command, for messages.
        watch: told how many bytes were read from the disk, each time that some are.
    """
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise ManifestError(f"{path}: {what} must be a file, got {found}. Give its full name.")
    try:
        with _binary(path, watch) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as refusal:
        text = "be UTF-8, got other bytes"
        raise fault(path, _line_of_bad_text(path), "the text", text, "Save it as UTF-8.") from refusal
    except (gzip.BadGzipFile, EOFError, zlib.error) as refusal:
        raise ManifestError(f"{path}: {what} must be a whole gzip file, got an error: {refusal}.") from refusal
    except OSError as refusal:
        raise ManifestError(f"{path}: {what} must be readable, got {refusal.strerror}.") from refusal


def first_line(path: Path, limit: int = 2**16) -> str:
    """The first line that holds any text, or the first `limit` bytes of it; nothing where the file cannot be read.

    It tells what a file is. So bytes that are no UTF-8 are replaced here and refused where the file is read.
    """
    try:
        with _binary(path) as file:
            text = file.read(limit).decode("utf-8-sig", errors="replace")
    except (OSError, EOFError, zlib.error):
        return ""
    return next((line.strip() for line in io.StringIO(text, newline=None) if line.strip()), "")


class _Watched(io.FileIO):
    """A file that tells how many bytes were read from it."""

    def __init__(self, path: Path, watch: Callable[[int], None]):
        super().__init__(path)
        self._watch = watch

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self._watch(count)
        return count


@contextmanager
def _binary(path: Path, watch: Callable[[int], None] | None = None) -> Iterator[Any]:
    raw = io.BufferedReader(_Watched(path, watch) if watch else io.FileIO(path), 2**18)
    with raw:
        yield gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw


def csv_cells(path: Path, file: Iterable[str], **dialect: Any) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of a CSV file, without its empty lines; `dialect` as csv.reader takes it."""
    reader, line = csv.reader(file, strict=True, **dialect), 1
    try:
        for cells in reader:
            begin, line = line, reader.line_num + 1
            if cells:
                yield begin, cells
    except csv.Error as refusal:
        raise fault(path, line, "the row", f"be valid CSV, got an error: {refusal}") from refusal


def csv_rows(
    path: Path, file: Iterable[str], needed: Iterable[str] | None = None, **dialect: Any
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, cells by column) of a CSV file, whose first row names the columns.

    Empty cells behind the last column, which spreadsheets write, are passed over.

    Args:
        needed: the columns that must not be there twice; None: all.
        dialect: as csv.reader takes it.
    """
    header: list[str] = []
    for line, cells in csv_cells(path, file, **dialect):
        if not header:
            header = _trimmed([cell.strip() for cell in cells], 1)
            twice = [name for name in (header if needed is None else needed) if header.count(name) > 1]
            if twice:
                raise fault(path, line, "the header", f"have each column once, got {twice[0]!r} twice")
            yield line, dict(zip(header, header))
        elif len(cells := _trimmed(cells, len(header))) != len(header):
            text = f"have {len(header)} cells ({', '.join(header)}), got {len(cells)}"
            raise fault(path, line, "the row", text, "Quote a text that holds the delimiter.")
        else:
            yield line, dict(zip(header, cells))


def _trimmed(cells: list[str], count: int) -> list[str]:
    """Without the empty cells at the end, as long as there are more than `count`."""
    while len(cells) > count and not cells[-1].strip():
        cells.pop()
    return cells


def parse_json(path: Path, line: int, field: str, text: str) -> Any:
    """A JSON text that begins on `line`."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as refusal:
        raise _json_fault(path, line, field, refusal) from refusal


def json_members(path: Path, file: TextIO, chunk: int = 2**18) -> Iterator[tuple[int, str, Any]]:
    """(line, key, value) of the members of a JSON object; one member is in memory at a time, and some of what follows.

    A text longer than 65,536 characters is refused where it crosses the end of a chunk.
    """
    stream = _JSONStream(path, file, chunk)
    stream.expect("{")
    keys: set[str] = set()
    after = stream.expect("}") if stream.peek() == "}" else ","
    while after == ",":
        stream.peek()
        line, key = stream.line, stream.value("the key")
        if not isinstance(key, str) or key in keys:
            text = f"be given once, got {key!r} twice" if key in keys else f"be a string, got {short(key)}"
            raise fault(path, line, "the key", text)
        keys.add(key)
        stream.expect(":")
        stream.peek()
        yield line, key, stream.value(key)
        after = stream.expect(",}")
    if stream.peek():
        raise fault(path, stream.line, "the file", f"end after one JSON object, got {stream.peek()!r}")


class _JSONStream:
    """JSON text that is read in pieces; `place` is where the part begins that is not yet used."""

    def __init__(self, path: Path, file: TextIO, chunk: int):
        self.path, self.file, self.chunk = path, file, chunk
        self.text, self.place, self.lines_before = "", 0, 0
        self.decoder = json.JSONDecoder(object_pairs_hook=_unique)

    @property
    def line(self) -> int:
        return 1 + self.lines_before + self.text.count("\n", 0, self.place)

    def read(self) -> bool:
        piece = self.file.read(max(self.chunk, len(self.text) - self.place))
        if piece:
            self.lines_before += self.text.count("\n", 0, self.place)
            self.text, self.place = self.text[self.place :] + piece, 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.text) or not self.read():
                return self.text[self.place : self.place + 1]

    def expect(self, wanted: str) -> str:
        got = self.peek()
        if not got or got not in wanted:
            text = f"have {' or '.join(wanted)} here, got {repr(got) if got else 'its end'}"
            raise fault(self.path, self.line, "the JSON object", text)
        self.place += 1
        return got

    def value(self, field: str) -> Any:
        while True:
            try:
                found, end = self.decoder.raw_decode(self.text, self.place)
                if len(self.text) - end > 2 or not self.read():  # a number may go on in the next piece: 1|e+3
                    self.place = end
                    return found
            except (ValueError, RecursionError) as refusal:
                cut = isinstance(refusal, json.JSONDecodeError) and len(self.text) - refusal.pos < 2**16
                if not (cut and self.read()):
                    raise _json_fault(self.path, 1 + self.lines_before, field, refusal) from refusal


def _json_fault(path: Path, line: int, field: str, refusal: Exception) -> ManifestError:
    """The fault of a text that begins on `line`."""
    what = f"an error: {getattr(refusal, 'msg', refusal)}"
    if isinstance(refusal, RecursionError):
        what = "the object nested too deeply"
    return fault(path, line + getattr(refusal, "lineno", 1) - 1, field, f"be valid JSON, got {what}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return row


def check_keys(
    path: Path, line: int | str, kind: str, row: Iterable[str], known: Iterable[str] | None, required: Iterable[str]
) -> None:
    """Refuse a row without a required key or, unless None are `known`, with an unknown one."""
    missing = [key for key in required if key not in row]
    for key in row if known is not None else ():
        if key not in known:
            close = difflib.get_close_matches(str(key), missing or known, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else ""
            raise fault(path, line, f"{kind}{key}", f"be one of {', '.join(known)}, got an unknown name", hint)
    if missing:
        raise fault(path, line, f"{kind}{missing[0]}", f"be given, got only {', '.join(map(str, row)) or 'nothing'}")


def check_seconds(path: Path, line: int | str, field: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
        raise fault(path, line, field, f"be a finite number of seconds >= 0, got {short(value)}")
    return float(value)


def seconds(path: Path, line: int, field: str, text: str) -> float:
    """Seconds from the text of a cell."""
    try:
        value = float(text)
    except ValueError:
        raise fault(path, line, field, f"be a number of seconds, got {short(text)}") from None
    return check_seconds(path, line, field, value)


def is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which JSON can write and no file or tokenizer can hold."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def fault(path: Path, line: int | str, field: str, text: str, hint: str = "") -> ManifestError:
    return ManifestError(f"{path}:{line}: {field} must {text}. {hint}".rstrip())


def _line_of_bad_text(path: Path) -> int:
    with _binary(path) as file:
        for line, content in enumerate(file, 1):
            try:
                content.decode()
            except UnicodeDecodeError:
                return line
    return 1
