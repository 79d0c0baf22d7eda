"""Metrics against scikit-learn's and torchmetrics' own, with ties, and what is undefined."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from vatt_engine.analysis.metrics import average_precision, d_prime, multi_label_metrics, roc_auc, top_k_accuracy
from vatt_engine.analysis.similarity import retrieval_metrics
from vatt_engine.testing import Sum, randn, sum_budget

SINGLE = 4 * torch.finfo(torch.float32).eps  # scores are float32, and a few roundings of what is at most 1


@pytest.fixture(scope="module", autouse=True)
def _peers():
    """Imported where these tests run: they take seconds, which every process that collects the tests would spend."""
    global classification, norm, retrieval, sklearn_metrics
    from scipy.stats import norm
    from sklearn import metrics as sklearn_metrics
    from torchmetrics.functional import classification, retrieval


def scored(num_samples, num_classes, *, levels=None, scale=1.0, seed=0):
    """Scores that know something of their targets; `levels` rounds them, so that many are tied."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 2, (num_samples, num_classes), generator=generator)
    scores = randn(num_samples, num_classes, seed=seed + 1) + targets
    return scale * (scores if levels is None else (scores * levels).round() / levels), targets


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])  # logits of any size: only their order counts
def test_equal_to_scikit_learn(levels, scale):
    scores, targets = scored(301, 5, levels=levels, scale=scale)
    for ours, theirs in (
        (average_precision, sklearn_metrics.average_precision_score),
        (roc_auc, sklearn_metrics.roc_auc_score),
    ):
        expected = [theirs(targets[:, c], scores[:, c]) for c in range(5)]
        np.testing.assert_allclose(ours(scores, targets).numpy(), expected, rtol=0, atol=SINGLE)
    found = multi_label_metrics(scores, targets)
    assert found["mAP"] == pytest.approx(
        100 * sklearn_metrics.average_precision_score(targets, scores), abs=100 * SINGLE
    )
    areas = [sklearn_metrics.roc_auc_score(targets[:, c], scores[:, c]) for c in range(5)]
    assert found["AUC"] == pytest.approx(100 * np.mean(areas), abs=100 * SINGLE)
    assert found["d'"] == pytest.approx(np.mean(math.sqrt(2) * norm.ppf(areas)), rel=1e-5)
    assert found["d' of AUC"] == pytest.approx(math.sqrt(2) * norm.ppf(np.mean(areas)), rel=1e-5)


@pytest.mark.parametrize("levels", [None, 2])
def test_equal_to_torchmetrics_on_probabilities(levels):
    scores, targets = scored(200, 4, levels=levels)
    scores = scores.sigmoid()
    for ours, theirs in (
        (average_precision, classification.multilabel_average_precision),
        (roc_auc, classification.multilabel_auroc),
    ):
        expected = theirs(scores, targets, 4, average="none")
        one_by_one = sum_budget(Sum(200))  # torchmetrics adds up the samples in float32
        torch.testing.assert_close(ours(scores, targets).float(), expected, rtol=0, atol=one_by_one)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_is_that_of_both(k):
    scores, labels = randn(200, 9), torch.randint(0, 9, (200,))
    scores[torch.arange(200), labels] += 1
    found = top_k_accuracy(scores, labels, (k,))[f"top-{k}"]
    expected = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(9)) if k < 9 else 1.0
    assert found == pytest.approx(100 * expected, rel=1e-6)
    tied = scores.round()  # where torchmetrics alone is the reference: scikit-learn breaks ties otherwise
    expected = classification.multiclass_accuracy(tied, labels, num_classes=9, top_k=k, average="micro")
    assert top_k_accuracy(tied, labels, (k,))[f"top-{k}"] == pytest.approx(100 * expected.item(), rel=1e-6)


