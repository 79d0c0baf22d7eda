"""`vatt ablate CONFIG --drop-rates 0 0.25 0.5 0.75`: Table 5, what dropped tokens save and what they cost."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vatt_engine.analysis.ablation import plot_costs
from vatt_engine.analysis.flops import module_flops, paper_flops
from vatt_engine.analysis.report import table
from vatt_engine.engine.faults import TrainingStopped
from vatt_engine.engine.logging import write_text
from vatt_engine.schema import ConfigError, dump_yaml, replace, to_dict
from vatt_engine.tasks.config import PretrainConfig, load_config
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.pretrain import config_hash
from vatt_engine.tasks.probe import ProbeConfig, probe
from vatt_engine.tasks.retrieve import RetrieveConfig, retrieve

PROBES = {"HMDB51": "video", "UCF101": "video", "ESC50": "audio"}  # the columns of Table 5
RETRIEVALS = ("YouCook2", "MSR-VTT")


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """One run of `vatt pretrain` per drop rate and budget, each probed and asked for text -> video retrieval.

    Every cell has a folder, OUT/drop-RATE-BUDGET, and goes on or is left alone where it is there. OUT receives
    ablation.csv, ablation.json, which says why a value is missing, and ablation.png.

    Args:
        config: recipe or YAML file of `vatt pretrain`, which the cells share.
        out: folder of the cells and the table.
        train: training set; "": the config's.
        batch_size: clips per batch; None: the config's.
        drop_rates: shares of the video and audio tokens that training drops.
        steps: of the cells of equal steps; None: the config's. Those of equal time train as long as the slowest of
            them, by the measured clips per second.
        equal_time: train those too.
        probes: NAME=TRAIN,TEST, or NAME/audio=TRAIN,TEST; HMDB51, UCF101 and ESC50 know their modality.
        retrievals: NAME=MANIFEST.
        fps: of the clips that are probed and retrieved; None: as trained.
        epochs: of the low-rank probe.
        num_windows: of a test file.
    """

    config: str
    out: str = "runs/ablation"
    train: str = ""
    batch_size: int | None = None
    drop_rates: tuple[float, ...] = (0.75, 0.5, 0.25, 0.0)
    steps: int | None = None
    equal_time: bool = True
    probes: tuple[str, ...] = ()
    retrievals: tuple[str, ...] = ()
    fps: float | None = None
    epochs: int = 1000
    num_windows: int = 4

    def __post_init__(self) -> None:
        rates = self.drop_rates
        if not rates or not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"AblateConfig: drop_rates must be different numbers in [0, 1), got {rates}.")
        for name in ("steps", "batch_size", "epochs", "num_windows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"AblateConfig: {name} must be at least 1, got {value}.")
        for name, count in (("probes", 2), ("retrievals", 1)):
            for word in getattr(self, name):
                title, _, files = word.partition("=")
                if not title or len(list(filter(None, files.split(",")))) != count:
                    form = "NAME=TRAIN,TEST" if count == 2 else "NAME=MANIFEST"
                    raise ValueError(f"AblateConfig: {name} must be written {form}, got {word!r}.")


def main(argv: Sequence[str]) -> int:
    config = parse_flags(AblateConfig, argv, prog="vatt ablate", positional=("config",))
    try:
        result = ablate(config)
    except TrainingStopped as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(table([row["values"] for row in result["rows"]]))
    for name, reason in result["rows"][0]["reasons"].items():
        print(f"{name} is empty: {reason}")
    print(f"top-1 of the low-rank probe, R@10 of text -> video, in percent; also in {config.out}/ablation.csv")
    return 0


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Train and evaluate what is not there yet, and write the table.

    Returns:
        {"rows": [{"values": the row of the table, "reasons": {column: why it is empty}}]}.

    Raises:
        ValueError: the config, or a folder of another ablation.
        TrainingStopped: a cell's training stopped; the same command goes on.

    >>> ablate(AblateConfig(config="demo", train="world/train.jsonl", drop_rates=(0.5, 0.0)))  # doctest: +SKIP
    """
    base = load_config(config.config)
    given = {"data.train": config.train or None, "data.batch_size": config.batch_size}
    base = replace(base, {key: value for key, value in given.items() if value is not None})
    steps = config.steps or base.engine.steps
    rows = [_cell(config, base, rate, "steps", steps) for rate in config.drop_rates]
    if config.equal_time:
        speeds = [row["values"]["clips/s"] for row in rows]
        for rate, row, speed in zip(config.drop_rates, list(rows), speeds):
            longer = round(steps * speed / min(speeds))
            same = row | {"values": row["values"] | {"budget": "time"}}
            rows.append(same if longer == steps else _cell(config, base, rate, "time", longer))
    out, text = Path(config.out), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]["values"]))
    writer.writeheader()
    writer.writerows(row["values"] for row in rows)
    write_text(out / "ablation.csv", text.getvalue())
    write_text(out / "ablation.json", json.dumps({"rows": rows, "config": dataclasses.asdict(config)}, indent=1) + "\n")
    plot_costs([row["values"] for row in rows], out / "ablation.png")
    return {"rows": rows}


