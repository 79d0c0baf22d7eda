"""Prepared shards: tars of transcoded tracks, read in place, and an index that says where each one lies.

A folder holds `000000.tar`, `000001.tar`, ... (uncompressed, WebDataset's layout) and `index.jsonl`. The members of a
sample are `<key>.mp4` (H.264), `<key>.webm` (VP9) or `<key>.avi` (MJPEG), `<key>.flac` and `<key>.json`; the key is the
sample's id as 16 hex digits. Frame i is the picture on screen at i / fps and sample j of the sound, mono, is heard at
j / sample_rate, of the same second 0. The index has one JSON object per line:

    {"format": "vatt_engine shards 1", "fps": 10.0, "short_side": 256, "codec": "h264", "crf": 20, "gop": 10,
     "sample_rate": 48000, "shard_mib": 512, "manifest": name, "manifest_sha256": ..., "rows": N, "part": "0/1",
     "shards": ..., "samples": ..., "rejected": ..., "seconds": ...}
    {"kind": "sample", "key": ..., "path": source, "line": of the manifest, "shard": "000000.tar",
     "video": {"name", "offset", "size", "sha256", "frames", "width", "height", "aspect"} or null,
     "audio": {"name", "offset", "size", "sha256", "samples", "heard"} or null,
     "json": {"name", "offset", "size", "sha256"},
     "duration": of the source in seconds, "captions": [{"text", "start", "end"}], "label": ...}
    {"kind": "rejected", "path": source, "line": of the manifest, "reason": ...}
    {"kind": "shard", "name": "000000.tar", "size": ..., "sha256": ..., "samples": ...}

Offset and size are those of the member's content in its tar, in bytes. Samples stand in the manifest's order; "path"
is followed by "start" and "end" where the sample is a part of its source. "aspect", the width of a pixel by its height,
is there where that is not 1; "heard", a list of [first sample, one behind the last], where the source has sound in
parts of the track alone and the rest is silence that was put in. A shard's name may lead into a folder. The
sound ends where the source's does and never after the last frame; a clip begins at a frame: the one on screen at its
start, floor((start + 1 ms) * fps) / fps, for picture and sound.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from hashlib import sha256
from itertools import chain, product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vatt_engine.data.manifest import Member, Sample, checked_captions, checked_label, read_manifest
from vatt_engine.data.rows import ManifestError, fault, opened, parse_json
from vatt_engine.data.streams import MEMBER_SUFFIXES
from vatt_engine.schema import short

FORMAT = "vatt_engine shards 1"
INDEX = "index.jsonl"
TOTALS = {"shards": int, "samples": int, "rejected": int, "seconds": float}  # the first line's; the rest are settings
_BLOCK = 512
_UNITS = {"video": "frames", "audio": "samples"}


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a manifest (.jsonl, .csv) or of prepared shards (a folder, its index.jsonl, or tars by pattern).

    Raises:
        ManifestError: as read_manifest and read_shards.

    >>> read_samples("shards/{000000..000099}.tar")  # doctest: +SKIP
    """
    path = Path(path)
    if path.is_dir() or path.name.endswith(".tar") or (path.suffix == ".jsonl" and is_index(path)):
        return read_shards(path)
    return read_manifest(path)


def read_shards(path: str | Path) -> list[Sample]:
    """Read the index of prepared shards; no tar is opened, and nothing is ever extracted.

    Args:
        path: the folder, its index.jsonl, or tars beside it: `shards/{000000..000099}.tar`, `shards/0000*.tar`.

    Returns:
        Samples in the manifest's order, with its ids; `path` is `shard/key`, `line` the index's.

    Raises:
        ManifestError: with `file:line:`; an unreadable or cut index, a wrong field, a name that leads out of the folder
            or has no allowed suffix, a member outside its tar, a tar that is missing, a sample that is there twice.

    >>> read_shards("shards")[0].video.offset  # doctest: +SKIP
    """
    path = Path(path)
    index, names = (path / INDEX, None) if path.is_dir() else (path, None)
    if path.name.endswith(".tar"):
        index, names = path.parent / INDEX, _expanded(path.name)
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    sizes: dict[str, int] = {}
    count, rates = 0, {}
    for row in read_index(index):
        if row.line == 1:
            count, rates = row.values["samples"], _rates(row)
        if row.values.get("kind") != "sample":
            continue
        count -= 1
        shard = _shard_of(row)
        if names is not None and not any(fnmatchcase(shard, name) for name in names):
            continue
        sample = _sample(row, shard, len(samples), sizes, rates)
        first = lines.setdefault(row.values["key"], row.line)
        if first != row.line:
            raise row.error("key", f"be there once, got {row.values['key']} on line {first} too")
        samples.append(sample)
    if count:
        raise ManifestError(f"{index}: the index must hold the samples its first line counts, {count} are missing.")
    for name in names or ():
        if not any(fnmatchcase(shard, name) for shard in sizes):
            raise ManifestError(f"{path}: each tar must be in {index} with a sample, got {name}, which is not.")
    if not samples:
        raise ManifestError(f"{index}: the index must have at least one sample, got none.")
    return samples


