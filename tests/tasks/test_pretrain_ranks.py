"""`vatt pretrain` as launchers start it: two processes under every strategy leave one run, that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_pretrain import SMALL

from vatt_engine.analysis.report import read_records
from vatt_engine.data.demo import make_world
from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.models import from_pretrained
from vatt_engine.schema import dump_yaml, replace, to_dict
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.pretrain import main
from vatt_engine.testing import Sum, sum_budget, transformer_terms

STEADY = {f"model.{m}.transformer.dropout": 0.0 for m in ("video", "audio", "text")}  # other ranks draw other masks
STEADY |= {f"model.{m}.position.dropout": 0.0 for m in ("video", "audio", "text")}
# A loss is the mean over eight samples of cosines over 0.07: of sums over a patch, a layer and three heads.
ROUNDING = sum_budget(
    Sum(2 * (768 + transformer_terms(layers=1, dim=32, ff_dim=64, tokens=76) + 3 * 128), 1 / 0.07 / 8**0.5)
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vatt_engine.cli"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The folder of world, config and the run of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    world = make_world(folder / "world", num_train=20, num_heldout=2, num_threads=2)
    settings = {"engine.steps": 4, "engine.log_every": 1, "optim.lr": 1e-4, "optim.clip_norm": 1.0}
    config = replace(load_config("demo"), SMALL | STEADY | settings | {"data.train": str(world.train)})
    config = replace(config, {"heldout": str(world.train), "evaluate_every": 2})
    (folder / "config.yaml").write_text(dump_yaml(to_dict(config)))
    assert main([str(folder / "config.yaml"), "--out", str(folder / "one")]) == 0
    return folder


def launch(folder: Path, out: str, *flags: str, launcher: list[str] = TORCHRUN) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "pretrain", str(folder / "config.yaml"), "--out", str(folder / out), *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)


def totals(run: Path) -> list[float]:
    """Of the four steps, and the held-out ones before the first step, after two and after four."""
    found = read_records(run / "metrics.jsonl")
    return [one[name] for name in ("total", "heldout_total") for one in found if name in one]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "flags"),
    [
        ("auto", ["--engine.accumulate", "2"]),
        ("zero1", []),
        ("zero2", ["--engine.accumulate", "3"]),
        ("zero3", ["--engine.checkpoint-activations", "true"]),
    ],
)
def test_two_processes_are_one_run(straight, strategy, flags):
    done = launch(straight, strategy, "--engine.strategy", strategy, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 4/4  total ") == 1  # one process speaks
    run = straight / strategy
    assert {path.name for path in run.iterdir()} == {path.name for path in (straight / "one").iterdir()}
    assert len(totals(run)) == 4 + 3
    assert totals(run) == pytest.approx(totals(straight / "one"), rel=0, abs=ROUNDING)
    weights = from_pretrained(run / "model").state_dict()
    assert weights.keys() == from_pretrained(straight / "one" / "model").state_dict().keys()
    assert all((weights[name] == value).all() for name, value in load_latest(run).tensors["model"].items())


@pytest.mark.slow
def test_other_ranks_and_another_strategy_go_on(straight):
    """Two steps by one process, two by two under ZeRO-2, from DeepSpeed's own launcher's flag."""
    flags = ["--out", str(straight / "mixed"), "--engine.steps", "2"]
    assert main([str(straight / "config.yaml"), *flags]) == 0
    launcher = [*TORCHRUN, "--local_rank=0"]
    done = launch(straight, "mixed", "--resume", "--engine.strategy", "zero2", launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("resuming after step 2 from") == 1
    assert totals(straight / "mixed") == pytest.approx(totals(straight / "one"), rel=0, abs=ROUNDING)