def test_degenerate_classes_are_left_out_and_counted():
    scores, targets = scored(50, 4)
    targets[:, 1], targets[:, 2] = 0, 1  # no positive; no negative
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precisions, areas = average_precision(scores, targets), roc_auc(scores, targets)
        found = multi_label_metrics(scores, targets)
    assert precisions.isnan().tolist() == [False, True, False, False]
    assert precisions[2] == 1
    assert areas.isnan().tolist() == [False, True, True, False]
    assert found["mAP"] == pytest.approx(100 * precisions[[0, 2, 3]].mean().item())
    assert found["AUC"] == pytest.approx(100 * areas[[0, 3]].mean().item())
    assert found["d'"] == pytest.approx(d_prime(areas[[0, 3]]).mean().item())
    assert (found["classes with a positive"], found["classes with both"]) == (3, 2)


def test_a_single_class_and_a_single_sample():
    scores, targets = scored(40, 1)
    expected = sklearn_metrics.average_precision_score(targets[:, 0], scores[:, 0])
    assert average_precision(scores, targets).item() == pytest.approx(expected, abs=SINGLE)
    assert top_k_accuracy(scores, torch.zeros(40, dtype=torch.int64), (1,)) == {"top-1": 100.0}
    found = multi_label_metrics(torch.zeros(1, 2), torch.tensor([[1, 0]]))
    assert found["mAP"] == 100
    assert all(math.isnan(found[name]) for name in ("AUC", "d'", "d' of AUC"))


def test_a_collapsed_model_is_at_chance():
    targets = scored(60, 3)[1]
    found = multi_label_metrics(torch.ones(60, 3), targets)
    assert (found["AUC"], found["d'"]) == (50, 0)
    assert found["mAP"] == pytest.approx(100 * targets.double().mean().item())


def test_both_readings_of_d_prime():
    """The baselines of Table 2 are that of the mean AUC; a mean over classes is larger where AUCs differ."""
    for auc, reported in ((0.958, 2.444), (0.953, 2.371), (0.963, 2.525)):
        assert d_prime(torch.tensor(auc, dtype=torch.float64)).item() == pytest.approx(reported, abs=3e-3)
    # Two classes, one separated perfectly, whose d' is infinite.
    scores = torch.tensor([[0.9, 0.9], [0.8, 0.1], [0.2, 0.5], [0.1, 0.6]])
    found = multi_label_metrics(scores, torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]))
    assert found["d'"] == math.inf
    assert found["d' of AUC"] == pytest.approx(math.sqrt(2) * norm.ppf(0.875), rel=1e-6)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_our_recall_is_that_of_torchmetrics_where_nothing_is_tied(k):
    similarity = randn(40, 60)
    targets = torch.randint(0, 60, (40,))
    relevant = torch.nn.functional.one_hot(targets, 60)
    expected = [retrieval.retrieval_recall(s, r, top_k=k).item() for s, r in zip(similarity.sigmoid(), relevant)]
    assert retrieval_metrics(similarity, targets)[f"R@{k}"] == pytest.approx(100 * np.mean(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_accuracy(torch.zeros(3), torch.zeros(3)), r"scores must be \[samples, classes\], got \[3\]"),
        (lambda: top_k_accuracy(torch.zeros(2, 3), torch.zeros(2)), r"int64 \[2\], got torch.float32 \[2\]"),
        (lambda: top_k_accuracy(torch.zeros(2, 3), torch.tensor([0, 3])), r"in 0\.\.2, got 0\.\.3"),
        (lambda: top_k_accuracy(torch.zeros(2, 3), torch.tensor([0, 1])), r"ks must be in 1\.\.3, got 5"),
        (lambda: roc_auc(torch.full((2, 3), math.nan), torch.zeros(2, 3)), "must be finite, got 6 NaN or infinite"),
        (lambda: roc_auc(torch.zeros(2, 3), torch.zeros(3, 2)), r"targets must be \[2, 3\], got \[3, 2\]"),
        (lambda: roc_auc(torch.zeros(2, 3), torch.full((2, 3), 2)), "targets must be 0 or 1, got another"),
    ],
)
def test_rejects_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
