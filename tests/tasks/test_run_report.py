"""The page of real runs: their own numbers, their own clips."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import pytest

from vatt_engine.cli import main
from vatt_engine.data.demo import make_world
from vatt_engine.schema import ConfigError, dump_yaml, replace, to_dict
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.finetune_config import FINETUNE_RECIPES
from vatt_engine.tasks.pretrain import pretrain
from vatt_engine.tasks.report import ReportConfig, report


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_train=8, num_heldout=8, num_threads=2)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> tuple[str, str]:
    first = str(tmp_path_factory.mktemp("runs") / "first")
    changes = {"data.train": str(world.train), "data.batch_size": 8, "engine.steps": 1, "engine.device": "cpu"}
    layers = {f"model.{modality}.transformer.num_layers": 1 for modality in ("video", "audio", "text")}
    assert pretrain(replace(load_config("demo"), changes | layers | {"out": first})) == 0
    (Path(first) / "retrieval.json").write_text(json.dumps({"tasks": {"text -> video": {"R@1": 33.3}}}))
    second = f"{first}-<b>second<b>"
    shutil.copytree(first, second)
    return first, second


def test_the_page_of_two_runs(runs, world, tmp_path, capsys):
    out = tmp_path / "pages" / "report.html"
    flags = ["--data", str(world.heldout), "--out", str(out), "--num-queries", "3"]
    assert main(["report", *runs, *flags]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;second&lt;b&gt;" in text
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text) == []
    assert text.count('<div class="clips">') == 2 * 3
    assert text.count('<div class="clip') - text.count('<div class="clips">') == 2 * 3 * 5
    captions = [json.loads(line)["captions"][0]["text"] for line in world.heldout.read_text().splitlines()]
    assert sum(f"<td>{caption}</td>" in text for caption in captions) == 3
    assert text.count('<td class="number">33.3</td>') == 2
    plot = (Path(runs[0]) / "plots" / "loss.png").read_bytes()
    assert text.count(base64.b64encode(plot).decode()) == 2


def table_of(text: str, title: str) -> list[list[str]]:
    """The rows of the section's table, its head first."""
    section = text.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]


def test_probes_fine_tuning_and_ablations(runs, world, tmp_path):
    run, tuned, ablation = (tmp_path / name for name in ("run", "tuned", "ablation"))
    shutil.copytree(runs[0], run)
    for name, untrained, top in (("probe-video", False, 71.5), ("probe-video-untrained", True, 14.25)):
        rows = [{"split": "1", "classifier": "low rank", "top-1": top}]
        (run / f"{name}.json").write_text(json.dumps({"modality": "video", "untrained": untrained, "rows": rows}))
    for folder in (tuned, ablation):
        folder.mkdir()
    settings = replace(FINETUNE_RECIPES["demo"](), {"model.video.drop_token.keep_rate": 0.75})
    (tuned / "config.yaml").write_text(dump_yaml(to_dict(settings)))
    (tuned / "metrics.jsonl").write_text('{"step": 5, "total": 1.5}\n')
    evaluation = {"step": 5, "data": "test.jsonl", "num_windows": 4, "num_crops": 3, "metrics": {"top-1": 62.5}}
    (tuned / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [
        {"values": {"training": "a", "GFLOPs": 188.12345, "ESC50": None, "A": 80.0}, "spread": {"A": 1.26}},
        {"values": {"training": "b", "GFLOPs": None, "ESC50": None, "A": 20.0}},
    ]
    table = {"rows": rows, "config": {"config": "vatt-mbs"}, "env": {"commit": "c0ffee"}}
    (ablation / "ablation.json").write_text(json.dumps(table))
    picture = (run / "plots" / "loss.png").read_bytes()[:99]
    (ablation / "ablation.png").write_bytes(picture)

    names = [str(folder) for folder in (run, tuned, ablation)]
    text = report(ReportConfig(runs=tuple(names), data=str(world.heldout), num_queries=1)).read_text()
    assert table_of(text, "Probes") == [
        ["run", "task", "weights", "split", "classifier", "top-1"],
        [names[0], "video", "random", "1", "low rank", "14.2"],
        [names[0], "video", "trained", "1", "low rank", "71.5"],
    ]
    assert table_of(text, "Fine-tuning") == [
        ["run", "data", "step", "num_windows", "num_crops", "top-1"],
        [names[1], "test.jsonl", "5", "4", "3", "62.5"],
    ]
    assert table_of(text, "Ablation") == [
        ["run", "training", "GFLOPs", "A"],
        [names[2], "a", "188.1", "80.0 ± 1.3"],
        [names[2], "b", "-", "20.0"],
    ]
    facts = {row[0]: row[1:] for row in table_of(text, "Runs")}
    assert facts["model"] == ["vatt_tiny", "vatt_tiny", "vatt-mbs"]
    assert facts["init"] == ["-", "from scratch", "-"]
    assert facts["DropToken keeps"] == ["-", "0.75", "-"]
    assert facts["commit"][2] == "c0ffee"
    assert base64.b64encode(picture).decode() in text


def test_without_a_manifest_there_are_no_examples(runs):
    path = report(ReportConfig(runs=runs[:1]))
    assert path == Path(runs[0]) / "report.html"
    assert "Retrieval examples" not in path.read_text()


def test_bad_runs_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml: the config file must exist"):
        report(ReportConfig(runs=(str(tmp_path),)))
    with pytest.raises(ValueError, match=r"ReportConfig: runs must name different run folders, got a a\."):
        ReportConfig(runs=("a", "a"))
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (broken / "retrieval.json").write_text("{")
    with pytest.raises(ConfigError, match=r"retrieval\.json: the file must be JSON, got "):
        report(ReportConfig(runs=(str(broken),)))
