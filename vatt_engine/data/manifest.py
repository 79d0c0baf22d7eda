"""A manifest names the media files of a set: one JSONL row per file, or CSV rows, with captions and a label."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from vatt_engine.data.rows import (
    ManifestError,
    check_keys,
    check_seconds,
    csv_rows,
    fault,
    is_unicode,
    opened,
    parse_json,
    seconds,
)
from vatt_engine.schema import short

__all__ = ["Caption", "ManifestError", "Member", "Sample", "read_manifest", "sample_id", "write_manifest"]

KEYS = ("path", "captions", "label", "start", "end")
CAPTION_KEYS = ("text", "start", "end")
COLUMNS = ("path", "caption", "start", "end", "label")


@dataclass(frozen=True, slots=True)
class Caption:
    """What is said or shown between `start` and `end`, in seconds from the beginning of the file."""

    text: str
    start: float
    end: float


class Member(NamedTuple):
    """A media file as bytes of another: a member of a tar shard, read where it lies.

    `suffix` says what it is, `sha256` (hex) what its bytes are; it has `count` frames or samples, `rate` per second.
    Pixels are `aspect` times as wide as high. Of sound, `heard` are the stretches (first, behind the last sample) that
    the source had; the rest is silence that was put in. None: all of it.
    """

    path: Path
    offset: int
    size: int
    suffix: str
    sha256: str
    count: int
    rate: float
    aspect: float = 1.0
    heard: tuple[tuple[int, int], ...] | None = None

    def heard_within(self, start: float, num_samples: int, sample_rate: int) -> tuple[tuple[int, int], ...]:
        """The stretches that lie in a window from second `start` on, in samples of the window.

        >>> Member(Path("a.tar"), 512, 9, ".flac", "", 100, 10.0, heard=((50, 80),)).heard_within(1.0, 60, 10)
        ((40, 60),)
        """
        places = [[round((one / self.rate - start) * sample_rate) for one in span] for span in self.heard or ()]
        spans = ((max(first, 0), min(end, num_samples)) for first, end in places)
        return tuple((first, end) for first, end in spans if first < end)


@dataclass(frozen=True, slots=True)
class Sample:
    """One media file of a manifest, or a part of it, or a sample of a shard.

    Args:
        index: position in the manifest, from 0.
        id: 63-bit hash of the path as the manifest writes it, of a part of a file with `#start-end` behind it; the
            same on every machine and in every order.
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
    `captions` and `label` may be left out, and a label may be a list of class numbers. `start` and `end`, in seconds of
    the file, make a part of it the sample; one file may be named for several parts.
    CSV with a header: `path,caption,start,end,label`, one row per caption (its times), the rows of one file together;
    or `path,captions,label` with the captions as JSON. In CSV an integer label is a number; it knows neither parts of
    files nor several classes. UTF-8, with or without a byte-order mark. Files are not opened: a bad one is found when
    it is loaded.

    Args:
        path: the manifest, ending in .jsonl or .csv.

    Raises:
        ManifestError: with `file:line:`; an unreadable file or row, an unknown, missing or wrong field, a file or a
            part that is named twice, no rows, or none of the named files exists.

    >>> read_manifest("clips/train.jsonl")[0].captions[0].text  # doctest: +SKIP
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_samples, ".csv": _csv_samples}
    if path.suffix.lower() not in readers:
        raise ManifestError(f"{path}: the manifest must end in .jsonl or .csv, got {path.name!r}.")
    samples: list[Sample] = []
    lines: dict[int, int] = {}
    with opened(path, "the manifest") as file:
        for sample in readers[path.suffix.lower()](path, file):
            first = lines.setdefault(sample.id, sample.line)
            if first != sample.line:
                whole = (sample.start, sample.end) == (0, None)
                part = "" if whole else f" from {sample.start:g} s"
                text = f"be named once, got {str(sample.path)!r}{part} on line {first} too"
                raise fault(path, sample.line, "path", text, "Put all its captions together in one place.")
            samples.append(sample)
    if not samples:
        raise ManifestError(f"{path}: the manifest must have at least one row, got none.")
    if not any(os.path.exists(sample.path) for sample in samples):
        text = f"name files that exist, got none of {len(samples)} (the first is '{samples[0].path}')"
        raise fault(path, samples[0].line, "path", text, "Relative paths start at the manifest's folder.")
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
    folder = path.parent.absolute()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for sample in samples:
                file.write(json.dumps(_row(folder, sample), ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _row(folder: Path, sample: Sample) -> dict[str, Any]:
    media = sample.path.absolute()
    row: dict[str, Any] = {"path": (media.relative_to(folder) if media.is_relative_to(folder) else media).as_posix()}
    if sample.start:
        row["start"] = sample.start
    if sample.end is not None:
        row["end"] = sample.end
    if sample.captions:
        row["captions"] = [{"text": c.text, "start": c.start, "end": c.end} for c in sample.captions]
    if sample.label is not None:
        row["label"] = sample.label
    return row


def _jsonl_samples(path: Path, file: TextIO) -> Iterator[Sample]:
    index = 0
    for line, text in enumerate(file, 1):
        if text.isspace():
            continue
        row = parse_json(path, line, "the row", text.rstrip())
        if not isinstance(row, dict):
            raise fault(path, line, "the row", f"be a JSON object, got {short(row)}", "One object per line.")
        check_keys(path, line, "", row, KEYS, required=("path",))
        captions = checked_captions(path, line, row.get("captions"))
        yield _sample(path, index, line, row["path"], captions, row.get("label"), row.get("start"), row.get("end"))
        index += 1


def _csv_samples(path: Path, file: Iterable[str]) -> Iterator[Sample]:
    """Rows of one path that follow each other are one sample."""
    index, first, name, label, captions = 0, 0, None, None, []
    for line, row in _csv_rows(path, file):
        if row["path"] == name and "captions" not in row:
            if row.get("label", "") != label:
                text = f"be the same in all rows of one path, got {row.get('label')!r} after {label!r}"
                raise fault(path, line, "label", text)
        else:
            if name is not None:
                yield _sample(path, index, first, name, tuple(captions), _csv_label(label))
                index += 1
            first, name, label, captions = line, row["path"], row.get("label", ""), []
        captions += _csv_captions(path, line, row)
    if name is not None:
        yield _sample(path, index, first, name, tuple(captions), _csv_label(label))


def _csv_rows(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, str]]]:
    rows = csv_rows(path, file)
    line, header = next(rows, (1, dict.fromkeys(COLUMNS)))
    known = ("path", "captions", "label") if "captions" in header else COLUMNS
    required = ("path", "caption", "start", "end") if {"caption", "start", "end"} & set(header) else ("path",)
    check_keys(path, line, "column ", header, known, required)
    yield from rows


