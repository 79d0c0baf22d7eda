"""Fine-tuning's evaluation cut short by a signal, or left by one of its ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tasks.test_finetune import config, world  # noqa: F401  (fixtures)
from tasks.test_signals import CODES, before

from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.models.heads import Classifier
from vatt_engine.schema import dump_yaml, replace, to_dict
from vatt_engine.tasks.finetune import finetune

RANKS = """
import json, sys, time, torch
from pathlib import Path
from fleet import launch, reap
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.finetune import finetune
from vatt_engine.tasks.finetune_config import FINETUNE_RECIPES, FinetuneConfig

folder, ends = Path(sys.argv[1]), []
config = load_config(str(folder / "config.yaml"), FinetuneConfig, FINETUNE_RECIPES)
torch.set_num_threads(1)

def work():
    try:
        finetune(config)
    except ValueError:
        (folder / "raised").write_text(str(time.time()))
        raise

codes = reap(launch(2, work, folder))
seconds = time.time() - float((folder / "raised").read_text())
print(json.dumps([codes, seconds, [(folder / f"{rank}.txt").read_text() for rank in range(2)]]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_the_evaluation_ends_it_and_a_resume_repeats_it(config, monkeypatch, capsys, number):  # noqa: F811
    config = replace(config, {"engine.steps": 2, "test_windows": 1, "data.batch_size": 4})
    with monkeypatch.context() as patch:
        before(Classifier, "heads", patch, number, call=3 + 1)  # two steps, two batches of the six clips
        assert finetune(config) == CODES[number]
    out = Path(config.out)
    assert f"not evaluated; repeat with: vatt finetune --resume {out}" in capsys.readouterr().err
    assert load_latest(out).step == 2
    assert (out / "model" / "model.safetensors").is_file()
    assert not (out / "evaluation.json").exists()
    assert finetune(config, resume=True) == 0
    assert json.loads((out / "evaluation.json").read_text())["samples"] == 6


@pytest.mark.slow
def test_a_rank_that_leaves_the_evaluation_is_named_by_the_other(config, world, tmp_path):  # noqa: F811
    """No file of rank 1's share can be used: it raises, while rank 0 waits for it in the all-reduce."""
    rows = [json.loads(line) for line in world.heldout.read_text().splitlines()]
    for place, row in enumerate(rows):
        row["path"] = str(world.heldout.parent / row["path"] if place < 3 else tmp_path / f"{place}.mp4")
        (tmp_path / f"{place}.mp4").write_bytes(b"no video")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"engine.steps": 1, "test_windows": 1, "test": str(tmp_path / "test.jsonl")}
    (tmp_path / "config.yaml").write_text(dump_yaml(to_dict(replace(config, settings))))
    here = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path)], capture_output=True, text=True, env=env, timeout=200
    )
    assert done.returncode == 0, done.stderr
    codes, seconds, texts = json.loads(done.stdout)
    assert codes == [1, 3], texts  # 3 is the test's own for what the command line turns into a message
    reason = "rank 1 has stopped: QuarantineError: loader: a file of the set must be usable, got none."
    assert f"rank 0: training cannot go on without all ranks: {reason}" in texts[0]
    assert seconds < 30
    assert load_latest(config.out).step == 1
