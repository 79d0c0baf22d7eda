"""`vatt ablate CONFIG --drop-rates 0.75 0.5 0.25 0`: Tables 5 and 6, what dropped tokens save and what they cost."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from vatt_engine.analysis.ablation import COSTS, plot_costs, shown
from vatt_engine.analysis.flops import module_flops, paper_flops
from vatt_engine.analysis.report import table
from vatt_engine.data.shards import read_samples
from vatt_engine.engine.faults import TrainingStopped
from vatt_engine.lock import Lock
from vatt_engine.losses import ClassLossConfig
from vatt_engine.models import tower_config
from vatt_engine.output import say, write_text
from vatt_engine.schema import ConfigError, PathText, dump_yaml, replace, to_dict
from vatt_engine.tasks.config import PretrainConfig, RunConfig, load_config
from vatt_engine.tasks.finetune_config import FinetuneConfig
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.pretrain import config_hash
from vatt_engine.tasks.probe import ProbeConfig, labelled, probe
from vatt_engine.tasks.results import Results
from vatt_engine.tasks.retrieve import RetrieveConfig, retrieve
from vatt_engine.tasks.towers import load_run_config

PROBES = {"HMDB51": "video", "UCF101": "video", "ESC50": "audio"}  # the columns of Table 5
RETRIEVALS = ("YouCook2", "MSR-VTT")
PRETRAINED, RANDOM, SCRATCH = "pre-trained + probe", "random init + probe", "from scratch"


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Runs of `vatt pretrain` per frame size, drop rate, budget and seed, each probed and asked for text -> video.

    Every cell has a folder in OUT, and goes on or is left alone where it is there. OUT receives ablation.csv,
    ablation.json, which says why a value is missing, and ablation.png. A row holds means over the seeds.

    Args:
        config: recipe or YAML file of `vatt pretrain`, which the cells share.
        out: folder of the cells and the table.
        data: training set; "": the config's.
        batch_size: clips per batch; None: the config's.
        drop_rates: shares of the video and audio tokens that training drops.
        resolutions: frame sizes in pixels; none: the config's.
        seeds: runs of each cell, of the config's seed and those after it.
        steps: of the cells of equal steps; None: the config's. Those of equal time train as long as the slowest of
            them, by the measured clips per second.
        equal_time: train those too.
        scratch_lrs: adds two baselines: probes of random weights, and towers trained from scratch on the labels of each
            probe, for as many steps as pre-training, with these peak learning rates, of which each seed's best on the
            test set counts; none: no baselines.
        probes: NAME=TRAIN,TEST, or NAME/audio=TRAIN,TEST; HMDB51, UCF101 and ESC50 know their modality.
        retrievals: NAME=MANIFEST.
        fps: of the clips that are probed and retrieved; None: as trained.
        epochs: of the low-rank probe.
        num_windows: of a test file.
    """

    config: PathText
    out: PathText = "runs/ablation"
    data: PathText = ""
    batch_size: int | None = None
    drop_rates: tuple[float, ...] = (0.75, 0.5, 0.25, 0.0)
    resolutions: tuple[int, ...] = ()
    seeds: int = 1
    steps: int | None = None
    equal_time: bool = True
    scratch_lrs: tuple[float, ...] = ()
    probes: tuple[str, ...] = ()
    retrievals: tuple[str, ...] = ()
    fps: float | None = None
    epochs: int = 1000
    num_windows: int = 4

    def __post_init__(self) -> None:
        rates = self.drop_rates
        if not rates or not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"AblateConfig: drop_rates must be different numbers in [0, 1), got {rates}.")
        for name in ("resolutions", "scratch_lrs"):
            values = getattr(self, name)
            if not all(value > 0 for value in values) or len(set(values)) < len(values):
                raise ValueError(f"AblateConfig: {name} must be different numbers above 0, got {values}.")
        for name in ("steps", "batch_size", "epochs", "num_windows", "seeds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"AblateConfig: {name} must be at least 1, got {value}.")
        for name, count in (("probes", 2), ("retrievals", 1)):
            for word in getattr(self, name):
                title, _, files = word.partition("=")
                wrong = title.partition("/")[2] not in (("", "video", "audio") if name == "probes" else ("",))
                if wrong or not title or len(list(filter(None, files.split(",")))) != count:
                    form = "NAME=TRAIN,TEST" if count == 2 else "NAME=MANIFEST"
                    raise ValueError(f"AblateConfig: {name} must be written {form}, got {word!r}.")


class Column(NamedTuple):
    """A number that says how good a cell is: the modality is a probe's, "" a retrieval's; no files, no data."""

    title: str
    modality: str
    files: tuple[str, ...] = ()


class Cell(NamedTuple):
    """What is trained in one folder."""

    training: str
    frame_size: int
    drop_rate: float
    budget: str
    steps: int
    seed: int

    def run(self, config: AblateConfig, base: PretrainConfig) -> PretrainConfig:
        """Its pre-training; a baseline's is what it is compared with."""
        name = {PRETRAINED: f"drop-{self.drop_rate:g}-{self.budget}", RANDOM: "random", SCRATCH: "scratch"}
        folder = f"{name[self.training]}-{self.frame_size}px-seed{self.seed}"
        changes = {f"model.{m}.drop_token.keep_rate": 1.0 - self.drop_rate for m in ("video", "audio")}
        if self.frame_size != base.data.frame_size:
            changes |= {"data.frame_size": self.frame_size, "data.decode_size": None}
            changes |= {"model.video.frame_size": (self.frame_size, self.frame_size)}
        warmup = round(base.schedule.warmup_steps * self.steps / base.engine.steps)
        changes |= {"schedule.total_steps": self.steps, "schedule.warmup_steps": min(warmup, self.steps - 1)}
        changes |= {"engine.steps": self.steps, "engine.seed": base.engine.seed + self.seed}
        return replace(base, changes | {"out": str(Path(config.out) / folder)})


def main(argv: Sequence[str]) -> int:
    config = parse_flags(AblateConfig, argv, prog="vatt ablate", positional=("config",))
    try:
        result = ablate(config)
    except TrainingStopped as error:
        say(f"\n{error}")
        return 1
    print(table(shown(result["rows"])))
    for name, reason in result["rows"][0]["reasons"].items():
        print(f"{name} is empty: {reason}")
    where = "in no file" if result["unwritten"] else f"also in {config.out}/ablation.csv"
    print(f"top-1 of the low-rank probe, R@10 of text -> video, in percent; {where}")
    return 2 if result["unwritten"] else 0


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Train and evaluate what is not there yet, and write the table.

    Returns:
        {"rows": [{"values": the means over the seeds, "spread": their standard deviations where there are several
        seeds, "seeds": each one's values, "reasons": {column: why it is empty}}], "config", "env": where the first
        cell was trained, "unwritten": [files that could not be]}.

    Raises:
        ValueError: the config, a folder of another ablation or that cannot be written, or another process at work.
        TrainingStopped: a cell's training stopped; the same command goes on.

    >>> ablate(AblateConfig(config="demo", data="world/train.jsonl", drop_rates=(0.5, 0.0)))  # doctest: +SKIP
    """
    base = load_config(config.config)
    given = {"data.train": config.data or None, "data.batch_size": config.batch_size}
    base = replace(base, {key: value for key, value in given.items() if value is not None})
    for path in base.data.sources:  # what cannot train is refused before anything is written
        if not path:
            raise ConfigError("vatt ablate: --data must be the path of a manifest, got an empty one.")
        read_samples(path)
    lock = Lock(config.out, "vatt ablate")
    lock.check()
    results = Results(config.out, "vatt ablate")
    with lock:
        result = _table(config, base)
        _write(results, result)
    return result | {"unwritten": results.faults}


def _table(config: AblateConfig, base: PretrainConfig) -> dict[str, Any]:
    """All rows, trained and evaluated where they are not there yet."""
    steps = config.steps or base.engine.steps
    grid = list(product(config.resolutions or (base.data.frame_size,), config.drop_rates))
    cells = [Cell(PRETRAINED, size, rate, "steps", steps, 0) for size, rate in grid]
    baselines = [
        Cell(training, size, config.drop_rates[0], "steps", steps, 0)
        for training, size in product((RANDOM, SCRATCH), dict(grid) if config.scratch_lrs else ())
    ]
    rows = _rows(config, base, cells + baselines)
    rows, compared = rows[: len(cells)], rows[len(cells) :]
    if config.equal_time:
        speeds = [row["seeds"][0]["clips/s"] for row in rows]  # which further seeds leave as they are
        lengths = [round(steps * speed / min(speeds)) for speed in speeds]
        longer = [cell._replace(budget="time", steps=n) for cell, n in zip(cells, lengths) if n != steps]
        trained = iter(_rows(config, base, longer))
        same = [row | {"values": row["values"] | {"budget": "time"}} for row in rows]
        rows += [next(trained) if n != steps else row for row, n in zip(same, lengths)]
    result = {"rows": rows + compared, "config": dataclasses.asdict(config)}
    env = Path(cells[0].run(config, base).out) / "env.json"
    result["env"] = json.loads(env.read_text(encoding="utf-8"))
    return result


def _write(results: Results, result: dict[str, Any]) -> None:
    text, rows = io.StringIO(), result["rows"]
    lines = [row["values"] | {f"{name} sd": value for name, value in row["spread"].items()} for row in rows]
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    results.save_text("ablation.csv", text.getvalue())
    results.save_text("ablation.json", json.dumps(result, indent=1) + "\n")
    results.save("ablation.png", lambda path: plot_costs(rows, path))


def _rows(config: AblateConfig, base: PretrainConfig, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row per cell, over the seeds; all cells of a seed come before the next seed."""
    found = [[_cell(config, base, cell._replace(seed=seed)) for cell in cells] for seed in range(config.seeds)]
    rows = []
    for own in zip(*found):
        values, spread = dict(own[0]["values"]), {}
        for name in values:
            numbers = [one["values"][name] for one in own]
            if None in numbers:
                values[name] = None
            elif len(own) > 1 and isinstance(numbers[0], float):
                values[name] = statistics.mean(numbers)
                if name not in COSTS or name == "clips/s":
                    spread[name] = statistics.stdev(numbers)
        reasons = {name: reason for one in own for name, reason in one["reasons"].items()}
        rows.append({"values": values, "spread": spread, "seeds": [o["values"] for o in own], "reasons": reasons})
    return rows


def _cell(config: AblateConfig, base: PretrainConfig, cell: Cell) -> dict[str, Any]:
    """The values of one cell: trained unless its run is whole, evaluated unless they are there."""
    run = cell.run(config, base)
    folder = Path(run.out)
    asked = {name: getattr(config, name) for name in ("probes", "retrievals", "fps", "epochs", "num_windows")}
    asked |= {"scratch_lrs": config.scratch_lrs} if cell.training == SCRATCH else {}
    key = json.loads(json.dumps({"run": config_hash(run), "steps": cell.steps, **asked}))
    kept = folder / "cell.json"
    if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return found
    values = {"training": cell.training, "frame size": cell.frame_size}
    if cell.training == PRETRAINED:
        _train(run)
        values |= _costs(run, cell)
    else:
        values |= dict.fromkeys(COSTS[2:]) | {"steps": cell.steps if cell.training == SCRATCH else 0}
    reasons: dict[str, str] = {}
    for column in _columns(config):
        values[column.title] = None
        try:
            values[column.title] = _measured(config, base, cell, column)
        except (ValueError, OSError) as error:
            reasons[column.title] = str(error)
    row = {"key": key, "values": values, "reasons": reasons}
    Results(folder, "vatt ablate").save_text(kept.name, json.dumps(row, indent=1) + "\n")
    return row


def _train(run: RunConfig) -> None:
    """Unless what it leaves last is there."""
    folder = Path(run.out)
    if not (folder / {"pretrain": "model", "finetune": "evaluation.json"}[run.verb]).exists():
        _start(run, folder)
    elif config_hash(load_run_config(folder)) != config_hash(run):
        raise ConfigError(f"{folder}: the cell must be of the same settings, got another's. Choose another --out.")


def _start(run: RunConfig, folder: Path) -> None:
    """In a process of its own, so that its memory is its own; it goes on from its newest checkpoint."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.yaml")
    write_text(path, dump_yaml(to_dict(run)))
    child = subprocess.Popen([sys.executable, "-m", "vatt_engine", run.verb, str(path), "--resume"])
    try:
        code = child.wait()
    except KeyboardInterrupt:  # which the child has got too: it saves
        child.wait()
        raise
    if code:
        text = f"training must end with exit code 0, got {code}"
        raise TrainingStopped(f"{folder}: {text}. The same `vatt ablate` goes on from its newest checkpoint.")


def _costs(run: PretrainConfig, cell: Cell) -> dict[str, Any]:
    """What the cell cost: GFLOPs of a clip's forward pass in training by both counts, speed, memory."""
    lines = (Path(run.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if "clips_per_second" in (record := json.loads(line))]
    candidates = run.data.num_candidates
    return {
        "drop %": round(100 * cell.drop_rate, 3),
        "budget": cell.budget,
        "steps": run.engine.steps,
        "GFLOPs": sum(part.forward for part in module_flops(run.model, candidates=candidates)) / 1e9,
        "paper GFLOPs": paper_flops(run.model, candidates=candidates) / 1e9,
        "clips/s": statistics.median(record["clips_per_second"] for record in records),
        "peak MB": max(record.get("gpu_peak_mb", record["rss_mb"]) for record in records),
    }


def _columns(config: AblateConfig) -> list[Column]:
    """The paper's, and those that were given."""
    columns = {title: Column(title, modality) for title, modality in (PROBES | dict.fromkeys(RETRIEVALS, "")).items()}
    for is_probe, words in ((True, config.probes), (False, config.retrievals)):
        for word in words:
            name, _, files = word.partition("=")
            title, _, modality = name.partition("/")
            modality = modality or PROBES.get(title, "video") if is_probe else ""
            columns[title] = Column(title, modality, tuple(map(os.path.expanduser, files.split(","))))
    return list(columns.values())


def _measured(config: AblateConfig, base: PretrainConfig, cell: Cell, column: Column) -> float | None:
    """A cell's value in a column.

    Raises:
        ValueError, OSError: why there is none.
    """
    if not column.files:
        raise ConfigError(f"no {column.title} in --{'probes' if column.modality else 'retrievals'}")
    if cell.training == SCRATCH:
        return _from_scratch(config, base, cell, column)
    run = cell._replace(training=PRETRAINED).run(config, base).out
    options = {"run": run, "num_windows": config.num_windows, "fps": config.fps}
    if column.modality:
        train, test = column.files
        options |= {"train": (train,), "test": (test,), "modality": column.modality, "epochs": config.epochs}
        seed = {"seed": 1 + cell.seed, "untrained": cell.training == RANDOM}
        return probe(ProbeConfig(**options, **seed))["rows"][0]["top-1"]
    if cell.training == RANDOM:  # chance
        return 100.0 * min(1.0, 10 / len(read_samples(column.files[0])))
    found = retrieve(RetrieveConfig(**options, data=column.files[0]))["tasks"].get("text -> video", {}).get("R@10")
    if found is None:
        raise ConfigError(f"{column.files[0]} or the run has no captions")
    return found


def _from_scratch(config: AblateConfig, base: PretrainConfig, cell: Cell, column: Column) -> float:
    """Top-1 of the tower trained on the probe's labels alone, by the best of the rates."""
    if not column.modality:
        raise ConfigError("class labels train no captions")
    (train, test), run = map(labelled, column.files), cell.run(config, base)
    unused = {"num_samples": 0} if column.modality == "video" else {"num_frames": 0}
    data = dataclasses.replace(run.data, train=column.files[0], weights=(), num_candidates=0, **unused)
    data = dataclasses.replace(data, batch_size=min(data.batch_size, len(train)), fps=config.fps or data.fps)
    classes = {"num_classes": 1 + max(sample.label for sample in train + test), "classifier_dropout": 0.0}
    model = replace(
        tower_config(run.model, column.modality), classes | {f"{column.modality}.drop_token.keep_rate": 1.0}
    )
    found = []
    for lr in config.scratch_lrs:
        part = FinetuneConfig(
            out=str(Path(run.out) / f"{column.title}-lr{lr:g}"),
            model=model,
            loss=ClassLossConfig(label_smoothing=0.1),
            test=column.files[1],
            test_windows=config.num_windows,
            test_crops=1,
            data=data,
            optim=dataclasses.replace(run.optim, lr=lr),
            schedule=run.schedule,
            engine=run.engine,
        )
        _train(part.fitted(model))
        evaluation = json.loads((Path(part.out) / "evaluation.json").read_text(encoding="utf-8"))
        found.append(evaluation["metrics"]["top-1"])
    return max(found)
