"""What metrics.jsonl tells of a run: means over the steps since the last record, and how it does on other clips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from vatt_engine.batch import Batch
from vatt_engine.collectives import all_reduce_sum, rank, world_size
from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.dali import build_loader
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import Sample
from vatt_engine.data.shards import read_samples
from vatt_engine.data.words import Vocabulary
from vatt_engine.engine.engine import Engine, StepOutput
from vatt_engine.engine.faults import StopRequested, StopSignals
from vatt_engine.engine.logging import NoLog, RunLog
from vatt_engine.engine.monitors import memory
from vatt_engine.engine.ranks import largest_of_ranks
from vatt_engine.schema import ConfigError
from vatt_engine.tasks.config import PretrainConfig
from vatt_engine.tasks.finetune_config import FinetuneConfig

PLAIN = AugmentConfig(crop="none", scale_jitter=0.0, flip=0.0, color_jitter=0.0, audio_noise=0.0)


class HeldOut:
    """Evaluates every so many steps, before the first and after the last.

    The clips are those of a training epoch without augmentation: whole batches, as large as in training or as the set
    allows, of a fixed order, one fixed window of each file, another file in place of one that cannot be used. A run
    that resumes at such a step evaluates it again, with the same result.

    Args:
        config, vocabulary, device: of the run.

    Raises:
        ConfigError: there are fewer clips than ranks, or than two.

    >>> HeldOut(config, vocabulary, device=torch.device("cpu")).due(0)  # doctest: +SKIP
    True
    """

    def __init__(self, config: PretrainConfig, vocabulary: Vocabulary, *, device: torch.device):
        samples = read_samples(config.heldout)
        size = min(config.data.batch_size, len(samples) // world_size() * world_size())
        if size < 2:
            raise ConfigError(f"vatt pretrain: heldout must hold at least {max(2, world_size())} clips, got {size}.")
        # A clip that cannot be used is no reason to stop training.
        data = replace(config.data, train=config.heldout, weights=(), augment=PLAIN, max_bad_fraction=1.0)
        options = {"seed": config.engine.seed, "rank": rank(), "world": world_size()}
        self.loader = build_loader(samples, data, vocabulary, device=device, batch_size=size, **options)
        self.begin, self.every, self.steps = self.loader.state_dict(), config.evaluate_every, config.engine.steps
        self.done: int | None = None  # the step that was evaluated last

    def due(self, step: int) -> bool:
        return step != self.done and (step % self.every == 0 or step == self.steps)

    def record(self, engine: Engine, log: RunLog | NoLog, stop: StopSignals) -> None:
        """Evaluate if it is due, unless a signal cuts it short: `heldout_<term>`, means over batches and ranks."""
        if self.due(engine.finished) and (values := self._evaluate(engine, stop)) is not None:
            self.done = engine.finished
            log.evaluation(engine.finished, values)

    def _evaluate(self, engine: Engine, stop: StopSignals) -> dict[str, float] | None:
        sums: Any = 0
        self.loader.load_state_dict(self.begin)
        with self.loader:
            batches = iter(self.loader)
            for _ in range(len(self.loader)):
                batch = awaited(batches, stop)
                if ending := largest_of_ranks(stop.received or 0, engine.device):
                    stop.received = ending  # on every rank, before the same batch
                    return None
                terms = engine.evaluate(batch)
                sums = sums + torch.stack([value.float() for value in terms.values()])
        means = all_reduce_sum(sums) / (world_size() * len(self.loader))
        values = {f"heldout_{name}": value for name, value in zip(terms, means.tolist())}
        return values | {"heldout_quarantined": len(self.loader.quarantine)}


class CleanBatch:
    """One batch of training clips as evaluation sees them: whether a classifier knows them without augmentation too.

    Every so many steps its terms are recorded as `clean_<term>`, `clean_accuracy` among them, beside those of the
    batches that are trained on. Where the two drift apart, evaluation sees another world than training, and nothing
    that is learned there will count in the test.

    Args:
        config: of the run.
        samples, sizes: what it trains on, see `build_loader`.
        device: of the run.

    >>> CleanBatch(config, samples, sizes, device=torch.device("cpu")).due(0)  # doctest: +SKIP
    True
    """

    def __init__(
        self, config: FinetuneConfig, samples: Sequence[Sample], sizes: Sequence[int], *, device: torch.device
    ):
        size = min(config.data.batch_size, len(samples) // world_size() * world_size())
        # Decoded once: a cache would hold more than this batch.
        data = replace(config.data, augment=PLAIN, max_bad_fraction=1.0, num_workers=0, cache="none")
        options = {"seed": config.engine.seed, "rank": rank(), "world": world_size()}
        self.loader = build_loader(samples, data, sizes=sizes, device=device, batch_size=size, **options)
        self.every, self.steps = config.engine.log_every, config.engine.steps
        self.batch: Batch | None = None
        self.done: int | None = None  # the step that was evaluated last

    def due(self, step: int) -> bool:
        return step != self.done and (step % self.every == 0 or step == self.steps)

    def record(self, engine: Engine, log: RunLog | NoLog, stop: StopSignals) -> None:
        """Evaluate if it is due, unless a signal cuts the reading short: means over the ranks."""
        if not self.due(engine.finished) or not self._read(engine, stop):
            return
        self.done = engine.finished
        terms = engine.evaluate(self.batch)
        means = all_reduce_sum(torch.stack([value.float() for value in terms.values()])) / world_size()
        log.evaluation(engine.finished, {f"clean_{name}": value for name, value in zip(terms, means.tolist())})

    def _read(self, engine: Engine, stop: StopSignals) -> bool:
        if self.batch is None:
            with self.loader:
                batch = awaited(iter(self.loader), stop)
            if ending := largest_of_ranks(stop.received or 0, engine.device):
                stop.received = ending  # on every rank
                return False
            self.batch = batch
        return True


def awaited(batches: Iterator[Batch], stop: StopSignals) -> Batch | None:
    """The next batch, or None where a signal cut the wait for it short.

    Raises:
        StopRequested: that, where there is nothing to save.
    """
    try:
        with stop.interruptible():
            return next(batches)
    except StopRequested:
        if not stop.begun:
            raise
    return None


class Window:
    """What happened since the last record."""

    def __init__(self) -> None:
        self.steps: list[StepOutput] = []
        self.clips, self.waited = 0, 0.0

    def add(self, out: StepOutput, clips: int) -> None:
        self.steps.append(out)
        self.clips += clips

    def write(self, engine: Engine, loader: Loader, log: RunLog | NoLog) -> None:
        values = _summary(self.steps) | engine.loss.monitors() | memory(engine.device)
        values |= {"data_seconds": self.waited, "skipped": engine.skipped}
        values |= {"quarantined": len(loader.quarantine), "noted": loader.quarantine.num_noted}
        log.write(engine.finished, values, clips=self.clips)


def _summary(window: Sequence[StepOutput]) -> dict[str, float]:
    """Means over the ranks and over the steps since the last record; skipped steps have no part in them."""
    taken = [out for out in window if not out.skipped] or window[-1:]
    norms = {"grad_norm": torch.stack([out.grad_norm for out in taken]).mean()}
    means = {name: torch.stack([out.terms[name] for out in taken]).mean() for name in taken[0].terms}
    sums = all_reduce_sum(torch.stack([value.to(means["total"]) for value in (means | norms).values()]))
    return dict(zip(means | norms, (sums / world_size()).tolist())) | {"lr": window[-1].lr}
