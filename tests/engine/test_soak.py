"""A run under fire, and a long one: what is trained in spite of faults is what is trained without; nothing leaks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine.test_engine import build, rows

from vatt_engine.engine.logging import RunLog
from vatt_engine.engine.monitors import memory

FIRE = """
import errno, json, os, random, signal, sys, torch
from pathlib import Path
from engine.test_engine import build, rows
from fleet import launch, reap
from vatt_engine.collectives import rank, world_size
from vatt_engine.engine import checkpoint
from vatt_engine.engine.checkpoint import has_checkpoint, load_latest
from vatt_engine.engine.faults import StopSignals, TrainingStopped
from vatt_engine.engine.peers import Peers
from vatt_engine.engine.ranks import largest_of_ranks

folder, faults, size = Path(sys.argv[1]), int(sys.argv[2]), 2
rng = random.Random(faults)
STEPS, EVERY = 10 * faults + 40, 5

def train(run_dir, tell, fault):
    with StopSignals() as stop, Peers(silence=4.0):
        engine = build(run_dir, steps=STEPS)
        if has_checkpoint(run_dir):
            for reason in engine.resume().skipped:
                print(reason)
        kind, at = fault
        stop.begin()
        first = engine.finished
        while engine.finished < STEPS:
            if ending := largest_of_ranks(stop.received or 0, engine.device):
                stop.received = ending
                break
            engine.step(rows(engine.finished))  # dropout differs between the ranks, BatchNorm must not
            if kind == "raise" and rank() == 1 and engine.finished == first + at:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if kind == "disk" and rank() == at % 2:
                checkpoint.os.fsync = broken
            if rank() == 0:
                os.write(tell, b".")
            if engine.finished % EVERY == 0:
                engine.save(wait=False)
            for line in engine.writer.news():
                if line.startswith("warning"):
                    print(line)
        try:
            engine.save()
        except OSError as error:
            raise TrainingStopped(str(error)) from error
    if stop.received:
        os._exit(128 + stop.received)

def broken(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def attempt(number, fault):
    kind, at = fault
    steps, tell = os.pipe()
    output = folder / f"{number}"
    output.mkdir()
    pids = launch(size, lambda: train(folder / "run", tell, fault), output)
    os.close(tell)
    seen = 0
    while seen < at and os.read(steps, 1):
        seen += 1
    victim = rng.randrange(size)
    if seen == at and kind in ("kill", "kill all", "term", "term one", "disk"):
        number = signal.SIGTERM if kind in ("term", "term one", "disk") else signal.SIGKILL
        for pid in pids if kind in ("kill all", "term", "disk") else [pids[victim]]:
            os.kill(pid, number)
    while os.read(steps, 4096):
        pass
    os.close(steps)
    codes = reap(pids)
    return codes, "".join((output / f"{r}.txt").read_text() for r in range(size))

torch.set_num_threads(1)
counts, best = {}, 0
for number in range(faults):
    kind = ["kill", "term", "disk", "kill all", "raise", "term one"][number % 6]
    at = rng.randrange(1, 14)
    codes, text = attempt(number, (kind, at))
    assert codes != [0] * size, (kind, at, text)
    if kind in ("term", "term one"):
        assert codes == [143] * size, (kind, codes, text)
    if kind == "disk":
        assert codes == [1] * size and "No space left on device" in text, (codes, text)
    if kind == "kill":
        assert sorted(codes) == [-9, 1] and "has died" in text, (codes, text)
    counts[kind] = counts.get(kind, 0) + 1
    if has_checkpoint(folder / "run"):
        found = load_latest(folder / "run")
        assert found.skipped == () and found.step >= best, (found.step, best)
        best = found.step
codes, text = attempt("last", ("none", 10**9))
assert codes == [0] * size, text
survived = load_latest(folder / "run")
(folder / "quiet").mkdir()
nowhere = os.open(os.devnull, os.O_WRONLY)
codes = reap(launch(size, lambda: train(folder / "straight", nowhere, ("none", 0)), folder / "quiet"))
assert codes == [0] * size
straight = load_latest(folder / "straight")
assert (survived.step, straight.step) == (STEPS, STEPS)
same = all(torch.equal(v, straight.tensors[g][n]) for g, t in survived.tensors.items() for n, v in t.items())
print(json.dumps([counts, same]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("faults", [3, pytest.param(60, marks=pytest.mark.soak)])
def test_a_run_under_fire_ends_where_a_quiet_one_does(tmp_path, faults):
    here = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FIRE, str(tmp_path), str(faults)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    counts, same = json.loads(done.stdout)
    assert sum(counts.values()) == faults
    assert same


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_memory_stays(tmp_path, steps):
    """Less than 1 MB per 1,000 steps, with records and checkpoints, after a warm-up of as many steps as a tenth."""
    engine = build(tmp_path, steps=steps)
    with RunLog(tmp_path, steps, stream=io.StringIO()) as log:
        before = 0.0
        for step in range(steps):
            out = engine.step(rows(step))
            if step % 100 == 99:
                log.write(engine.finished, {"total": out.terms["total"].item()}, clips=8)
                engine.save(wait=False)
                engine.writer.news()
            if step == steps // 10:
                before = memory(torch.device("cpu"))["rss_mb"]
    engine.writer.finish()
    assert memory(torch.device("cpu"))["rss_mb"] - before < max(steps / 1000, 4.0)
