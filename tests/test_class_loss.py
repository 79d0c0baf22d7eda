"""The losses of classifiers against their formulas, written out sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from vatt_engine.batch import Batch
from vatt_engine.losses import ClassLoss, ClassLossConfig, balanced_weights


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_class_per_sample(smoothing):
    logits, labels = 3 * torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 3, 1, 2])
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        norm = math.log(sum(math.exp(x) for x in row))
        for index, x in enumerate(row):
            total -= ((1 - smoothing) * (index == label) + smoothing / 4) * (x - norm) / 5
    terms = ClassLoss(ClassLossConfig(label_smoothing=smoothing))(logits, Batch(label=labels))
    assert terms.total.item() == pytest.approx(total, rel=1e-5)
    assert terms.accuracy.item() == pytest.approx(sum(logits.argmax(1) == labels).item() / 5)


@pytest.mark.parametrize("balanced", [False, True])
def test_several_classes_per_sample(balanced):
    """Mixed labels too: row 2 is half of row 0 and half of row 1."""
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    logits, total, counts = 3 * torch.randn(4, 3), 0.0, labels.sum(0).tolist()
    for row, label in zip(logits.double().tolist(), labels.tolist()):
        entropy = sum(y * math.log1p(math.exp(-x)) + (1 - y) * math.log1p(math.exp(x)) for x, y in zip(row, label))
        weight = sum(y / count for y, count in zip(label, counts)) / sum(label)
        total += entropy * (weight if balanced else 1) / 4
    terms = ClassLoss(ClassLossConfig(balanced=balanced))(logits, Batch(label=labels))
    assert terms.total.item() == pytest.approx(total, rel=1e-5)
    assert terms.accuracy is None


def test_a_sample_without_a_class_has_no_weight():
    labels = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert balanced_weights(labels).tolist() == [0.0, 0.5, 0.5]
    logits = torch.randn(3, 2, requires_grad=True)
    ClassLoss(ClassLossConfig(balanced=True))(logits, Batch(label=labels)).total.backward()
    assert logits.grad[0].tolist() == [0.0, 0.0]
    assert logits.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        ClassLossConfig(label_smoothing=1.0)
