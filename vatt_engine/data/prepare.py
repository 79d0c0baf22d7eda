"""Media files to prepared shards, once: transcoded in worker processes, packed in the manifest's order, resumable.

The work of a part lies in `OUT/.work-i-of-n/`: the tracks and the record of each finished file, then, per finished tar,
its lines of the index, which commit it. Whatever is killed, the next call goes on from the records: a tar without its
lines is packed again, and a file is transcoded again only if its record is missing. The index comes last.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from vatt_engine.cpus import usable_cpus
from vatt_engine.data.encode import check_encoders
from vatt_engine.data.manifest import Sample, read_manifest
from vatt_engine.data.shards import (
    FORMAT,
    INDEX,
    ShardWriter,
    json_line,
    key_of,
    read_index,
    replace_synced,
    write_synced,
)
from vatt_engine.data.transcode import CODECS, Transcoders
from vatt_engine.lock import Lock


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How media become shards.

    Args:
        fps: frames per second, constant.
        short_side: pixels that the short side of larger frames is scaled down to.
        pixel_aspect: "stored" keeps pixels that are not square as they are, and their shape in the index; "square"
            stretches frames until they are.
        codec: "h264", "vp9" or "mjpeg".
        crf: quality, lower is better: 0 to 51 (h264), 63 (vp9), mjpeg's quantiser 1 to 31; None: 20, 28, 3.
        sample_rate: of the sound, mono, in Hz.
        shard_mib: size at which a shard is full.
        workers: processes that transcode; 0: one per CPU that may be used.
        part: "i/n", i from 0: the i-th of n equal parts of the manifest, for job arrays.
        time_limit: seconds without a sign of life after which a file is given up.
    """

    fps: float = 10.0
    short_side: int = 256
    pixel_aspect: Literal["stored", "square"] = "stored"
    codec: Literal["h264", "vp9", "mjpeg"] = "h264"
    crf: int | None = None
    sample_rate: int = 48_000
    shard_mib: int = 512
    workers: int = 0
    part: str = "0/1"
    time_limit: float = 120.0

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"PrepareConfig: codec must be one of {', '.join(CODECS)}, got {self.codec!r}.")
        if self.pixel_aspect not in ("stored", "square"):
            raise ValueError(f"PrepareConfig: pixel_aspect must be stored or square, got {self.pixel_aspect!r}.")
        worst = CODECS[self.codec].worst
        limits = {"fps": (0.1, 120), "short_side": (16, 4096), "sample_rate": (8000, 192_000), "shard_mib": (1, 65536)}
        limits |= {"workers": (0, 256), "time_limit": (1, 86_400), "crf": (0, worst)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"PrepareConfig: {name} must be in [{least}, {most}], got {value}.")
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"PrepareConfig: part must be i/n with 0 <= i < n, got {self.part!r}.")

    @property
    def place(self) -> tuple[int, int]:
        """i and n of the part."""
        i, n = self.part.split("/")
        return int(i), int(n)


