"""`vatt prepare MANIFEST OUT`: media files into shards that decode fast, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vatt_engine.data.prepare import PrepareConfig, prepare
from vatt_engine.data.shards import read_index
from vatt_engine.schema import PathText
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.progress import Progress
from vatt_engine.tasks.results import check_writable


@dataclass(frozen=True, kw_only=True)
class PrepareArguments(PrepareConfig):
    """Media files into shards: constant frame rate, small pictures, a key frame every second, FLAC beside them.

    A killed run goes on where it was when it is called again.

    Args:
        manifest: .jsonl or .csv, the media files.
        out: receives the tars and index.jsonl.
    """

    manifest: PathText
    out: PathText


def main(argv: Sequence[str]) -> int:
    given = parse_flags(PrepareArguments, argv, prog="vatt prepare", positional=("manifest", "out"))
    check_writable(given.out, "vatt prepare", "Name another OUT.")
    index = prepare(given.manifest, given.out, given, progress=Progress())
    rows = read_index(index)
    total = next(rows).values
    rejected, num_oblong, pictures = [], 0, False
    for row in rows:
        if row.values.get("kind") == "rejected":
            rejected.append(row.values)
        num_oblong += "aspect" in (row.values.get("video") or {})
        pictures = pictures or row.values.get("video") is not None
    for row in rejected[:10]:
        print(f"rejected {row['path']}: {row['reason']}")
    if len(rejected) > 10:
        print(f"... and {len(rejected) - 10} more, in {index}")
    if num_oblong:
        hint = "--pixel-aspect square stretches them; so does data.pixel_aspect where the shards are read."
        print(f"{num_oblong} samples have pixels that are not square, which are kept as stored. {hint}")
    counts = f"{total['samples']} samples in {total['shards']} shards, {total['rejected']} files rejected"
    print(f"{index}: {counts}, {total['seconds'] / 3600:.2f} h")
    if total["samples"]:
        print(_next_step(given, pictures))
    return 0


def _next_step(given: PrepareArguments, pictures: bool) -> str:
    """What to call next: sounds without a picture are nothing to pre-train on."""
    if given.place[1] > 1:
        return f"Next, when all parts are there: vatt data merge {Path(given.out)}"
    if pictures:
        return f"Next: vatt pretrain CONFIG --data.train {given.out}"
    return f"Next: vatt finetune CONFIG --data.train {given.out} (sound alone: vatt pretrain needs pictures)"
