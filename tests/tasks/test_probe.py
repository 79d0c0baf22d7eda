"""The probes: both classifiers on separable features, files shared between splits, windows, a whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vatt_engine.cli import main
from vatt_engine.data.demo import make_world
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import read_manifest
from vatt_engine.models import build_model, from_pretrained, init, model_config, save_pretrained
from vatt_engine.tasks.probe import Features, ProbeConfig, logistic_regression, low_rank, probe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_train=16, num_heldout=8, num_threads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_pretrained(build_model(model_config("vatt_tiny")), folder)
    return str(folder)


def clouds(seed: int, spread: float = 1.0):
    draw = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(5, 16, generator=torch.Generator().manual_seed(9))
    y = torch.arange(60) % 5
    return centres[y] + spread * torch.randn(60, 16, generator=draw), y


@pytest.mark.parametrize("classify", [low_rank, logistic_regression])
def test_classifiers_learn_what_is_linear(classify):
    (x, y), (x_test, y_test) = clouds(0), clouds(1)
    options = {"epochs": 100} if classify is low_rank else {}
    scores = classify(x, y, x_test, 6, **options)
    torch.testing.assert_close(scores.sum(1), torch.ones(60))
    assert (scores.argmax(1) == y_test).float().mean() > 0.95
    assert scores[:, 5].max() < 0.2  # a class that training does not have
    assert torch.equal(scores, classify(x, y, x_test, 6, **options))
    shuffled = classify(x, y[torch.randperm(60)], x_test, 6, **options)
    assert (shuffled.argmax(1) == y_test).float().mean() < 0.6


def test_low_rank_is_the_official_step(monkeypatch):
    """Its loss: the mean cross-entropy and a tenth of the squares of the last matrix, none of the first."""
    (x, y), seen = clouds(0), {}
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (seen.setdefault("loss", loss.item()), backward(loss)))
    low_rank(x, y, x, 5, epochs=1)
    monkeypatch.undo()
    torch.manual_seed(1)
    first, last = init.linear(16, 128), init.linear(128, 5)
    init.glorot_normal_(first.weight, 16, 128)
    rows = torch.randperm(60)
    hidden = first(x[rows])
    hidden = hidden * (torch.nn.functional.dropout(torch.ones_like(hidden), 0.9))
    logits = last(hidden)
    loss = (logits.logsumexp(1) - logits.gather(1, y[rows][:, None])[:, 0]).mean() + 0.1 * (last.weight**2).sum()
    assert seen["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_features_are_the_towers_of_each_window(world, model, modality, monkeypatch):
    rates = {"fps": 10.0, "sample_rate": 12_000}
    config = ProbeConfig(run=model, train=("a",), test=("b",), modality=modality, device="cpu", **rates)
    features, samples = Features(config), read_manifest(world.heldout)
    x, used = features(samples[:5], 2)
    assert used == samples[:5]
    whole, data = from_pretrained(model), features.data
    with Loader(samples[:5], replace(data, num_windows=2), train=False) as loader, torch.inference_mode():
        rows = torch.cat([getattr(whole, f"encode_{modality}")(getattr(batch, modality)) for batch in loader])
    torch.testing.assert_close(x.flatten(0, 1), rows, atol=1e-5, rtol=1e-4)
    loaded = []
    monkeypatch.setattr(
        "vatt_engine.tasks.probe.build_loader", lambda s, *a, **k: loaded.append(len(s)) or Loader(s, a[0], train=False)
    )
    again, _ = features(samples[3:8], 2)
    assert loaded == [3]  # two of them are there
    assert torch.equal(again[:2], x[3:])


def test_probe_of_two_splits(world, model, tmp_path, capsys):
    (world.train.parent / "broken.mp4").write_text("not a video")
    bad = world.train.parent / "bad.jsonl"
    bad.write_text(world.heldout.read_text() + json.dumps({"path": "broken.mp4", "label": 1}) + "\n")
    flags = ["--train", str(world.train), str(bad), "--test", str(bad), str(world.train), "--epochs", "3"]
    assert main(["probe", model, *flags, "--num_windows", "2", "--fps", "10", "--device", "cpu"]) == 0
    assert "mean   logistic regression" in capsys.readouterr().out
    result = json.loads((Path(model) / "probe-video.json").read_text())
    assert [(row["split"], row["classifier"]) for row in result["rows"]] == [
        (split, name) for split in ("1", "2", "mean") for name in ("low rank", "logistic regression")
    ]
    by_name = [row["top-1"] for row in result["rows"] if row["classifier"] == "low rank"]
    assert by_name[2] == pytest.approx(sum(by_name[:2]) / 2)
    assert result["left_out"] == 1  # of one window, and of two
    config = ProbeConfig(run=model, train=(str(world.train),), test=(str(world.heldout),), untrained=True, epochs=1)
    assert Path(probe(config)["path"]).name == "probe-video-untrained.json"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "a", "--test", "a", "b"], "test must be as many manifests as train, at least 1, got 2 for 1"),
        (["--train", "a", "--test", "b", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--train", "a.jsonl", "--test", "b.jsonl"], "a.jsonl"),
    ],
)
def test_refuses(model, capsys, flags, message):
    assert main(["probe", model, *flags]) == 2
    assert message in capsys.readouterr().err


def test_refuses_captions_alone(world, model, tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text(json.dumps({"path": str(read_manifest(world.train)[0].path)}) + "\n")
    with pytest.raises(ValueError, match=r"none\.jsonl: label of .* must be a class number >= 0, got None"):
        probe(ProbeConfig(run=model, train=(str(path),), test=(str(path),)))
