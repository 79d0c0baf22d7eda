"""Results go where they can be written: refused before the work elsewhere, and printed whatever the disk says later."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from vatt_engine.cli import main
from vatt_engine.data.demo import make_world
from vatt_engine.data.manifest import Sample
from vatt_engine.models import create_model, save_pretrained
from vatt_engine.output import write_text
from vatt_engine.schema import ConfigError, dump_yaml, replace, to_dict
from vatt_engine.tasks import ablate, finetune, results
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.finetune_config import FINETUNE_RECIPES, FinetuneConfig
from vatt_engine.tasks.pretrain import pretrain
from vatt_engine.tasks.results import Results, check_writable
from vatt_engine.tasks.retrieve import load_run
from vatt_engine.tasks.visualize import VisualizeConfig, choose

LAYERS = {f"model.{modality}.transformer.num_layers": 1 for modality in ("video", "audio", "text")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_train=8, num_heldout=8, num_threads=2)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("run") / "run")
    changes = {"data.train": str(world.train), "out": out, "data.batch_size": 8, "engine.steps": 1}
    assert pretrain(replace(load_config("demo"), changes | LAYERS | {"engine.device": "cpu"})) == 0
    return out


def verbs(run: str, world) -> dict[str, tuple[list[str], list[str]]]:
    """Each verb that writes results: its command, and the files that it leaves below --out."""
    data, device = ["--data", str(world.heldout)], ["--device", "cpu"]
    splits = ["--train", str(world.train), "--test", str(world.heldout), "--epochs", "1", "--num-windows", "1"]
    similarities = [f"plots/similarity-{query}-video.png" for query in ("audio", "text")]
    return {
        "retrieve": (["retrieve", run, *data, "--num-windows", "1", *device], [*similarities, "retrieval.json"]),
        "probe": (["probe", run, *splits, *device], ["probe-video.json"]),
        "plot": (["plot", run], ["plots/loss.png", "plots/monitors.png"]),
        "visualize": (
            ["visualize", run, *data, "--figure", "similarity", *device],
            ["similarity.csv", "similarity.png"],
        ),
        "report": (["report", run], ["report.html"]),
    }


VERBS = ("retrieve", "probe", "plot", "visualize", "report")


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("verb", VERBS)
def test_results_go_to_out_and_nothing_to_the_run(run, world, tmp_path, capsys, verb):
    argv, files = verbs(run, world)[verb]
    before = sorted(path for path in Path(run).rglob("*"))
    out = tmp_path / "new" / "folder"
    assert main([*argv, "--out", str(out / "report.html" if verb == "report" else out)]) == 0
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(files)
    assert sorted(path for path in Path(run).rglob("*")) == before
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(run, world, monkeypatch, capsys, verb):
    monkeypatch.setattr(results.tempfile, "TemporaryFile", read_only)  # whoever tests may write everywhere
    for work in (
        "retrieve.load_run",
        "probe.read_tower",
        "plot.plot_run",
        "visualize.read_manifest",
        "report._read_run",
    ):
        monkeypatch.setattr(f"vatt_engine.tasks.{work}", pytest.fail)
    assert main(verbs(run, world)[verb][0]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    where = f"{run}/plots" if verb == "visualize" else run
    assert said.err == (
        f"vatt {verb}: {where} must be a folder that can be written, got Read-only file system. "
        "Name another one with --out.\n"
    )


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "plot"])
def test_results_are_printed_when_the_disk_is_full_at_the_end(run, world, tmp_path, monkeypatch, capsys, verb):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    (Path(run) / "retrieval.json").write_text(json.dumps({"tasks": {"text -> video": {"R@1": 33.3}}}))
    monkeypatch.setattr(results, "write_text", full)
    argv, files = verbs(run, world)[verb]
    assert main([*argv, "--out", str(tmp_path / "report.html" if verb == "report" else tmp_path)]) == 2
    said = capsys.readouterr()
    lost = next(name for name in files if not name.endswith(".png"))
    assert f"vatt {verb}: {tmp_path / lost} must be written, got: No space left on device.\n" in said.err
    if verb == "visualize":
        rows = list(csv.DictReader(io.StringIO(said.out.partition(str(tmp_path))[0])))
        assert {row["pair"] for row in rows} == {"video-text", "video-audio"}
    else:
        assert {"retrieve": "text -> video", "probe": "low rank", "report": "33.3"}[verb] in said.out
        assert "also in" not in said.out


def test_a_finetuning_prints_its_evaluation_when_it_cannot_keep_it(world, tmp_path, monkeypatch, capsys):
    def full(path, text):
        if path.name == "evaluation.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr(results, "write_text", full)
    changes = {"data.train": str(world.train), "test": str(world.heldout), "out": str(tmp_path / "tuned")}
    changes |= {"data.batch_size": 8, "engine.steps": 1, "engine.device": "cpu", "test_windows": 1}
    changes |= {"model.video.transformer.num_layers": 1}
    assert finetune.finetune(replace(load_config("demo", FinetuneConfig, FINETUNE_RECIPES), changes)) == 2
    said = capsys.readouterr()
    assert "top-1" in said.out
    assert "evaluation.json must be written, got: No space left on device" in said.err


def test_an_ablation_prints_its_table_when_it_cannot_keep_it(world, tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    values = {"training": "pre-trained + probe", "budget": "steps", "GFLOPs": 1.0, "HMDB51": 12.5}
    row = {"values": values, "spread": {}, "seeds": [values], "reasons": {}}
    monkeypatch.setattr(ablate, "_table", lambda config, base: {"rows": [row], "config": {}, "env": {}})
    monkeypatch.setattr(results, "write_text", full)
    assert main(["ablate", "demo", "--data", str(world.train), "--out", str(tmp_path / "cells")]) == 2
    said = capsys.readouterr()
    assert "12.5" in said.out
    assert "in no file" in said.out
    assert "ablation.csv must be written" in said.err


@pytest.mark.parametrize(
    "argv",
    [
        ["data", "check", "{world}", "--out", "{out}.jsonl"],
        ["data", "import", "ucf101", "--media", ".", "--out", "{out}"],
        ["convert", "{run}", "{out}"],
        ["prepare", "{world}", "{out}"],
        ["demo-data", "{out}"],
        ["ablate", "demo", "--data", "{world}", "--out", "{out}"],
        ["pretrain", "demo", "--data.train", "{world}", "--out", "{out}"],
    ],
    ids=lambda argv: " ".join(argv[:2]),
)
def test_other_verbs_refuse_before_the_work_too(run, world, tmp_path, monkeypatch, capsys, argv):
    monkeypatch.setattr(results.tempfile, "TemporaryFile", read_only)
    out = tmp_path / "out"
    places = {"world": str(world.heldout), "run": run, "out": str(out)}
    assert main([word.format(**places) for word in argv]) == 2
    said = capsys.readouterr()
    folder = tmp_path if argv[1] == "check" else out  # that command writes a file, in a folder that exists
    assert f"{folder} must be a folder that can be written, got Read-only file system." in said.err
    assert said.out == ""
    assert not out.exists()


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file must be a folder that can be written, got a file\."):
        check_writable(tmp_path / "file", "vatt probe")
    with pytest.raises(ConfigError, match=f"got a path through the file {tmp_path / 'file'}"):
        check_writable(tmp_path / "file" / "below" / "it", "vatt probe")
    check_writable(tmp_path / "new" / "folder", "vatt probe")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_write_permission():
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()
    folder.chmod(0o555)
    try:
        if user == 0:  # whom no permission stops
            os.seteuid(65534)
        with pytest.raises(ConfigError, match="got Permission denied"):
            Results(folder, "vatt probe")
    finally:
        os.seteuid(user)
        folder.rmdir()


# ---------------------------------------------------------------------------------------------- the wrong kind of run


@pytest.fixture
def tuned(tmp_path) -> str:
    """What shows a folder to be a run of `vatt finetune`."""
    config = load_config("demo", FinetuneConfig, FINETUNE_RECIPES)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.yaml").write_text(dump_yaml(to_dict(config)))
    return str(tmp_path / "tuned")


def test_a_finetuned_run_is_named_where_a_pretrained_one_is_needed(tuned, run, world, capsys):
    data = ["--data", str(world.heldout)]
    for argv in (["retrieve", tuned, *data], ["visualize", tuned, *data, "--figure", "similarity"]):
        assert main(argv) == 2
        message = (
            f"{tuned}: the run must be one of `vatt pretrain`, got one of `vatt finetune`: a classifier on one tower"
        )
        assert message in capsys.readouterr().err
    for argv in (
        ["pretrain", "--resume", tuned],
        ["pretrain", f"{tuned}/config.yaml"],
        ["ablate", f"{tuned}/config.yaml"],
    ):
        assert main(argv) == 2
        message = "init must be of a config for `vatt pretrain`, got one of `vatt finetune`. Use that command."
        assert message in capsys.readouterr().err
    assert main(["finetune", "--resume", run]) == 2
    message = "heldout must be of a config for `vatt finetune`, got one of `vatt pretrain`. Use that command."
    assert message in capsys.readouterr().err


def test_a_finetuned_run_becomes_a_model(world, tmp_path):
    changes = {"data.train": str(world.train), "out": str(tmp_path / "tuned"), "data.batch_size": 8}
    changes |= {"engine.steps": 1, "engine.device": "cpu", "model.video.transformer.num_layers": 1}
    assert finetune.finetune(replace(load_config("demo", FinetuneConfig, FINETUNE_RECIPES), changes)) == 0
    assert main(["convert", str(tmp_path / "tuned"), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_folder_of_an_ablation_or_a_model_is_named(tmp_path, world, capsys):
    cells, model = tmp_path / "cells", tmp_path / "model"
    cells.mkdir()
    (cells / "ablation.json").write_text("{}")
    save_pretrained(create_model("vatt_tiny", **LAYERS_OF_MODEL), model)
    data, splits = ["--data", str(world.heldout)], ["--train", str(world.train), "--test", str(world.heldout)]
    for argv, text in (
        (["retrieve", str(cells), *data], "got the folder of an ablation, whose runs are the folders in it."),
        (["probe", str(cells), *splits], "got the folder of an ablation, whose runs are the folders in it."),
        (["pretrain", "--resume", str(cells)], "got the folder of an ablation, whose runs are the folders in it."),
        (["pretrain", "--resume", str(model)], "got a model's folder, which has none."),
        (["report", str(model)], "got a model's folder, which has none."),
        (["plot", str(model)], "metrics must be a readable file of a run, got No such file or directory."),
        (["probe", str(model), *splits, "--modality", "audio", "--device", "cpu", "--epochs", "0"], "epochs must be"),
    ):
        assert main(argv) == 2, argv
        assert text in capsys.readouterr().err, argv


LAYERS_OF_MODEL = {name.removeprefix("model."): value for name, value in LAYERS.items()}


def test_a_tower_that_a_model_lacks_has_its_article(tmp_path, capsys):
    save_pretrained(create_model("vit_base", **{"video.transformer.num_layers": 1}), tmp_path / "video")
    argv = ["probe", str(tmp_path / "video"), "--modality", "audio", "--train", "a.jsonl", "--test", "b.jsonl"]
    (tmp_path / "a.mp4").write_text("")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"path": "a.mp4", "label": 1}\n')
    argv[-3], argv[-1] = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert main(argv) == 2
    assert "the model must have an audio tower, got the video encoder." in capsys.readouterr().err


def test_labels_of_several_classes_are_named_as_such():
    samples = [Sample(index=0, id=0, path=Path("a.mp4"), line=1), Sample(1, 1, Path("b.mp4"), label=(3, 5), line=2)]
    figure = VisualizeConfig(runs=("run",), data="set.jsonl", figure="tsne-classes")
    with pytest.raises(ConfigError, match=r"must have one label for a clip, got several for each, \[3, 5\] on line 2"):
        choose(samples, figure)
    with pytest.raises(ConfigError, match="must have one label for a clip, got none"):
        choose(samples[:1], figure)


def test_a_damaged_newest_checkpoint_is_said_beside_the_results(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    step = next((copy / "checkpoints").iterdir())
    shutil.copytree(step, step.with_name("step-00000009"))
    with torch.inference_mode():
        load_run(copy, "cpu")
    said = capsys.readouterr()
    assert "step-00000009: skipped" in said.err
    assert said.out == ""
