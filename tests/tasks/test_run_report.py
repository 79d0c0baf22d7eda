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
from vatt_engine.schema import ConfigError, replace
from vatt_engine.tasks.config import load_config
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
