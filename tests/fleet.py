"""Ranks that may be killed: forked from a process that has imported torch once, and reaped with their exit codes."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch import distributed as dist

from vatt_engine.engine.faults import TrainingStopped


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(size: int, work: Callable[[], None], folder: Path) -> list[int]:
    """Fork `size` gloo ranks that call `work`, as the CLI does: TrainingStopped is a line and exit code 1; their pids.

    What a rank prints is in `folder/<rank>.txt`. The ranks' store is in this process, as torchrun's is in its agent.
    """
    port, pids = free_port(), []
    server = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os._exit(_rank(rank, size, port, work, folder / f"{rank}.txt"))
        pids.append(pid)
    launch.servers = [server]  # lives until the next launch
    return pids


def reap(pids: list[int]) -> list[int]:
    """Exit codes; -9 for a SIGKILL."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _rank(rank: int, size: int, port: int, work: Callable[[], None], output: Path) -> int:
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 2)
    try:
        store = dist.TCPStore("127.0.0.1", port, None, False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        work()
    except TrainingStopped as error:
        print(error)
        return 1
    except BaseException:
        traceback.print_exc()
        return 3
    return 0
