"""`vatt probe RUN --train A.jsonl --test B.jsonl`: what linear classifiers read from frozen features."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vatt_engine.analysis.metrics import top_k_accuracy
from vatt_engine.analysis.report import table
from vatt_engine.data.config import DataConfig
from vatt_engine.data.dali import build_loader
from vatt_engine.data.manifest import Sample
from vatt_engine.data.shards import read_samples
from vatt_engine.engine.config import EngineConfig
from vatt_engine.engine.optim import OptimConfig, build_optimizer
from vatt_engine.models import build_model, init, load_tower
from vatt_engine.refusals import Refusals
from vatt_engine.schema import ConfigError, PathText
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.results import Results
from vatt_engine.tasks.towers import Tower, read_tower

BATCH = 64  # of the low-rank classifier (official)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear classifiers on the frozen features of a run's tower, over the splits of a dataset.

    Features are AGG's, of the centre clip of training files and of several windows of test files, whose probabilities
    are averaged; nothing is augmented. Writes OUT/probe-MODALITY.json, or probe-MODALITY-untrained.json.

    Args:
        run: run folder, or a folder that holds a model.
        train, test: manifests of one class per sample, one of each for every split, in the same order.
        out: folder for the results; by default the run's.
        modality: the tower, "video" or "audio".
        untrained: random weights instead of the run's, the baseline.
        num_windows: of a test file.
        fps: of the clips; None: as the run was trained (official: 12.5).
        sample_rate: of the sounds; None: as the run was trained.
        epochs: of the low-rank classifier.
        batch_size: clips embedded at once.
        seed: of the low-rank classifier and of untrained weights.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    run: PathText
    train: tuple[PathText, ...]
    test: tuple[PathText, ...]
    out: PathText | None = None
    modality: Literal["video", "audio"] = "video"
    untrained: bool = False
    num_windows: int = 4
    fps: float | None = None
    sample_rate: int | None = None
    epochs: int = 1000
    batch_size: int = 32
    seed: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_windows", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"ProbeConfig: {name} must be at least 1, got {getattr(self, name)}.")
        if not self.train or len(self.train) != len(self.test):
            text = f"be as many manifests as train, at least 1, got {len(self.test)} for {len(self.train)}"
            raise ValueError(f"ProbeConfig: test must {text}.")


def main(argv: Sequence[str]) -> int:
    config = parse_flags(ProbeConfig, argv, prog="vatt probe", positional=("run",))
    result = probe(config)
    print(table(result["rows"]))
    where = f"also in {result['path']}" if result["path"] else "in no file"
    print(f"{result['left_out']} files left out; in percent, the last rows over all splits; {where}")
    return 2 if result["unwritten"] else 0


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Train and test both classifiers on every split.

    Returns:
        {"run", "modality", "untrained", "rows": [{"split", "classifier", "top-1", "top-5"}], the means last,
        "left_out": unusable files, "path": where it is written, "unwritten": [files that could not be]}.

    Raises:
        ValueError: the run or a manifest cannot be used, or nothing can be written where the results go.

    Source: official vatt/experiments/test.py (linear classification); paper section 4.3, Table 8.

    >>> probe(ProbeConfig(run="runs/demo/run", train=("a.jsonl",), test=("b.jsonl",)))["rows"]  # doctest: +SKIP
    """
    results, refusals = Results(config.out or config.run, "vatt probe"), Refusals()
    splits = [tuple(refusals.of(labelled, path) for path in pair) for pair in zip(config.train, config.test)]
    features = refusals.of(Features, config)
    refusals.settle()
    num_classes = 1 + max(sample.label for split in splits for samples in split for sample in samples)
    rows = []
    for number, (train, test) in enumerate(splits, 1):
        x, train = features(train, 1)
        x_test, test = features(test, config.num_windows)
        y, y_test = (torch.tensor([sample.label for sample in samples]) for samples in (train, test))
        for name, classify in (("low rank", low_rank), ("logistic regression", logistic_regression)):
            options = {"epochs": config.epochs, "seed": config.seed} if classify is low_rank else {}
            scores = classify(x[:, 0], y, x_test.flatten(0, 1), num_classes, **options)
            scores = scores.view(len(x_test), -1, num_classes).mean(1)
            metrics = top_k_accuracy(scores, y_test, ks=sorted({1, min(5, num_classes)}))
            rows.append({"split": str(number), "classifier": name, **metrics})
    for name in dict.fromkeys(row["classifier"] for row in rows) if len(splits) > 1 else ():
        own = [row for row in rows if row["classifier"] == name]
        means = {key: sum(row[key] for row in own) / len(own) for key in own[0] if key.startswith("top")}
        rows.append({"split": "mean", "classifier": name, **means})
    name = f"probe-{config.modality}{'-untrained' if config.untrained else ''}.json"
    result = {"run": config.run, "modality": config.modality, "untrained": config.untrained, "rows": rows}
    result |= {"left_out": len({key[:-1] for key in features.left_out}), "path": str(results.folder / name)}
    path = results.save_text(name, json.dumps(result | dataclasses.asdict(config), indent=1) + "\n")
    return result | {"path": None if path is None else str(path), "unwritten": results.faults}


