"""`vatt pretrain CONFIG`: self-supervised pre-training from a manifest of media files, top to bottom."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vatt_engine.analysis.flops import step_flops
from vatt_engine.analysis.report import plot_run
from vatt_engine.batch import Batch, Embeddings
from vatt_engine.collectives import rank, world_size
from vatt_engine.data.dali import build_loader
from vatt_engine.data.loader import Loader, QuarantineError, join_sources
from vatt_engine.engine.checkpoint import has_checkpoint
from vatt_engine.engine.engine import Engine
from vatt_engine.engine.faults import OUT_OF_MEMORY, SpikeGuard, StopRequested, StopSignals, TrainingStopped
from vatt_engine.engine.logging import NoLog, RunLog
from vatt_engine.engine.monitors import peak_flops, spread
from vatt_engine.engine.peers import Peers
from vatt_engine.engine.ranks import alone_among_tasks, joined_ranks, largest_of_ranks
from vatt_engine.losses import LossTerms, VATTLoss
from vatt_engine.models import build_model, save_pretrained
from vatt_engine.output import say
from vatt_engine.schema import replace, to_dict
from vatt_engine.tasks.config import (
    RECIPES,
    PretrainConfig,
    RunConfig,
    config_of_run,
    fitted_noise,
    load_config,
    noise_notes,
)
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.needs import training_sets
from vatt_engine.tasks.records import CleanBatch, HeldOut, Window, awaited
from vatt_engine.tasks.run_folder import check_places, check_run, opened_run, write_start
from vatt_engine.tasks.words import check_words, freeze_as_saved, load_vectors, load_vocabulary

USAGE = """usage: vatt {verb} CONFIG [--resume [RUN]] [--section.field value ...]
       vatt {verb} --resume RUN

