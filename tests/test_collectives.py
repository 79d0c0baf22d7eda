"""Gathers and reductions over two processes, their gradients, and the identity on one."""

import pytest
import torch
from ranks import run_ranks

from vatt_engine import collectives
from vatt_engine.collectives import all_gather, all_reduce_max, all_reduce_sum

WORLD = 2


def on_rank() -> dict:
    """Rank r holds x = [[r + 1, 10 (r + 1)]]; rank r's loss is <weights_r, what it received>."""
    rank, world = collectives.rank(), collectives.world_size()
    x = torch.tensor([[1.0, 10.0]], dtype=torch.float64).mul(rank + 1).requires_grad_()
    gathered = all_gather(x)
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) * (10.0**rank)
    (gather_grad,) = torch.autograd.grad((gathered * weights).sum(), x)
    summed = all_reduce_sum(x)
    (sum_grad,) = torch.autograd.grad((summed * weights[:1]).sum(), x)
    # The variance over both ranks' rows, as batch normalisation takes it: a sum inside a function of the sum.
    mean = all_reduce_sum(x) / world
    (variance_grad,) = torch.autograd.grad((all_reduce_sum((x - mean).square()) / world).sum(), x)
    strided = all_gather(torch.arange(6.0).view(2, 3).t() + rank)  # [3, 2], not contiguous
    transposed = torch.arange(6.0).view(2, 3).t()
    results = {
        "identity": [rank, world],
        "gathered": gathered,
        "gather_grad": gather_grad,
        "summed": summed,
        "sum_grad": sum_grad,
        "variance_grad": variance_grad,
        "kept": x,
        "max": all_reduce_max(x * (1 - 2 * rank)),
        "mask": all_gather(torch.tensor([rank == 0, True])),
        "half": all_gather(torch.tensor([0.5 + rank], dtype=torch.bfloat16)).float(),
        "strided": strided,
        "strided_sum": all_reduce_sum(transposed),
    }
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in results.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("test_collectives:on_rank", WORLD, tmp_path_factory.mktemp("ranks"))


def test_every_rank_knows_its_place(ranks):
    assert [r["identity"] for r in ranks] == [[0, 2], [1, 2]]


def test_all_gather_concatenates_in_order_of_the_ranks(ranks):
    for result in ranks:
        assert result["gathered"] == [[1, 10], [2, 20]]
        assert result["mask"] == [True, True, False, True]
        assert result["half"] == [0.5, 1.5]
        assert result["strided"] == [[0, 3], [1, 4], [2, 5], [1, 4], [2, 5], [3, 6]]


def test_gradient_of_a_gather_is_the_sum_of_the_parts_gradients(ranks):
    assert ranks[0]["gather_grad"] == [[1 + 10, 2 + 20]]
    assert ranks[1]["gather_grad"] == [[3 + 30, 4 + 40]]


def test_gradient_of_a_sum_is_the_sum_of_the_gradients(ranks):
    for result in ranks:
        assert result["summed"] == [[3, 30]]
        assert result["sum_grad"] == [[1 + 10, 2 + 20]]
        assert result["strided_sum"] == [[0, 6], [2, 8], [4, 10]]
    assert [r["kept"] for r in ranks] == [[[1, 10]], [[2, 20]]]


def test_statistics_of_statistics(ranks):
    """Each rank calls backward on the global variance, so x gets world x its gradient, 2 (x - mean) / world."""
    assert ranks[0]["variance_grad"] == [[-1, -10]]
    assert ranks[1]["variance_grad"] == [[1, 10]]


def test_all_reduce_max(ranks):
    assert [r["max"] for r in ranks] == [[[1, 10]], [[1, 10]]]


def test_one_process_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert all_gather(x) is x
    assert all_reduce_sum(x) is x
    assert torch.equal(all_reduce_max(x), x)
    assert not all_reduce_max(x).requires_grad