def prepare(
    manifest: str | Path,
    out: str | Path,
    config: PrepareConfig = PrepareConfig(),
    *,
    progress: Callable[[int, int, int], None] | None = None,
) -> Path:
    """Transcode the files of a manifest into shards; a killed call is taken up again by the same call.

    The format is that of vatt_engine.data.shards. A file that cannot be decoded whole, or takes its worker with it, is
    rejected with its reason. The same files and settings make the same bytes.

    Args:
        manifest: .jsonl or .csv.
        out: a new folder, or that of an earlier call or of other parts.
        config: see PrepareConfig.
        progress: called with (files done, of them rejected, files in all).

    Returns:
        The index: out/index.jsonl, or out/index-i-of-n.jsonl of a part.

    Raises:
        ManifestError: as read_manifest.
        ValueError: `out` holds other work, or another process is at the same (LockedError).
        ChildProcessError: a worker cannot start or cannot write.

    >>> prepare("clips/train.jsonl", "shards")  # doctest: +SKIP
    """
    manifest, out = Path(manifest), Path(out)
    samples = read_manifest(manifest)
    settings = _settings(manifest, samples, config)
    part, parts = config.place
    samples = samples[len(samples) * part // parts : len(samples) * (part + 1) // parts]
    suffix = f"-{part}-of-{parts}" if parts > 1 else ""
    index, work = out / INDEX.replace(".", f"{suffix}."), out / f".work{suffix}"
    if index.exists():
        _check_same(index, next(read_index(index)).values, settings)
        shutil.rmtree(work, ignore_errors=True)
        return index
    out.mkdir(parents=True, exist_ok=True)
    with _claimed(work, settings):
        packer = _Packer(manifest.parent, out, work, settings)
        todo = samples[packer.row :]
        with Transcoders(config.workers or usable_cpus(), settings, work, config.time_limit) as transcoders:
            for sample, record in zip(todo, transcoders.records(todo)):
                packer.add(sample, record)
                if progress:
                    progress(packer.row, packer.totals["rejected"], len(samples))
        packer.finish(index)
        shutil.rmtree(work, ignore_errors=True)  # another call may find the index and do the same
    return index


def _settings(manifest: Path, samples: Sequence[Sample], config: PrepareConfig) -> dict[str, Any]:
    """The first line of the index, without its counts."""
    codec = CODECS[config.codec]
    check_encoders("prepare", (codec.encoder, "flac"))
    return {
        "format": FORMAT,
        "fps": float(config.fps),
        "short_side": config.short_side,
        **({} if config.pixel_aspect == "stored" else {"pixel_aspect": config.pixel_aspect}),
        "codec": config.codec,
        "crf": codec.crf if config.crf is None else config.crf,
        "gop": max(1, round(config.fps)),  # a key frame per second
        "sample_rate": config.sample_rate,
        "shard_mib": config.shard_mib,
        "manifest": manifest.name,
        "manifest_sha256": sha256(manifest.read_bytes()).hexdigest(),
        "rows": len(samples),
        "part": config.part,
    }


def _check_same(where: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    for name in dict.fromkeys((*settings, "pixel_aspect")):  # which is there only where it is not the default
        value = settings.get(name)
        if found.get(name) != value:
            text = f"prepare: {name} must be that of {where}, {found.get(name)!r}, got {value!r}."
            raise ValueError(f"{text} Choose another OUT, or remove what is there.")


@contextmanager
def _claimed(work: Path, settings: dict[str, Any]) -> Iterator[None]:
    """The work folder of these settings, for this process alone."""
    if not work.exists() and (work.parent / shard_name(settings["part"], 0)).exists():
        raise ValueError(f"prepare: OUT must not hold shards without an index, got {work.parent}. Choose another OUT.")
    with Lock(work, "vatt prepare", shown=work.parent):
        kept = work / "settings"
        if kept.exists():
            _check_same(work, json.loads(kept.read_text(encoding="utf-8")), settings)
        else:
            write_synced(kept, json.dumps(settings))
        yield


def shard_name(part: str, number: int) -> str:
    i, n = map(int, part.split("/"))
    return f"{f'{i:04}-' if n > 1 else ''}{number:06}.tar"


class _Packer:
    """Finished files into tars, in the manifest's order: `row` is the next one, behind those of committed tars."""

    def __init__(self, root: Path, out: Path, work: Path, settings: dict[str, Any]):
        self.root, self.out, self.work, self.settings = root, out, work, settings
        self.suffixes = {"video": CODECS[settings["codec"]].suffix, "audio": ".flac"}
        self.totals = {"shards": 0, "samples": 0, "rejected": 0, "seconds": 0.0}
        self.shard: ShardWriter | None = None
        self.rows: list[dict[str, Any]] = []  # of the index, since the last committed tar
        self.keys: list[str] = []
        while (lines := self._committed(self.totals["shards"])).exists():
            with lines.open(encoding="utf-8") as file:
                for line in file:
                    self._count(json.loads(line))

    @property
    def row(self) -> int:
        return self.totals["samples"] + self.totals["rejected"]

    def _committed(self, number: int) -> Path:
        return self.work / f"{shard_name(self.settings['part'], number)}.jsonl"

    def _count(self, row: dict[str, Any]) -> None:
        self.totals[{"sample": "samples", "rejected": "rejected", "shard": "shards"}[row["kind"]]] += 1
        self.totals["seconds"] += row.get("duration", 0.0)

    def add(self, sample: Sample, record: dict[str, Any]) -> None:
        """Pack the next sample of the manifest."""
        path = sample.path.relative_to(self.root) if sample.path.is_relative_to(self.root) else sample.path
        source: dict[str, Any] = {"path": path.as_posix(), "line": sample.line}
        if sample.start or sample.end is not None:
            source |= {"start": sample.start, "end": sample.end}
        if "reason" in record:
            row = {"kind": "rejected", **source, "reason": record["reason"]}
        else:
            row = {"kind": "sample", "key": key_of(sample), **source, **self._packed(sample, record)}
        self.rows.append(row)
        self.keys.append(key_of(sample))
        self._count(row)
        if self.shard and self.shard.size >= self.settings["shard_mib"] << 20:
            self._commit()

    def _packed(self, sample: Sample, record: dict[str, Any]) -> dict[str, Any]:
        name, key = shard_name(self.settings["part"], self.totals["shards"]), key_of(sample)
        self.shard = self.shard or ShardWriter(self.out / name)
        row: dict[str, Any] = {"shard": name}
        for kind, suffix in self.suffixes.items():
            row[kind] = record[kind] and self.shard.add(key + suffix, self.work / (key + suffix)) | record[kind]
        about = {"duration": record["duration"], "captions": _captions_of(sample), "label": sample.label}
        content = {name: self.settings[name] for name in ("fps", "sample_rate")} | about
        row["json"] = self.shard.add(f"{key}.json", json.dumps(content, ensure_ascii=False).encode())
        self.shard.samples += 1
        return row | about

    def _commit(self) -> None:
        row = self.shard.close()
        self.rows.append(row)
        write_synced(self._committed(self.totals["shards"]), "".join(map(json_line, self.rows)))
        self._count(row)
        for key in self.keys:
            for suffix in (".json", *self.suffixes.values()):
                (self.work / (key + suffix)).unlink(missing_ok=True)
        self.shard, self.rows, self.keys = None, [], []

    def finish(self, index: Path) -> None:
        """Commit the last tar, and write the index."""
        if self.shard:
            self._commit()
        temporary = self.work / "index"
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json_line(self.settings | self.totals))
            for number in range(self.totals["shards"]):
                file.write(self._committed(number).read_text(encoding="utf-8"))
            file.writelines(map(json_line, self.rows))  # rejected files behind the last tar
        replace_synced(temporary, index)


def _captions_of(sample: Sample) -> list[dict[str, Any]]:
    """The captions in seconds of the sample; of a part of a file those that overlap it, cut to it."""
    start, end = sample.start, math.inf if sample.end is None else sample.end
    whole = start == 0 and end == math.inf
    return [
        {"text": c.text, "start": max(c.start, start) - start, "end": min(c.end, end) - start}
        for c in sample.captions
        if whole or (c.start < end and c.end >= start)
    ]
