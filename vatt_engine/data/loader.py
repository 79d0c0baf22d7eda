"""Batches from a manifest: decode, augment, encode words, in threads, in an order that only the seed decides."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vatt_engine.batch import Batch
from vatt_engine.data.clips import ClipReader, Row
from vatt_engine.data.config import DataConfig
from vatt_engine.data.manifest import Sample
from vatt_engine.data.media import MediaError
from vatt_engine.data.order import generator_of, hash_of
from vatt_engine.data.quarantine import Quarantine, QuarantineError
from vatt_engine.data.words import Vocabulary

__all__ = ["DataConfig", "Loader", "Quarantine", "QuarantineError"]

MAX_TRIES = 20  # substitutes for one place of a batch


class _Made(NamedTuple):
    """What became of one place of a batch: a row unless all failed, and (sample, reason, skipped) to report."""

    row: Row | None
    reports: list[tuple[Sample, str, bool]]


class Loader:
    """Batches of clips: without end and augmented for training; once, in manifest order, for evaluation.

    The order of epoch e is a permutation drawn from (seed, e); window, crop, colours and noise of a sample come from
    (seed, e, sample id): neither threads nor other samples matter. A file that cannot be used is quarantined; training
    puts f(seed, e, position, try) in its place, evaluation goes on without it. The last, incomplete batch of a training
    epoch is dropped. A sample without sound or captions keeps its place, with zeros and a False mask.

    Args:
        samples: from read_manifest.
        config: see DataConfig.
        vocabulary: turns captions into ids; None: batches without text.
        seed: of the order and of the augmentation.
        train: training or evaluation.
        batch_size: instead of the config's.
        quarantine: where faults are named: a .jsonl file, or None for memory alone (`loader.quarantine.entries`).

    Raises:
        ValueError: fewer samples than a batch, or, while iterating, too many bad files (QuarantineError) or a set
            larger than the cache.

    >>> batches = iter(Loader(read_manifest("train.jsonl"), DataConfig(), vocabulary, seed=0))  # doctest: +SKIP
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        config: DataConfig,
        vocabulary: Vocabulary | None = None,
        *,
        seed: int = 0,
        train: bool = True,
        batch_size: int | None = None,
        quarantine: str | Path | None = None,
    ):
        self.samples, self.config, self.seed, self.train = samples, config, seed, train
        self.batch_size = batch_size or config.batch_size
        if not samples or (train and len(samples) < self.batch_size):
            expectation = f"fill a batch of {self.batch_size}" if train else "hold a file"
            hint = "Set a smaller data.batch_size." if samples else ""
            raise ValueError(f"loader: samples must {expectation}, got {len(samples)}. {hint}".rstrip())
        self.epoch, self.position = 0, 0  # of the next batch
        self.quarantine = Quarantine(quarantine)
        self._has_labels = all(type(sample.label) is int for sample in samples)
        self._reader = ClipReader(config, vocabulary, seed=seed, train=train)
        self._executor: ThreadPoolExecutor | None = None
        self._fingerprint = hash_of(*(sample.id for sample in samples))

    def __len__(self) -> int:
        """Batches per epoch."""
        if self.train:
            return len(self.samples) // self.batch_size
        return -(-len(self.samples) * self.config.num_windows // self.batch_size)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; iterating again starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins, as numbers; batches made ahead but not taken do not count."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position, "samples": self._fingerprint}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state_dict` was taken; the next `iter` begins there, with the state's seed.

        Raises:
            ValueError: the state belongs to another set of files.
        """
        if state["samples"] != self._fingerprint:
            raise ValueError(
                f"loader: the manifest must be the one the state was saved with, got other files in its"
                f" {len(self.samples)} rows. Resume with the same data.train."
            )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._reader.seed = self.seed

    def __iter__(self) -> Iterator[Batch]:
        if self._executor is None:
            count = self.config.num_threads or os.cpu_count()
            self._executor = ThreadPoolExecutor(count, "vatt-loader", torch.set_num_threads, (1,))  # of its own thread
        waiting: deque[tuple[list[Future[_Made]], int, int]] = deque()
        plan, num_rows = self._plan(), 0
        try:
            while True:
                for epoch, position, places in islice(plan, self.config.prefetch + 1 - len(waiting)):
                    futures = [self._executor.submit(self._make, epoch, *place) for place in places]
                    waiting.append((futures, epoch, position + len(places)))
                if not waiting:
                    break
                rows = self._take(*waiting.popleft())
                if rows:
                    num_rows += len(rows)
                    yield self._collate(rows)
        finally:
            for futures, _, _ in waiting:
                for future in futures:
                    future.cancel()
        if not num_rows:
            raise QuarantineError(f"loader: a file of the set must be usable, got none. {self.quarantine.first()}")

    def _plan(self) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
        """(epoch, position, [(position, index of the sample, window), ...]) of each batch from the state on."""
        if not self.train:
            windows = self.config.num_windows
            places = [(p, *divmod(p, windows)) for p in range(len(self.samples) * windows)]
            for begin in range(0, len(places), self.batch_size):
                yield 0, begin, places[begin : begin + self.batch_size]
            return
        epoch, position = self.epoch, self.position
        while True:
            order = torch.randperm(len(self.samples), generator=generator_of(self.seed, epoch)).tolist()
            while position + self.batch_size <= len(order):
                yield epoch, position, [(p, order[p], 0) for p in range(position, position + self.batch_size)]
                position += self.batch_size
            epoch, position = epoch + 1, 0

    def _take(self, futures: list[Future[_Made]], epoch: int, position: int) -> list[Row]:
        """The usable rows of a batch; reports go to the quarantine in the order of the set."""
        made = [future.result() for future in futures]
        for one in made:
            for sample, reason, skipped in one.reports:
                self.quarantine.add(sample, reason, epoch, skipped=skipped)
            bad = sum(skipped for _, _, skipped in one.reports)
            self.quarantine.count(seen=bad + (one.row is not None), bad=bad)
            if self.train:
                self.quarantine.check(self.config.max_bad_fraction)
                if one.row is None:
                    text = f"one of {MAX_TRIES} samples in a row must be usable, got none"
                    raise QuarantineError(f"loader: {text}. {self.quarantine.first()}")
        if self.train:
            self.epoch, self.position = epoch, position
        return [one.row for one in made if one.row is not None]

    def _make(self, epoch: int, position: int, index: int, window: int) -> _Made:
        reports: list[tuple[Sample, str, bool]] = []
        for attempt in range(MAX_TRIES if self.train else 1):
            if attempt:
                index = hash_of(self.seed, epoch, position, attempt) % len(self.samples)
            sample = self.samples[index]
            try:
                row = self._reader.row(sample, epoch, window)
            except MediaError as error:
                reports.append((sample, error.reason, True))
                continue
            return _Made(row, [*reports, (sample, row.note, False)] if row.note else reports)
        return _Made(None, reports)

    def _collate(self, rows: list[Row]) -> Batch:
        def stacked(name: str) -> Tensor | None:
            values = [getattr(row, name) for row in rows]
            return None if values[0] is None else torch.stack(values)

        audio, text = stacked("audio"), stacked("text")
        return Batch(
            video=stacked("video"),
            audio=audio,
            text=text,
            audio_mask=None if audio is None else torch.tensor([row.audio_mask for row in rows]),
            text_mask=None if text is None else torch.tensor([row.text_mask for row in rows]),
            sample_id=torch.tensor([row.sample.id for row in rows]),
            label=torch.tensor([row.sample.label for row in rows]) if self._has_labels else None,
        )
