"""The error budget: right sums pass in every order, and what a wrong kernel does to a result does not.

All against the luckiest of references, the exact result rounded once: what passes or fails here does so on any machine.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vatt_engine.testing import (
    Sum,
    assert_same_formula,
    assert_same_sums,
    assert_within_budget,
    error_budget,
    product_size,
    randn,
    sum_budget,
)


def passes(actual: Tensor, exact: Tensor, *sums: Sum) -> bool:
    try:
        assert_within_budget(actual.float(), exact.float(), exact, *sums)
    except AssertionError:
        return False
    return True


def in_tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, as tensor cores take float32 unless told otherwise."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def in_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


# --------------------------------------------------------------------------------------------------------- a product

# rows, terms, columns: a patch of the paper and an odd one, a layer, a head, a projection under bfloat16 autocast.
PRODUCTS = [(10, 3072, 8), (12, 30, 5), (65, 768, 24), (96, 16, 96), (257, 96, 63)]
IN_ORDER = {
    "one after the other": lambda terms: np.add.accumulate(terms, axis=-1)[..., -1],
    "backwards": lambda terms: np.add.accumulate(terms[..., ::-1], axis=-1)[..., -1],
    "by size": lambda terms: np.add.accumulate(np.sort(terms, axis=-1), axis=-1)[..., -1],
    "in eight lanes": lambda terms: sum(np.add.accumulate(terms[..., i::8], axis=-1)[..., -1] for i in range(8)),
    "in a tree": lambda terms: terms.sum(-1),
}


@pytest.mark.parametrize("order", IN_ORDER)
@pytest.mark.parametrize("size", PRODUCTS, ids=str)
def test_a_right_sum_passes_in_every_order(size, order):
    rows, terms, columns = size
    for shift in (0.0, 3.0):  # terms of either sign, and nearly all of one
        a, b = randn(rows, terms, seed=1) + shift, randn(columns, terms, seed=2) + shift
        found = IN_ORDER[order]((a[:, None] * b).numpy())
        exact = a.double() @ b.double().T
        if order == "by size":  # the worst there is: the sum is that of one sign for half of the way
            size = max(exact.abs().max().item(), (a.double().abs() @ b.double().abs().T).max().item() / 2)
            assert passes(torch.from_numpy(found), exact, Sum(terms, size))
        else:
            assert passes(torch.from_numpy(found), exact, Sum(terms))


def last_product_in(rounded):
    """One of the terms alone."""
    return lambda a, b: a @ b.T - a[:, -1:] * b[:, -1] + rounded(a[:, -1:]) * rounded(b[:, -1])


WRONG_PRODUCTS = {
    "rows off by one": lambda a, b: (a @ b.T).roll(1, 0),
    "a column dropped": lambda a, b: torch.cat([(a @ b.T)[:, :-1], torch.zeros(len(a), 1)], 1),
    "a term dropped": lambda a, b: a[:, :-1] @ b[:, :-1].T,
    "a term twice": lambda a, b: a @ b.T + a[:, -1:] * b[:, -1],
    "one product in bfloat16": last_product_in(in_bfloat16),
    "all in bfloat16": lambda a, b: in_bfloat16(a) @ in_bfloat16(b).T,
    "all in TF32": lambda a, b: in_tf32(a) @ in_tf32(b).T,
    "one operand in TF32": lambda a, b: a @ in_tf32(b).T,
    "a scale 1 % off": lambda a, b: 1.01 * (a @ b.T),
    "a scale 1e-4 off": lambda a, b: (1 + 1e-4) * (a @ b.T),
    "halves added in two bfloat16 parts": lambda a, b: sum(in_bfloat16(x @ y.T) for x, y in halves(a, b)),
}


def halves(a, b):
    return zip(a.chunk(2, 1), b.chunk(2, 1))


@pytest.mark.parametrize("mistake", WRONG_PRODUCTS)
@pytest.mark.parametrize("size", PRODUCTS, ids=str)
def test_a_wrong_product_fails(size, mistake):
    rows, terms, columns = size
    a, b = randn(rows, terms, seed=1).double(), randn(columns, terms, seed=2).double()
    assert passes(a @ b.T, a @ b.T, Sum(terms))
    assert not passes(WRONG_PRODUCTS[mistake](a, b), a @ b.T, Sum(terms))


# --------------------------------------------------------------------------------------------------------- attention


def attention(q, k, v, do, *, scale=1.0, scores=lambda s: s, weights=lambda p: p, dscores=lambda x: x):
    """y and the gradients in float64, with places for mistakes."""
    scale = scale * q.shape[-1] ** -0.5
    p = weights((scores(q @ k.mT) * scale).softmax(-1))
    y, dp = p @ v, do @ v.mT
    ds = dscores(p * (dp - (do * y).sum(-1, keepdim=True)) * scale)
    return {"y": y, "dq": ds @ k, "dk": ds.mT @ q, "dv": p.mT @ do}


def without_last_key(p):
    return torch.cat([p[..., :-1], torch.zeros_like(p[..., -1:])], -1)


HEADS = [1, 0]
# The mistake, and the results in which it shows.
WRONG_ATTENTION = {
    "a scale 1 % off": (lambda g: attention(*g, scale=1.01), "y dq dk dv"),
    "a key dropped": (lambda g: attention(*g, weights=without_last_key), "y dq dk dv"),
    "a key dropped in backward": (lambda g: attention(*g, dscores=without_last_key), "dq dk"),
    "scores in bfloat16": (lambda g: attention(*g, scores=in_bfloat16), "y dq dk dv"),
    "scores in TF32": (lambda g: attention(*(in_tf32(x) for x in g[:2]), *g[2:]), "y dq dk dv"),
    "probabilities in bfloat16": (lambda g: attention(*g, weights=in_bfloat16), "y dv"),
    "gradients of scores in bfloat16": (lambda g: attention(*g, dscores=in_bfloat16), "dq dk"),
    "heads swapped": (lambda g: {name: x[:, HEADS] for name, x in attention(*g).items()}, "y dq dk dv"),
    "rows off by one": (lambda g: {name: x.roll(1, 2) for name, x in attention(*g).items()}, "y dq dk dv"),
}


@pytest.mark.parametrize("mistake", WRONG_ATTENTION)
@pytest.mark.parametrize(("rows", "dim"), [(3, 32), (16, 16), (65, 32), (601, 64)])
def test_a_wrong_attention_fails(rows, dim, mistake):
    given = [randn(1, 2, rows, dim, seed=seed).double() for seed in range(4)]
    right, sums = attention(*given), Sum(rows + dim)
    wrong, shows_in = WRONG_ATTENTION[mistake]
    found = wrong(given)
    assert all(passes(x, x, sums) for x in right.values())
    assert [name for name in shows_in.split() if passes(found[name], right[name], sums)] == []


# --------------------------------------------------------------------------------------------------------------- nce


def losses(a, b, t, *, row=lambda s: s, positive=lambda s: s):
    """Joint losses of samples with one candidate each."""
    s = a @ b.T / t
    return torch.cat([row(s), s.T], 1).logsumexp(1) - positive(s.diagonal())


WRONG_LOSSES = {
    "a temperature 1 % off": lambda a, b, t: losses(a, b, 1.01 * t),
    "a tile of columns dropped": lambda a, b, t: losses(a, b, t, row=lambda s: s[:, : 3 * len(s) // 4]),
    "positives in bfloat16": lambda a, b, t: losses(a, b, t, positive=in_bfloat16),
    "positives in TF32": lambda a, b, t: losses(a, b, t, positive=in_tf32),
    "all in bfloat16": lambda a, b, t: losses(in_bfloat16(a), in_bfloat16(b), t),
    "all in TF32": lambda a, b, t: losses(in_tf32(a), in_tf32(b), t),
    "samples off by one": lambda a, b, t: losses(a, b, t).roll(1),
    "positives off by one": lambda a, b, t: losses(a, b.roll(1, 0), t),
}


@pytest.mark.parametrize("mistake", WRONG_LOSSES)
@pytest.mark.parametrize(("rows", "dim", "t"), [(5, 16, 0.02), (127, 512, 0.07), (127, 64, 0.01), (600, 256, 0.3)])
def test_a_wrong_loss_fails(rows, dim, t, mistake):
    a = randn(rows, dim, seed=1).double()
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, a + 6 * randn(rows, dim, seed=2)))  # no easy pairs
    sums = Sum(dim, 4 / t), Sum(rows, 4.0)
    exact = losses(a, b, t)
    assert passes(exact, exact, *sums)
    assert not passes(WRONG_LOSSES[mistake](a, b, t), exact, *sums)


# ---------------------------------------------------------------------------------------------------- the arithmetic


def test_the_budget_is_the_operations_alone():
    """By hand; and a reference that is less exact widens it, one that is more exact does not narrow it."""
    exact = torch.tensor([3.0, -4.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert sum_budget(Sum(9), largest=4.0) == pytest.approx(3 * 4 * eps)
    assert sum_budget(Sum(9, 2.0), Sum(16, 4.0)) == pytest.approx(eps * math.hypot(3 * 2, 4 * 4))
    assert sum_budget(Sum(9, 2.0), dtype=torch.bfloat16) == sum_budget(Sum(9, 2.0))  # halves are added in float32
    assert sum_budget(Sum(3, 2.0, torch.float16)) == pytest.approx(3**0.5 * 2 * torch.finfo(torch.float16).eps)
    assert sum_budget(Sum(9, 2.0), dtype=torch.float64) == pytest.approx(6 * torch.finfo(torch.float64).eps)
    assert error_budget(exact.float(), exact, Sum(9)) == pytest.approx(3 * 4 * eps + 4 * eps)
    assert error_budget(exact.float() + 1e-3, exact, Sum(9)) == pytest.approx(2e-3 + 3 * 4 * eps + 4 * eps, rel=1e-3)
    with pytest.raises(ValueError, match="sum_budget: sums must hold a Sum at least, got none"):
        error_budget(exact.float(), exact)


def test_what_cancels_needs_its_size():
    """The gradient of one key's score: 0 by a difference of two sums of 64 products."""
    v, do = randn(1000, 64, seed=1), randn(1000, 64, seed=2)
    left = np.add.accumulate((do * v).numpy(), axis=1)[:, -1] - (do * v).flip(1).sum(1).numpy()
    nothing = torch.zeros(1000, dtype=torch.float64)
    assert np.abs(left).max() > 0
    assert not passes(torch.from_numpy(left), nothing, Sum(2 * 64))
    assert passes(torch.from_numpy(left), nothing, Sum(2 * 64, product_size(do, v.T)))