def _cell(config: AblateConfig, base: PretrainConfig, rate: float, budget: str, steps: int) -> dict[str, Any]:
    """The row of one cell: trained unless its run is whole, evaluated unless its row is there."""
    folder = Path(config.out) / f"drop-{rate:g}-{budget}"
    warmup = round(base.schedule.warmup_steps * steps / base.engine.steps)
    changes: dict[str, Any] = {f"model.{m}.drop_token.keep_rate": 1.0 - rate for m in ("video", "audio")}
    changes |= {"engine.steps": steps, "schedule.total_steps": steps, "schedule.warmup_steps": min(warmup, steps - 1)}
    run = replace(base, changes | {"out": str(folder)})
    asked = {name: getattr(config, name) for name in ("probes", "retrievals", "fps", "epochs", "num_windows")}
    key = json.loads(json.dumps({"run": config_hash(run), "steps": steps, **asked}))
    kept = folder / "cell.json"
    if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return found
    if not (folder / "model").is_dir():
        _train(run, folder)
    elif config_hash(load_config(str(folder / "config.yaml"))) != key["run"]:
        raise ConfigError(f"{folder}: the cell must be of the same settings, got another's. Choose another --out.")
    row = {"key": key, **_measured(run, rate, budget), "reasons": {}}
    _evaluate(config, folder, row)
    write_text(kept, json.dumps(row, indent=1) + "\n")
    return row


def _train(run: PretrainConfig, folder: Path) -> None:
    """In a process of its own, so that its memory is its own; it goes on from its newest checkpoint."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.yaml")
    write_text(path, dump_yaml(to_dict(run)))
    child = subprocess.Popen([sys.executable, "-m", "vatt_engine", "pretrain", str(path), "--resume"])
    try:
        code = child.wait()
    except KeyboardInterrupt:  # which the child has got too: it saves
        child.wait()
        raise
    if code:
        text = f"training must end with exit code 0, got {code}"
        raise TrainingStopped(f"{folder}: {text}. The same `vatt ablate` goes on from its newest checkpoint.")


def _measured(run: PretrainConfig, rate: float, budget: str) -> dict[str, Any]:
    """What the cell cost: GFLOPs of a clip's forward pass in training by both counts, speed, memory."""
    lines = (Path(run.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if "clips_per_second" in (record := json.loads(line))]
    candidates = run.data.num_candidates
    values = {
        "drop %": round(100 * rate, 3),
        "budget": budget,
        "steps": run.engine.steps,
        "GFLOPs": sum(part.forward for part in module_flops(run.model, candidates=candidates)) / 1e9,
        "paper GFLOPs": paper_flops(run.model, candidates=candidates) / 1e9,
        "clips/s": statistics.median(record["clips_per_second"] for record in records),
        "peak MB": max(record.get("gpu_peak_mb", record["rss_mb"]) for record in records),
    }
    return {"values": values}


def _evaluate(config: AblateConfig, folder: Path, row: dict[str, Any]) -> None:
    """Probes and retrievals of a cell; a value that cannot be had is None, with the reason."""
    probes = dict(word.split("=", 1) for word in config.probes)
    retrievals = dict(word.split("=", 1) for word in config.retrievals)
    for column in (*dict.fromkeys((*PROBES, *probes)), *dict.fromkeys((*RETRIEVALS, *retrievals))):
        is_probe = column in PROBES or column in probes
        given = (probes if is_probe else retrievals).get(column)
        row["values"][column] = None
        if given is None:
            row["reasons"][column] = f"no {column} in --{'probes' if is_probe else 'retrievals'}"
            continue
        try:
            if is_probe:
                train, test = given.split(",")
                modality = PROBES.get(column) or column.partition("/")[2] or "video"
                options = {"modality": modality, "epochs": config.epochs, "num_windows": config.num_windows}
                found = probe(ProbeConfig(run=str(folder), train=(train,), test=(test,), fps=config.fps, **options))
                row["values"][column] = found["rows"][0]["top-1"]
            else:
                options = {"num_windows": config.num_windows, "fps": config.fps}
                tasks = retrieve(RetrieveConfig(run=str(folder), data=given, **options))["tasks"]
                row["values"][column] = tasks.get("text -> video", {}).get("R@10")
                if row["values"][column] is None:
                    row["reasons"][column] = f"{given} or the run has no captions"
        except (ValueError, OSError) as error:
            row["reasons"][column] = str(error)
