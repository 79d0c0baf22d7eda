"""The drop-rate ablation on a small world: cells, the table in three forms, going on, missing data."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tasks.test_pretrain import SMALL

from vatt_engine.analysis.ablation import shown
from vatt_engine.analysis.flops import paper_flops
from vatt_engine.cli import main
from vatt_engine.data.demo import make_world
from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.schema import ConfigError, dump_yaml, replace, to_dict
from vatt_engine.tasks import ablate as task
from vatt_engine.tasks.ablate import AblateConfig, ablate
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.finetune import finetune
from vatt_engine.tasks.pretrain import pretrain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    world = make_world(folder / "world", num_train=16, num_heldout=6, num_threads=2)
    config = replace(load_config("demo"), SMALL | {"data.train": str(world.train), "engine.log_every": 1})
    (folder / "small.yaml").write_text(dump_yaml(to_dict(config)))
    return folder


@pytest.fixture
def here(monkeypatch):
    """Train in this process, and note what was trained."""
    trained = []

    def start(run, folder):
        trained.append((folder.name, run.engine.steps))
        job = {"pretrain": pretrain, "finetune": finetune}[run.verb]
        assert job(run, resume=(folder / "config.yaml").exists()) == 0

    monkeypatch.setattr(task, "_start", start)
    return trained


def options(folder: Path, out: str, **changes) -> AblateConfig:
    world = folder / "world"
    sets = {"probes": (f"HMDB51={world}/train.jsonl,{world}/heldout.jsonl", f"UCF101={world}/train.jsonl,none.jsonl")}
    sets |= {"retrievals": (f"demo={world}/heldout.jsonl",), "epochs": 2, "num_windows": 1, "steps": 4}
    sets |= {"drop_rates": (0.5, 0.0), "config": str(folder / "small.yaml"), "out": str(folder / out)}
    return AblateConfig(**sets | changes)


@pytest.mark.slow
def test_cells_table_and_what_is_missing(folder, here):
    config = options(folder, "equal", equal_time=False)
    rows = ablate(config)["rows"]
    assert here == [("drop-0.5-steps-48px-seed0", 4), ("drop-0-steps-48px-seed0", 4)]
    values = [row["values"] for row in rows]
    assert [(row["drop %"], row["budget"], row["steps"]) for row in values] == [(50, "steps", 4), (0, "steps", 4)]
    for row, keep in zip(values, (0.5, 1.0)):
        run = load_config(str(folder / "equal" / f"drop-{row['drop %'] / 100:g}-steps-48px-seed0" / "config.yaml"))
        assert run.model.video.drop_token.keep_rate == run.model.audio.drop_token.keep_rate == keep
        assert (run.schedule.total_steps, run.schedule.warmup_steps) == (4, 1)
        assert row["paper GFLOPs"] == paper_flops(run.model, candidates=5) / 1e9
        assert 0 <= row["HMDB51"] <= 100
        assert row["demo"] == 100.0  # R@10 among six
        assert row["ESC50"] is row["UCF101"] is row["MSR-VTT"] is None
    assert values[0]["GFLOPs"] < values[1]["GFLOPs"]
    reasons = rows[0]["reasons"]
    assert reasons["ESC50"] == "no ESC50 in --probes"
    assert "none.jsonl" in reasons["UCF101"]
    with (folder / "equal" / "ablation.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["HMDB51"]) for row in read] == [row["HMDB51"] for row in values]
    assert [row["ESC50"] for row in read] == ["", ""]
    assert json.loads((folder / "equal" / "ablation.json").read_text())["rows"] == rows
    assert (folder / "equal" / "ablation.png").stat().st_size > 5_000

    assert ablate(config)["rows"] == rows  # nothing is trained or probed again
    assert len(here) == 2
    (folder / "equal" / "drop-0-steps-48px-seed0" / "cell.json").unlink()
    assert ablate(config)["rows"][1]["values"]["HMDB51"] == values[1]["HMDB51"]
    assert len(here) == 2
    other = (folder / "small.yaml").read_text().replace("lr: 0.001", "lr: 0.002")
    (folder / "other.yaml").write_text(other)
    with pytest.raises(
        ConfigError, match=r"drop-0\.5-steps-48px-seed0: the cell must be of the same settings, got another's"
    ):
        ablate(dataclasses.replace(config, config=str(folder / "other.yaml")))


@pytest.mark.slow
def test_seeds_frame_sizes_and_baselines(folder, here):
    world, out = folder / "world", folder / "seeds"
    sets = {"probes": tuple(f"{name}={world}/train.jsonl,{world}/heldout.jsonl" for name in ("MOTION", "BEAT/audio"))}
    sets |= {"resolutions": (32,), "drop_rates": (0.5,), "seeds": 2, "scratch_lrs": (1e-3, 1e-4), "equal_time": False}
    config = options(folder, "seeds", steps=2, **sets)
    rows = ablate(config)["rows"]
    classifiers = [f"{name}-lr{lr}" for name in ("MOTION", "BEAT") for lr in ("0.001", "0.0001")]
    assert here == [(name, 2) for seed in "01" for name in (f"drop-0.5-steps-32px-seed{seed}", *classifiers)]

    def found(path: str, *keys) -> list[float]:
        values = []
        for seed in range(2):
            value = json.loads((out / path.format(seed)).read_text())
            for key in keys:
                value = value[key]
            values.append(value)
        return values

    probed, random, scratch = rows
    cell = "drop-0.5-steps-32px-seed{}"
    for column, modality in (("MOTION", "video"), ("BEAT", "audio")):
        files = {"pre-trained": (f"{cell}/probe-{modality}.json", "rows", 0, "top-1")}
        files |= {"random": (f"{cell}/probe-{modality}-untrained.json", "rows", 0, "top-1")}
        by_rate = [
            found(f"scratch-32px-seed{{}}/{column}-lr{lr}/evaluation.json", "metrics", "top-1")
            for lr in ("0.001", "0.0001")
        ]
        expected = (found(*files["pre-trained"]), found(*files["random"]), [max(pair) for pair in zip(*by_rate)])
        for row, values in zip(rows, expected):
            assert [one[column] for one in row["seeds"]] == values
            assert row["values"][column] == pytest.approx(sum(values) / 2)
            assert row["spread"][column] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert probed["values"]["demo"] == sum(found(f"{cell}/retrieval.json", "tasks", "text -> video", "R@10")) / 2
    assert random["values"]["demo"] == 100.0  # ten of six
    assert scratch["values"]["demo"] is None
    assert scratch["reasons"]["demo"] == "class labels train no captions"
    seeds = [load_config(str(out / cell.format(seed) / "config.yaml")) for seed in range(2)]
    assert [run.engine.seed for run in seeds] == [seeds[0].engine.seed, seeds[0].engine.seed + 1]
    assert seeds[0].model.video.frame_size == (32, 32)
    with (out / "ablation.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["MOTION sd"]) for row in read] == [row["spread"]["MOTION"] for row in rows]
    value, spread = probed["values"]["MOTION"], probed["spread"]["MOTION"]
    assert shown(rows)[0]["MOTION"] == f"{value:.1f} ± {spread:.1f}"

    for name in ("cell.json", "BEAT-lr0.001/evaluation.json"):  # stopped before the evaluation
        (out / "scratch-32px-seed1" / name).unlink()
    assert ablate(config)["rows"] == rows
    assert here[10:] == [("BEAT-lr0.001", 2)]


@pytest.mark.slow
def test_equal_time_gives_the_faster_more_steps(folder, here, monkeypatch):
    costs = task._costs

    def timed(run, cell):
        return costs(run, cell) | {"clips/s": 30.0 + cell.seed if cell.drop_rate else 20.0}

    monkeypatch.setattr(task, "_costs", timed)
    config = options(folder, "time", probes=(), retrievals=())
    values = [row["values"] for row in ablate(config)["rows"]]
    assert here == [
        ("drop-0.5-steps-48px-seed0", 4),
        ("drop-0-steps-48px-seed0", 4),
        ("drop-0.5-time-48px-seed0", 6),
    ]
    assert [(row["drop %"], row["budget"], row["steps"]) for row in values[2:]] == [(50, "time", 6), (0, "time", 4)]
    rows = ablate(dataclasses.replace(config, seeds=2))["rows"]  # the first seed's cells stay what they are
    assert here[3:] == [(name.replace("seed0", "seed1"), steps) for name, steps in here[:3]]
    assert [row["values"]["clips/s"] for row in rows] == [30.5, 20.0, 30.5, 20.0]


def test_a_cell_goes_on_in_a_process_of_its_own(folder, capfd):
    part = replace(load_config(str(folder / "small.yaml")), {"out": str(folder / "real" / "drop-0.5-steps-48px-seed0")})
    changes = {f"model.{m}.drop_token.keep_rate": 0.5 for m in ("video", "audio")}
    changes |= {"engine.steps": 2, "schedule.total_steps": 4, "schedule.warmup_steps": 1}
    pretrain(replace(part, changes))
    shutil.rmtree(Path(part.out) / "model")
    flags = ["--out", str(folder / "real"), "--drop-rates", "0.5", "--steps", "4", "--equal-time", "false"]
    assert main(["ablate", str(folder / "small.yaml"), *flags]) == 0
    out, err = capfd.readouterr()
    assert "resuming after step 2" in err
    assert "HMDB51 is empty: no HMDB51 in --probes" in out
    assert load_latest(part.out).step == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--drop-rates", "1.0"], "drop_rates must be different numbers in [0, 1), got (1.0,)"),
        (["--drop-rates", "0.5", "0.5"], "drop_rates must be different numbers"),
        (["--probes", "HMDB51=a"], "probes must be written NAME=TRAIN"),
        (["--retrievals", "x"], "retrievals must be written NAME=MANIFEST, got 'x'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--resolutions", "48", "48"], "resolutions must be different numbers above 0, got (48, 48)"),
        (["--scratch-lrs", "0.0"], "scratch_lrs must be different numbers above 0, got (0.0,)"),
        (["--probes", "A/text=a,b"], "probes must be written NAME=TRAIN"),
    ],
)
def test_refuses(capsys, flags, message):
    assert main(["ablate", "demo", *flags]) == 2
    assert message in capsys.readouterr().err
