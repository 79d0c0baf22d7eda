"""Which sample stands where: a function of (sizes, weights, seed, epoch), whatever the number of ranks and workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PERIOD = 100_000  # positions after which the sources of a mixture come in the same order again


class Place(NamedTuple):
    """One row of a batch: its position in the epoch over all ranks, the sample of the set, the view of that."""

    position: int
    sample: int
    view: int = 0


class Step(NamedTuple):
    """What one rank loads of one batch; `position` is where the next batch of the epoch begins, over all ranks."""

    epoch: int
    position: int
    places: list[Place]


class Order:
    """The samples of every epoch: each at most once, those of weighted sources in exact proportions.

    Without weights an epoch is one permutation of all samples. With weights position p belongs to the source that a
    periodic sequence names, every prefix of which is within 1 of each source's share (see `interleaved`); each source
    has a permutation of its own, and the epoch ends where the first of them runs out.

    Args:
        sizes: samples of each source; the set holds the sources one after the other.
        weights: share of each source in a batch, up to a common factor, as written (0.7 is 7/10); none: all samples.
        seed: of the permutations, which are drawn from (seed, epoch, source).

    Raises:
        ValueError: weights that are no ratios of small whole numbers, or not one per source.

    >>> order = Order([4, 100], [1, 3], seed=0)
    >>> len(order), sorted(i for i in order.samples(0, 0, 16).tolist() if i < 4)
    (17, [0, 1, 2, 3])
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] = (), *, seed: int):
        if weights and len(weights) != len(sizes):
            raise ValueError(f"data: weights must be one per source, got {len(weights)} for {len(sizes)} sources.")
        self.seed = seed
        self.sizes = tuple(sizes) if weights else (sum(sizes),)
        self.begins = (0, *accumulate(self.sizes))
        self.shares = whole_shares(weights)  # of each source in whole numbers; none without weights
        counts = self.shares or (1,)
        self._sources = torch.tensor(interleaved(counts))
        self._counts = torch.tensor(counts)
        ranks = torch.nn.functional.one_hot(self._sources, len(counts)).cumsum(0) - 1
        self._ranks = ranks.gather(1, self._sources[:, None])[:, 0]  # how many of the same source stand before
        self._length = min(self._position(source, size) for source, size in enumerate(self.sizes))
        self._drawn: tuple[tuple[int, int], list[Tensor]] | None = None

    def __len__(self) -> int:
        """Positions of an epoch."""
        return self._length

    def samples(self, epoch: int, begin: int, end: int) -> Tensor:
        """The samples at positions begin..end-1 of an epoch, int64."""
        positions = torch.arange(begin, end)
        rounds, places = positions // len(self._sources), positions % len(self._sources)
        sources = self._sources[places]
        ranks = rounds * self._counts[sources] + self._ranks[places]
        found = torch.empty_like(positions)
        for source, permutation in enumerate(self._permutations(epoch)):
            ours = sources == source
            found[ours] = permutation[ranks[ours]] + self.begins[source]
        return found

    def substitute(self, epoch: int, position: int, attempt: int) -> int:
        """The sample in place of an unusable one, of its source: a function of (seed, epoch, position, attempt)."""
        source = int(self._sources[position % len(self._sources)])
        return self.begins[source] + hash_of(self.seed, epoch, position, attempt) % self.sizes[source]

    def _position(self, source: int, rank: int) -> int:
        """Where the rank-th sample of a source stands, from 0."""
        rounds, rest = divmod(rank, int(self._counts[source]))
        return rounds * len(self._sources) + int((self._sources == source).nonzero()[rest])

    def _permutations(self, epoch: int) -> list[Tensor]:
        key = (self.seed, epoch)
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = None  # frees the last epoch's first: 8 bytes per sample
            generators = [generator_of(*key, *([source] if source else [])) for source in range(len(self.sizes))]
            self._drawn = key, [torch.randperm(n, generator=g) for n, g in zip(self.sizes, generators)]
        return self._drawn[1]


