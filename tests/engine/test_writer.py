"""In the background: what is saved is the moment of the call, one write at a time, and faults cost nothing."""

from __future__ import annotations

import errno
import json
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from vatt_engine.engine import checkpoint
from vatt_engine.engine.checkpoint import load_latest, share
from vatt_engine.engine.peers import Meeting
from vatt_engine.engine.writer import CheckpointWriter


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    model = {f"p{i}": torch.full((i + 1, 7), float(step * 100 + i)) for i in range(9)}
    return {"model": model | {"count": torch.tensor(step)}, "optimizer": {"p0/step": torch.tensor(float(step))}}


def items(groups: dict[str, dict[str, torch.Tensor]]) -> list[tuple[str, str, torch.Tensor]]:
    return [(group, name, value) for group, values in groups.items() for name, value in values.items()]


def assert_holds(found: checkpoint.Checkpoint, step: int) -> None:
    assert (found.step, found.state) == (step, {"step": step})
    for group, values in tensors(step).items():
        assert found.tensors[group].keys() == values.keys()
        assert [name for name, value in values.items() if not torch.equal(found.tensors[group][name], value)] == []


def save(writer: CheckpointWriter, run_dir: Path, step: int) -> None:
    writer.save(run_dir, step, tensors(step), {"step": step})


def test_what_is_saved_is_the_moment_of_the_call(tmp_path, monkeypatch):
    gate, write = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (gate.wait(60), write(*a, **k))[1])
    writer, live = CheckpointWriter(), tensors(1)
    writer.save(tmp_path, 1, live, {"step": 1})
    assert writer.news() == []  # training goes on while it is written
    for values in live.values():
        for value in values.values():
            value.fill_(-1)
    gate.set()
    assert writer.finish() == tmp_path / "checkpoints" / "step-00000001"
    assert writer.news() == [f"saved {tmp_path}/checkpoints/step-00000001"]
    assert_holds(load_latest(tmp_path), 1)


def test_what_lasts_is_copied_before_settle_returns(tmp_path, monkeypatch):
    """By the thread; the others at once."""
    gate, writer, live = threading.Event(), CheckpointWriter(), tensors(1)
    copy = writer._copy
    monkeypatch.setattr(writer, "_copy", lambda values: (("model", "p1") in values and gate.wait(60), copy(values))[1])
    writer.save(tmp_path, 1, live, {"step": 1}, lasts=lambda group, name: name.startswith("p"))
    live["model"]["count"].fill_(-1)
    assert not writer._copied.is_set()
    gate.set()
    writer.settle()
    for value in live["model"].values():
        value.fill_(-1)
    writer.finish()
    assert_holds(load_latest(tmp_path), 1)
    writer.settle()  # there is nothing to wait for


def test_a_copy_that_does_not_fit_into_memory_is_news(tmp_path, monkeypatch):
    writer = CheckpointWriter()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", _full)
        writer.save(tmp_path, 1, tensors(1), {"step": 1}, lasts=lambda group, name: True)
        writer.settle()
        with pytest.raises(OSError, match="can't allocate memory"):
            writer.finish()
    assert writer.news()[0].startswith("warning: the checkpoint could not be written")
    save(writer, tmp_path, 2)
    writer.finish()
    assert_holds(load_latest(tmp_path), 2)


def _full(*args, **kwargs):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def test_a_save_waits_for_the_one_before_and_says_so(tmp_path, monkeypatch):
    gate, write = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (gate.wait(60), write(*a, **k))[1])
    writer = CheckpointWriter()
    save(writer, tmp_path, 1)
    join = writer._thread.join
    monkeypatch.setattr(writer._thread, "join", lambda: (gate.set(), join()))  # opened by the one who waits
    save(writer, tmp_path, 2)
    writer.finish()
    first, second, third = writer.news()
    assert first.startswith("step 2: training waited ")
    assert (second[-8:], third[-8:]) == ("00000001", "00000002")
    assert_holds(load_latest(tmp_path), 2)


def test_host_memory_is_taken_once(tmp_path):
    writer = CheckpointWriter()
    save(writer, tmp_path, 1)
    before = {name: copy.data_ptr() for name, copy in writer._copies.items()}
    writer.finish()
    save(writer, tmp_path, 2)
    writer.finish()
    assert {name: copy.data_ptr() for name, copy in writer._copies.items()} == before
    assert_holds(load_latest(tmp_path), 2)


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_disk_fault_is_news_and_the_next_save_tries_again(tmp_path, monkeypatch, call, number):
    writer = CheckpointWriter()
    save(writer, tmp_path, 1)
    writer.finish()
    writer.news()

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, fail)
        save(writer, tmp_path, 2)
        writer.join()
    [line] = writer.news()
    assert line.startswith("warning: the checkpoint could not be written; older ones are intact")
    assert os.strerror(number) in line
    with pytest.raises(OSError, match=os.strerror(number)):
        writer.finish()
    assert_holds(load_latest(tmp_path), 1)
    save(writer, tmp_path, 3)
    writer.finish()
    assert_holds(load_latest(tmp_path), 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]


