"""`vatt convert` on checkpoints of the official trainers: models that compute what TensorFlow did, runs that go on."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interop.official import FOLDERS, HEAD_DIMS, inputs, worst_error
from tasks.test_pretrain import world  # noqa: F401  (a fixture)

from vatt_engine.batch import Batch
from vatt_engine.data.words import Vocabulary
from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.engine.engine import Engine
from vatt_engine.engine.schedule import learning_rate
from vatt_engine.interop import read_tf_checkpoint
from vatt_engine.interop.tf_model import official_model
from vatt_engine.losses import ClassLoss
from vatt_engine.models import build_model, from_pretrained
from vatt_engine.schema import ConfigError, dump_yaml, replace, to_dict
from vatt_engine.tasks.convert import main
from vatt_engine.tasks.finetune import finetune
from vatt_engine.tasks.pretrain import PretrainLoss, pretrain
from vatt_engine.tasks.towers import load_run_config

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"word{number}" for number in range(36))]


def flags(name: str) -> list[str]:
    return ["--head-dim", *map(str, HEAD_DIMS[name])]


def converted(tmp_path: Path, name: str, to: str, *more: str) -> Path:
    out = tmp_path / f"{name}-{to}"
    assert main([str(FOLDERS / name), str(out), "--to", to, *flags(name), *more]) == 0
    return out


@pytest.mark.parametrize("name", HEAD_DIMS)
def test_a_model_computes_what_tensorflow_did(tmp_path, name, capsys):
    model = from_pretrained(converted(tmp_path, name, "model"))
    errors = worst_error(model, name)
    assert max(errors.values()) <= 2e-6, errors
    said = capsys.readouterr().err
    assert "step 4, " in said
    assert ("note: without --vocabulary" in said) == (name in ("tx", "ut"))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == {"tx": ["text.embedding.weight"], "ut": ["backbone.stems.text.embedding.weight"]}.get(name, [])


def test_the_vocabulary_goes_in_as_the_tokenizer(tmp_path, capsys):
    path = tmp_path / "howto100m_en.txt"
    path.write_text("\n".join(WORDS) + "\n")
    out = converted(tmp_path, "tx", "model", "--vocabulary", str(path))
    assert Vocabulary.load(out / "tokenizer.json").words == WORDS
    path.write_text("\n".join([*WORDS, "more"]) + "\n")
    with pytest.raises(ValueError, match="vocabulary must fit the 40 rows of the model's table, got 41 words"):
        converted(tmp_path, "ut", "model", "--vocabulary", str(path))
    with pytest.raises(ValueError, match="--vocabulary must be left out for vit, which reads no words"):
        converted(tmp_path, "vit", "model", "--vocabulary", str(path))
    with pytest.raises(ValueError, match="--vocabulary must be left out where SOURCE is no official"):
        main([str(out), str(tmp_path / "again"), "--vocabulary", str(path)])
    assert {path.name for path in tmp_path.iterdir()} == {"howto100m_en.txt", "tx-model"}


def test_a_config_stands_in_for_the_shapes(tmp_path):
    """The word count and the heads of both towers, which the file does not hold."""
    out = tmp_path / "out"
    assert main([str(FOLDERS / "tx"), str(out), "--config", str(FOLDERS / "tx" / "model.json")]) == 0
    assert max(worst_error(from_pretrained(out), "tx").values()) <= 2e-6
    with pytest.raises(ValueError, match="must fit vatt_tiny, got other variables for ") as e:
        main([str(FOLDERS / "tx"), str(tmp_path / "other"), "--config", "demo"])
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------ going on


def engine_of(run: Path) -> tuple[Engine, torch.nn.Module]:
    """The engine that goes on with a run, where every update is large enough to be seen."""
    config = replace(
        load_run_config(run), {"schedule.warmup_steps": 0, "engine.device": "cpu", "engine.precision": "fp32"}
    )
    model = build_model(config.model)
    loss = PretrainLoss(config.loss) if config.verb == "pretrain" else ClassLoss(config.loss)
    engine = Engine(model, loss, config.engine, config.optim, config.schedule, run_dir=run)
    engine.resume()
    return engine, model


def test_one_more_step_of_adam_is_keras(tmp_path):
    """Keras' formulas in float64 on the file's weights, moments and step, with the gradient of a fixed batch."""
    engine, model = engine_of(converted(tmp_path, "tx", "run"))
    given = inputs("tx")
    batch = Batch(video=given["video"], audio=given["audio"], text=given["text"][:2, None])
    found = official_model(read_tf_checkpoint(FOLDERS / "tx"), head_dim=HEAD_DIMS["tx"])
    weights, moments = dict(found.weights()), dict(found.moments())
    engine.step(batch)
    assert engine.finished == 5
    lr = learning_rate(4, engine.schedule, engine.peak)
    beta_1, beta_2, t = 0.9, 0.999, found.step + 1
    assert found.number("beta_2", 0) == np.float32(beta_2)
    rate = lr * math.sqrt(1 - beta_2**t) / (1 - beta_1**t)
    for name, parameter in model.named_parameters():
        before = weights[name].astype(np.float64)
        if name == "text.embedding.weight":
            assert np.array_equal(parameter.detach().numpy(), weights[name])
            continue
        gradient = parameter.grad.numpy().astype(np.float64)
        m = beta_1 * moments[f"{name}/exp_avg"] + (1 - beta_1) * gradient
        v = beta_2 * moments[f"{name}/exp_avg_sq"] + (1 - beta_2) * gradient**2
        wanted = before - rate * m / (np.sqrt(v) + 1e-7)
        # One rounding of the weight to float32, and a few of the step's own, whose terms may cancel.
        terms = beta_1 * np.abs(moments[f"{name}/exp_avg"]) + (1 - beta_1) * np.abs(gradient)
        allowed = 2.0**-23 * (np.abs(wanted) + 8 * rate * terms / (np.sqrt(v) + 1e-7))
        assert (np.abs(wanted - before) > allowed).any()
        assert (np.abs(parameter.detach().numpy() - wanted) <= allowed).all(), name


def test_one_more_step_of_sgd_is_keras(tmp_path):
    engine, model = engine_of(converted(tmp_path, "vit", "run"))
    batch = Batch(video=inputs("vit")["video"], label=torch.arange(len(inputs("vit")["video"])))
    found = official_model(read_tf_checkpoint(FOLDERS / "vit"), head_dim=HEAD_DIMS["vit"])
    weights, moments = dict(found.weights()), dict(found.moments())
    engine.step(batch)
    lr = learning_rate(4, engine.schedule, engine.peak)
    for name, parameter in model.named_parameters():
        velocity = 0.9 * moments[f"{name}/velocity"].astype(np.float64) - lr * parameter.grad.numpy().astype(np.float64)
        wanted = weights[name] + velocity
        allowed = 2.0**-23 * (np.abs(wanted) + 8 * np.abs(velocity))
        assert (np.abs(parameter.detach().numpy() - wanted) <= allowed).all(), name


@pytest.fixture
def run(tmp_path, world):  # noqa: F811
    """A run out of `tx`, shaped for the demo world's clips."""
    path = tmp_path / "howto100m_en.txt"
    path.write_text("\n".join(WORDS) + "\n")
    out = converted(tmp_path, "tx", "run", "--vocabulary", str(path))
    short = {"engine.steps": 5, "engine.device": "cpu", "data.batch_size": 4, "data.num_workers": 0}
    rates = {"data.fps": 10.0, "data.sample_rate": 2_000, "data.train": str(world.train)}
    return out, replace(load_run_config(out), short | rates)


