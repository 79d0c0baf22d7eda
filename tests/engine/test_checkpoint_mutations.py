"""Damaged and hostile files: each is refused with our own error, an older checkpoint is used, nothing is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vatt_engine.data.manifest import read_manifest
from vatt_engine.data.words import Vocabulary, load_word_vectors
from vatt_engine.engine import checkpoint
from vatt_engine.engine.checkpoint import CheckpointError, load_latest, read_tensors, save
from vatt_engine.engine.monitors import memory
from vatt_engine.models import from_pretrained
from vatt_engine.models.pretrained import load_weights
from vatt_engine.tasks.config import load_config


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    model = {f"layer.{i}.weight": torch.randn(5, i + 1, generator=generator) for i in range(4)}
    return {"model": model | {"count": torch.tensor(step)}, "optimizer": {"w/exp_avg": torch.ones(3).bfloat16()}}


def mutate(path: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint in one of the ways that disks, copies and people do."""
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    how = rng.choice(["flip", "zeros", "cut", "longer", "delete", "swap", "empty", "junk", "folder", "extra", "older"])
    at = rng.randrange(len(content))
    if how == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        at = next(i for i in range(len(content)) if content[(at + i) % len(content)]) + at
        content[at % len(content)] = 0
    elif how == "cut":
        del content[at:]
    elif how == "longer":
        content += rng.randbytes(rng.randrange(1, 600))
    elif how == "junk":
        content[:] = rng.randbytes(len(content))
    elif how == "empty":
        content.clear()
    elif how == "swap":
        content[:] = (path.parent / "step-00000002" / "COMMIT").read_bytes()[::-1]
    elif how == "older":
        file = path / rng.choice(["COMMIT", "model.safetensors"])
        content[:] = (path.parent / "step-00000001" / file.name).read_bytes()
    if how in ("delete", "folder"):
        file.unlink()
        file.mkdir() if how == "folder" else None
    elif how == "extra":
        (path / "more.safetensors").write_bytes(content)
    else:
        file.write_bytes(content)
    return f"{how} {file.name} at {at}"


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.soak)])
def test_every_mutation_is_found_and_the_older_one_used(tmp_path, count):
    for step in (1, 2):
        save(tmp_path, step, tensors(step), {"step": step})
    newest, kept = tmp_path / "checkpoints" / "step-00000002", tmp_path / "kept"
    shutil.copytree(newest, kept)
    for number in range(count):
        what = mutate(newest, random.Random(number))
        found = load_latest(tmp_path)
        assert (found.step, len(found.skipped)) == (1, 1), what
        assert str(newest) in found.skipped[0], what
        for name, value in tensors(1)["model"].items():
            assert torch.equal(found.tensors["model"][name], value)
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    assert load_latest(tmp_path).step == 2


