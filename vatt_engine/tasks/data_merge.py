"""`vatt data merge OUT [FOLDER ...]`: one index for the parts of a prepared set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vatt_engine.data.shards import merge_shards, read_index
from vatt_engine.schema import PathText
from vatt_engine.tasks.flags import parse_flags


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """One index for the parts that `vatt prepare --part i/n` made; the tars stay where they are.

    Args:
        out: the folder that holds the parts; receives index.jsonl.
        folders: those below it that hold an index each; none: the indexes are in `out` itself.
    """

    out: PathText
    folders: tuple[PathText, ...] = ()


def main(argv: Sequence[str]) -> int:
    words = list(argv)
    more = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    flags = ["--folders", *words[1:more]] if more > 1 else []
    config = parse_flags(MergeConfig, words[:1] + flags + words[more:], prog="vatt data merge", positional=("out",))
    index = merge_shards(config.out, config.folders)
    header = next(read_index(index)).values
    print(f"{index}: {header['samples']} samples in {header['shards']} shards, {header['rejected']} files rejected")
    return 0
