"""Universal checkpoints: DeepSpeed goes on from ours, ours holds what DeepSpeed's did, hostile files are refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from vatt_engine.interop.deepspeed import Universal, read_universal, write_universal

SCRIPT = """
import json, os, subprocess, sys, torch
stage, folder, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ |= dict(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from vatt_engine.interop.deepspeed import read_universal, write_universal
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first use, for inference alone

def engine(universal):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": universal},
    }
    model = torch.nn.Sequential(*layers)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

def losses(engine, steps):
    found = []
    for step in steps:
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found

first = engine(False)
losses(first, range(3))
first.save_checkpoint(folder, tag="t3")
arguments = ["--input_folder", f"{folder}/t3", "--output_folder", f"{folder}/theirs", "--inject_missing_state"]
workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments, *workers]
subprocess.run(command, check=True, capture_output=True)

read = read_universal(f"{folder}/theirs")
assert read.step == 3 and sorted(read.weights) == sorted(first.module.state_dict())
for name, parameter in first.module.named_parameters():
    assert torch.equal(read.weights[name], safe_get_full_fp32_param(parameter)), name
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(read.moments[f"{name}/{key}"], safe_get_full_optimizer_state(parameter, key)), (name, key)
    assert read.moments[f"{name}/step"] == 3
buffers = dict(first.module.named_buffers())
assert all(torch.equal(read.weights[name], value) for name, value in buffers.items())

write_universal(f"{folder}/ours", read, buffers=set(buffers))
second = engine(True)
second.load_checkpoint(folder, tag="ours")
print("LOSSES", json.dumps([losses(first, range(3, 6)), losses(second, range(3, 6))]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_goes_on_from_ours_as_from_its_own(tmp_path, stage):
    pytest.importorskip("deepspeed")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(stage), str(tmp_path), str(29610 + stage)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("LOSSES ")]
    theirs, ours = json.loads(line.removeprefix("LOSSES "))
    assert theirs == ours


def universal() -> Universal:
    weights = {"layer.weight": torch.randn(3, 2), "norm.running_mean": torch.randn(3), "frozen": torch.ones(2)}
    moments = {f"layer.weight/{key}": torch.rand(3, 2) for key in ("exp_avg", "exp_avg_sq")}
    return Universal(weights, moments | {"layer.weight/step": torch.tensor(7.0)}, 9)


def test_what_is_written_is_read(tmp_path):
    given = universal()
    write_universal(tmp_path / "u9", given, buffers={"norm.running_mean"})
    found = read_universal(tmp_path / "u9")
    assert found.step == 9
    for mine, theirs in ((given.weights, found.weights), (given.moments, found.moments)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_frozen_parameters_that_zero_3_left_out_are_named(tmp_path):
    write_universal(tmp_path / "u9", universal(), buffers={"norm.running_mean"})
    (tmp_path / "u9" / "mp_rank_00_model_states.pt").unlink()  # ZeRO 3 writes the other one alone
    with pytest.raises(ValueError, match="frozen is frozen, and ZeRO 3 leaves frozen parameters out"):
        read_universal(tmp_path / "u9")


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("pickle", "mp_rank_00_model_states.pt"),
        ("torch", "zero/layer.weight/exp_avg.pt"),
        ("cut", "zero/layer.weight/fp32.pt"),
    ],
)
def test_a_hostile_or_damaged_file_is_refused(tmp_path, monkeypatch, name, form):
    monkeypatch.chdir(tmp_path)
    write_universal(tmp_path / "u9", universal(), buffers={"norm.running_mean"})
    path = tmp_path / "u9" / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif form == "torch":
        torch.save({"param": Payload()}, path)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="u9: the folder must be a DeepSpeed universal checkpoint, got: "):
        read_universal(tmp_path / "u9")
    assert not (tmp_path / "executed").exists()


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "zero").mkdir()
    with pytest.raises(ValueError, match=r"got: ValueError: no zero/ or no \*_model_states\.pt in it"):
        read_universal(tmp_path)
