"""`vatt prepare`, `vatt data merge`, and training from what they made."""

from __future__ import annotations

import json

import pytest

from vatt_engine.cli import main
from vatt_engine.data.demo import make_world
from vatt_engine.data.manifest import read_manifest
from vatt_engine.data.shards import read_shards
from vatt_engine.schema import dump_yaml, replace, to_dict
from vatt_engine.tasks.config import load_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"), num_train=12, num_heldout=2, num_threads=2)
    with world.train.open("a") as file:
        file.write('{"path": "train/gone.mp4"}\n')
    return world


def test_a_world_is_prepared_and_trained_from(world, tmp_path, capsys):
    out, run = tmp_path / "shards", tmp_path / "run"
    assert main(["prepare", str(world.train), str(out), "--short-side", "64", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "13/13 files, 1 rejected, " in said
    assert "rejected train/gone.mp4: the path must name a file, got no such file." in said
    assert f"{out / 'index.jsonl'}: 12 samples in 1 shards, 1 files rejected, 0.00 h" in said
    raw, prepared = read_manifest(world.train)[:12], read_shards(out)
    assert [(s.id, s.captions, s.label) for s in prepared] == [(s.id, s.captions, s.label) for s in raw]

    changes = {"data.batch_size": 4, "engine.steps": 2, "engine.device": "cpu", "out": str(run)}
    changes |= {f"model.{modality}.transformer.num_layers": 1 for modality in ("video", "audio", "text")}
    (tmp_path / "small.yaml").write_text(dump_yaml(to_dict(replace(load_config("demo"), changes))))
    assert main(["pretrain", str(tmp_path / "small.yaml"), "--data.train", str(out / "{000000..000000}.tar")]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2
    assert (records[-1]["quarantined"], records[-1]["noted"]) == (0, 0)
    assert main(["retrieve", str(run), "--data", str(out), "--num-windows", "1"]) == 0


def test_parts_are_merged(world, tmp_path, capsys):
    for i in range(2):
        folder = tmp_path / f"part{i}"
        assert main(["prepare", str(world.heldout), str(folder), "--workers", "1", "--part", f"{i}/2"]) == 0
    assert f"Next, when all parts are there: vatt data merge {folder}" in capsys.readouterr().out
    assert main(["data", "merge", str(tmp_path), *(str(tmp_path / f"part{i}") for i in range(2))]) == 0
    assert f"{tmp_path / 'index.jsonl'}: 2 samples in 2 shards, 0 files rejected" in capsys.readouterr().out
    assert [s.id for s in read_shards(tmp_path)] == [s.id for s in read_manifest(world.heldout)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare", "no.jsonl", "out"], "no.jsonl: the manifest must be a file, got no such file."),
        (["prepare", "a.jsonl", "out", "--fps", "0"], "must be in [0.1, 120], got 0.0."),
        (["prepare", "a.jsonl", "out", "--codec", "h265"], "--codec must be one of"),
        (["prepare", "a.jsonl", "out", "--codec", "vp9", "--crf", "64"], "crf must be in [0, 63], got 64."),
        (["prepare", "a.jsonl", "out", "--part", "3/3"], "part must be i/n with 0 <= i < n, got '3/3'."),
        (["data", "merge", "nowhere"], "merge: nowhere must hold indexes of parts, index-i-of-n.jsonl, got none."),
        (["data", "marge"], "Did you mean 'merge'?"),
    ],
)
def test_bad_input_is_one_message(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