def is_index(path: Path) -> bool:
    """Whether a .jsonl file begins as an index of shards does."""
    try:
        with path.open("rb") as file:
            return FORMAT.rpartition(" ")[0].encode() in file.read(64)
    except OSError:
        return False


def merge_shards(out: str | Path, folders: Sequence[str | Path] = ()) -> Path:
    """Join the indexes of all parts that `vatt prepare --part i/n` made into out/index.jsonl; no tar is moved.

    Args:
        out: the folder that holds the parts.
        folders: below it, with an index each; none: the parts' indexes are in `out` itself.

    Raises:
        ManifestError: an index is wrong, or a sample is in two of them.
        ValueError: a part is missing, is there twice, was made with other settings or lies elsewhere.

    >>> merge_shards("shards")  # doctest: +SKIP
    """
    out = Path(out)
    found = [index for folder in folders or [out] for index in sorted(Path(folder).glob("index*-of-*.jsonl"))]
    if not found:
        raise ValueError(f"merge: {out} must hold indexes of parts, index-i-of-n.jsonl, got none.")
    headers = {index: next(read_index(index)) for index in found}
    first, count = headers[found[0]].values, int(found[0].stem.rpartition("-")[2])
    parts: dict[str, list[Path]] = {f"{part}/{count}": [] for part in range(count)}
    for index, header in headers.items():
        for name in sorted((first.keys() | header.values.keys()) - {"part", *TOTALS}):
            value = header.values.get(name)
            if value != first.get(name):
                text = f"be {first.get(name)!r} as in {found[0]}, got {value!r}. Prepare all parts with the same flags"
                raise header.error(name, text)
        if not index.is_relative_to(out):
            raise ValueError(f"merge: a part must lie in {out}, got {index}.")
        parts[header.get("part", str, parts.__contains__, f"be one of {count}")].append(index)
    for part, indexes in parts.items():
        if len(indexes) != 1:
            raise ValueError(f"merge: part {part} must be there once, got {' and '.join(map(str, indexes)) or 'none'}.")
    totals = {
        name: sum(header.get(name, kind, _is_count, "be a count") for header in headers.values())
        for name, kind in TOTALS.items()
    }
    temporary, keys = out / f".{INDEX}.tmp", {}
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(json_line(first | {"part": "0/1"} | totals))
        for row in chain.from_iterable(read_index(indexes[0]) for indexes in parts.values()):
            prefix, names = row.index.parent.relative_to(out), {"shard", "name"} & row.values.keys()
            tars = {name: (prefix / _shard_of(row, name)).as_posix() for name in names}
            place = f"{row.index}:{row.line}"
            if "key" in row.values and keys.setdefault(key := _key_of(row), place) != place:
                raise row.error("key", f"be in one part, got {keys[key]} too")
            if row.line > 1:
                file.write(json_line(row.values | tars))
    read_shards(temporary)
    replace_synced(temporary, out / INDEX)
    return out / INDEX


class Row(NamedTuple):
    """One line of an index, or an object in it; `get` refuses what is not there, with file and line."""

    index: Path
    line: int
    values: dict[str, Any]
    prefix: str = ""

    def get(self, name: str, kind: type, valid: Callable[[Any], object], expectation: str) -> Any:
        value = self.values.get(name)
        if type(value) is not kind or not valid(value):
            raise self.error(name, f"{expectation}, got {short(value)}")
        return value

    def error(self, name: str, text: str) -> ManifestError:
        return fault(self.index, self.line, self.prefix + name, text)


def read_index(index: Path) -> Iterator[Row]:
    """Each row of an index, the header first.

    Raises:
        ManifestError: not an index, or no JSON object on a line.
    """
    line = 0
    with opened(index, "the index") as file:
        for line, text in enumerate(file, 1):
            row = Row(index, line, parse_json(index, line, "the row", text))
            if not isinstance(row.values, dict):
                raise row.error("the row", f"be a JSON object, got {short(row.values)}")
            if line == 1:
                row.get("format", str, lambda value: value == FORMAT, f"be {FORMAT!r}")
                row.get("samples", int, _is_count, "be a count")
            yield row
        if not line:
            raise ManifestError(f"{index}: the index must begin with a line of settings, got an empty file.")


def _rates(header: Row) -> dict[str, float]:
    """Frames and samples per second."""
    fps = header.get("fps", float, lambda v: 0 < v < math.inf, "be a number above 0")
    return {"video": fps, "audio": float(header.get("sample_rate", int, lambda v: v > 0, "be a count above 0"))}


