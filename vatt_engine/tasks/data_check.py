"""`vatt data check MANIFEST|SHARDS`: decodes a whole set, and says what of it can be used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from vatt_engine.analysis.report import table
from vatt_engine.cpus import usable_cpus
from vatt_engine.data.clips import NO_PICTURE
from vatt_engine.data.config import DataConfig
from vatt_engine.data.manifest import Sample, write_manifest
from vatt_engine.data.media import MediaError
from vatt_engine.data.shards import INDEX, json_line, key_of, read_index, read_samples, write_synced
from vatt_engine.data.workers import Workers
from vatt_engine.refusals import Refusals
from vatt_engine.schema import ConfigError, PathText
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.progress import Progress
from vatt_engine.tasks.results import check_writable

PART_SECONDS = 10.0  # decoded at a time: long files need no more memory than short ones
AT_ONCE = 1_000  # samples
LOOKED_AT = 20  # samples that tell whether a set is sound alone
Checked = tuple[Sample, str, str, str]
NOT_LOADED = {"video": {"num_samples": 0}, "audio": {"num_frames": 0}, "both": {}}  # modality -> what it does without


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Decode every sample from its first second to its last, in processes that may be killed.

    Ends with 0 where all can be used, with 1 where some cannot.

    Args:
        data: a manifest (.jsonl, .csv) or prepared shards (a folder, its index, or tars by pattern).
        out: receives the usable samples as a manifest; of shards as an index, which must lie beside theirs.
        modality: what the samples will be used for: "video", pictures alone; "audio", sound alone; "both", as
            pre-training does: there must be a picture, and sound where there is some is decoded too; "auto": "audio"
            where the first files have no picture, else "both".
        num_workers: processes that decode; 0: as many as CPUs may be used.
        max_decode_seconds: limit of time for ten seconds of a sample.
    """

    data: PathText
    out: PathText | None = None
    modality: Literal["auto", "video", "audio", "both"] = "auto"
    num_workers: int = 0
    max_decode_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.out is not None and not self.out.endswith(".jsonl"):
            raise ValueError(f"CheckConfig: out must end in .jsonl, got {self.out!r}.")


def main(argv: Sequence[str]) -> int:
    config = parse_flags(CheckConfig, argv, prog="vatt data check", positional=("data",))
    workers = config.num_workers or usable_cpus()
    form = DataConfig(num_workers=workers, max_decode_seconds=config.max_decode_seconds)
    refusals = Refusals()
    samples = refusals.of(read_samples, config.data)
    if config.out is not None and not Path(config.out).parent.is_dir():
        refusals.add(f"vatt data check: --out must lie in a folder that exists, got {config.out!r}.")
    refusals.settle()
    index = _index_of(config, samples)
    if config.out is not None:
        check_writable(Path(config.out).parent, "vatt data check")
    results = checked_for(config.modality, samples, form)
    usable, reasons, num_noted, progress, of_set = [], Counter(), 0, Progress(), Counter()
    for sample, fault, note, set_note in results:
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


def checked_for(modality: str, samples: Sequence[Sample], config: DataConfig) -> Iterator[Checked]:
    """What `check` finds about samples that will be used for a modality.

    Args:
        modality: see CheckConfig; "auto" says on the output that it has chosen "audio".
        samples, config: see check.
    """
    if modality != "auto":
        return check(samples, replace(config, **NOT_LOADED[modality]))
    results = check(samples, config)
    first = list(islice(results, LOOKED_AT))
    faults = [fault for _, fault, _, _ in first]
    if "" in faults or NO_PICTURE not in faults:
        return chain(first, results)
    results.close()
    print(f"sound alone: none of the first {len(first)} samples has a picture (--modality both asks for one)")
    return check(samples, replace(config, **NOT_LOADED["audio"]))


def check(samples: Sequence[Sample], config: DataConfig) -> Iterator[Checked]:
    """(sample, why it cannot be used, what is odd about it, what is odd and probably is so in the set), or "" for each.

    They come in the set's order.

    Args:
        samples: of any kind.
        config: at which rates and sizes they are decoded, within which limits, by how many processes.

    >>> list(check(read_samples("a.jsonl"), DataConfig(num_workers=2)))  # doctest: +SKIP
    """

    def checked(sample: Sample) -> Checked:
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
