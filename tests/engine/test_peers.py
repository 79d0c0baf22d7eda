"""A rank that dies, hangs or gives up is named by the others, which stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from torch import distributed as dist
from fleet import launch, reap
from vatt_engine.collectives import rank
from vatt_engine.engine.peers import Peers
from vatt_engine.engine.writer import CheckpointWriter

folder, size, victim, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
ready, tell = os.pipe()

def work():
    with Peers(silence=2.0):
        for step in range(10**9):
            dist.all_reduce(torch.ones(1))
            if step == 3 and how == "saving":
                writer = CheckpointWriter()
                if rank() != victim:  # and so waits for the victim's word in the background
                    writer.save(folder / "run", 3, {"model": {"w": torch.ones(3)}}, {})
            if step == 3:
                os.write(tell, b".")
            if step > 3 and rank() == victim and how == "raise":
                raise ValueError("data.train: the file must exist, got none.")
            if step > 3 and rank() != victim and how == "hang":  # as a NCCL collective does whose peer has died
                time.sleep(10**6)

torch.set_num_threads(1)
pids = launch(size, work, folder)
for _ in range(size):
    os.read(ready, 1)
start = time.monotonic()
if how in ("kill", "hang", "saving"):
    os.kill(pids[victim], signal.SIGKILL)
if how == "stop":
    os.kill(pids[victim], signal.SIGSTOP)
codes = [code for code in reap(pids[:victim] + pids[victim + 1:])]
seconds = time.monotonic() - start
if how == "stop":
    os.kill(pids[victim], signal.SIGKILL)
codes.insert(victim, reap([pids[victim]])[0])
print(json.dumps([codes, seconds, [(folder / f"{r}.txt").read_text() for r in range(size)]]))
"""


def run(folder: Path, size: int, victim: int, how: str) -> tuple[list[int], float, list[str]]:
    here = Path(__file__).parents[1]
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(size), str(victim), how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "victim", "how"), [(4, 2, "kill"), (3, 1, "hang"), (2, 0, "stop"), (2, 0, "saving")])
def test_a_dead_rank_is_named_within_30_seconds(tmp_path, size, victim, how):
    codes, seconds, texts = run(tmp_path, size, victim, how)
    assert codes == [1 if rank != victim else -9 for rank in range(size)], texts
    for rank in set(range(size)) - {victim}:
        assert f"rank {rank}: training cannot go on without all ranks: rank {victim} has died" in texts[rank]
        assert "Traceback" not in texts[rank]
    assert seconds < 30


def test_a_rank_that_gives_up_says_why_to_all(tmp_path):
    codes, _, texts = run(tmp_path, 3, 1, "raise")
    assert codes == [1, 3, 1], texts
    reason = "rank 1 has stopped: ValueError: data.train: the file must exist, got none."
    assert all(reason in texts[rank] for rank in (0, 2))
