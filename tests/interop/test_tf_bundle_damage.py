"""Damaged bundles of TensorFlow: none crashes the reader, and none silently changes a tensor."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from interop.test_tf_bundle import GENUINE, copied

from vatt_engine.interop import read_tf_checkpoint
from vatt_engine.interop.tf_files import CheckpointFileError
from vatt_engine.interop.tf_table import read_table, write_table


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file with a fault: bits, bytes, a cut, a part twice, zeros, another's part."""
    data, place = bytearray(content), rng.randrange(len(content))
    kind = rng.choice(("bit", "byte", "cut", "twice", "zeros", "swap", "drop", "insert"))
    size = rng.randrange(1, 64)
    if kind == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[place] = rng.randrange(256)
    elif kind == "cut":
        del data[place:]
    elif kind == "twice":
        data[place:place] = data[place : place + size]
    elif kind == "zeros":
        data[place : place + size] = bytes(len(data[place : place + size]))
    elif kind == "swap":
        other = rng.randrange(len(content))
        data[place], data[other] = data[other], data[place]
    elif kind == "drop":
        del data[place : place + size]
    else:
        data[place:place] = rng.randbytes(size)
    return bytes(data)


def resealed(content: bytes, rng: random.Random) -> bytes:
    """An index with changed entries under good checksums: what is left is the reader's own care."""
    entries = read_table(content)
    number = rng.randrange(len(entries))
    key, value = entries[number]
    entries[number] = (key, mutated(value, rng)) if value and rng.random() < 0.7 else (mutated(key or b"x", rng), value)
    return write_table(sorted(dict(entries).items()))


def contents(checkpoint) -> dict[str, object]:
    """Every tensor as something that compares bit by bit."""
    return {key: x.tolist() if x.dtype == object else (x.dtype, x.shape, x.tobytes()) for key, x in checkpoint.items()}


def check_faults(tmp_path: Path, name: str, count: int, seed: int) -> dict[str, int]:
    """Read `count` damaged copies: each is refused, or every tensor that is read is what was written."""
    rng, prefix = random.Random(seed), copied(tmp_path, name)
    truth = contents(read_tf_checkpoint(GENUINE / name))
    good = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    found = {"refused": 0, "harmless": 0, "resealed": 0}
    for _ in range(count):
        path = rng.choice(sorted(good))
        seal = path.suffix == ".index" and rng.random() < 0.3
        path.write_bytes(resealed(good[path], rng) if seal else mutated(good[path], rng))
        message, read = "", None
        try:
            read = contents(read_tf_checkpoint(prefix))
        except CheckpointFileError as error:
            message = str(error)
        assert "\n" not in message
        if message:
            found["refused"] += 1
        else:
            if seal:
                found["resealed"] += 1  # a changed index that is in order says something else, rightly
            else:
                assert read == truth
                found["harmless"] += 1
        path.write_bytes(good[path])
    return found


def test_no_damage_is_silent(tmp_path):
    for name in ("mixed", "shards", "slices"):
        folder = tmp_path / name
        folder.mkdir()
        found = check_faults(folder, f"format/{name}", 150, seed=1)
        assert found["refused"] > 100


@pytest.mark.soak
def test_no_damage_is_silent_in_ten_thousand_files(tmp_path):
    total: dict[str, int] = {}
    for name, count in (
        ("format/mixed", 3_000),
        ("format/slices", 2_500),
        ("format/shards", 2_500),
        ("wat/ckpt-4", 2_000),
    ):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for kind, number in check_faults(folder, name, count, seed=2).items():
            total[kind] = total.get(kind, 0) + number
    print(total)
    assert sum(total.values()) == 10_000
    assert total["refused"] > 8_000