def test_two_sums_may_both_round():
    terms = randn(500, 1000).numpy()
    first, second = (torch.from_numpy(IN_ORDER[order](terms)) for order in ("one after the other", "backwards"))
    assert not torch.equal(first, second)
    assert_same_sums(first, second, Sum(1000))
    with pytest.raises(AssertionError, match=r"y\[.*error"):
        assert_same_sums(first, torch.from_numpy(terms[:, 1:].sum(-1)), Sum(1000), name="y")


def test_a_formula_is_told_from_rounding():
    x = randn(50, dtype=torch.float64)
    assert_same_formula(x * (1 + 1e-11), x)
    assert_same_formula(torch.full((3,), 1e-12, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), size=1.0)
    for wrong in (x * (1 + 1e-6), x.roll(1), torch.where(x == x[7], torch.nan, x)):
        with pytest.raises(AssertionError, match=r"y.* off by"):
            assert_same_formula(wrong, x, name="y")
    with pytest.raises(AssertionError, match=r"dtypes torch\.float32"):
        assert_same_formula(x.float(), x)


def test_what_is_not_finite_fails():
    exact = randn(4, 5, dtype=torch.float64)
    for value in (math.nan, math.inf):
        wrong = exact.float()
        wrong[2, 3] = value
        with pytest.raises(AssertionError, match=r"dx\[2, 3\]: got (nan|inf), expected"):
            assert_within_budget(wrong, exact.float(), exact, Sum(1), name="dx")
