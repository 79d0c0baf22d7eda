"""A checkpoint is whole or does not exist, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vatt_engine.engine import checkpoint
from vatt_engine.engine.checkpoint import CheckpointError, has_checkpoint, load_latest, save

STATE = {"seed": 3, "list": [1, 2.5, None, "x"]}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    shared = torch.arange(6.0).reshape(2, 3) + step
    model = {"a": shared, "tied": shared, "view": shared.T, "scalar": torch.tensor(step), "bf16": shared.bfloat16()}
    return {"model": model, "optimizer": {"a/exp_avg": torch.full((3,), float(step))}, "empty": {}}


def saved(run_dir: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [save(run_dir, step, tensors(step), STATE, keep=keep) for step in steps]


def test_comes_back_as_it_was(tmp_path):
    [path] = saved(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert {file.name for file in path.iterdir()} == {
        "COMMIT",
        "state.json",
        "model.safetensors",
        "optimizer.safetensors",
        "empty.safetensors",
    }
    found = load_latest(tmp_path)
    assert (found.step, found.path, found.state, found.skipped) == (7, path, STATE, ())
    for group, values in tensors(7).items():
        assert found.tensors[group].keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(found.tensors[group][name], value)
            assert found.tensors[group][name].dtype == value.dtype


def test_keeps_the_newest_and_at_least_two(tmp_path):
    saved(tmp_path, 1, 2, 3, 10, keep=3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (2, 3, 10)]
    saved(tmp_path, 11, keep=0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (10, 11)]


def test_a_step_is_never_written_over(tmp_path):
    [path] = saved(tmp_path, 5)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    save(tmp_path, 5, tensors(99), STATE)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    (path / "state.json").write_text("{}")
    save(tmp_path, 5, tensors(99), STATE)
    assert load_latest(tmp_path).tensors["model"]["scalar"] == 99
    assert (tmp_path / "checkpoints" / "step-00000005.damaged" / "state.json").read_text() == "{}"


@pytest.mark.parametrize(
    "name", ["COMMIT", "state.json", "model.safetensors", "optimizer.safetensors", "empty.safetensors"]
)
def test_every_flipped_byte_is_found_and_the_older_one_used(tmp_path, name):
    _, newest = saved(tmp_path, 1, 2)
    content = (newest / name).read_bytes()
    rng = random.Random(name)
    for position in rng.sample(range(len(content)), min(25, len(content))):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        (newest / name).write_bytes(damaged)
        found = load_latest(tmp_path)
        assert found.step == 1
        assert len(found.skipped) == 1
        assert str(newest) in found.skipped[0]
        assert name in found.skipped[0]
    (newest / name).write_bytes(content)
    assert load_latest(tmp_path).step == 2


@pytest.mark.parametrize("name", ["COMMIT", "state.json", "model.safetensors"])
def test_a_missing_or_short_file_is_found(tmp_path, name):
    _, newest = saved(tmp_path, 1, 2)
    content = (newest / name).read_bytes()
    for damage in (content[:-1], content[: len(content) // 2], b"", content + b"\n"):
        (newest / name).write_bytes(damage)
        found = load_latest(tmp_path)
        assert found.step == 1
        assert name in found.skipped[0]
    (newest / name).unlink()
    assert f"{name} is missing" in load_latest(tmp_path).skipped[0]


def test_a_file_that_was_added_is_found(tmp_path):
    _, newest = saved(tmp_path, 1, 2)
    (newest / "more.safetensors").write_bytes(b"")
    assert "more.safetensors is not in COMMIT" in load_latest(tmp_path).skipped[0]


def test_a_renamed_step_is_found(tmp_path):
    _, newest = saved(tmp_path, 1, 2)
    newest.rename(newest.with_name("step-00000003"))
    assert load_latest(tmp_path).step == 1


def test_none_valid_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: the run folder must exist"):
        load_latest(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"checkpoints: the run must have at least one valid checkpoint, got none"
    ):
        load_latest(tmp_path)
    assert not has_checkpoint(tmp_path)
    [path] = saved(tmp_path, 1)
    (path / "model.safetensors").write_bytes(b"")
    assert has_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000001: skipped, model\.safetensors has 0 bytes"):
        load_latest(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_error_leaves_the_older_one(tmp_path, monkeypatch, call, number):
    saved(tmp_path, 1)

    def fail(*args):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            saved(tmp_path, 2)
    assert (load_latest(tmp_path).step, load_latest(tmp_path).skipped) == (1, ())
    saved(tmp_path, 2)  # the half-written one is not in the way
    assert load_latest(tmp_path).step == 2


KILLER = """
import os, random, signal, sys, time, torch
from torch import distributed as dist
from fleet import free_port
from vatt_engine.engine.checkpoint import load_latest, save, share
from vatt_engine.engine.peers import Meeting

folder, attempts, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(size)
tensors = {"model": {f"p{i}": torch.full((20_000,), float(i)) for i in range(40)}}

def train(run_dir, rank, port, tell):
    meeting, part = None, share([("model", name, value) for name, value in tensors["model"].items()], rank, size)
    store = dist.TCPStore("127.0.0.1", port, None, False) if size > 1 else None
    for step in range(1, 10_000):
        meeting = Meeting(store, rank, size, f"try-{step}") if size > 1 else None
        save(run_dir, step, part, {"step": step}, keep=2, meeting=meeting)
        if rank == 0:
            os.write(tell, b".")

for attempt in range(attempts):
    run_dir, port = f"{folder}/{attempt}", free_port()
    server = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False) if size > 1 else None
    done, tell = os.pipe()
    children = []
    for rank in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            train(run_dir, rank, port, tell)
    os.close(tell)
    saved = sum(len(os.read(done, 1)) for _ in range(rng.randrange(1, 5)))
    for child in rng.sample(children, size):
        deadline = time.perf_counter() + rng.random() * 0.1  # a random moment of one of the next saves
        while time.perf_counter() < deadline:
            pass
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    saved += len(os.read(done, 100_000))
    found = load_latest(run_dir)
    assert found.skipped == (), found.skipped
    assert found.step in (saved, saved + 1), (found.step, saved)
    assert found.state == {"step": found.step}
    assert len(found.tensors["model"]) == 40 and found.tensors["model"]["p39"].eq(39).all()
    print(*sorted(os.listdir(f"{run_dir}/checkpoints")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("attempts", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_a_kill_at_any_moment_loses_nothing(tmp_path, attempts, size):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", KILLER, str(tmp_path), str(attempts), str(size)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == attempts
    assert ".tmp" in result.stdout  # some were killed while they wrote


def test_nothing_is_unpickled(tmp_path):
    events = []
    active = True
    sys.addaudithook(lambda event, args: events.append(event) if active and event.startswith("pickle") else None)
    saved(tmp_path, 1)
    load_latest(tmp_path)
    active = False
    assert events == []


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    save(tmp_path, 1, {"model": {"w": torch.zeros(4)}}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000002\.tmp: model\.safetensors must fit on the disk, got an error"):
            save(tmp_path, 2, {"model": {"w": torch.zeros(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_latest(tmp_path).step == 1
