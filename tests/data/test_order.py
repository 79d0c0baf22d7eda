"""The order of samples: the same for any number of ranks and workers, each sample once, sources in exact shares."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import write_media

from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.config import DataConfig
from vatt_engine.data.loader import Loader, join_sources
from vatt_engine.data.manifest import Sample, sample_id
from vatt_engine.data.order import Order, evaluation_steps, interleaved, training_steps, whole_shares

TINY = DataConfig(
    batch_size=4,
    num_frames=2,
    fps=5.0,
    frame_size=16,
    num_samples=800,
    sample_rate=8_000,
    num_candidates=0,
    num_threads=2,
    max_bad_fraction=1.0,
    augment=AugmentConfig(crop="none", color_jitter=0.0),
)
RANKS, WORKERS = (1, 2, 4), (0, 2, 4)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sets of 8 and 6 files, each with one that is no film."""
    folder, sets = tmp_path_factory.mktemp("clips"), []
    for name, count in (("a", 8), ("b", 6)):
        samples = []
        for index in range(count):
            path = folder / f"{name}{index}.avi"
            frames = torch.full((6, 16, 16, 3), 20 * index, dtype=torch.uint8)
            write_media(path, frames, fps=5, waveform=torch.zeros(9_600), sample_rate=8_000, audio_codec="pcm_s16le")
            samples.append(Sample(index, sample_id(path.name), path))
        samples[2].path.write_text("no film")
        sets.append(samples)
    return sets


def epoch_of(sources, ranks, workers, num_batches, state=None, **changes):
    """The next `num_batches` batches as the ranks make them together, their rows in order; and where that ends."""
    samples, sizes = join_sources(sources)
    config = replace(TINY, num_workers=workers, **changes)

    def part(rank):
        with Loader(samples, config, sizes=sizes, seed=5, rank=rank, world=ranks) as loader:
            if state is not None:
                loader.load_state_dict(state)
            return list(islice(loader, num_batches)), loader.state_dict()

    with ThreadPoolExecutor(ranks) as together:
        parts, states = zip(*together.map(part, range(ranks)))
    assert all(one == states[0] for one in states)
    steps = [[batch.tensors() for batch in step] for step in zip(*parts)]
    return [{name: torch.cat([batch[name] for batch in step]) for name in step[0]} for step in steps], states[0]


def digest(batches):
    content = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            content.update(batch[name].numpy().tobytes())
    return content.hexdigest()


MIXED = {"weights": (1.0, 1.0), "train": ("a", "b")}


@pytest.mark.slow
def test_ranks_and_workers_change_nothing(sources):
    """Two epochs of a mixture, with files that are replaced: ids, pixels and sound."""
    truth = digest(epoch_of(sources, 1, 0, 6, **MIXED)[0])
    for ranks in RANKS:
        for workers in WORKERS:
            assert digest(epoch_of(sources, ranks, workers, 6, **MIXED)[0]) == truth, (ranks, workers)
    assert digest(epoch_of(sources, 4, 0, 6, train=MIXED["train"])[0]) != truth


