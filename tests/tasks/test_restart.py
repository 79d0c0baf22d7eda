"""torchrun starts a run again whose rank was killed, and it ends where a quiet one does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tasks.test_pretrain import config, world  # noqa: F401  (fixtures)

from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.schema import dump_yaml, replace, to_dict

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_nothing_is_lost(config, tmp_path):  # noqa: F811
    settings = {"engine.steps": 16, "engine.save_every": 4, "engine.log_every": 1, "schedule.total_steps": 16}
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(to_dict(replace(config, settings))))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen:
        command = [sys.executable, *TORCHRUN, "-m", "vatt_engine.cli", "pretrain", str(path), "--resume", "--out", out]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    hit = start(str(tmp_path / "hit"))
    while not (tmp_path / "hit" / "checkpoints" / "step-00000004").exists():  # it is written beside the steps after it
        assert hit.stdout.readline(), hit.stderr.read()
    ranks = Path(f"/proc/{hit.pid}/task/{hit.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    out, err = hit.communicate(timeout=200)
    assert hit.returncode == 0, out + err
    assert re.search("resuming after step (4|8|12) from", err)
    quiet = start(str(tmp_path / "quiet"))
    out, err = quiet.communicate(timeout=200)
    assert quiet.returncode == 0, out + err
    one, other = (load_latest(tmp_path / name) for name in ("hit", "quiet"))
    assert (one.step, other.step) == (16, 16)
    for group, tensors in other.tensors.items():
        assert [name for name, value in tensors.items() if not torch.equal(value, one.tensors[group][name])] == []
