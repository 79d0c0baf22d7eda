"""A manifest names the media files of a set: one JSONL row per file, or CSV rows, with captions and a label."""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

KEYS = ("path", "captions", "label")
CAPTION_KEYS = ("text", "start", "end")
COLUMNS = ("path", "caption", "start", "end", "label")
MAX_SECONDS = 1e9  # a caption later than this (32 years) is a wrong unit


class ManifestError(ValueError):
    """A manifest that cannot be read; the message says file, line, field and what was expected."""


@dataclass(frozen=True, slots=True)
class Caption:
    """What is said or shown between `start` and `end`, in seconds from the beginning of the file."""

    text: str
    start: float
    end: float


class Member(NamedTuple):
    """A media file as bytes of another: a member of a tar shard, read where it lies.

    `suffix` says what it is, `sha256` (hex) what its bytes are; it has `count` frames or samples, `rate` per second.
    """

    path: Path
    offset: int
    size: int
    suffix: str
    sha256: str
    count: int
    rate: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One media file of a manifest, or a part of it, or a sample of a shard.

    Args:
        index: position in the manifest, from 0.
        id: 63-bit hash of the path as the manifest writes it, the same on every machine and in every order.
        path: the file; of a shard's sample the shard and the key, `000000.tar/key`, which only names it.
        captions: in the manifest's order, in seconds of the file; may be empty.
        label: class number or name, or several class numbers (AudioSet), or None.
        line: line of the manifest, from 1.
        start, end: seconds of the file that are the sample; None: to the end of the file.
        video, audio: of a shard's sample, where its tracks lie; None without that track.
        duration: of a shard's sample, seconds.
    """

    index: int
    id: int
    path: Path
    captions: tuple[Caption, ...] = ()
    label: int | str | tuple[int, ...] | None = None
    line: int = 0
    start: float = 0.0
    end: float | None = None
    video: Member | None = None
    audio: Member | None = None
    duration: float | None = None

    @property
    def in_shard(self) -> bool:
        """Whether the tracks are members of a tar shard instead of one file at `path`."""
        return self.video is not None or self.audio is not None


def sample_id(text: str) -> int:
    """The id of a path: the first 63 bits of BLAKE2b of its UTF-8 text.

    >>> sample_id("clips/a.mp4") == sample_id("clips/a.mp4")
    True
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


