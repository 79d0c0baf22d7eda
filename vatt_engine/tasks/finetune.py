"""`vatt finetune CONFIG --init RUN`: a classifier on a trained tower, and its evaluation over several views."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta

from vatt_engine.analysis.metrics import multi_label_metrics, top_k_accuracy
from vatt_engine.analysis.report import table
from vatt_engine.batch import Batch
from vatt_engine.collectives import all_reduce_sum, rank, world_size
from vatt_engine.data.config import DataConfig
from vatt_engine.data.dali import build_loader
from vatt_engine.data.loader import join_sources
from vatt_engine.data.manifest import Sample
from vatt_engine.data.shards import read_samples
from vatt_engine.engine.engine import Engine
from vatt_engine.engine.faults import StopRequested, StopSignals
from vatt_engine.engine.seeds import derive_seed
from vatt_engine.losses import ClassLoss
from vatt_engine.models import build_model, load_tower, save_pretrained
from vatt_engine.models.heads import Classifier
from vatt_engine.output import put, say
from vatt_engine.refusals import Refusals
from vatt_engine.schema import ConfigError
from vatt_engine.tasks.config import noise_notes
from vatt_engine.tasks.finetune_config import FINETUNE_RECIPES, FinetuneConfig
from vatt_engine.tasks.needs import read_training_manifest
from vatt_engine.tasks.pretrain import command, draw_run, resume_run, supervised, train
from vatt_engine.tasks.records import CleanBatch
from vatt_engine.tasks.results import Results
from vatt_engine.tasks.run_folder import check_run, opened_run, write_start
from vatt_engine.tasks.towers import Tower, load_run_config, read_tower

MIXUP = 1  # of the random numbers of a step, those of mixup


def main(argv: Sequence[str]) -> int:
    return command(argv, FinetuneConfig, FINETUNE_RECIPES, finetune)


def finetune(config: FinetuneConfig, *, resume: bool = False) -> int:
    """Train a classifier on its manifest, from a trained tower, and evaluate it; everything it leaves is in `out`.

    Args:
        config: see FinetuneConfig; recipes give one.
        resume: continue from the newest valid checkpoint of `config.out`, with the model that the run has.

    Returns, raises:
        As `pretrain`.

    >>> finetune(replace(load_config("demo", FinetuneConfig, FINETUNE_RECIPES), changes))  # doctest: +SKIP
    0
    """
    return supervised(config, lambda stop: _finetune(config, resume, stop))


def _finetune(config: FinetuneConfig, asked: bool, stop: StopSignals) -> int:
    run_dir, seed, device = Path(config.out), config.engine.seed, config.engine.torch_device()
    resume = check_run(config, asked)

    # ------------------------------------------------ data, model, loss: all that may refuse to train
    sources, tests, tower = _needed(config, resume)
    samples, sizes = join_sources(sources)
    for sample in (*samples, *tests):
        if not config.data.num_classes:  # several classes are the loader's to check
            check_label(sample, config.model.num_classes, several=False)
    if resume:
        config = dataclasses.replace(config, model=load_run_config(run_dir).model)
    config = config.fitted(config.model if tower is None else tower.config)
    torch.manual_seed(seed)
    model = build_model(config.model)
    if tower is not None:
        load_tower(model.encoder, tower.config, tower.weights)
    ranks = {"rank": rank(), "world": world_size()}
    loader = build_loader(samples, config.data, device=device, sizes=sizes, seed=seed, **ranks)
    engine = Engine(model, ClassLoss(config.loss), config.engine, config.optim, config.schedule, run_dir=run_dir)
    clean = CleanBatch(config, samples, sizes, device=device)

    # ------------------------------------------------ training, in a folder of its own
    notes = [f"{config.model.name} {config.modality} on {device}: {len(samples)} clips, run folder {run_dir}"]
    notes.append(f"{config.model.num_classes} classes, the encoder from {config.init or 'scratch'}")
    if config.modality == "audio":
        notes += noise_notes(config.data, config.model.audio)
    prepare = functools.partial(_mixed, alpha=config.mixup, seed=seed) if config.mixup else None
    with opened_run(config, asked):
        if resume:
            resume_run(engine, loader, config)
        write_start(config)
        stopped = train(config, engine, loader, stop, notes=notes, prepare=prepare, heldout=clean)
        weights = engine.strategy.export_state()["model"]  # of all ranks
        if rank() == 0:
            draw_run(run_dir)
        if stopped:
            return 128 + stop.received
        classifier = build_model(config.model)
        classifier.load_state_dict(weights)
        if rank() == 0:
            save_pretrained(classifier, run_dir / "model")
        return _evaluated(config, engine, classifier, tests, stop) if tests else 0


def _evaluated(
    config: FinetuneConfig, engine: Engine, classifier: Classifier, tests: Sequence[Sample], stop: StopSignals
) -> int:
    """Evaluate what was trained, on all ranks; the first one prints and keeps the result. The exit code."""
    try:
        with stop.interruptible():
            classifier = classifier.to(engine.device)
            result = evaluate(classifier, tests, _test_data(config), bf16=engine.precision == "bf16")
    except StopRequested:
        if rank() == 0:
            say(f"not evaluated; repeat with: vatt finetune --resume {config.out}")
        return 128 + stop.received
    if rank() > 0:
        return 0
    result = {"step": engine.finished, "data": config.test, **result}
    put(sys.stdout, table([result["metrics"]]) + "\n")
    results = Results(config.out, "vatt finetune")
    results.save_json("evaluation.json", result)
    return results.code


def _needed(config: FinetuneConfig, resume: bool) -> tuple[list[list[Sample]], list[Sample], Tower | None]:
    """Training sets, test set and tower. Whatever of them is not there, or is wrong, is told at once.

    A run that goes on has its own weights and needs no tower, which may be gone.
    """
    refusals = Refusals()
    refusals.of(config.check)
    sources = [refusals.of(read_training_manifest, path, config.verb) for path in config.data.sources]
    tests = refusals.of(read_samples, config.test) if config.test else []
    tower = refusals.of(read_tower, config.init, config.modality) if config.init and not resume else None
    refusals.settle()
    return sources, tests, tower


def _test_data(config: FinetuneConfig) -> DataConfig:
    views = {"num_windows": config.test_windows, "num_crops": config.test_crops}
    return dataclasses.replace(config.data, train=config.test, weights=(), **views)


def check_label(sample: Sample, classes: int, *, several: bool) -> None:
    """Refuse a label that is no class of a model, or where samples have several, no list of them.

    Raises:
        ConfigError: with the sample and its label.
    """
    label = sample.label
    if several and not (isinstance(label, tuple) and all(0 <= one < classes for one in label)):
        expectation = f"be a list of class numbers in 0..{classes - 1}, as of other samples"
        raise ConfigError(f"{sample.path}: label must {expectation}, got {label!r}.")
    if not several and not (type(label) is int and 0 <= label < classes):
        expectation = f"be a class number in 0..{classes - 1} (model.num_classes {classes})"
        hint = " Samples of several classes need data.num_classes." if isinstance(sample.label, tuple) else ""
        raise ConfigError(f"{sample.path}: label must {expectation}, got {sample.label!r}.{hint}")


def _mixed(batch: Batch, finished: int, *, alpha: float, seed: int) -> Batch:
    """The batch that the step after `finished` ones is made with: mixup that depends on (seed, step, rank) alone."""
    torch.manual_seed(derive_seed(seed, finished, rank(), MIXUP))
    return mixup(batch, Beta(alpha, alpha).sample((len(batch),)))


def mixup(batch: Batch, shares: Tensor) -> Batch:
    """Every sound and its label mixed with those of the row before it: s x_i + (1 - s) x_(i-1), the first's the last.

    Args:
        batch: with audio [B, L] and label [B, C] float.
        shares: [B], s, in [0, 1].

    Source: paper appendix A.2.2; which sample is mixed with which it does not say.

    >>> mixup(Batch(audio=torch.eye(2), label=torch.eye(2)), torch.tensor([0.75, 0.5])).label.tolist()
    [[0.75, 0.25], [0.5, 0.5]]
    """
    shares = shares.to(batch.audio)[:, None]
    mixed = {name: torch.lerp(x.roll(1, 0), x, shares) for name, x in (("audio", batch.audio), ("label", batch.label))}
    return dataclasses.replace(batch, **mixed)


@torch.inference_mode()
def evaluate(model: Classifier, samples: Sequence[Sample], data: DataConfig, *, bf16: bool = False) -> dict[str, Any]:
    """Metrics of the logits averaged over a sample's views; every rank sees its share, all get the result.

    Args:
        model: on its device; it is set to evaluation.
        samples: with labels.
        data: `num_windows` x `num_crops` views; `num_classes` makes the metrics those of several classes per sample.
        bf16: compute under autocast.

    Returns:
        {"num_windows", "num_crops", "samples": usable ones, "left_out": the others, "metrics": top-1 and top-5 in
        percent, or see `multi_label_metrics`}.

    Raises:
        ValueError: no sample of a rank is usable.

    Source: official vatt/experiments/finetune.py (logits, not probabilities, are averaged).

    >>> evaluate(model, read_samples("val.jsonl"), DataConfig(num_windows=4, num_crops=3))  # doctest: +SKIP
    """
    device = next(model.parameters()).device
    places = {sample.id: place for place, sample in enumerate(samples)}
    sums = torch.zeros(len(samples), model.config.num_classes + 1, device=device)  # of logits, and the views
    targets = torch.zeros(len(samples), *([data.num_classes] if data.num_classes else []), device=device)
    model.eval()
    with build_loader(samples, data, device=device, train=False, rank=rank(), world=world_size()) as loader:
        for batch in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model.heads(**model.features(batch.to(device))).float()
            rows = torch.tensor([places[one] for one in batch.sample_id.tolist()], device=device)
            sums.index_add_(0, rows, torch.nn.functional.pad(logits, (0, 1), value=1.0))
            targets[rows] = batch.label.to(targets)
    sums, targets = all_reduce_sum(sums).cpu(), all_reduce_sum(targets).cpu()
    seen = sums[:, -1] > 0
    scores, targets = sums[seen, :-1] / sums[seen, -1:], targets[seen]
    if data.num_classes:
        metrics = multi_label_metrics(scores, targets)
    else:
        metrics = top_k_accuracy(scores, targets.long(), ks=sorted({1, min(5, scores.shape[1])}))
    views = {"num_windows": data.num_windows, "num_crops": data.num_crops}
    return {**views, "samples": int(seen.sum()), "left_out": int((~seen).sum()), "metrics": metrics}
