"""Fine-tuning on a small real world: recipes, towers, losses that fall, mixup, views, resume."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tasks.test_pretrain import SMALL

from vatt_engine.batch import Batch
from vatt_engine.cli import main
from vatt_engine.data.demo import make_world
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import read_manifest
from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.engine.schedule import learning_rate
from vatt_engine.models import EncoderConfig, build_model, from_pretrained, model_config, save_pretrained, tower_config
from vatt_engine.models.embeddings import resample_table
from vatt_engine.schema import ConfigError, dump_yaml, replace, to_dict
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.finetune import _mixed, evaluate, finetune, mixup
from vatt_engine.tasks.finetune_config import FINETUNE_RECIPES, FinetuneConfig
from vatt_engine.tasks.pretrain import pretrain
from vatt_engine.tasks.towers import read_tower
from vatt_engine.testing import Sum, assert_same_sums, sum_budget, transformer_terms

GOLDEN = Path(__file__).parents[1] / "golden" / "g_schedules_optimizers.npz"
STEPS = {"engine.save_every": 2, "engine.log_every": 2, "engine.device": "cpu", "engine.keep_checkpoints": 9}
# What a tower of vatt_tiny adds up: a patch, and its layers on 75 tokens and AGG.
WHOLE = Sum(768 + transformer_terms(layers=4, dim=128, ff_dim=256, tokens=76))
TINY = {"num_layers": 1, "dim": 32, "ff_dim": 64, "num_heads": 2, "head_dim": 16, "dropout": 0.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_train=24, num_heldout=6, num_threads=2)


@pytest.fixture
def config(world, tmp_path) -> FinetuneConfig:
    changes = {f"model.video.transformer.{name}": value for name, value in TINY.items()}
    changes |= {"data.batch_size": 8, "engine.steps": 6, "schedule.warmup_steps": 2, "schedule.total_steps": 6}
    changes |= {"out": str(tmp_path / "run"), "data.train": str(world.train), "test": str(world.heldout)}
    return replace(FINETUNE_RECIPES["demo"](), STEPS | changes)


def sounds(world, folder: Path) -> str:
    """The world's sounds with one or two classes of four each."""
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    for row in rows:
        row["path"] = str(world.train.parent / row["path"])
        row["label"] = sorted({row["label"] % 4, row["label"] // 2})
    path = folder / "sounds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sound_config(config: FinetuneConfig, manifest: str) -> FinetuneConfig:
    tiny = model_config("vatt_tiny").audio
    model = EncoderConfig(name="tiny", modality="audio", audio=tiny, num_classes=4, classifier_dropout=0.0)
    changes = {"data.num_frames": 0, "data.num_samples": 4_800, "data.sample_rate": 12_000, "data.num_classes": 4}
    changes |= {"loss.label_smoothing": 0.0, "loss.balanced": True, "data.train": manifest, "test": manifest}
    changes |= {"model.audio.drop_token.keep_rate": 1.0}
    changes |= {f"model.audio.transformer.{name}": value for name, value in TINY.items()}
    return replace(dataclasses.replace(config, model=model), changes | {"mixup": 5.0})


def records(out: str, term: str = "total") -> list[dict]:
    """The records that have a term: those of training, unless another is asked for."""
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [one for one in found if term in one]


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # the specification, section 10
        ("kinetics400", (0.005, 2_500, 100_000, 64, 32, 320, 0, 48_000, 0.1, 0.0, 0.5, 400, 4, 3)),
        ("kinetics600", (0.005, 2_500, 100_000, 64, 32, 320, 0, 48_000, 0.1, 0.0, 0.5, 600, 4, 3)),
        ("kinetics700", (0.005, 2_500, 100_000, 64, 32, 320, 0, 48_000, 0.1, 0.0, 0.5, 700, 4, 3)),
        ("moments", (0.005, 2_500, 150_000, 64, 32, 320, 0, 48_000, 0.1, 0.0, 0.5, 339, 4, 3)),
        ("audioset", (0.2, 5_000, 50_000, 1024, 0, 224, 153_600, 24_000, 0.0, 5.0, 0.0, 527, 4, 1)),
        ("imagenet", (0.08, 2_500, 125_100, 512, 4, 384, 0, 48_000, 0.1, 0.0, 0.5, 1000, 1, 1)),
    ],
)
def test_recipes_are_the_papers(name, expected):
    config = FINETUNE_RECIPES[name]()
    config.check()
    data, schedule, part = config.data, config.schedule, getattr(config.model, config.modality)
    assert expected == (
        *(config.optim.lr, schedule.warmup_steps, schedule.total_steps, data.batch_size, data.num_frames),
        *(data.frame_size, data.num_samples, data.sample_rate, config.loss.label_smoothing, config.mixup),
        *(config.model.classifier_dropout, config.model.num_classes, config.test_windows, config.test_crops),
    )
    optim = config.optim
    assert (optim.name, optim.momentum, optim.weight_decay, optim.clip_norm) == ("sgd", 0.9, 0.0, 0.75)
    assert (optim.clip_prefix, schedule.final, schedule.shape) == ("model.encoder.", 0.0, "half_cosine")
    assert (part.drop_token.keep_rate, part.transformer.keep_rates, part.transformer.dropout) == (1.0, (), 0.1)
    assert config.engine.steps == schedule.total_steps
    if config.modality == "video":
        assert (part.num_frames, part.frame_size) == (data.num_frames, (data.frame_size,) * 2)
        assert part.grid == (data.num_frames // 4, data.frame_size // 16, data.frame_size // 16)


@pytest.mark.parametrize(("key", "name"), [("finetune_video", "kinetics400"), ("finetune_audio_paper", "audioset")])
def test_schedules_are_the_official_ones(key, name):
    golden, config = np.load(GOLDEN), FINETUNE_RECIPES[name]()
    for step, expected in zip(golden[f"{key}/steps"].tolist(), golden[f"{key}/lr"].tolist()):
        ours = learning_rate(step, config.schedule, config.optim.lr)
        assert ours == pytest.approx(0.0 if np.isnan(expected) else expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_towers_give_the_models_features(tmp_path, backbone, modality):
    changes = {"backbone": backbone, "shared_projection": 48} | {f"shared.{n}": v for n, v in TINY.items()}
    changes |= {f"{m}.pre_projection": backbone == "agnostic" for m in ("video", "audio")}
    model = build_model(replace(model_config("vatt_tiny"), changes)).eval()
    save_pretrained(model, tmp_path)
    tower = read_tower(str(tmp_path), modality)
    encoder = build_model(tower.config).eval()
    encoder.load_state_dict(tower.weights)
    signal = torch.randn(2, 8, 48, 48, 3) if modality == "video" else torch.randn(2, 9_600)
    features = getattr(model, f"encode_{modality}")(signal)
    assert torch.equal(encoder(signal, agg_only=True)[:, 0], features)
    assert_same_sums(encoder(signal)[:, 0], features, WHOLE)
    with pytest.raises(ValueError, match="must have an audio tower, got the video encoder"):
        tower_config(model_config("vit_base"), "audio")


def test_starts_from_a_run_at_another_size_and_resumes_bit_for_bit(config, world, tmp_path, capsys):
    pretrained = replace(load_config("demo"), SMALL | {"data.train": str(world.train), "out": str(tmp_path / "pre")})
    pretrain(replace(pretrained, {"engine.steps": 1}))
    weights = load_latest(pretrained.out).tensors["model"]
    config = replace(config, {"init": pretrained.out, "data.frame_size": 64, "data.num_frames": 4})
    config = replace(config, {"optim.lr": 0.0, "engine.steps": 1})
    assert finetune(config) == 0
    model = from_pretrained(Path(config.out) / "model")
    assert model.config.video.grid == (1, 8, 8)
    found = model.state_dict()
    same = [name for name in found if name.startswith("encoder.") and "tables" not in name]
    assert len(same) > 10
    assert [n for n in same if not torch.equal(found[n], weights["video." + n.removeprefix("encoder.")])] == []
    for axis, size in enumerate((1, 8, 8)):
        table = resample_table(weights[f"video.stem.position.tables.{axis}"], size)
        torch.testing.assert_close(found[f"encoder.stem.position.tables.{axis}"], table)
    again = read_tower(config.out, "video")  # a fine-tuned run is a start too, without its head
    assert (again.config.num_classes, again.config.video) == (0, model.config.video)
    assert {f"encoder.{name}" for name in again.weights} == {name for name in found if name.startswith("encoder.")}
    evaluation = json.loads((Path(config.out) / "evaluation.json").read_text())
    assert (evaluation["step"], evaluation["num_windows"], evaluation["num_crops"]) == (1, 4, 1)
    assert set(evaluation["metrics"]) == {"top-1", "top-5"}

    config = replace(config, {"optim.lr": 1e-3, "engine.steps": 5, "out": str(tmp_path / "straight"), "test": ""})
    finetune(config)
    part = replace(config, {"out": str(tmp_path / "part"), "engine.steps": 3})
    finetune(part)
    (tmp_path / "pre").rename(tmp_path / "gone")  # the run has its model by now
    assert main(["finetune", "--resume", part.out, "--engine.steps", "5", "--test", str(world.heldout)]) == 0
    straight, resumed = load_latest(config.out), load_latest(part.out)
    for group, tensors in straight.tensors.items():
        assert [name for name in tensors if not torch.equal(tensors[name], resumed.tensors[group][name])] == []
    assert "top-1" in capsys.readouterr().out


def test_learns_the_motions_it_sees(config):
    config = replace(config, {"engine.steps": 40, "schedule.total_steps": 40, "schedule.warmup_steps": 4, "test": ""})
    config = replace(config, {"optim.lr": 3e-3, "engine.save_every": 40, "data.augment.crop": "none"})
    assert finetune(replace(config, {"model.video.drop_token.keep_rate": 0.5})) == 0
    found = records(config.out)
    assert found[-1]["total"] < 0.8 * found[0]["total"]
    assert found[-1]["accuracy"] > found[0]["accuracy"]


def test_sounds_of_several_classes_with_mixup(config, world, tmp_path, capsys):
    config = sound_config(config, sounds(world, tmp_path))
    config = replace(config, {"test_crops": 1, "test_windows": 2, "engine.accumulate": 2})
    assert finetune(config) == 0
    assert "mAP" in capsys.readouterr().out
    evaluation = json.loads((Path(config.out) / "evaluation.json").read_text())
    assert (evaluation["samples"], evaluation["left_out"]) == (24, 0)
    straight = records(config.out)
    part = replace(config, {"out": str(tmp_path / "part"), "engine.steps": 4})
    finetune(part)
    finetune(replace(part, {"engine.steps": 6}), resume=True)
    assert [r["total"] for r in records(part.out)] == [r["total"] for r in straight]


def spectrogram_config(config: FinetuneConfig, manifest: str) -> FinetuneConfig:
    changes = {"input": "spectrogram", "patch": (4, 20), "patch_init": "dense", "num_samples": 16_000}
    changes |= {"sample_rate": 16_000}
    config = replace(sound_config(config, manifest), {f"model.audio.{name}": value for name, value in changes.items()})
    return replace(config, {"data.num_samples": 6_400, "data.sample_rate": 16_000, "mixup": 0.0})


def test_noise_is_the_official_one_for_waveforms_and_none_for_spectrograms(config, world, tmp_path):
    waveform = sound_config(config, sounds(world, tmp_path))
    assert waveform.fitted(waveform.model).data.augment.audio_noise is None  # the loader's official 0.01
    spectrogram = spectrogram_config(config, sounds(world, tmp_path))
    fitted = spectrogram.fitted(spectrogram.model)
    assert fitted.data.augment.audio_noise == 0.0
    asked = replace(spectrogram, {"data.augment.audio_noise": 0.02})
    assert asked.fitted(asked.model).data.augment.audio_noise == 0.02
    pretraining = load_config("vatt-bbs")
    changes = {"model.audio.input": "spectrogram", "model.audio.patch": (16, 5), "data.sample_rate": 24_000}
    with pytest.raises(ConfigError, match=r"data.sample_rate must equal model.audio.sample_rate 48000, got 24000"):
        replace(pretraining, changes).check_shapes()


def test_the_log_has_accuracy_as_trained_and_as_evaluated_side_by_side(config, world, tmp_path, capsys):
    """Of a spectrogram whose noise was asked for, with a note; its bands follow the clips' rate."""
    manifest = tmp_path / "motions.jsonl"
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    rows = [row | {"path": str(world.train.parent / row["path"])} for row in rows]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.num_classes": 0, "model.num_classes": 8, "loss.balanced": False, "data.augment.audio_noise": 0.01}
    assert finetune(replace(spectrogram_config(config, str(manifest)), changes)) == 0
    assert "note: data.augment.audio_noise 0.01 makes training's spectrograms unlike" in capsys.readouterr().out
    assert from_pretrained(tmp_path / "run" / "model").config.audio.sample_rate == 16_000
    clean = records(config.out, "clean_accuracy")
    assert [one["step"] for one in clean] == [0, 2, 4, 6]
    assert [one["step"] for one in records(config.out, "accuracy")] == [2, 4, 6]
    assert all(one["clean_accuracy"] * 8 % 1 == 0 for one in clean)  # a share of one batch


def test_mixup_mixes_sounds_and_labels_alike():
    batch = Batch(audio=torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0]]), label=torch.eye(3))
    mixed = mixup(batch, torch.tensor([1.0, 0.25, 0.5]))
    assert mixed.audio.tolist() == [[1.0, 0.0], [0.75, 0.5], [2.0, 3.0]]
    assert mixed.label.tolist() == [[1.0, 0.0, 0.0], [0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]
    large = Batch(audio=torch.ones(4_000, 1), label=torch.eye(4_000))
    shares = _mixed(large, 3, alpha=5.0, seed=0).label.diagonal()
    assert torch.equal(shares, _mixed(large, 3, alpha=5.0, seed=0).label.diagonal())
    assert not torch.equal(shares, _mixed(large, 4, alpha=5.0, seed=0).label.diagonal())
    assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares.var().item() == pytest.approx(1 / 44, rel=0.1)  # of Beta(5, 5)


def test_views_are_averaged_as_logits(config, world):
    """Against a loop over windows and crops by hand, and over two ranks' shares of nothing missing."""
    model, samples = build_model(config.fitted(config.model).model).eval(), read_manifest(world.heldout)
    data = replace(config.data, {"num_windows": 2, "num_crops": 3, "cache": "none"})
    with Loader(samples, data, train=False, batch_size=6) as loader, torch.inference_mode():
        means = torch.stack([model(batch.video).mean(0) for batch in loader])  # a batch is one sample's six views
    expected = 100 * (means.argmax(1) == torch.tensor([sample.label for sample in samples])).float().mean().item()
    result = evaluate(model, samples, data)
    assert result["metrics"]["top-1"] == pytest.approx(expected)
    assert (result["samples"], result["num_windows"], result["num_crops"]) == (6, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_classes": 0}, r"model\.num_classes must be at least 2, got 0"),
        ({"model.num_classes": 3}, r"label must be a class number in 0\.\.2 \(model\.num_classes 3\), got \d"),
        ({"data.num_classes": 4}, r"data\.num_classes must be model\.num_classes 8 where .*, else 0, got 4"),
        ({"data.num_classes": 8}, r"loss\.label_smoothing must be 0 here, got 0\.1"),
        ({"loss.balanced": True}, r"loss\.balanced must be off where data\.num_classes is 0, got True"),
        ({"data.num_frames": 0, "data.num_samples": 9}, r"data\.num_frames must be at least 1 for video, got 0"),
        ({"init": "nowhere"}, r"nowhere: the folder must be a run folder, with a config\.yaml, or .* got neither"),
        ({"data.train": ""}, "vatt finetune: --data.train must be the path of a manifest, got none"),
        ({"optim.clip_prefix": "encoder."}, r"clip_prefix must begin the name of model\.encoder\..*got 'encoder\.'"),
        ({"engine.strategy": "zero2"}, r"strategy must be single or ddp where optim\.clip_prefix is given, got zero2"),
    ],
)
def test_refuses(config, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(replace(config, changes))


def test_refuses_mixed_pictures_and_another_folder(config):
    with pytest.raises(ValueError, match="mixup must be a finite number >= 0, and 0 for video, got 5"):
        replace(config, {"mixup": 5.0})
    finetune(replace(config, {"engine.steps": 1, "test": ""}))
    with pytest.raises(ConfigError, match=f"Continue it with `vatt finetune --resume {config.out}`"):
        finetune(config)
    assert main(["finetune", "kinetics40"]) == 2


@pytest.mark.slow
def test_two_processes_are_one_run(config, tmp_path):
    """Steps and evaluation: each process sees its share of the views."""
    steady = {"model.video.transformer.dropout": 0.0, "optim.lr": 1e-4}
    config = replace(config, steady | {"engine.steps": 4, "test_windows": 2, "engine.log_every": 1})
    assert finetune(config) == 0
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(to_dict(config)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vatt_engine.cli"]
    command = [sys.executable, *torchrun, "finetune", str(path), "--out", str(tmp_path / "two")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(command, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    # A loss is the mean over eight samples of logits of about 3: of sums over a patch, a layer and a head.
    terms = 768 + transformer_terms(layers=1, dim=32, ff_dim=64, tokens=76) + 32
    rounding = sum_budget(Sum(2 * terms, 3 / 8**0.5))
    assert [r["total"] for r in records(str(tmp_path / "two"))] == pytest.approx(
        [r["total"] for r in records(config.out)], rel=0, abs=rounding
    )
    one, two = (json.loads((Path(out) / "evaluation.json").read_text()) for out in (config.out, tmp_path / "two"))
    assert one == two
    assert done.stdout.count("top-1") == 1