def mutated_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: its length, its JSON, a field, or bytes of it."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    how = rng.choice(["length", "bytes", "field", "deep", "cut", "twice", "text"])
    if how == "length":
        return rng.choice([0, size - 1, size + 1, 2**63, 2**64 - 1, rng.getrandbits(64)]).to_bytes(8, "little") + header
    if how == "bytes":
        header = bytearray(header)
        for _ in range(rng.randrange(1, 9)):
            header[rng.randrange(size)] = rng.randrange(256)
    elif how == "field":
        fields = json.loads(header)
        name = rng.choice([name for name in fields if name != "__metadata__"])
        wrong = [None, -1, 2**70, [], {}, "F99", [[0]], [0, 2**63], [-1, 4], [9, 1], 1.5, "F64", [2**40, 2**40], True]
        fields[name][rng.choice(list(fields[name]))] = rng.choice(wrong)
        header = json.dumps(fields).encode()
    elif how == "deep":
        header = b'{"a":' * rng.randrange(1, 20_000) + b"1"
    elif how == "cut":
        header = header[: rng.randrange(size)]
    elif how == "twice":
        header = header.rstrip()[:-1] + b"," + header.strip()[1:]
    else:
        header = rng.choice([b"", b"null", b"[]", b"{", b'{"": 1}', b"\xff\xfe", b'{"__metadata__": 3}', b"{}" * 50])
    return len(header).to_bytes(8, "little") + bytes(header) + data


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_a_header_that_lies_is_our_error(tmp_path, count):
    path = save(tmp_path, 1, tensors(1), {}) / "model.safetensors"
    model = torch.nn.Module()
    for name, value in tensors(1)["model"].items():
        model.register_buffer(name.replace(".", "_"), value)
    content, refused = path.read_bytes(), 0
    before = memory(torch.device("cpu"))["rss_mb"]
    for number in range(count):
        path.write_bytes(mutated_header(content, random.Random(number)))
        try:
            read_tensors(path)
        except CheckpointError as error:
            message = str(error)
        else:
            continue
        assert "model.safetensors: the file must be intact safetensors, got" in message
        refused += 1
        with pytest.raises(ValueError, match=r"model\.safetensors: the (file|weights) must be"):
            load_weights(model, path)
    assert refused > 0.9 * count
    assert memory(torch.device("cpu"))["rss_mb"] - before < 20


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_forged_commit_around_a_bad_file_falls_back(tmp_path, name):
    for step in (1, 2):
        save(tmp_path, step, tensors(step), {"step": step})
    path = tmp_path / "checkpoints" / "step-00000002"
    (path / name).write_bytes(b"[" * 100_000)
    commit = json.loads((path / "COMMIT").read_text())
    commit["files"][name] = {"size": 100_000, "sha256": checkpoint._sha256(path / name)}
    (path / "COMMIT").write_text(checkpoint._canonical(commit))
    found = load_latest(tmp_path)
    assert found.step == 1
    assert name in found.skipped[0]


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def torch_zip(payload: bytes) -> bytes:
    """What torch.save would write, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


def npy(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([payload], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npz(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, words=np.array([payload], dtype=object), vectors=np.ones((1, 2)))
    return buffer.getvalue()


def tar_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


YAML_TAGS = ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir", "!mkdir"]


def refused(call, *args) -> None:
    """Whatever is read, it is refused as bad input, in our words."""
    with pytest.raises(ValueError, match=r"must|malformed"):
        call(*args)


def test_nothing_hostile_is_executed(tmp_path):
    mark = tmp_path / "executed"
    payload = Payload(mark)
    plain, zipped = pickle.dumps(payload), torch_zip(pickle.dumps(payload))
    events, watching = [], True
    hook = lambda event, args: events.append((event, args)) if watching and event == "pickle.find_class" else None  # noqa: E731
    sys.addaudithook(hook)
    cases = 0
    for content in (plain, zipped):
        for name in ("model.safetensors", "state.json", "COMMIT", "optimizer.safetensors"):  # in a checkpoint
            run = tmp_path / f"run{cases}"
            path = save(run, 1, tensors(1), {})
            (path / name).write_bytes(content)
            refused(load_latest, run)
            cases += 1
        for name in ("model.safetensors", "config.json", "tokenizer.json"):  # a model's folder
            folder = tmp_path / f"model{cases}"
            folder.mkdir()
            (folder / "config.json").write_text('{"kind": "VATTConfig", "config": {}}')
            (folder / name).write_bytes(content)
            refused(
                Vocabulary.load if name == "tokenizer.json" else from_pretrained,
                *([folder / name] if name == "tokenizer.json" else [folder]),
            )
            cases += 1
        for name in ("pytorch_model.bin", "model.pt"):  # beside no safetensors: not even looked at
            folder = tmp_path / f"torch{cases}"
            folder.mkdir()
            (folder / "config.json").write_text('{"kind": "VATTConfig", "config": {}}')
            (folder / name).write_bytes(content)
            with pytest.raises(FileNotFoundError):
                from_pretrained(folder)
            cases += 1
    deepspeed = tmp_path / "deepspeed" / "checkpoints" / "step-00000001"  # its files under our names
    deepspeed.mkdir(parents=True)
    (deepspeed / "mp_rank_00_model_states.pt").write_bytes(zipped)
    (deepspeed / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(zipped)
    (deepspeed.parent / "latest").write_text("step-00000001")
    refused(load_latest, tmp_path / "deepspeed")
    for suffix, content in ((".npz", npz(payload)), (".npy", npy(payload)), (".npz", plain), (".bin", plain)):
        (tmp_path / f"vectors{cases}{suffix}").write_bytes(content)
        refused(load_word_vectors, tmp_path / f"vectors{cases}{suffix}")
        cases += 1
    for tag in YAML_TAGS:
        file = tmp_path / f"{cases}.yaml"
        file.write_text(f"out: {tag} [{mark}]\n")
        refused(load_config, str(file))
        cases += 1
    for content in (plain, tar_of("clip.pyd", plain), tar_of("clip.pkl", zipped)):
        (tmp_path / f"{cases}.jsonl").write_bytes(content)
        refused(read_manifest, tmp_path / f"{cases}.jsonl")
        cases += 1
    watching = False
    assert cases >= 20
    assert events == []
    assert not mark.exists()
    pickle.loads(plain)
    assert mark.exists()  # the payload works
