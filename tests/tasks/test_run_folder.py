"""What a start makes of its run folder: one process at a time, refused before anything is touched, begun anew."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from tasks.test_pretrain import config, records, rewritten, world  # noqa: F401  (fixtures)

from vatt_engine.cli import main
from vatt_engine.data.demo import make_world
from vatt_engine.data.prepare import prepare
from vatt_engine.engine.engine import Engine
from vatt_engine.engine.faults import StopSignals
from vatt_engine.engine.ranks import alone_among_tasks
from vatt_engine.lock import NAME, Holder, Lock, LockedError
from vatt_engine.schema import ConfigError, dump_yaml, replace, to_dict
from vatt_engine.tasks.ablate import AblateConfig, ablate
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.finetune import finetune
from vatt_engine.tasks.finetune_config import FINETUNE_RECIPES, FinetuneConfig
from vatt_engine.tasks.pretrain import pretrain
from vatt_engine.tasks.run_folder import check_places, paths_of


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_is_refused_and_writes_nothing(config, monkeypatch):  # noqa: F811
    """In the middle of a run, with another config, as new runs and as resumed ones."""
    step, seen = Engine.step, []
    config = replace(config, {"engine.save_every": 100})  # no checkpoint is being written beside the steps
    run, other = Path(config.out), replace(config, {"optim.lr": 0.5, "engine.steps": 3})
    tuning = replace(load_config("demo", FinetuneConfig, FINETUNE_RECIPES), {"out": config.out})

    def stepped(self, batch):
        if self.finished == 3:
            before = files_of(run)
            for start in (pretrain, lambda c: pretrain(c, resume=True)):
                with pytest.raises(LockedError, match=f"got `vatt pretrain`, process {os.getpid()} on .*, since 20"):
                    start(other)
            with pytest.raises(LockedError):
                finetune(tuning)
            seen.append(files_of(run) == before)
        return step(self, batch)

    monkeypatch.setattr(Engine, "step", stepped)
    assert pretrain(config) == 0
    assert seen == [True]
    assert load_config(str(run / "config.yaml")) == config
    assert not (run / NAME).exists()


def test_verbs_that_write_for_long_have_a_lock_too(world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("vatt_engine.tasks.ablate._table", pytest.fail)
    monkeypatch.setattr("vatt_engine.data.demo._make_clip", pytest.fail)
    monkeypatch.setattr("vatt_engine.data.prepare.Transcoders", pytest.fail)
    starts = {
        "ablate": lambda out: ablate(AblateConfig(config="demo", data=str(world.train), out=str(out))),
        "demo-data": lambda out: make_world(out, num_train=1, num_heldout=1),
        "prepare": lambda out: prepare(world.train, out),
    }
    for name, start in starts.items():
        out = tmp_path / name
        with Lock(out / ".work" if name == "prepare" else out, f"vatt {name}"):
            before = files_of(out)
            with pytest.raises(LockedError, match=f"{out}: the folder must be of no other process at work"):
                start(out)
            assert files_of(out) == before


def test_a_killed_runs_lock_is_taken_over_and_told(config, capsys):  # noqa: F811
    Path(config.out).mkdir()
    dead = dataclasses.replace(Holder.this_process("vatt pretrain"), ticks=1)
    (Path(config.out) / NAME).write_text(json.dumps(dataclasses.asdict(dead)))
    assert pretrain(replace(config, {"engine.steps": 1})) == 0
    assert "taking over the lock of `vatt pretrain`, process" in capsys.readouterr().err


def test_tasks_of_a_scheduler_that_are_no_ranks_are_told(monkeypatch):
    for name in ("RANK", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert alone_among_tasks() is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert alone_among_tasks() is None
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "4")
            assert f"counts 4 tasks ({name}), but this process trains alone" in alone_among_tasks()
            patch.setenv("RANK", "0")  # as torchrun sets it
            assert alone_among_tasks() is None


def test_a_task_of_a_scheduler_says_that_it_trains_alone(config, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ValueError, match="no such file"):
        pretrain(replace(config, {"data.train": "nowhere.jsonl"}))
    assert "Slurm counts 2 tasks" in capsys.readouterr().err


REFUSED = [
    {"data.train": ""},
    {"data.train": "nowhere.jsonl"},
    {"data.num_frames": 16},
    {"data.batch_size": 21},
    {"engine.device": "cuda:7"},
    {"engine.strategy": "zero1", "optim.clip_prefix": "model."},
    {"model.text.freeze_embedding": True},
    {"text.vectors": "nowhere.txt"},
    {"text.vocabulary": "nowhere.txt"},
    {"heldout": "nowhere.jsonl"},
    {"engine.wandb": True},
    {"data.loader": "dali"},
]


@pytest.mark.parametrize("changes", REFUSED, ids=lambda changes: "-".join(changes))
def test_what_cannot_train_is_refused_before_the_folder_is_touched(config, monkeypatch, changes):  # noqa: F811
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError):
        pretrain(replace(config, changes))
    assert not Path(config.out).exists()


def test_a_finetuning_that_cannot_train_leaves_no_folder(world, tmp_path):  # noqa: F811
    tuning = replace(
        load_config("demo", FinetuneConfig, FINETUNE_RECIPES),
        {"data.train": str(world.train), "data.batch_size": 8, "out": str(tmp_path / "tuned"), "engine.device": "cpu"},
    )
    bad = [{"init": "nowhere"}, {"test": "nowhere.jsonl"}, {"model.num_classes": 2}, {"data.batch_size": 64}]
    for changes in bad:
        with pytest.raises(ValueError):
            finetune(replace(tuning, changes))
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_finished_no_step_is_begun_anew(config, world, tmp_path, monkeypatch, capsys):  # noqa: F811
    """It has left all that a start leaves, and what it says about its config is not believed."""

    def broken(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    first = replace(config, {"heldout": str(world.train), "evaluate_every": 2})  # which records a loss at step 0
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", broken)
        assert main(["pretrain", as_file(first, tmp_path)]) == 1
    left = files_of(Path(config.out))
    assert {"config.yaml", "env.json", "tokenizer.json", "metrics.jsonl"} <= left.keys()
    (Path(config.out) / "quarantine.jsonl").write_text('{"path": "old.mp4", "reason": "x", "skipped": true}\n')
    second = replace(config, {"optim.lr": 5e-4, "engine.steps": 2})
    capsys.readouterr()
    assert pretrain(second) == 0
    told = f"{config.out}: an earlier start has finished no step here; this one begins anew, without its config.yaml, "
    assert told in capsys.readouterr().err
    assert load_config(str(Path(config.out) / "config.yaml")) == second
    assert [record["step"] for record in records(config.out)] == [2]
    assert records(config.out)[0]["quarantined"] == 0
    with pytest.raises(ConfigError, match=r"got one that holds a run\. Continue it with `vatt pretrain --resume"):
        pretrain(second)


def as_file(config, folder: Path) -> str:  # noqa: F811
    path = folder / "start.yaml"
    path.write_text(dump_yaml(to_dict(config)))
    return str(path)


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "metrics.jsonl", "quarantine.jsonl", "model"])
def test_what_no_start_has_left_is_kept(config, name):  # noqa: F811
    Path(config.out).mkdir()
    (Path(config.out) / name).write_text("mine\n")
    with pytest.raises(ConfigError, match="--out must be a new run folder, got one"):
        pretrain(config)
    assert files_of(Path(config.out)) == {name: b"mine\n"}


def test_a_resume_that_does_not_fit_leaves_the_config_alone(config):  # noqa: F811
    pretrain(replace(config, {"engine.steps": 1}))
    before = files_of(Path(config.out))
    with pytest.raises(ValueError, match="must fit the model and optimizer of this run"):
        pretrain(replace(config, {"engine.steps": 2, "optim.name": "sgd"}), resume=True)
    assert files_of(Path(config.out)) == before


def test_training_in_a_thread_trains_and_says_once_that_signals_are_not_handled(config, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(StopSignals, "said", False)
    codes = []
    for resume in (False, True):
        run = replace(config, {"engine.steps": 1 + resume})
        thread = threading.Thread(target=lambda run=run, resume=resume: codes.append(pretrain(run, resume=resume)))
        thread.start()
        thread.join()
    assert codes == [0, 0]
    assert [record["step"] for record in records(config.out)] == [1, 2]
    assert capsys.readouterr().err.count("signals are not handled") == 1


def test_an_output_in_another_encoding_ends_no_training(config, tmp_path, monkeypatch):  # noqa: F811
    config = replace(config, {"out": str(tmp_path / "run caf\xe9 \U0001f600"), "engine.steps": 2})
    log = io.TextIOWrapper(io.BytesIO(), encoding="gbk")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, log)
    assert pretrain(config) == 0  # a program of the user's, whose streams are as Python made them
    assert main(["pretrain", "--resume", config.out, "--engine.steps", "3"]) == 0
    log.flush()
    assert "run caf\xe9 ?" in log.buffer.getvalue().decode("gbk")
    assert [record["step"] for record in records(config.out)] == [2, 3]


def test_pictures_that_cannot_be_drawn_end_no_training(config, monkeypatch, capsys):  # noqa: F811
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vatt_engine.tasks.pretrain.plot_run", full)
    assert pretrain(replace(config, {"engine.steps": 1})) == 0
    assert "note: no pictures of" in capsys.readouterr().err


def test_relative_paths_are_those_of_the_folder_the_run_was_started_in(config, world, tmp_path, monkeypatch, capsys):  # noqa: F811
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir(), away.mkdir()
    manifest = Path(rewritten(world, home / "train.jsonl"))
    monkeypatch.chdir(home)
    pretrain(replace(config, {"data.train": manifest.name, "engine.steps": 1}))
    monkeypatch.chdir(away)
    assert main(["pretrain", "--resume", config.out]) == 2
    message = (
        f"data.train must lead to a file from {away}, got 'train.jsonl', which is relative to {home}, where the run"
    )
    assert message in capsys.readouterr().err
    assert main(["pretrain", "--resume", config.out, "--data.train", str(manifest), "--engine.steps", "2"]) == 0
    (away / "train.jsonl").write_text("another")
    monkeypatch.chdir(home)  # where the last start was in `away`, and the file is there too
    check_places(replace(config, {"data.train": "train.jsonl"}))
    assert f"--data.train train.jsonl is now taken from {home}" in capsys.readouterr().err


def test_every_path_of_a_config_is_known():
    names = {name for name, _ in paths_of(replace(load_config("demo"), {"text.vectors": "v", "text.vocabulary": "w"}))}
    assert names == {"out", "heldout", "data.train", "text.vectors", "text.vocabulary"}
    several = replace(load_config("demo"), {"data.train": ["a", "b"]})
    assert [path for name, path in paths_of(several) if name == "data.train"] == ["a", "b"]