def training_steps(
    order: Order, batch_size: int, *, epoch: int = 0, position: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Step]:
    """The batches of one rank from (epoch, position) on, without end; an epoch's last, incomplete batch is dropped.

    Args:
        order: what stands where; at least `batch_size` long.
        batch_size: rows of a batch over all ranks; rank r takes rows [r B / W, (r + 1) B / W).

    Raises:
        ValueError: `world` does not divide `batch_size`.

    >>> [len(step.places) for step, _ in zip(training_steps(Order([10], seed=0), 4, rank=1, world=2), range(3))]
    [2, 2, 2]
    """
    share = rank_share(batch_size, world)
    while True:
        while position + batch_size <= len(order):
            begin = position + rank * share
            samples = order.samples(epoch, begin, begin + share).tolist()
            position += batch_size
            yield Step(epoch, position, [Place(begin + i, sample) for i, sample in enumerate(samples)])
        epoch, position = epoch + 1, 0


def evaluation_steps(
    num_samples: int, batch_size: int, *, num_views: int = 1, rank: int = 0, world: int = 1
) -> Iterator[Step]:
    """The batches of one rank that go through the set once, in its order.

    Rank r takes samples [r N / W, (r + 1) N / W), rounded down, with all their views: none is padded or seen twice,
    the ranks' results one after the other are in the set's order, and a rank may have a batch less than another.

    >>> [[p.sample for p in step.places] for step in evaluation_steps(5, 4, rank=1, world=2)]
    [[2, 3], [4]]
    """
    share = rank_share(batch_size, world)
    begin, end = (r * num_samples // world * num_views for r in (rank, rank + 1))
    places = [Place(p, *divmod(p, num_views)) for p in range(begin, end)]
    for first in range(0, len(places), share):
        yield Step(0, begin + first, places[first : first + share])


def rank_share(batch_size: int, world: int) -> int:
    """Rows of a batch that each of `world` ranks takes.

    Raises:
        ValueError: they cannot be equally many.

    >>> rank_share(2048, 8)
    256
    """
    if batch_size % world:
        raise ValueError(f"data: batch_size must be a multiple of the number of ranks {world}, got {batch_size}.")
    return batch_size // world


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as the smallest whole numbers in the same proportions, exactly as written in decimal.

    Raises:
        ValueError: a weight is not above 0, or the numbers sum to more than 100,000.

    >>> whole_shares([0.5, 0.5]), whole_shares([1, 0.25])
    ((1, 1), (4, 1))
    """
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"data: weights must be above 0, got {tuple(weights)}.")
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(one.denominator for one in exact))
    whole = [int(one * common) for one in exact]
    whole = [one // math.gcd(*whole) for one in whole]
    if sum(whole) > MAX_PERIOD:
        text = f"be in the proportions of whole numbers that sum to at most {MAX_PERIOD}, got {tuple(weights)}"
        raise ValueError(f"data: weights must {text}. For thirds write 1 1 1.")
    return tuple(whole)


def interleaved(counts: Sequence[int]) -> list[int]:
    """A sequence with counts[i] times i, in every prefix of which each i is within 1 of its share.

    Of those at least 1 / (2k - 2) behind their share the one comes next that must come soonest.

    Source: Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980).

    >>> interleaved([1, 2, 1])
    [1, 0, 2, 1]
    """
    total, slack = sum(counts), max(2 * len(counts) - 2, 1)
    behind = [0] * len(counts)  # (share - number so far) * total * slack
    sequence = []
    for _ in range(total):
        behind = [one + count * slack for one, count in zip(behind, counts)]
        ready = [i for i, one in enumerate(behind) if one >= total]
        chosen = min(ready, key=lambda i: ((slack - 1) * total - behind[i]) / counts[i])
        behind[chosen] -= total * slack
        sequence.append(chosen)
    return sequence


def hash_of(*numbers: int) -> int:
    """63 bits of the numbers, alike on every machine."""
    content = b"".join(number.to_bytes(16, "little", signed=True) for number in numbers)
    return int.from_bytes(blake2b(content, digest_size=8).digest()) >> 1


def generator_of(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash_of(*numbers))