CONFIG is a YAML file or a recipe: {recipes}.
--resume RUN continues the run in that folder; without RUN the one in --out.
`vatt {verb} CONFIG --help` lists the flags with their values in that config."""


BAD_DATA = 1  # beside the numbers of signals: a rank has too many bad files


class PretrainLoss(VATTLoss):
    """VATTLoss with the masks of the batch; `seen` keeps the embeddings of the last one for the monitors."""

    def forward(self, embeddings: Embeddings, batch: Batch) -> LossTerms:
        masks = {"audio_video": batch.audio_mask, "text_video": batch.text_mask}
        present = {name: value.detach() for name, value in embeddings._asdict().items() if value is not None}
        self.seen = {name: (value, masks.get(name)) for name, value in present.items()}
        return super().forward(embeddings, audio_mask=batch.audio_mask, text_mask=batch.text_mask)

    @torch.no_grad()
    def monitors(self) -> dict[str, float]:
        """Spread of each embedding that was there, and the temperature."""
        found = {}
        for name, (value, mask) in self.seen.items():
            rows = value if mask is None else value[mask]
            found |= {f"{name}_{key}": number for key, number in spread(rows).items()} if len(rows) else {}
        return found | {"temperature": float(self.temperature())}


def main(argv: Sequence[str]) -> int:
    return command(argv, PretrainConfig, RECIPES, pretrain)


def command(
    argv: Sequence[str], kind: type[RunConfig], recipes: dict[str, Callable[[], RunConfig]], job: Callable[..., int]
) -> int:
    """The command line of a verb that trains: a config's flags and --resume, and what stops it as one message."""
    words, resume, run = _take_resume(list(argv))
    run = None if run is None else os.path.expanduser(run)
    source = words.pop(0) if words and not words[0].startswith("-") else None
    if source is None and run is None:
        print(
            USAGE.format(verb=kind.verb, recipes=", ".join(recipes)),
            file=sys.stdout if "--help" in words else sys.stderr,
        )
        return 0 if "--help" in words or "-h" in words else 2
    config = load_config(source if source is not None else str(config_of_run(run)), kind, recipes)
    if run is not None:
        config = replace(config, {"out": run})
    config = parse_flags(config, words, prog=f"vatt {kind.verb}")
    if resume:
        check_places(config)
    try:
        return job(config, resume=resume)
    except TrainingStopped as error:
        say(f"\n{error}")
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
        0, or 130 / 143 / 138 when Ctrl-C / SIGTERM / SIGUSR1 ended it, after the step was finished and saved.

    Raises:
        ValueError: the config, the manifest or the run folder cannot be used.
        TrainingStopped: the loss stayed not finite, another rank died, memory ran out, the end could not be saved.

    >>> pretrain(load_config("demo"))  # doctest: +SKIP
    0
    """
    return supervised(config, lambda stop: _pretrain(config, resume, stop))


def supervised(config: RunConfig, job: Callable[[StopSignals], int]) -> int:
    """A job of all ranks, which signals may stop; its exit code, or 128 + the signal's number.

    Raises:
        TrainingStopped: memory ran out, or the job says so.
    """
    if note := alone_among_tasks():
        say(f"vatt {config.verb}: {note}")
    with StopSignals() as stop:
        try:
            with joined_ranks(config.engine.torch_device()), Peers():
                return job(stop)
        except StopRequested as signal:
            say(f"{signal}: no step of this start was finished, nothing had to be saved.")
            return 128 + stop.received
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(f"vatt {config.verb}: {OUT_OF_MEMORY}") from error


def _pretrain(config: PretrainConfig, asked: bool, stop: StopSignals) -> int:
    run_dir, seed = Path(config.out), config.engine.seed
    device = config.engine.torch_device()
    resume = check_run(config, asked)

    # ------------------------------------------------ words, data, model, loss: all that may refuse to train
    samples, sizes = join_sources(training_sets(config))
    config = dataclasses.replace(config, data=fitted_noise(config.data, config.model.audio))
    kept = run_dir / "tokenizer.json"
    vocabulary = load_vocabulary(config, samples, kept if resume and kept.exists() else None)
    torch.manual_seed(seed)
    model = build_model(config.model)
    num_vectors = load_vectors(model, config.model, config.text, vocabulary, held=resume)
    if resume and config.text.vectors is None and freeze_as_saved(model, config.model, run_dir):
        check_words(config, kept)
    ranks = {"rank": rank(), "world": world_size()}
    loader = build_loader(samples, config.data, vocabulary, device=device, sizes=sizes, seed=seed, **ranks)
    loss = PretrainLoss(config.loss)
    engine = Engine(model, loss, config.engine, config.optim, config.schedule, run_dir=run_dir)
    heldout = HeldOut(config, vocabulary, device=device) if config.heldout else None

    # ------------------------------------------------ training, in a folder of its own
    with opened_run(config, asked):
        if resume:
            resume_run(engine, loader, config)
        write_start(config)
        if rank() == 0:
            vocabulary.save(kept)
        if heldout is not None:
            heldout.loader.report_to(faults_file(run_dir, "heldout.quarantine"))
        model_on = f"{config.model.name} on {device} in {engine.precision}"
        notes = [f"{model_on}: {len(samples)} clips, {vocabulary.size} words, run folder {run_dir}"]
        notes += noise_notes(config.data, config.model.audio)
        if config.text.vectors is not None:
            notes.append(f"{config.text.vectors}: vectors of {num_vectors} words; the others keep their random ones")
        stopped = train(config, engine, loader, stop, notes=notes, heldout=heldout)
        weights = engine.strategy.export_state(rank(), 1)["model"]  # on rank 0, gathered by all
        if rank() == 0:
            if not stopped:
                whole = build_model(config.model)
                whole.load_state_dict(weights)
                whole.word_embedding.weight.requires_grad_(model.word_embedding.weight.requires_grad)
                save_pretrained(whole, run_dir / "model", vocabulary=vocabulary)
            draw_run(run_dir)
    return 128 + stop.received if stopped else 0


def train(
    config: RunConfig,
    engine: Engine,
    loader: Loader,
    stop: StopSignals,
    *,
    notes: Sequence[str],
    prepare: Callable[[Batch, int], Batch] | None = None,
    heldout: HeldOut | CleanBatch | None = None,
) -> bool:
    """The steps of a run in its folder, which `opened_run` has opened; whether it stopped before the last of them.

    Args:
        notes: lines to begin with.
        prepare: changes a batch for the step after so many finished ones.
        heldout: evaluates beside training.
    """
    run_dir, steps = Path(config.out), config.engine.steps
    loader.report_to(faults_file(run_dir, "quarantine"))
    with loader, _run_log(config, engine) as log:
        for note in notes:
            log.say(note)
        log.say(f"an epoch is {len(loader)} batches of {loader.batch_size} and leaves out {loader.num_dropped} clips")
        log.say(f"clips are decoded by {loader.decoder}")
        if world_size() > 1:
            log.say(f"{world_size()} processes, strategy {engine.strategy_name}")
        if engine.finished >= steps:
            log.say(f"nothing to train: step {engine.finished} of {steps} is done; raise --engine.steps to go on")
        if config.schedule.total_steps != steps:
            log.say(f"note: schedule.total_steps is {config.schedule.total_steps}, engine.steps {steps}")
        _loop(config, engine, loader, log, stop, prepare, heldout)
        stopped = engine.finished < steps or (heldout is not None and heldout.due(engine.finished))
        if stopped:
            log.say(f"stopped after step {engine.finished}; continue with: vatt {config.verb} --resume {run_dir}")
    return stopped


def faults_file(run_dir: Path, name: str) -> Path:
    """Where this rank names files that cannot be used."""
    return run_dir / (f"{name}.jsonl" if rank() == 0 else f"{name}.rank-{rank()}.jsonl")


def draw_run(run_dir: Path) -> None:
    """Draw what the run has logged; that it cannot be drawn is no matter of the training, which is done."""
    try:
        plot_run(run_dir)
    except (OSError, RuntimeError, ValueError) as error:
        say(f"note: no pictures of {run_dir}, got: {error} Draw them later with `vatt plot {run_dir} --out FOLDER`.")


def _run_log(config: RunConfig, engine: Engine) -> RunLog | NoLog:
    if rank() > 0:
        return NoLog()
    every = config.engine
    options = {"tensorboard": every.tensorboard, "wandb": every.wandb, "peak_flops": peak_flops(engine.device)}
    options["peak_flops"] *= world_size()
    options["flops_per_clip"] = step_flops(config.model, candidates=max(config.data.num_candidates, 1)).model
    return RunLog(config.out, every.steps, resume_step=engine.finished, **options)


def _loop(
    config: RunConfig,
    engine: Engine,
    loader: Loader,
    log: RunLog | NoLog,
    stop: StopSignals,
    prepare: Callable[[Batch, int], Batch] | None,
    heldout: HeldOut | CleanBatch | None,
) -> None:
    """Steps until the last one or a signal, with a record and a checkpoint every so often and at the end."""
    every, batches, guard = config.engine, iter(loader), SpikeGuard(config.engine.spike_factor)
    window, fault = Window(), None
    if heldout is not None:
        heldout.record(engine, log, stop)
    while engine.finished < every.steps:
        start = time.perf_counter()
        place = loader.state_dict()
        try:
            batch = awaited(batches, stop)
        except QuarantineError as error:  # too many bad files: what was learned so far is kept
            fault = error
        if ending := largest_of_ranks(stop.received or BAD_DATA * (fault is not None), engine.device):
            stop.received = ending  # on every rank, before the same step
            loader.load_state_dict(place)
            break
        window.waited += time.perf_counter() - start
        out = engine.step(batch if prepare is None else prepare(batch, engine.finished))
        stop.begin()
        window.add(out, loader.batch_size)
        evaluates = heldout is not None and heldout.due(engine.finished)
        if evaluates or engine.finished % every.log_every == 0 or engine.finished == every.steps:
            window.write(engine, loader, log)
            window = Window()
        if guard.factor and largest_of_ranks(int(guard.jumps(float(out.terms["total"]))), engine.device):
            _go_back(engine, guard, log)
            window, evaluates = Window(), False
        elif engine.finished % every.save_every == 0 and engine.finished < every.steps:
            engine.save(wait=False, loader=loader.state_dict(), config_sha256=config_hash(config))
        if evaluates:
            heldout.record(engine, log, stop)
        for line in engine.writer.news():
            log.say(line)
    stop.begin()
    if window.steps:
        window.write(engine, loader, log)
    _save_end(config, engine, loader, log)
    if fault is not None:
        raise fault
    if stop.received == BAD_DATA:
        raise TrainingStopped("another rank found too many bad files; what was trained is saved")


def _save_end(config: RunConfig, engine: Engine, loader: Loader, log: RunLog | NoLog) -> None:
    try:
        engine.save(loader=loader.state_dict(), config_sha256=config_hash(config))
    except OSError as error:
        raise TrainingStopped(
            f"{config.out}: the checkpoint of step {engine.finished} must fit on the disk, got: {error}. Older ones "
            f"are intact, `vatt {config.verb} --resume {config.out}` goes on from the newest."
        ) from error
    finally:
        for line in engine.writer.news():
            log.say(line)


def _go_back(engine: Engine, guard: SpikeGuard, log: RunLog | NoLog) -> None:
    """Weights, optimizer and step of the newest checkpoint; the data goes on, so what came since is skipped."""
    step = engine.finished
    if not has_checkpoint(engine.run_dir):
        log.event(step, "the loss jumps, but there is no checkpoint yet to go back to")
        return
    found = engine.resume()
    guard.count(found.step)
    log.go_back(found.step)
    log.event(step, "the loss jumps: went back and skipped the data since then", to=found.step)


def resume_run(engine: Engine, loader: Loader, config: RunConfig) -> None:
    """Go on from the newest checkpoint of the run folder, which is read and not changed.

    Raises:
        CheckpointError: there is no valid one, or it belongs to another model or optimizer.
        ValueError: it was saved with other data.
    """
    found = engine.resume()
    for reason in found.skipped:
        _tell(reason)
    extra = found.state["extra"]
    if "loader" in extra:  # `vatt convert` knows of no data
        loader.load_state_dict(extra["loader"])
    if extra.get("config_sha256") != config_hash(config):
        _tell(f"note: {found.path} was saved under another config; it goes on with this run's")
    _tell(f"resuming after step {found.step} from {found.path}")


def _tell(text: str) -> None:
    if rank() == 0:
        say(text)


def config_hash(config: RunConfig) -> str:
    """SHA-256 of the config without its run folder and its length, which a resumed run may change."""
    values: dict[str, Any] = to_dict(replace(config, {"out": "any", "engine.steps": 1}))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