@pytest.mark.parametrize("changes", [{}, MIXED], ids=["one set", "mixture"])
def test_resume_at_every_step_on_another_number_of_ranks(sources, changes):
    truth, _ = epoch_of(sources, 1, 0, 8, **changes)
    after = [(2, 0), (4, 0), (1, 0), (4, 0), (1, 2), (2, 0)]
    for taken, (ranks, workers) in enumerate(after):
        _, state = epoch_of(sources, RANKS[taken % 3], 0, taken, **changes)
        batches, _ = epoch_of(sources, ranks, workers, 2, state, **changes)
        assert digest(batches) == digest(truth[taken : taken + 2]), taken


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(sizes, st.data(), st.integers(0, 2**62), st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(0, 2))
def test_each_sample_once(sizes, data, seed, world, share, epoch):
    """Of every epoch: no sample twice over all ranks, all ranks as many steps, only an incomplete batch left out."""
    weights = data.draw(st.just([]) | st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    order, batch = Order(sizes, weights, seed=seed), share * world
    if len(order) < batch:
        return
    count = len(order) // batch
    ranks = [
        list(islice(training_steps(order, batch, epoch=epoch, rank=rank, world=world), count + 1))
        for rank in range(world)
    ]
    assert all([step[:2] for step in steps] == [step[:2] for step in ranks[0]] for steps in ranks)
    assert [(step.epoch, step.position) for step in ranks[0]] == [
        *((epoch, batch * n) for n in range(1, count + 1)),
        (epoch + 1, batch),
    ]
    places = [place for steps in zip(*ranks) for step in steps for place in step.places][: count * batch]
    assert [place.position for place in places] == list(range(count * batch))
    taken = [place.sample for place in places]
    assert taken == order.samples(epoch, 0, count * batch).tolist()
    assert len(set(taken)) == len(taken)
    assert set(order.samples(epoch, 0, len(order)).tolist()) <= set(range(sum(sizes)))
    if not weights:
        assert sorted(order.samples(epoch, 0, len(order)).tolist()) == list(range(sum(sizes)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_every_prefix_has_its_shares(counts):
    """Within 1 of each source's share, and exact after a period."""
    total, seen = sum(counts), [0] * len(counts)
    for length, source in enumerate(interleaved(counts), 1):
        seen[source] += 1
        assert all(abs(n * total - c * length) < total for n, c in zip(seen, counts))
    assert seen == counts


def test_a_mixture_ends_with_its_first_source():
    order = Order([1_000, 50, 400], [0.5, 0.25, 0.25], seed=1)
    taken = order.samples(3, 0, len(order))
    in_second = (taken >= 1_000) & (taken < 1_050)
    assert int(in_second.sum()) == 50
    assert len(order) in range(198, 203)
    shares = [int((taken[:n] < 1_000).sum()) - n / 2 for n in range(1, len(order))]
    assert max(map(abs, shares)) < 1
    assert not torch.equal(taken, order.samples(4, 0, len(order)))
    assert all(0 <= order.substitute(3, p, 1) < 1_000 for p in range(len(order)) if taken[p] < 1_000)


def test_the_order_needs_no_lists():
    """Ten million samples, a window of them late in the epoch: permutations alone are held."""
    order = Order([6_000_000, 4_000_000], [1, 1], seed=0)
    assert len(order) in (8_000_000, 8_000_001)
    assert len(set(order.samples(0, 7_999_000, 8_000_000).tolist())) == 1_000


def test_weights_are_taken_as_written():
    assert whole_shares([0.7, 0.3]) == (7, 3)
    assert whole_shares([1, 1, 1]) == (1, 1, 1)
    assert whole_shares([2.5, 0.001]) == (2500, 1)
    for wrong, message in (
        ([1, 0], r"weights must be above 0, got \(1, 0\)"),
        ([1, float("inf")], "weights must be above 0"),
        ([1 / 3, 1], r"whole numbers that sum to at most 100000, got .* For thirds write 1 1 1\."),
    ):
        with pytest.raises(ValueError, match=message):
            whole_shares(wrong)
    with pytest.raises(ValueError, match="weights must be one per source, got 3 for 2 sources"):
        Order([1, 2], [1, 1, 1], seed=0)
    with pytest.raises(ValueError, match=r"DataConfig: weights must be one per manifest of train, got 2 for 1\."):
        DataConfig(train="a.jsonl", weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="DataConfig: train must be a manifest or several, got none"):
        DataConfig(train=())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 5))
def test_an_evaluation_sees_each_window_once(count, windows, world, share):
    ranks = [
        list(evaluation_steps(count, share * world, num_views=windows, rank=rank, world=world)) for rank in range(world)
    ]
    places = [place for steps in ranks for step in steps for place in step.places]
    assert [(place.sample, place.view) for place in places] == [(n, w) for n in range(count) for w in range(windows)]
    assert all(1 <= len(step.places) <= share for steps in ranks for step in steps)
    assert max(map(len, ranks)) - min(map(len, ranks)) <= windows


def test_an_evaluation_on_ranks(sources):
    samples, _ = join_sources(sources)
    seen, reasons = [], []
    for rank in range(4):
        with Loader(samples, TINY, train=False, rank=rank, world=4) as loader:
            seen += [i for batch in loader for i in batch.sample_id.tolist()]
            reasons += loader.quarantine.entries
    assert seen == [one.id for one in samples if one.path.stem not in ("a2", "b2")]
    assert len(reasons) == 2


def test_a_state_of_other_weights_is_refused(sources):
    samples, sizes = join_sources(sources)
    state = Loader(samples, replace(TINY, **MIXED), sizes=sizes).state_dict()
    for changes in (MIXED | {"weights": (2.0, 1.0)}, {"weights": ()}):
        with pytest.raises(ValueError, match=r"got other files or weights .* same data\.train and data\.weights"):
            Loader(samples, replace(TINY, **changes), sizes=sizes).load_state_dict(state)
    Loader(samples, replace(TINY, **MIXED | {"weights": (0.5, 0.5)}), sizes=sizes).load_state_dict(state)


def test_ranks_must_divide_the_batch(sources):
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of the number of ranks 3, got 4\."):
        Loader(sources[0], TINY, world=3)


def test_what_an_epoch_leaves_out_is_counted(sources):
    samples, sizes = join_sources(sources)
    assert Loader(samples, TINY).num_dropped == 2
    mixed = Loader(samples, replace(TINY, train=("a", "b"), weights=(3.0, 1.0)), sizes=sizes)
    assert (len(mixed), mixed.num_dropped) == (2, 6)
    assert Loader(samples, TINY, train=False).num_dropped == 0


def test_a_file_of_two_sources_is_two_samples(sources):
    """Its id decides augmentation and retrieval; its place in each source is its own."""
    samples, sizes = join_sources([sources[0], sources[0]])
    assert sizes == [8, 8]
    assert len({one.id for one in samples}) == 16
    assert [one.id for one in samples[:8]] == [one.id for one in sources[0]]
    assert [one.index for one in samples] == list(range(16))


def test_the_order_stays_what_it_was():
    """The order is part of what a checkpoint means: a change of these numbers breaks resuming."""
    order = Order([100, 10], [3, 1], seed=7)
    assert order.samples(0, 0, 8).tolist() == [15, 98, 101, 4, 14, 96, 103, 74]
    assert [order.substitute(0, p, 1) for p in (0, 1)] == [36, 98]
    assert all(b - a == 4 for a, b in pairwise(step.position for step, _ in zip(training_steps(order, 4), range(3))))
