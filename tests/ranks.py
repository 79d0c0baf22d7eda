"""Run a function of a test module on several processes (gloo, CPU) and give back what each of them returned."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

_TIMEOUT = 540  # seconds, after which a rank that waits for another says where, and ends


def run_ranks(target: str, world_size: int, folder: Path) -> list[Any]:
    """Call `target`, "module:function" beside this file, on `world_size` processes; JSON results in order of rank.

    The ranks are forked from one fresh process, which imports torch once and has run nothing with it.
    """
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, target, str(world_size), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def main(target: str, world_size: str, folder: str) -> int:
    importlib.import_module("torch._dynamo")  # which an optimizer's first step imports: here once for all ranks
    module, _, function = target.partition(":")
    call = getattr(importlib.import_module(module), function)
    children = []
    for rank in range(int(world_size)):
        if (child := os.fork()) == 0:
            os._exit(_rank(call, rank, int(world_size), folder))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


def _rank(call: Any, rank: int, world_size: int, folder: str) -> int:
    faulthandler.dump_traceback_later(_TIMEOUT, exit=True)
    try:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        Path(folder, f"{rank}.json").write_text(json.dumps(call()))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        print(f"rank {rank}:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