def _csv_captions(path: Path, line: int, row: dict[str, str]) -> tuple[Caption, ...]:
    if row.get("captions"):
        return checked_captions(path, line, parse_json(path, line, "captions", row["captions"]))
    if not (row.get("caption") or row.get("start") or row.get("end")):
        return ()
    start, end = (seconds(path, line, key, row[key]) for key in ("start", "end"))
    return (checked_caption(path, line, "", row["caption"], start, end),)


def _csv_label(cell: str | None) -> int | str | None:
    digits = (cell or "").removeprefix("-")
    return int(cell) if digits.isdecimal() and digits.isascii() and len(digits) < 19 else cell or None


def checked_captions(path: Path, line: int, rows: Any) -> tuple[Caption, ...]:
    if rows is None:
        return ()
    if not isinstance(rows, list):
        raise fault(path, line, "captions", f"be a list of objects, got {short(rows)}")
    captions = []
    for i, row in enumerate(rows):
        where = f"captions[{i}]"
        if not isinstance(row, dict):
            hint = 'Write {"text": "...", "start": 0, "end": 1}.'
            raise fault(path, line, where, f"be an object, got {short(row)}", hint)
        if row.keys() != set(CAPTION_KEYS):
            check_keys(path, line, f"{where}.", row, CAPTION_KEYS, CAPTION_KEYS)
        captions.append(checked_caption(path, line, f"{where}.", row["text"], row["start"], row["end"]))
    return tuple(captions)


def checked_caption(path: Path, line: int | str, where: str, text: Any, start: Any, end: Any) -> Caption:
    """A caption whose text is text and whose times are seconds in order; `where` stands before a field's name."""
    if not isinstance(text, str) or not is_unicode(text):
        raise fault(path, line, f"{where}text" if where else "caption", f"be text, got {short(text)}")
    start, end = (check_seconds(path, line, where + key, value) for key, value in (("start", start), ("end", end)))
    if end < start:
        raise fault(path, line, f"{where}end", f"be at least start ({start:g}), got {end:g}", "Are they swapped?")
    return Caption(text, start, end)


def _sample(
    path: Path,
    index: int,
    line: int,
    name: Any,
    captions: tuple[Caption, ...],
    label: Any,
    start: Any = None,
    end: Any = None,
) -> Sample:
    if not isinstance(name, str) or not name.strip() or "\0" in name or not is_unicode(name):
        raise fault(path, line, "path", f"be the name of a file, got {short(name)}")
    start = 0.0 if start is None else check_seconds(path, line, "start", start)
    end = None if end is None else check_seconds(path, line, "end", end)
    if end is not None and end <= start:
        raise fault(path, line, "end", f"be later than start ({start:g}), got {end:g}", "Are they swapped?")
    part = "" if (start, end) == (0, None) else f"#{start}-{'' if end is None else end}"
    label = checked_label(path, line, label)
    return Sample(index, sample_id(name + part), path.parent / name, captions, label, line, start, end)


def checked_label(path: Path, line: int, label: Any) -> int | str | tuple[int, ...] | None:
    if isinstance(label, list):
        if all(type(number) is int and 0 <= number < 2**63 for number in label) and len(set(label)) == len(label):
            return tuple(label)
    elif type(label) is int:
        if -(2**63) <= label < 2**63:
            return label
    elif label is None or (isinstance(label, str) and is_unicode(label)):
        return label
    text = "be a 64-bit integer, a string or a list of different class numbers >= 0"
    raise fault(path, line, "label", f"{text}, got {short(label)}")
