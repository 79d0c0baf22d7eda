"""`vatt demo-data DIRECTORY`: a small, learnable audio-visual world of real media files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vatt_engine.data.demo import make_world
from vatt_engine.output import is_terminal
from vatt_engine.schema import PathText
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.results import check_writable


@dataclass(frozen=True, kw_only=True)
class DemoDataConfig:
    """The demo world: moving shapes with sounds and captions that belong to them, as mp4 and webm files.

    Args:
        directory: an empty or new folder; receives train.jsonl, heldout.jsonl and their media.
        num_train: training clips.
        num_heldout: held-out clips, each a combination that no training clip has.
        untold: colours and scenes are chance, which neither sounds nor captions tell.
        seed: the same seed makes the same world.
        num_threads: clips made at once; None for one per CPU that may be used.
    """

    directory: PathText
    num_train: int = 2048
    num_heldout: int = 256
    untold: bool = False
    seed: int = 0
    num_threads: int | None = None


def main(argv: Sequence[str]) -> int:
    config = parse_flags(DemoDataConfig, argv, prog="vatt demo-data", positional=("directory",))

    def progress(done: int, total: int) -> None:
        if is_terminal(sys.stdout):
            print(f"\r{done}/{total} clips", end="\n" if done == total else "", flush=True)

    check_writable(config.directory, "vatt demo-data", "Name another DIRECTORY.")
    world = make_world(
        config.directory,
        num_train=config.num_train,
        num_heldout=config.num_heldout,
        untold=config.untold,
        seed=config.seed,
        num_threads=config.num_threads,
        progress=progress,
    )
    print(f"{world.train}: {world.num_train} clips of {world.num_train_combinations} combinations")
    print(f"{world.heldout}: {world.num_heldout} clips, each of a combination of its own")
    print(f"{world.num_bytes / 1e6:.1f} MB. Next: vatt pretrain demo --data.train {world.train}")
    return 0
