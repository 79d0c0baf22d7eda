"""`vatt data check MANIFEST|SHARDS`: decodes a whole set, and says what of it can be used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vatt_engine.analysis.report import table
from vatt_engine.cpus import usable_cpus
from vatt_engine.data.config import DataConfig
from vatt_engine.data.manifest import Sample, write_manifest
from vatt_engine.data.media import MediaError
from vatt_engine.data.shards import INDEX, json_line, key_of, read_index, read_samples, write_synced
from vatt_engine.data.workers import Workers
from vatt_engine.schema import ConfigError, PathText
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.progress import Progress
from vatt_engine.tasks.results import check_writable

PART_SECONDS = 10.0  # decoded at a time: long files need no more memory than short ones
AT_ONCE = 1_000  # samples


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Decode every sample from its first second to its last, in processes that may be killed.

    Ends with 0 where all can be used, with 1 where some cannot.

    Args:
        data: a manifest (.jsonl, .csv) or prepared shards (a folder, its index, or tars by pattern).
        out: receives the usable samples as a manifest; of shards as an index, which must lie beside theirs.
        num_workers: processes that decode; 0: as many as CPUs may be used.
        max_decode_seconds: limit of time for ten seconds of a sample.
    """

    data: PathText
    out: PathText | None = None
    num_workers: int = 0
    max_decode_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.out is not None and not self.out.endswith(".jsonl"):
            raise ValueError(f"CheckConfig: out must end in .jsonl, got {self.out!r}.")


def main(argv: Sequence[str]) -> int:
    config = parse_flags(CheckConfig, argv, prog="vatt data check", positional=("data",))
    workers = config.num_workers or usable_cpus()
    form = DataConfig(num_workers=workers, max_decode_seconds=config.max_decode_seconds)
    samples = read_samples(config.data)
    index = _index_of(config, samples)
    if config.out is not None:
        check_writable(Path(config.out).parent, "vatt data check")
    usable, reasons, num_noted, progress, of_set = [], Counter(), 0, Progress(), Counter()
    for sample, fault, note, set_note in check(samples, form):
        if fault:
            print(f"unusable {sample.path}: {fault}")
            reasons[fault.partition(", got ")[0]] += 1
        else:
            usable.append(sample)
        if note:
            print(f"noted {sample.path}: {note}")
        if set_note:
            if set_note not in of_set:
                print(f"noted once for the set, first in {sample.path}: {set_note}")
            of_set[set_note] += 1
        num_noted += bool(note or set_note)
        progress(len(usable) + reasons.total(), reasons.total(), len(samples))
    if reasons:
        print(table([{"reason": reason, "samples": count} for reason, count in reasons.most_common()]))
    for set_note, count in of_set.items():
        print(f"{count} samples: {set_note}")
    print(f"{config.data}: {len(usable)} of {len(samples)} samples can be used, {num_noted} of them with a note")
    if config.out is not None and usable:
        _write(Path(config.out), usable, index)
        print(f"{config.out}: the usable ones, content {content_hash(usable)}")
    return 1 if reasons else 0


def check(samples: Sequence[Sample], config: DataConfig) -> Iterator[tuple[Sample, str, str, str]]:
    """(sample, why it cannot be used, what is odd about it, what is odd and probably is so in the set), or "" for each.

    They come in the set's order.

    Args:
        samples: of any kind.
        config: at which rates and sizes they are decoded, within which limits, by how many processes.

    >>> list(check(read_samples("a.jsonl"), DataConfig(num_workers=2)))  # doctest: +SKIP
    """

    def checked(sample: Sample) -> tuple[Sample, str, str, str]:
        start, notes, set_note = sample.start, {}, ""
        try:
            while start is not None:
                start, note, set_note = workers.check(sample, start, PART_SECONDS)
                notes[note] = None
        except MediaError as error:
            return sample, error.reason, "", ""
        return sample, "", " ".join(filter(None, notes)), set_note

    with closing(Workers(config, train=False)) as workers, ThreadPoolExecutor(config.num_workers) as threads:
        for begin in range(0, len(samples), AT_ONCE):
            yield from threads.map(checked, samples[begin : begin + AT_ONCE])


def content_hash(samples: Sequence[Sample]) -> str:
    """SHA-256 of one line per sample, its id in 16 hex digits, a space and its size in bytes, in the set's order.

    >>> content_hash([])[:8]
    'e3b0c442'
    """
    digest = sha256()
    for sample in samples:
        members = [member for member in (sample.video, sample.audio) if member is not None]
        size = sum(member.size for member in members) if members else os.path.getsize(sample.path)
        digest.update(f"{sample.id:016x} {size}\n".encode())
    return digest.hexdigest()


def _index_of(config: CheckConfig, samples: Sequence[Sample]) -> Path | None:
    """The index of shards, or None for a manifest; refuses an `out` from which the tars would not be found."""
    if not samples[0].in_shard:
        return None
    path = Path(config.data)
    index = path / INDEX if path.is_dir() else path.with_name(INDEX) if path.suffix == ".tar" else path
    if config.out is not None and Path(config.out).parent.resolve() != index.parent.resolve():
        raise ConfigError(f"vatt data check: --out must lie in {index.parent}, beside the tars, got {config.out!r}.")
    return index


def _write(out: Path, usable: Sequence[Sample], index: Path | None) -> None:
    if index is None:
        write_manifest(out, usable)
        return
    keys = {key_of(sample) for sample in usable}
    header, *rows = (row.values for row in read_index(index))
    kept = [row for row in rows if row.get("kind") != "sample" or row["key"] in keys]
    write_synced(out, "".join(map(json_line, [header | {"samples": len(usable)}, *kept])))
