"""`vatt pretrain CONFIG`: self-supervised pre-training from a manifest of media files, top to bottom."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vatt_engine.analysis.report import plot_losses
from vatt_engine.batch import Batch, Embeddings
from vatt_engine.data.dali import build_loader
from vatt_engine.data.loader import Loader, QuarantineError, join_sources
from vatt_engine.data.manifest import Sample
from vatt_engine.data.shards import read_samples
from vatt_engine.data.words import Vocabulary, load_word_vectors, match_vectors
from vatt_engine.engine.checkpoint import has_checkpoint
from vatt_engine.engine.engine import Engine, StepOutput
from vatt_engine.engine.faults import StopSignals, TrainingStopped
from vatt_engine.engine.logging import RunLog, environment, write_text
from vatt_engine.losses import LossTerms, VATTLoss
from vatt_engine.models import VATT, VATTConfig, build_model, save_pretrained
from vatt_engine.schema import ConfigError, dump_yaml, replace, to_dict
from vatt_engine.tasks.config import RECIPES, PretrainConfig, WordsConfig, load_config
from vatt_engine.tasks.flags import parse_flags

USAGE = """usage: vatt pretrain CONFIG [--resume [RUN]] [--section.field value ...]
       vatt pretrain --resume RUN

CONFIG is a YAML file or a recipe: {recipes}.
--resume RUN continues the run in that folder; without RUN the one in --out.
`vatt pretrain CONFIG --help` lists the flags with their values in that config."""


class PretrainLoss(VATTLoss):
    """VATTLoss with the masks of the batch."""

    def forward(self, embeddings: Embeddings, batch: Batch) -> LossTerms:
        return super().forward(embeddings, audio_mask=batch.audio_mask, text_mask=batch.text_mask)


def main(argv: Sequence[str]) -> int:
    words, resume, run = _take_resume(list(argv))
    source = words.pop(0) if words and not words[0].startswith("-") else None
    if source is None and run is None:
        print(USAGE.format(recipes=", ".join(RECIPES)), file=sys.stdout if "--help" in words else sys.stderr)
        return 0 if "--help" in words or "-h" in words else 2
    config = load_config(source if source is not None else str(Path(run) / "config.yaml"))
    if run is not None:
        config = replace(config, {"out": run})
    config = parse_flags(config, words, prog="vatt pretrain")
    try:
        return pretrain(config, resume=resume)
    except TrainingStopped as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def _take_resume(argv: list[str]) -> tuple[list[str], bool, str | None]:
    """The other words, whether --resume is among them, and the run folder it names."""
    for index, word in enumerate(argv):
        if word.startswith("--resume="):
            return argv[:index] + argv[index + 1 :], True, word.partition("=")[2]
        if word == "--resume":
            named = index + 1 < len(argv) and not argv[index + 1].startswith("-")
            return argv[:index] + argv[index + 1 + named :], True, argv[index + 1] if named else None
    return argv, False, None


def pretrain(config: PretrainConfig, *, resume: bool = False) -> int:
    """Train the model of a config on its manifest; everything it leaves is in `config.out`.

    Args:
        config: see PretrainConfig; recipes give one.
        resume: continue from the newest valid checkpoint of `config.out`, bit for bit on one process.

    Returns:
        0, or 130 / 143 when Ctrl-C / SIGTERM ended it, after the step was finished and saved.

    Raises:
        ValueError: the config, the manifest or the run folder cannot be used.
        TrainingStopped: the loss stayed not finite.

    >>> pretrain(load_config("demo"))  # doctest: +SKIP
    0
    """
    with StopSignals() as stop:
        return _train(config, resume, stop)


def _train(config: PretrainConfig, resume: bool, stop: StopSignals) -> int:
    run_dir, seed = Path(config.out), config.engine.seed
    device = config.engine.torch_device()
    config.check_shapes()

    # ------------------------------------------------ words, data, model, loss
    samples, sizes = join_sources([read_training_manifest(path) for path in config.data.sources])
    resume = _open_run(run_dir, resume)
    vocabulary = load_vocabulary(config, samples, run_dir / "tokenizer.json" if resume else None)
    torch.manual_seed(seed)
    model = build_model(config.model)
    num_vectors = load_vectors(model, config.model, config.text, vocabulary)
    quarantine = run_dir / "quarantine.jsonl"
    loader = build_loader(
        samples, config.data, vocabulary, device=device, sizes=sizes, seed=seed, quarantine=quarantine
    )
    loss = PretrainLoss(config.loss)
    engine = Engine(model, loss, config.engine, config.optim, config.schedule, run_dir=run_dir)

    # ------------------------------------------------ run folder
    if resume:
        _resume(engine, loader, config)
    vocabulary.save(run_dir / "tokenizer.json")
    write_text(run_dir / "config.yaml", dump_yaml(to_dict(config)))
    write_text(run_dir / "env.json", json.dumps(environment(device), indent=1) + "\n")

    # ------------------------------------------------ training
    steps, board = config.engine.steps, config.engine.tensorboard
    with loader, RunLog(run_dir, steps, resume_step=engine.finished, tensorboard=board) as log:
        log.say(f"{config.model.name} on {device}: {len(samples)} clips, {vocabulary.size} words, run folder {run_dir}")
        log.say(f"an epoch is {len(loader)} batches of {loader.batch_size} and leaves out {loader.num_dropped} clips")
        log.say(f"clips are decoded by {loader.decoder}")
        if config.text.vectors is not None:
            log.say(f"{config.text.vectors}: vectors of {num_vectors} words; the others keep their random ones")
        if engine.finished >= steps:
            log.say(f"nothing to train: step {engine.finished} of {steps} is done; raise --engine.steps to go on")
        if config.schedule.total_steps != steps:
            log.say(f"note: schedule.total_steps is {config.schedule.total_steps}, engine.steps {steps}")
        _loop(config, engine, loader, log, stop)
        stopped = engine.finished < steps
        if stopped:
            log.say(f"stopped after step {engine.finished}; continue with: vatt pretrain --resume {run_dir}")
    if not stopped:
        save_pretrained(model, run_dir / "model", vocabulary=vocabulary)
    plot_losses(run_dir)
    return 128 + stop.received if stopped else 0


def _loop(config: PretrainConfig, engine: Engine, loader: Loader, log: RunLog, stop: StopSignals) -> None:
    """Steps until the last one or a signal, with a record and a checkpoint every so often and at the end."""
    every, batches = config.engine, iter(loader)
    window: list[StepOutput] = []
    clips, waited = 0, 0.0
    while engine.finished < every.steps and stop.received is None:
        start = time.perf_counter()
        place = loader.state_dict()
        try:
            batch = next(batches)
        except QuarantineError:  # too many bad files: what was learned so far is kept
            loader.load_state_dict(place)
            _save(engine, loader, config, log)
            raise
        waited += time.perf_counter() - start
        window.append(engine.step(batch.split(every.accumulate)))
        clips += len(batch)
        last = engine.finished == every.steps or stop.received is not None
        if engine.finished % every.log_every == 0 or last:
            values = _summary(window) | {"data_seconds": waited, "skipped": engine.skipped}
            values |= {"quarantined": len(loader.quarantine), "noted": loader.quarantine.num_noted}
            log.write(engine.finished, values, clips=clips)
            window, clips, waited = [], 0, 0.0
        if engine.finished % every.save_every == 0 and not last:
            _save(engine, loader, config, log)
    _save(engine, loader, config, log)


def _save(engine: Engine, loader: Loader, config: PretrainConfig, log: RunLog) -> None:
    log.say(f"saved {engine.save(loader=loader.state_dict(), config_sha256=config_hash(config))}")


def _open_run(run_dir: Path, resume: bool) -> bool:
    """Make the run folder, or refuse one that holds another run; whether there is a checkpoint to resume."""
    if resume:
        if not has_checkpoint(run_dir):
            print(f"{run_dir}: no checkpoint yet, starting at step 0.", file=sys.stderr)
        run_dir.mkdir(parents=True, exist_ok=True)
        return has_checkpoint(run_dir)
    if (run_dir / "metrics.jsonl").exists() or has_checkpoint(run_dir):
        raise ConfigError(
            f"{run_dir}: --out must be a new run folder, got one that holds a run. "
            f"Continue it with `vatt pretrain --resume {run_dir}`, or choose another --out."
        )
    for name in ("config.yaml", "env.json", "tokenizer.json", "quarantine.jsonl", "model"):
        if (run_dir / name).exists():
            raise ConfigError(f"{run_dir}: --out must be a new run folder, got one with a {name}, which is kept.")
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: --out must be a folder, got a file.")
    run_dir.mkdir(parents=True, exist_ok=True)
    return False


def _resume(engine: Engine, loader: Loader, config: PretrainConfig) -> None:
    found = engine.resume()
    for reason in found.skipped:
        print(reason, file=sys.stderr)
    loader.load_state_dict(found.state["extra"]["loader"])
    if found.state["extra"]["config_sha256"] != config_hash(config):
        print(f"note: {found.path} was saved under another config; it goes on with this run's", file=sys.stderr)
    print(f"resuming after step {found.step} from {found.path}", file=sys.stderr)


def read_training_manifest(path: str) -> list[Sample]:
    """The samples to train on.

    Raises:
        ValueError: no manifest was given, or it is wrong somewhere (ManifestError, with file and line).
    """
    if not path:
        hint = "`vatt demo-data DIRECTORY` makes a small world with one."
        raise ConfigError(f"vatt pretrain: --data.train must be the path of a manifest, got none. {hint}")
    return read_samples(path)


def load_vocabulary(config: PretrainConfig, samples: Sequence[Sample], kept: Path | None) -> Vocabulary:
    """The vocabulary the run was started with (`kept`), else the configured one, else one trained on the captions.

    Raises:
        ValueError: it has more words than the model's table, or there is no caption to train it on.
    """
    limit, path = config.model.text.vocabulary_size, kept or config.text.vocabulary
    if path is None and not config.data.num_candidates:
        return Vocabulary(["<pad>", "<unk>"])
    if path is None:
        if not any(sample.captions for sample in samples):
            hint = "Train on video and audio alone with --data.num-candidates 0."
            raise ConfigError(f"{', '.join(config.data.sources)}: the manifest must have captions, got none. {hint}")
        return Vocabulary.train((caption.text for sample in samples for caption in sample.captions), limit)
    vocabulary = Vocabulary.load(path)
    if vocabulary.size > limit:
        raise ConfigError(
            f"{path}: vocabulary must fit model.text.vocabulary_size {limit}, got {vocabulary.size} words."
        )
    return vocabulary


def load_vectors(model: VATT, config: VATTConfig, words: WordsConfig, vocabulary: Vocabulary) -> int:
    """Put word vectors into the model's table; returns the number of words that have one.

    Raises:
        ValueError: the table would be frozen with random vectors, or the file's width is not the table's.
    """
    if words.vectors is None:
        if config.text.freeze_embedding:
            raise ConfigError(
                "text.vectors must be given where model.text.freeze_embedding is true, got none: random word vectors "
                "would stay random. Give a word2vec file, or set model.text.freeze_embedding to null."
            )
        return 0
    table, found = match_vectors(vocabulary, *load_word_vectors(words.vectors))
    if not found.any():
        raise ConfigError(f"{words.vectors}: word vectors must be of words of the vocabulary, got none of its words.")
    weight = model.word_embedding.weight
    if table.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"{words.vectors}: word vectors must have width model.text.embedding_dim {weight.shape[1]}, "
            f"got {table.shape[1]}."
        )
    rows = torch.zeros_like(weight)
    rows[: len(table)] = table
    marks = torch.zeros(len(weight), dtype=torch.bool)
    marks[: len(found)] = found
    model.word_embedding.load_vectors(rows, marks)
    return int(marks.sum())


def config_hash(config: PretrainConfig) -> str:
    """SHA-256 of the config without its run folder and its length, which a resumed run may change."""
    values: dict[str, Any] = to_dict(replace(config, {"out": "any", "engine.steps": 1}))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _summary(window: Sequence[StepOutput]) -> dict[str, float]:
    """Means over the steps since the last record; skipped steps have no part in them."""
    taken = [out for out in window if not out.skipped] or window[-1:]

    def mean(values: list[Tensor]) -> float:
        return torch.stack(values).mean().item()

    terms = {name: mean([out.terms[name] for out in taken]) for name in taken[0].terms}
    return terms | {"grad_norm": mean([out.grad_norm for out in taken]), "lr": window[-1].lr}