def test_a_run_goes_on_from_the_official_step(run):
    out, config = run
    assert config.model.text.freeze_embedding
    before = load_latest(out).tensors["model"]["text.embedding.weight"]
    assert pretrain(config, resume=True) == 0
    after = load_latest(out)
    assert after.step == 5
    assert torch.equal(after.tensors["model"]["text.embedding.weight"], before)
    assert "model.text.embedding.weight/exp_avg" not in after.tensors["optimizer"]
    assert not from_pretrained(out / "model").word_embedding.weight.requires_grad


def test_a_recipe_does_not_thaw_the_word_vectors(run):
    """`vatt pretrain CONFIG --out RUN --resume` with a config that leaves it open: the checkpoint has trained none."""
    out, config = run
    assert pretrain(replace(config, {"model.text.freeze_embedding": None}), resume=True) == 0
    assert "model.text.embedding.weight/exp_avg" not in load_latest(out).tensors["optimizer"]


def test_a_run_out_of_a_models_folder_keeps_them_frozen(run, tmp_path):
    """Without moments nothing else tells that they are not trained."""
    out, config = run
    model, again = converted(tmp_path, "tx", "model"), tmp_path / "again"
    shutil.copyfile(out / "tokenizer.json", model / "tokenizer.json")
    assert main([str(model), str(again), "--to", "run"]) == 0
    config = replace(config, {"model.text.freeze_embedding": None, "out": str(again), "engine.steps": 1})
    assert pretrain(config, resume=True) == 0
    assert "model.text.embedding.weight/exp_avg" not in load_latest(again).tensors["optimizer"]