def test_a_file_in_the_way_is_a_message(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    writer = CheckpointWriter()
    save(writer, tmp_path, 1)
    writer.join()
    assert f"Not a directory: '{tmp_path}/checkpoints/step-00000001.tmp'" in writer.news()[0]
    assert (tmp_path / "checkpoints").read_text() == "mine"


def on_ranks(run_dir: Path, size: int, step: int, *, broken: int | None = None, absent: int | None = None) -> list:
    """Save as `size` ranks at once; what each of them got: the folder or its OSError."""
    store, results = dist.HashStore(), [None] * size

    def one(rank: int) -> None:
        meeting = Meeting(store.clone(), rank, size, f"m{step}", limit=0.3 if absent is not None else 60)
        part = share(items(tensors(step)), rank, size)
        if rank == broken:
            part["no such folder/model"] = {"w": torch.ones(1)}
        try:
            results[rank] = checkpoint.save(run_dir, step, part, {"step": step}, meeting=meeting)
        except OSError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size) if rank != absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_writes_what_one_reads(tmp_path, size):
    paths = on_ranks(tmp_path, size, 1)
    assert set(paths) == {tmp_path / "checkpoints" / "step-00000001"}
    names = {path.name for path in paths[0].iterdir()}
    expected = {f"{group}.rank-{r}-of-{size}.safetensors" for group in ("model", "optimizer") for r in range(size)}
    assert names == expected | {"state.json", "COMMIT"}
    assert_holds(load_latest(tmp_path), 1)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_rank_that_cannot_write_is_heard_by_all(tmp_path, rank):
    on_ranks(tmp_path, 4, 1)
    errors = on_ranks(tmp_path, 4, 2, broken=rank)
    assert all(isinstance(error, OSError) for error in errors)
    assert "no such folder" in str(errors[rank])
    assert "no such folder" in str(errors[0])
    assert_holds(load_latest(tmp_path), 1)
    assert on_ranks(tmp_path, 4, 3)[0].name == "step-00000003"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]


def test_a_rank_that_says_nothing_is_named(tmp_path):
    on_ranks(tmp_path, 2, 1)
    result = on_ranks(tmp_path, 2, 2, absent=1)[0]
    assert "rank 1 must write its part within 0 s" in str(result)
    assert_holds(load_latest(tmp_path), 1)


def test_a_missing_part_and_a_tensor_in_two_files_are_found(tmp_path):
    on_ranks(tmp_path, 2, 1)
    [path] = set(on_ranks(tmp_path, 2, 2))
    part = path / "model.rank-1-of-2.safetensors"
    content = part.read_bytes()
    part.unlink()
    assert "model.rank-1-of-2.safetensors is missing" in load_latest(tmp_path).skipped[0]
    part.write_bytes((path / "model.rank-0-of-2.safetensors").read_bytes())
    commit = json.loads((path / "COMMIT").read_text())
    commit["files"][part.name] = commit["files"]["model.rank-0-of-2.safetensors"]
    (path / "COMMIT").write_text(checkpoint._canonical(commit))
    found = load_latest(tmp_path)
    assert found.step == 1
    assert "must hold tensors that no other file has" in found.skipped[0]
    assert content


def test_shares_are_disjoint_whole_and_even():
    sizes = {f"p{i}": torch.zeros(1 + 37 * i % 101, 64) for i in range(60)}
    parts = [share(items({"model": sizes}), rank, 4)["model"] for rank in range(4)]
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(value.nbytes for value in part.values()) for part in parts]
    assert max(loads) - min(loads) <= max(value.nbytes for value in sizes.values())


def test_what_others_write_is_not_kept():
    """Of a state gathered tensor by tensor a rank holds its share and the newest: what ZeRO asks of the host."""
    alive, most = [], 0

    def gathered():
        nonlocal most
        for number in range(16):
            value = torch.ones(100)
            alive.append(weakref.ref(value))
            most = max(most, sum(one() is not None for one in alive))
            yield "model", f"p{number}", value
            del value

    assert len(share(gathered(), 3, 4)["model"]) == 4
    assert most <= 4 + 1
    assert share(gathered(), 1, 1) == {"model": {}}  # rank 0 keeps all of it