def _sample(row: Row, shard: str, position: int, sizes: dict[str, int], rates: dict[str, float]) -> Sample:
    key = _key_of(row)
    tar = row.index.parent / shard
    if shard not in sizes:
        try:
            sizes[shard] = os.path.getsize(tar)
        except OSError as error:
            raise row.error("shard", f"be a readable file, got {shard}: {error.strerror}") from error
    members = {}
    for kind, suffixes in MEMBER_SUFFIXES.items():
        if row.values.get(kind) is not None:
            within = Row(row.index, row.line, row.get(kind, dict, bool, "be an object"), f"{kind}.")
            names = [key + suffix for suffix in suffixes]
            name = within.get("name", str, names.__contains__, f"be {' or '.join(names)}")
            offset = within.get("offset", int, lambda v: v > 0 and v % _BLOCK == 0, "be a positive multiple of 512")
            size = within.get("size", int, _is_count, "be a count of bytes")
            if offset + size > sizes[shard]:
                raise within.error("size", f"end in {shard} of {sizes[shard]} bytes, got {offset} + {size}")
            digest = within.get("sha256", str, lambda v: bool(re.fullmatch("[0-9a-f]{64}", v)), "be 64 hex digits")
            length = within.get(_UNITS[kind], int, lambda v: v > 0, "be a count above 0")
            about = (digest, length, rates[kind], _aspect(within), _heard(within))
            members[kind] = Member(tar, offset, size, name[len(key) :], *about)
    if not members:
        raise row.error("video", "be given where audio is not, got neither")
    duration = row.get("duration", float, lambda v: 0 < v < math.inf, "be seconds above 0")
    captions = checked_captions(row.index, row.line, row.values.get("captions"))
    label = checked_label(row.index, row.line, row.values.get("label"))
    return Sample(position, int(key, 16), tar / key, captions, label, row.line, duration=duration, **members)


def _aspect(within: Row) -> float:
    if "aspect" not in within.values:
        return 1.0
    return within.get("aspect", float, lambda value: 0 < value < math.inf, "be a number above 0")


def _heard(within: Row) -> tuple[tuple[int, int], ...] | None:
    def valid(spans: list) -> bool:
        pairs = all(type(span) is list and len(span) == 2 and all(type(one) is int for one in span) for span in spans)
        return pairs and all(0 <= first < end for first, end in spans)

    if "heard" not in within.values:
        return None
    return tuple(map(tuple, within.get("heard", list, valid, "be pairs of rising sample numbers")))


def key_of(sample: Sample) -> str:
    """What the members of a sample are called, without their suffix."""
    return f"{sample.id:016x}"


def _key_of(row: Row) -> str:
    return row.get("key", str, re.compile("[0-7][0-9a-f]{15}").fullmatch, "be 16 hex digits of 63 bits")


def _shard_of(row: Row, name: str = "shard") -> str:
    """The name of a tar in the folder of the index or below it."""

    def valid(shard: str) -> bool:
        parts = PurePosixPath(shard).parts
        return shard.endswith(".tar") and "\0" not in shard and parts[0] != "/" and ".." not in parts

    return row.get(name, str, valid, "name a .tar in the index's folder")


def _is_count(value: float) -> bool:
    return value >= 0


def _expanded(name: str) -> list[str]:
    """The names that {000..099} stands for; * ? [] are left to fnmatch."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", name)
    spans = [range(int(a), int(b) + 1) for a, b in zip(parts[1::3], parts[2::3])]
    widths = [len(a) for a in parts[1::3]]
    return [
        "".join(f"{text}{number:0{width}}" for text, number, width in zip(parts[::3], numbers, widths)) + parts[-1]
        for numbers in product(*spans)
    ]


class ShardWriter:
    """One tar, whole or not at all: a temporary file until `close`. The same members make the same bytes.

    >>> shard = ShardWriter(Path("000000.tar"))
    >>> entry = shard.add("00000000000000ff.json", b"{}")
    >>> entry["offset"], entry["size"], shard.close()["size"]
    (512, 2, 10240)
    """

    def __init__(self, path: Path):
        self.path, self.size, self.samples = path, 0, 0
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = self._temporary.open("wb")
        self._sha256 = sha256()

    def add(self, name: str, content: bytes | Path) -> dict[str, Any]:
        """Append a member; its name, offset, size and SHA-256."""
        size = len(content) if isinstance(content, bytes) else os.path.getsize(content)
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset, digest = self.size, sha256()
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                self._write(block)
        self._write(bytes(-size % _BLOCK))
        return {"name": name, "offset": offset, "size": size, "sha256": digest.hexdigest()}

    def close(self) -> dict[str, Any]:
        """End the tar and give it its name; its line of the index."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self._file.close()
        replace_synced(self._temporary, self.path)
        digest = self._sha256.hexdigest()
        return {"kind": "shard", "name": self.path.name, "size": self.size, "sha256": digest, "samples": self.samples}

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.size += len(content)


def replace_synced(temporary: Path, path: Path) -> None:
    """Give a finished file its name: after this, neither a kill nor a power cut leaves half of it."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_synced(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    replace_synced(temporary, path)


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
