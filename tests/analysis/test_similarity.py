import random

import numpy as np
import pytest
import torch

from vatt_engine.analysis.similarity import retrieval_metrics, target_ranks


def test_ranks_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.5, 0.4, 0.3, 0.6], [-0.1, -0.3, -0.2, 0.0]])
    targets = torch.tensor([0, 2, 1])
    assert target_ranks(similarity, targets).tolist() == [1, 4, 4]
    assert target_ranks(similarity[:, :3]).tolist() == [1, 2, 2]  # the diagonal
    metrics = retrieval_metrics(similarity, targets)
    assert metrics["R@1"] == pytest.approx(100 / 3)
    assert metrics["R@5"] == metrics["R@10"] == 100
    assert metrics["MedR"] == 4
    assert metrics["chance"] == 100  # ten guesses at four candidates


def test_agrees_with_the_official_sort_where_there_are_no_ties():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(101, 211, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 211, (101,), generator=generator)
    similarity[torch.arange(101), targets] += 1.5
    order = np.argsort(-similarity.numpy(), axis=1)
    zero_based = np.array([np.where(row == target)[0][0] for row, target in zip(order, targets.numpy())])
    metrics = retrieval_metrics(similarity, targets)
    for k in (1, 5, 10):
        assert metrics[f"R@{k}"] == pytest.approx(100 * np.mean(zero_based < k))
    assert metrics["MedR"] == np.median(zero_based) + 1
    assert metrics["chance"] == pytest.approx(1000 / 211)
    assert 10 < metrics["R@10"] < 90  # neither end, or the comparison would say little


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_a_collapsed_model_scores_nothing(value):
    metrics = retrieval_metrics(torch.full((256, 256), value))
    assert [metrics[f"R@{k}"] for k in (1, 5, 10)] == [0, 0, 0]
    assert metrics["MedR"] == 256
    assert metrics["chance"] == pytest.approx(3.90625)


def test_ties_count_against_the_target():
    assert target_ranks(torch.tensor([[0.5, 0.5, 0.1], [0.9, 0.2, 0.2], [0.0, 0.0, 1.0]])).tolist() == [2, 3, 1]


def test_ranks_do_not_depend_on_the_order_of_candidates():
    generator = torch.Generator().manual_seed(1)
    similarity = torch.randint(0, 4, (30, 30), generator=generator).float()  # many ties
    order = list(range(30))
    random.Random(0).shuffle(order)
    moved = torch.tensor([order.index(i) for i in range(30)])
    assert torch.equal(target_ranks(similarity[:, order], moved), target_ranks(similarity))


def test_guessing_is_at_chance():
    similarity = torch.rand(2_000, 256, generator=torch.Generator().manual_seed(0))
    metrics = retrieval_metrics(similarity, torch.arange(2_000) % 256)
    deviation = 100 * (0.039 * 0.961 / 2_000) ** 0.5
    assert abs(metrics["R@10"] - metrics["chance"]) < 4 * deviation


def test_median_of_an_even_number_is_between():
    similarity, first = torch.zeros(4, 100), torch.zeros(4, dtype=torch.int64)
    for row, rank in zip(similarity, (1, 2, 5, 100)):
        row[:rank] = torch.linspace(1, 2, rank)  # the target's is the least of so many
    metrics = retrieval_metrics(similarity, first)
    assert (metrics["MedR"], metrics["R@5"]) == (3.5, 75)
    assert retrieval_metrics(similarity[2:3], first[:1])["MedR"] == 5


@pytest.mark.parametrize(
    ("similarity", "targets", "message"),
    [
        (torch.zeros(3), None, r"similarity must be \[queries, candidates\], got \[3\]"),
        (torch.zeros(0, 3), None, r"similarity must be \[queries, candidates\], got \[0, 3\]"),
        (torch.tensor([[float("nan"), 1.0], [0.0, 1.0]]), None, "similarity must be finite, got 1 NaN or infinite"),
        (torch.zeros(2, 3), None, r"must be square where there are no targets, got \[2, 3\]"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"targets must be in 0..2, got 0..3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), r"targets must be in 0..2, got -1..0"),
        (torch.zeros(2, 3), torch.tensor([0]), r"targets must be int64 \[2\], got torch.int64 \[1\]"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), r"targets must be int64 \[2\], got torch.float32 \[2\]"),
    ],
)
def test_rejects_bad_arguments(similarity, targets, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(similarity, targets)
