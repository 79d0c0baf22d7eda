"""Batches from manifests: decode, augment, encode words, in threads or processes; only the seed decides the order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vatt_engine.batch import Batch
from vatt_engine.cpus import usable_cpus
from vatt_engine.data.clips import ClipReader, Row
from vatt_engine.data.config import DataConfig
from vatt_engine.data.manifest import Sample
from vatt_engine.data.media import MediaError
from vatt_engine.data.order import Order, Place, Step, evaluation_steps, hash_of, rank_share, training_steps
from vatt_engine.data.quarantine import Quarantine, QuarantineError
from vatt_engine.data.words import Vocabulary
from vatt_engine.data.workers import Workers

__all__ = ["DataConfig", "Loader", "Quarantine", "QuarantineError", "join_sources"]

MAX_TRIES = 20  # substitutes for one place of a batch


class _Made(NamedTuple):
    """What became of places that share a window: rows unless all failed, and (sample, reason, kind) to report.

    Kinds are "skipped", "noted", and "set" for a note that probably is true of the whole set.
    """

    rows: list[Row]
    reports: list[tuple[Sample, str, str]]


class Loader:
    """Batches of clips: without end and augmented for training; once, in manifest order, for evaluation.

    The order of epoch e is a permutation drawn from (seed, e); window, crop, colours and noise of a sample come from
    (seed, e, sample id): neither threads, processes, ranks nor other samples matter. A file that cannot be used is
    quarantined; training puts f(seed, e, position, try) in its place, evaluation goes on without it. The last,
    incomplete batch of a training epoch is dropped. A sample without sound or captions keeps its place, with zeros and
    a False mask.

    Of every training batch rank r of W yields rows [r B / W, (r + 1) B / W); of an evaluation it yields the samples
    [r N / W, (r + 1) N / W), each once. Every rank counts and checks the bad samples of its own rows.

    Args:
        samples: from read_manifest; of several sources from join_sources.
        config: see DataConfig.
        vocabulary: turns captions into ids; None: batches without text.
        sizes: samples of each source, where `config.weights` mixes them.
        seed: of the order and of the augmentation.
        train: training or evaluation.
        batch_size: instead of the config's; over all ranks like that.
        rank, world: which of how many processes that train together this is.
        quarantine: where faults are named: a .jsonl file, or None for memory alone (`loader.quarantine.entries`).

    Raises:
        ValueError: fewer samples than a batch, ranks that do not divide it, or, while iterating, too many bad files
            (QuarantineError) or a set larger than the cache.
        ChildProcessError: while iterating: a decoding process cannot be started.

    >>> batches = iter(Loader(read_manifest("train.jsonl"), DataConfig(), vocabulary, seed=0))  # doctest: +SKIP
    """

    decoder = "PyAV"

    def __init__(
        self,
        samples: Sequence[Sample],
        config: DataConfig,
        vocabulary: Vocabulary | None = None,
        *,
        sizes: Sequence[int] = (),
        seed: int = 0,
        train: bool = True,
        batch_size: int | None = None,
        rank: int = 0,
        world: int = 1,
        quarantine: str | Path | None = None,
    ):
        self.samples, self.config, self.train = samples, config, train
        self.rank, self.world = rank, world
        self.batch_size = batch_size or config.batch_size
        self.order = Order(sizes or [len(samples)], config.weights if train else (), seed=seed)
        rank_share(self.batch_size, world)
        if not samples or (train and len(self.order) < self.batch_size):
            expectation = f"fill a batch of {self.batch_size}" if train else "hold a file"
            hint = "Set a smaller data.batch_size." if samples else ""
            raise ValueError(f"loader: samples must {expectation}, got {len(self.order)}. {hint}".rstrip())
        self.epoch, self.position = 0, 0  # of the next batch, over all ranks
        self.quarantine = Quarantine(quarantine)
        self._has_labels = all(type(sample.label) is int for sample in samples)
        if config.num_classes:
            for sample in samples:
                _check_classes(sample, config.num_classes)
        self._reader = ClipReader(config, vocabulary, seed=seed, train=train)
        self._executor: ThreadPoolExecutor | None = None
        self._workers: Workers | None = None
        self._fingerprint = hash_of(*(sample.id for sample in samples), *self.order.shares)

    def __len__(self) -> int:
        """Batches per epoch."""
        if self.train:
            return len(self.order) // self.batch_size
        return sum(1 for _ in self._steps())

    @property
    def num_dropped(self) -> int:
        """Samples left out of every training epoch: beyond its last whole batch, or of sources that had more."""
        return len(self.samples) - len(self) * self.batch_size if self.train else 0

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and processes; iterating again starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            if self._workers is not None:
                self._workers.close()
            self._executor.shutdown()
            self._executor = self._workers = None

    def report_to(self, path: str | Path) -> None:
        """Name faults in this .jsonl file from now on; those that it names already are known."""
        self.quarantine = Quarantine(path)

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins, as numbers; batches made ahead but not taken do not count."""
        place = {"seed": self.order.seed, "epoch": self.epoch, "position": self.position}
        return place | {"samples": self._fingerprint}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state_dict` was taken, on any number of ranks; the next `iter` begins there, with its seed.

        Raises:
            ValueError: the state belongs to another set of files, or to other weights of them.
        """
        if state["samples"] != self._fingerprint:
            raise ValueError(
                f"loader: the manifest must be the one the state was saved with, got other files or weights in its"
                f" {len(self.samples)} rows. Resume with the same data.train and data.weights."
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self.order.seed = self._reader.seed = state["seed"]

    def __iter__(self) -> Iterator[Batch]:
        if self._executor is None:
            count = self.config.num_workers or self.config.num_threads or usable_cpus()
            self._executor = ThreadPoolExecutor(count, "vatt-loader", torch.set_num_threads, (1,))  # of its own thread
            self._workers = Workers(self.config, train=self.train) if self.config.num_workers else None
        waiting: deque[tuple[list[Future[_Made]], Step]] = deque()
        steps, num_rows = self._steps(), 0
        num_crops = 1 if self.train else self.config.num_crops
        try:
            while True:
                for step in islice(steps, self.config.prefetch + 1 - len(waiting)):
                    shared = groupby(step.places, lambda place: place.position // num_crops)
                    futures = [self._executor.submit(self._make, step.epoch, list(places)) for _, places in shared]
                    waiting.append((futures, step))
                if not waiting:
                    break
                rows = self._take(*waiting.popleft())
                if rows:
                    num_rows += len(rows)
                    yield self._collate(rows)
        finally:
            for futures, _ in waiting:
                for future in futures:
                    future.cancel()
        if not num_rows and len(self):
            raise QuarantineError(f"loader: a file of the set must be usable, got none. {self.quarantine.first()}")

    def _steps(self) -> Iterator[Step]:
        """What this rank loads, from the state on."""
        ranks = {"rank": self.rank, "world": self.world}
        if self.train:
            return training_steps(self.order, self.batch_size, epoch=self.epoch, position=self.position, **ranks)
        return evaluation_steps(len(self.samples), self.batch_size, num_views=self.config.num_views, **ranks)

    def _take(self, futures: list[Future[_Made]], step: Step) -> list[Row]:
        """The usable rows of a batch; reports go to the quarantine in the order of the set."""
        made = [future.result() for future in futures]
        for one in made:
            for sample, reason, kind in one.reports:
                self.quarantine.add(sample, reason, step.epoch, skipped=kind == "skipped", once=kind == "set")
            bad = sum(kind == "skipped" for _, _, kind in one.reports)
            self.quarantine.count(seen=bad + len(one.rows), bad=bad)
            if self.train:
                self.quarantine.check(self.config.max_bad_fraction)
                if not one.rows:
                    text = f"one of {MAX_TRIES} samples in a row must be usable, got none"
                    raise QuarantineError(f"loader: {text}. {self.quarantine.first()}")
        if self.train:
            self.epoch, self.position = step.epoch, step.position
        return [row for one in made for row in one.rows]

    def _make(self, epoch: int, places: Sequence[Place]) -> _Made:
        reports: list[tuple[Sample, str, str]] = []
        index, views = places[0].sample, [place.view for place in places]
        for attempt in range(MAX_TRIES if self.train else 1):
            if attempt:
                index = self.order.substitute(epoch, places[0].position, attempt)
            sample = self.samples[index]
            try:
                rows = self._rows(sample, epoch, views)
            except MediaError as error:
                reports += [(sample, error.reason, "skipped")] * len(views)
                continue
            reports += [(sample, row.note, "noted") for row in rows if row.note]
            return _Made(rows, reports + [(sample, row.set_note, "set") for row in rows if row.set_note])
        return _Made([], reports)

    def _rows(self, sample: Sample, epoch: int, views: Sequence[int]) -> list[Row]:
        if self._workers is None:
            return self._reader.rows(sample, epoch, views)
        decoded = self._workers.decode(sample, seed=self.order.seed, epoch=epoch, views=views)
        return self._reader.worded(sample, decoded)

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
            label=self._labels([row.sample.label for row in rows]),
        )

    def _labels(self, labels: list[int | str | tuple[int, ...] | None]) -> Tensor | None:
        """Class numbers [B], or of a set of many classes per sample 0 and 1 [B, C]."""
        if not self.config.num_classes:
            return torch.tensor(labels) if self._has_labels else None
        hot = torch.zeros(len(labels), self.config.num_classes)
        for row, label in zip(hot, labels):
            row[list(label) if isinstance(label, tuple) else label] = 1
        return hot


def _check_classes(sample: Sample, num_classes: int) -> None:
    label = (sample.label,) if type(sample.label) is int else sample.label
    if not isinstance(label, tuple) or not all(0 <= one < num_classes for one in label):
        expectation = f"be class numbers in 0..{num_classes - 1} where data.num_classes is {num_classes}"
        raise ValueError(f"{sample.path}: label must {expectation}, got {sample.label!r}.")


def join_sources(sources: Sequence[Sequence[Sample]]) -> tuple[list[Sample], list[int]]:
    """Several sets as one, and the number of samples of each; a file that two of them hold has two ids.

    >>> samples, sizes = join_sources([read_manifest("a.jsonl"), read_manifest("b.jsonl")])  # doctest: +SKIP
    >>> loader = Loader(samples, DataConfig(train=("a", "b"), weights=(1, 1)), sizes=sizes)  # doctest: +SKIP
    """
    ids = [[hash_of(one.id, n) if n else one.id for one in source] for n, source in enumerate(sources)]
    joined = enumerate(zip(chain(*sources), chain(*ids)))
    return [replace(sample, index=index, id=own) for index, (sample, own) in joined], list(map(len, sources))