def labelled(path: str) -> list[Sample]:
    samples = read_samples(path)
    for sample in samples:
        if type(sample.label) is not int or sample.label < 0:
            raise ConfigError(f"{path}: label of {sample.path} must be a class number >= 0, got {sample.label!r}.")
    return samples


class Features:
    """Features of a run's tower, each file's computed once, however many splits hold it.

    Args:
        config: the run, the tower and the clips.
    """

    def __init__(self, config: ProbeConfig):
        tower = read_tower(config.run, config.modality)
        torch.manual_seed(config.seed)
        self.encoder = build_model(tower.config)
        if not config.untrained:
            load_tower(self.encoder, tower.config, tower.weights)
        self.device = EngineConfig(device=config.device).torch_device()
        self.encoder.to(self.device).eval()
        self.modality, self.data = config.modality, clips_of(tower, config)
        self.rows: dict[tuple, list[Tensor]] = {}
        self.left_out: set[tuple] = set()

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample], num_windows: int) -> tuple[Tensor, list[Sample]]:
        """Features [N, num_windows, D] of the samples that are usable, and these."""
        keys = {sample.id: (sample.path, sample.start, sample.end, num_windows) for sample in samples}
        missing = [sample for sample in samples if keys[sample.id] not in self.rows | dict.fromkeys(self.left_out)]
        if missing:
            data = dataclasses.replace(self.data, num_windows=num_windows)
            with build_loader(missing, data, device=self.device, train=False) as loader:
                for batch in loader:
                    signal = getattr(batch.to(self.device), self.modality)
                    pooled = self.encoder(signal, agg_only=True)[:, 0].float().cpu()
                    for sample_id, row in zip(batch.sample_id.tolist(), pooled):
                        self.rows.setdefault(keys[sample_id], []).append(row)
        for sample in missing:
            if len(self.rows.get(keys[sample.id], ())) < num_windows:
                self.left_out.add(keys[sample.id])
                self.rows.pop(keys[sample.id], None)
        usable = [sample for sample in samples if keys[sample.id] in self.rows]
        return torch.stack([torch.stack(self.rows[keys[sample.id]]) for sample in usable]).clone(), usable


def clips_of(tower: Tower, config: ProbeConfig) -> DataConfig:
    """Clips of the tower's size, at the rates of the run unless the config has others."""
    part, run = getattr(tower.config, config.modality), tower.data or DataConfig()
    sizes = {"num_frames": 0, "num_samples": getattr(part, "num_samples", 0)}
    if config.modality == "video":
        sizes |= {"num_frames": part.num_frames, "frame_size": part.frame_size[0], "decode_size": None}
    rates = {"fps": config.fps or run.fps, "sample_rate": config.sample_rate or run.sample_rate}
    rest = {"batch_size": config.batch_size, "num_candidates": 0, "num_classes": 0, "num_crops": 1}
    rest |= {"cache": "none", "loader": "auto"}
    return dataclasses.replace(run, **sizes, **rates, **rest)


def low_rank(
    x: Tensor, y: Tensor, x_test: Tensor, num_classes: int, *, epochs: int = 1000, seed: int = 1, rank: int = 128
) -> Tensor:
    """Probabilities [M, C] by the official classifier, whose matrix is a product of two, with 90 % dropout between.

        p = softmax(V drop_0.9(U x + a) + b),   loss = cross-entropy + 0.1 |V|^2;   Adam, 5e-4, batches of 64

    Args:
        x, y: [N, D] features and [N] classes to train on.
        x_test: [M, D].
        num_classes: C.
        epochs, seed, rank: of the training, and the width between the matrices.

    Source: official vatt/experiments/test.py; paper section 4.3 (LRC).
    """
    torch.manual_seed(seed)
    first, last = init.linear(x.shape[1], rank), init.linear(rank, num_classes)
    init.glorot_normal_(first.weight, x.shape[1], rank)
    model = nn.Sequential(first, nn.Dropout(0.9), last)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=5e-4))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows]) + 0.1 * last.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        return model.eval()(x_test).softmax(1)


def logistic_regression(x: Tensor, y: Tensor, x_test: Tensor, num_classes: int) -> Tensor:
    """Probabilities [M, C] by scikit-learn's LogisticRegression (C = 1) on features of mean 0 and deviation 1.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: there is one class alone to train on.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(y.unique()) < 2:
        raise ConfigError("vatt probe: train must hold at least 2 classes, got 1.")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x.numpy(), y.numpy())
    found = torch.zeros(len(x_test), num_classes)
    found[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(x_test.numpy())).float()
    return found
