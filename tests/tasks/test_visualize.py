"""The paper's figures of tiny runs: the numbers behind them are of the clips that were asked for."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from vatt_engine.analysis.embeddings import tsne
from vatt_engine.cli import main
from vatt_engine.data.demo import make_world
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import read_manifest
from vatt_engine.models import from_pretrained
from vatt_engine.schema import ConfigError, replace
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.finetune import finetune
from vatt_engine.tasks.finetune_config import FINETUNE_RECIPES, FinetuneConfig
from vatt_engine.tasks.pretrain import pretrain
from vatt_engine.tasks.towers import load_run_config
from vatt_engine.tasks.visualize import VisualizeConfig, visualize

SHARED = {"num_layers": 2, "dim": 32, "ff_dim": 32, "num_heads": 2, "head_dim": 16, "dropout": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_train=8, num_heldout=12, num_threads=2)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> list[str]:
    """One modality-specific and one modality-agnostic run of a step."""
    found = []
    layers = {f"model.{modality}.transformer.num_layers": 1 for modality in ("video", "audio", "text")}
    agnostic = {f"model.shared.{name}": value for name, value in SHARED.items()}
    agnostic |= {"model.backbone": "agnostic", "model.video.pre_projection": True, "model.audio.pre_projection": True}
    for name, own in (("specific", layers), ("agnostic", agnostic)):
        changes = {"data.train": str(world.train), "data.batch_size": 8, "engine.steps": 1, "engine.device": "cpu"}
        changes["out"] = str(tmp_path_factory.mktemp("runs") / name)
        assert pretrain(replace(load_config("demo"), changes | own)) == 0
        found.append(changes["out"])
    return found


def table(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_classes(runs, world, tmp_path, capsys):
    out = tmp_path / "figures"
    flags = ["--data", str(world.heldout), "--figure", "tsne-classes", "--num-classes", "3", "--out", str(out)]
    assert main(["visualize", *runs, *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "tsne-classes.csv")
    rows = table(out / "tsne-classes.csv")
    labels = {json.loads(line)["path"]: json.loads(line)["label"] for line in world.heldout.read_text().splitlines()}
    assert {row["run"] for row in rows} == set(runs)
    assert len({row["class"] for row in rows}) == 3
    for row in rows:
        assert str(labels["heldout/" + row["clip"].rpartition("/")[2]]) == row["class"]
    first = (out / "tsne-classes.csv").read_bytes()
    assert main(["visualize", *runs, *flags]) == 0
    assert (out / "tsne-classes.csv").read_bytes() == first
    assert (out / "tsne-classes.png").stat().st_size > 5000


def test_classes_of_fine_tuned_runs_and_of_one_from_scratch(runs, world, tmp_path):
    tuned = []
    for name, init in zip(("specific", "agnostic", "scratch"), (*runs, "")):
        changes = {"data.train": str(world.train), "test": str(world.heldout), "data.batch_size": 8, "init": init}
        changes |= {"engine.steps": 1, "engine.device": "cpu", "test_windows": 1, "out": str(tmp_path / name)}
        assert finetune(replace(load_config("demo", FinetuneConfig, FINETUNE_RECIPES), changes)) == 0
        tuned.append(changes["out"])
    draw = {"data": str(world.heldout), "figure": "tsne-classes", "out": str(tmp_path)}
    rows = table(visualize(VisualizeConfig(runs=tuple(tuned), **draw))[1])
    samples = read_manifest(world.heldout)
    for run in tuned:
        own = [row for row in rows if row["run"] == run]
        assert [(row["clip"], row["class"]) for row in own] == [(str(s.path), str(s.label)) for s in samples]
        model = from_pretrained(Path(run) / "model").encoder.eval()
        batch_size = VisualizeConfig(runs=(run,), **draw).batch_size  # a row's last digits depend on it
        data = replace(load_run_config(Path(run)).data, {"num_windows": 1, "batch_size": batch_size})
        with Loader(samples, data, train=False) as loader, torch.inference_mode():
            features = torch.cat([model(batch.video, agg_only=True)[:, 0] for batch in loader])
        points = tsne([features], seed=0)
        assert [(float(row["x"]), float(row["y"])) for row in own] == [tuple(point) for point in points.tolist()]


def test_modalities_and_similarity(runs, world, tmp_path):
    for figure in ("tsne-modalities", "similarity"):
        paths = visualize(VisualizeConfig(runs=tuple(runs), data=str(world.heldout), figure=figure, out=str(tmp_path)))
        assert [path.name for path in paths] == [f"{figure}.png", f"{figure}.csv"]
    points = table(tmp_path / "tsne-modalities.csv")
    for space in ("tokens", "common space"):
        for modality in ("video", "audio", "text"):
            own = [row for row in points if (row["space"], row["modality"]) == (space, modality)]
            assert len(own) == len({(row["run"], row["sample"]) for row in own}) == 24
    bins = table(tmp_path / "similarity.csv")
    assert {(row["run"], row["pair"]) for row in bins} == {(r, p) for r in runs for p in ("video-text", "video-audio")}


def test_activation_of_every_layer_and_node(runs, world, tmp_path):
    out = {}
    for hook in ("mlp-input", "mlp-output"):
        config = VisualizeConfig(
            runs=(runs[1],), data=str(world.heldout), figure="activation", out=str(tmp_path / hook), hook=hook
        )
        out[hook] = table(visualize(config)[1])
        cells = {(row["modality"], row["layer"], row["node"]) for row in out[hook]}
        assert len(cells) == len(out[hook]) == 3 * SHARED["num_layers"] * SHARED["dim"]
    assert out["mlp-input"] != out["mlp-output"]


def test_what_cannot_be_drawn_is_refused(runs, world, tmp_path):
    rows = [json.loads(line) for line in world.heldout.read_text().splitlines()]
    for row in rows:
        row["path"], row["label"] = str(world.heldout.parent / row["path"]), None
    manifest = tmp_path / "unlabelled.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"the manifest must have one label for a clip, got none\."):
        visualize(VisualizeConfig(runs=(runs[0],), data=str(manifest), figure="tsne-classes"))
    with pytest.raises(ValueError, match=r"VisualizeConfig: runs must name a run folder, got none\."):
        VisualizeConfig(runs=(), data="x", figure="activation")
    with pytest.raises(ValueError, match=r"VisualizeConfig: runs must differ, got a a\."):
        VisualizeConfig(runs=("a", "a"), data="x", figure="activation")
