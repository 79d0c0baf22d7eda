"""SyncBatchNorm: ranks together equal one big batch, in values, gradients and running statistics."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from vatt_engine.models.heads import SyncBatchNorm
from vatt_engine.testing import Sum, assert_same_sums, gradients, randn

ROWS, DIM = 12, 5
OVER_ROWS = Sum(5 * ROWS)  # the mean, the variance, and three sums in backward


def step(x: torch.Tensor, weights: torch.Tensor) -> dict[str, list]:
    """One training call in fp64: output, gradient of <output, weights> in x, and the state behind it."""
    norm = SyncBatchNorm(DIM).double()
    norm.weight.data, norm.bias.data = randn(DIM, seed=7).double(), randn(DIM, seed=8).double()
    x = x.clone().requires_grad_()
    y = norm.train()(x)
    (y * weights).sum().backward()
    tensors = {"y": y, "dx": x.grad, "mean": norm.running_mean, "var": norm.running_var, "dweight": norm.weight.grad}
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def on_a_rank() -> dict[str, list]:
    part = slice(None, None) if not dist.is_initialized() else slice(dist.get_rank(), None, dist.get_world_size())
    x, weights = 3 + 2 * randn(ROWS, DIM, seed=1).double(), randn(ROWS, DIM, seed=2).double()
    return step(x[part], weights[part])


def double(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_batch(world_size, tmp_path):
    whole = {name: double(value) for name, value in on_a_rank().items()}
    parts = run_ranks("models.test_batch_norm:on_a_rank", world_size, tmp_path)
    for rank, part in enumerate(parts):
        for name in ("y", "dx"):
            assert_same_sums(double(part[name]), whole[name][rank::world_size], OVER_ROWS, name=name)
        for name in ("mean", "var"):
            assert_same_sums(double(part[name]), whole[name], OVER_ROWS, name=name)
    assert_same_sums(sum(double(part["dweight"]) for part in parts), whole["dweight"], OVER_ROWS)


def test_matches_torch_except_the_running_variance():
    """torch.nn.BatchNorm1d stores the unbiased variance; Keras, and so this one, the biased."""
    ours, theirs = SyncBatchNorm(DIM), torch.nn.BatchNorm1d(DIM, momentum=0.1)
    x = randn(ROWS, DIM).requires_grad_()
    y, expected = ours(x), theirs(x)
    assert_same_sums(y, expected, OVER_ROWS)
    assert_same_sums(gradients(y, [x])[0], gradients(expected, [x])[0], OVER_ROWS)
    assert_same_sums(ours.running_mean, theirs.running_mean, OVER_ROWS)
    biased = 0.9 + 0.1 * x.detach().var(0, correction=0)
    assert_same_sums(ours.running_var, biased, OVER_ROWS)
    assert not torch.allclose(theirs.running_var, biased)


def test_candidates_are_rows():
    norm = SyncBatchNorm(DIM)
    x = randn(4, 3, DIM)
    assert_same_sums(norm(x).view(12, DIM), SyncBatchNorm(DIM)(x.view(12, DIM)), OVER_ROWS)
    assert norm.eval()(x.bfloat16()).dtype == torch.bfloat16