def test_frozen_vectors_need_their_words(run):
    out, config = run
    (out / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError, match=r"tokenizer\.json: the words of the frozen vectors must be given, got no such"
    ):
        pretrain(config, resume=True)


def test_a_fine_tuned_classifier_goes_on(tmp_path, world):  # noqa: F811
    out = converted(tmp_path, "wat", "run")
    rows = [json.loads(line) for line in Path(world.train).read_text().splitlines()]
    manifest = Path(world.train).with_name("sounds.jsonl")
    manifest.write_text("".join(json.dumps(row | {"label": [number % 5]}) + "\n" for number, row in enumerate(rows)))
    config = replace(
        load_run_config(out),
        {
            "data.train": str(manifest),
            "data.sample_rate": 2_000,
            "data.batch_size": 4,
            "engine.steps": 5,
            "engine.device": "cpu",
        },
    )
    assert finetune(config, resume=True) == 0
    assert load_latest(out).step == 5


# ------------------------------------------------------------------------------------------------ and back


@pytest.mark.parametrize("name", ["ut", "vit"])
def test_a_run_goes_back_to_tensorflow(tmp_path, name):
    """Through a run of ours every number of the official checkpoint comes back; through a model its weights do."""
    given = read_tf_checkpoint(FOLDERS / name)
    run, model = converted(tmp_path, name, "run"), converted(tmp_path, name, "model")
    assert main([str(run), str(tmp_path / "back"), "--to", "tensorflow"]) == 0
    back = read_tf_checkpoint(tmp_path / "back" / "ckpt-4")
    counter = "save_counter/.ATTRIBUTES/VARIABLE_VALUE"
    assert back.keys() == given.keys()
    assert all(np.array_equal(back[key], given[key]) for key in given.keys() - {counter})
    assert main([str(model), str(tmp_path / "weights"), "--to", "tensorflow"]) == 0
    weights = read_tf_checkpoint(tmp_path / "weights")
    assert not any(".OPTIMIZER_SLOT" in key for key in weights)
    assert weights["optimizer/iter/.ATTRIBUTES/VARIABLE_VALUE"] == 0


def test_a_fine_tuned_run_becomes_a_model(tmp_path):
    """The config of a run of `vatt finetune` is read as such."""
    run = converted(tmp_path, "vit", "run")
    assert main([str(run), str(tmp_path / "model")]) == 0
    assert max(worst_error(from_pretrained(tmp_path / "model"), "vit").values()) <= 2e-6


def test_a_bad_source_ends_with_one_line(tmp_path):
    folder = tmp_path / "ckpt"
    shutil.copytree(FOLDERS / "wat", folder)
    (folder / "ckpt-4.data-00000-of-00001").write_bytes(b"<html>")
    command = [sys.executable, "-m", "vatt_engine", "convert", str(folder), str(tmp_path / "out"), "--head-dim", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{folder}/ckpt-4.data-00000-of-00001: the data file must have the ")
    assert not (tmp_path / "out").exists()


def test_half_a_download_is_told_of(tmp_path):
    """A folder with the data file alone is a checkpoint that lacks its index, and no run without checkpoints."""
    folder = tmp_path / "ckpt"
    shutil.copytree(FOLDERS / "wat", folder)
    (folder / "ckpt-4.index").unlink()
    with pytest.raises(
        ValueError, match=r"must hold a checkpoint's \.index, got ckpt-4\.data-00000-of-00001 without one"
    ):
        main([str(folder), str(tmp_path / "out")])


def test_what_is_converted_already_is_not_converted(tmp_path):
    with pytest.raises(ValueError, match="--to must be another form than that of"):
        main([str(FOLDERS / "wat"), str(tmp_path / "out"), "--to", "tensorflow"])


def test_configs_of_runs_are_whole(tmp_path):
    """What is written as config.yaml is read back as it was, with the recipe of a classifier of that many classes."""
    for name in HEAD_DIMS:
        config = load_run_config(converted(tmp_path, name, "run"))
        assert config.out == str(tmp_path / f"{name}-run")
        assert dataclasses.replace(config, data=config.data) == config
        assert dump_yaml(to_dict(config)) == (tmp_path / f"{name}-run" / "config.yaml").read_text()