def read_manifest(path: str | Path) -> list[Sample]:
    """Read a manifest of media files; relative paths in it are relative to its folder.

    JSONL, one object per line:
    `{"path": "a.mp4", "captions": [{"text": "a dog", "start": 0.0, "end": 2.5}], "label": 3}`;
    `captions` and `label` may be left out. CSV with a header: `path,caption,start,end,label`, one row per caption, the
    rows of one file together; or `path,captions,label` with the captions as JSON. In CSV an integer label is a number.
    UTF-8, with or without a byte-order mark. Files are not opened: a bad one is found when it is loaded.

    Args:
        path: the manifest, ending in .jsonl or .csv.

    Raises:
        ManifestError: with `file:line:`; an unreadable file or row, an unknown, missing or wrong field, a file that
            is named twice, no rows, or none of the named files exists.

    >>> read_manifest("clips/train.jsonl")[0].captions[0].text  # doctest: +SKIP
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_samples, ".csv": _csv_samples}
    if path.suffix.lower() not in readers:
        raise ManifestError(f"{path}: the manifest must end in .jsonl or .csv, got {path.name!r}.")
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise ManifestError(f"{path}: the manifest must be a file, got {found}. Give its full name.")
    samples: list[Sample] = []
    lines: dict[int, int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for sample in readers[path.suffix.lower()](path, file):
                first = lines.setdefault(sample.id, sample.line)
                if first != sample.line:
                    text = f"be named once, got {str(sample.path)!r} on line {first} too"
                    raise _error(path, sample.line, "path", text, "Put all its captions together in one place.")
                samples.append(sample)
    except UnicodeDecodeError as error:
        raise _error(
            path, _line_of_bad_text(path), "the text", "be UTF-8, got other bytes", "Save it as UTF-8."
        ) from error
    except OSError as error:
        raise ManifestError(f"{path}: the manifest must be readable, got {error.strerror}.") from error
    if not samples:
        raise ManifestError(f"{path}: the manifest must have at least one row, got none.")
    if not any(os.path.exists(sample.path) for sample in samples):
        text = f"must name files that exist, got none of {len(samples)} (the first is '{samples[0].path}')"
        raise ManifestError(f"{path}:{samples[0].line}: path {text}. Relative paths start at the manifest's folder.")
    return samples


def write_manifest(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write samples as a JSONL manifest; files under the manifest's folder get relative paths.

    Raises:
        ManifestError: the name does not end in .jsonl.

    >>> write_manifest("clips/train.jsonl", samples)  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise ManifestError(f"{path}: the manifest must end in .jsonl to be written, got {path.name!r}.")
    folder = path.parent.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for sample in samples:
            media = sample.path.resolve()
            row: dict[str, Any] = {
                "path": (media.relative_to(folder) if media.is_relative_to(folder) else media).as_posix()
            }
            if sample.captions:
                row["captions"] = [{"text": c.text, "start": c.start, "end": c.end} for c in sample.captions]
            if sample.label is not None:
                row["label"] = sample.label
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def _jsonl_samples(path: Path, file: Iterable[str]) -> Iterator[Sample]:
    index = 0
    for line, text in enumerate(file, 1):
        if text.isspace():
            continue
        row = _json(path, line, "the row", text)
        if not isinstance(row, dict):
            raise _error(path, line, "the row", f"be a JSON object, got {_short(row)}", "One object per line.")
        _check_keys(path, line, "", row, KEYS, required=("path",))
        captions = _captions(path, line, row.get("captions"))
        yield _sample(path, index, line, row["path"], captions, row.get("label"))
        index += 1


def _csv_samples(path: Path, file: Iterable[str]) -> Iterator[Sample]:
    """Rows of one path that follow each other are one sample."""
    index, first, name, label, captions = 0, 0, None, None, []
    for line, row in _csv_rows(path, file):
        if row["path"] == name and "captions" not in row:
            if row.get("label", "") != label:
                text = f"be the same in all rows of one path, got {row.get('label')!r} after {label!r}"
                raise _error(path, line, "label", text)
        else:
            if name is not None:
                yield _sample(path, index, first, name, tuple(captions), _csv_label(label))
                index += 1
            first, name, label, captions = line, row["path"], row.get("label", ""), []
        captions += _csv_captions(path, line, row)
    if name is not None:
        yield _sample(path, index, first, name, tuple(captions), _csv_label(label))


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(file, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            begin, line = line, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _check_header(path, begin, header)
            elif len(cells) != len(header):
                text = f"have {len(header)} cells as the header, got {len(cells)}"
                raise _error(path, begin, "the row", text, "Quote a caption that holds a comma.")
            else:
                yield begin, dict(zip(header, cells))
    except csv.Error as error:
        raise _error(path, line, "the row", f"be valid CSV, got an error: {error}") from error


def _check_header(path: Path, line: int, header: list[str]) -> None:
    known = ("path", "captions", "label") if "captions" in header else COLUMNS
    required = ("path", "caption", "start", "end") if {"caption", "start", "end"} & set(header) else ("path",)
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise _error(path, line, "the header", f"have each column once, got {twice[0]!r} twice")
    _check_keys(path, line, "column ", dict.fromkeys(header), known, required)


def _csv_captions(path: Path, line: int, row: dict[str, str]) -> tuple[Caption, ...]:
    if row.get("captions"):
        return _captions(path, line, _json(path, line, "captions", row["captions"]))
    if not (row.get("caption") or row.get("start") or row.get("end")):
        return ()
    times = {}
    for key in ("start", "end"):
        try:
            times[key] = float(row[key])
        except ValueError:
            raise _error(path, line, key, f"be a number of seconds, got {_short(row[key])}") from None
    return _captions(path, line, [{"text": row["caption"], **times}], "")


def _csv_label(cell: str | None) -> int | str | None:
    digits = (cell or "").removeprefix("-")
    return int(cell) if digits.isdecimal() and digits.isascii() and len(digits) < 19 else cell or None


def _captions(path: Path, line: int, rows: Any, prefix: str | None = None) -> tuple[Caption, ...]:
    if rows is None:
        return ()
    if not isinstance(rows, list):
        raise _error(path, line, "captions", f"be a list of objects, got {_short(rows)}")
    captions = []
    for i, row in enumerate(rows):
        where = f"captions[{i}]" if prefix is None else prefix
        if not isinstance(row, dict):
            raise _error(
                path, line, where, f"be an object, got {_short(row)}", 'Write {"text": "...", "start": 0, "end": 1}.'
            )
        where += "." if where else ""
        if row.keys() != set(CAPTION_KEYS):
            _check_keys(path, line, where, row, CAPTION_KEYS, CAPTION_KEYS)
        text, start, end = row["text"], row["start"], row["end"]
        if not isinstance(text, str) or not _is_unicode(text):
            raise _error(path, line, f"{where}text" if where else "caption", f"be text, got {_short(text)}")
        for key, value in (("start", start), ("end", end)):
            if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
                text = f"be a finite number of seconds >= 0, got {_short(value)}"
                raise _error(path, line, f"{where}{key}", text)
        if end < start:
            raise _error(path, line, f"{where}end", f"be at least start ({start}), got {end}", "Are they swapped?")
        captions.append(Caption(text, float(start), float(end)))
    return tuple(captions)


def _sample(path: Path, index: int, line: int, name: Any, captions: tuple[Caption, ...], label: Any) -> Sample:
    if not isinstance(name, str) or not name.strip() or "\0" in name or not _is_unicode(name):
        raise _error(path, line, "path", f"be the name of a file, got {_short(name)}")
    number = type(label) is int and -(2**63) <= label < 2**63
    if not (label is None or number or (isinstance(label, str) and _is_unicode(label))):
        raise _error(path, line, "label", f"be a 64-bit integer or a string, got {_short(label)}")
    return Sample(index, sample_id(name), path.parent / name, captions, label, line)


def _check_keys(path: Path, line: int, kind: str, row: dict, known: tuple[str, ...], required: tuple[str, ...]) -> None:
    missing = [key for key in required if key not in row]
    for key in row:
        if key not in known:
            close = difflib.get_close_matches(str(key), missing or known, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else ""
            text = f"be one of {', '.join(known)}, got an unknown name"
            raise _error(path, line, f"{kind}{key}", text, hint)
    if missing:
        raise _error(path, line, f"{kind}{missing[0]}", f"be given, got only {', '.join(map(str, row)) or 'nothing'}")


def _json(path: Path, line: int, field: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        what = "the object nested too deeply" if isinstance(error, RecursionError) else f"an error: {error}"
        raise _error(path, line, field, f"be valid JSON, got {what}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return row


def _is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which JSON can write and no file or tokenizer can hold."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _line_of_bad_text(path: Path) -> int:
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            try:
                content.decode()
            except UnicodeDecodeError:
                return line
    return 1


def _error(path: Path, line: int, field: str, text: str, hint: str = "") -> ManifestError:
    return ManifestError(f"{path}:{line}: {field} must {text}. {hint}".rstrip())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
