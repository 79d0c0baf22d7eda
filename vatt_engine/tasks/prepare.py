"""`vatt prepare MANIFEST OUT`: media files into shards that decode fast, once."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vatt_engine.data.prepare import PrepareConfig, prepare
from vatt_engine.data.shards import read_index
from vatt_engine.tasks.flags import parse_flags

SAY_EVERY = 30.0  # seconds between lines where the output is no terminal


@dataclass(frozen=True, kw_only=True)
class PrepareArguments(PrepareConfig):
    """Media files into shards: constant frame rate, small pictures, a key frame every second, FLAC beside them.

    A killed run goes on where it was when it is called again.

    Args:
        manifest: .jsonl or .csv, the media files.
        out: receives the tars and index.jsonl.
    """

    manifest: str
    out: str


class Progress:
    """Files done, rejected, per second and left, on one line of a terminal or on a line now and then."""

    def __init__(self) -> None:
        self.start = self.said = time.monotonic()
        self.first: int | None = None  # files that an earlier call had done

    def __call__(self, done: int, rejected: int, total: int) -> None:
        now, terminal = time.monotonic(), sys.stdout.isatty()
        self.first = done - 1 if self.first is None else self.first
        if now - self.said < (0.1 if terminal else SAY_EVERY) and done < total:
            return
        self.said = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((total - done) / rate))
        text = f"{done}/{total} files, {rejected} rejected, {rate:.1f} files/s, {left} left"
        print(f"\r{text}  " if terminal else text, end="" if terminal and done < total else "\n", flush=True)


def main(argv: Sequence[str]) -> int:
    given = parse_flags(PrepareArguments, argv, prog="vatt prepare", positional=("manifest", "out"))
    index = prepare(given.manifest, given.out, given, progress=Progress())
    rows = read_index(index)
    total = next(rows).values
    rejected = [row.values for row in rows if row.values.get("kind") == "rejected"]
    for row in rejected[:10]:
        print(f"rejected {row['path']}: {row['reason']}")
    if len(rejected) > 10:
        print(f"... and {len(rejected) - 10} more, in {index}")
    counts = f"{total['samples']} samples in {total['shards']} shards, {total['rejected']} files rejected"
    print(f"{index}: {counts}, {total['seconds'] / 3600:.2f} h")
    whole = given.place[1] == 1
    next_step = f"vatt pretrain CONFIG --data.train {given.out}" if whole else f"vatt data merge {Path(given.out)}"
    print(f"Next{'' if whole else ', when all parts are there'}: {next_step}")
    return 0
