"""linear: torch's own, except under bfloat16 autocast on a CPU without AMX, where it may be as far off as autocast."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vatt_engine import ops
from vatt_engine.testing import Sum, assert_same_sums, assert_within_budget, gradients, randn

SIZES = [((5, 7, 33), 17), ((64,), 24), ((0, 3, 8), 4), ((2, 1), 1), ((257, 96), 63)]


@pytest.fixture
def amx(monkeypatch):
    """Set it to True or False."""
    return lambda has: monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)


def operands(shape, out, *, bias=True, scale=1.0):
    given = [randn(*shape) * scale, randn(out, shape[-1], seed=1) * scale]
    given += [randn(out, seed=2)] if bias else []
    return [t.requires_grad_() for t in given]


def both_passes(function, given):
    with torch.autocast("cpu", torch.bfloat16, enabled=given[0].dtype != torch.float64):
        y = function(*given)
    return [y, *gradients(y, given)]


def check(function, given):
    exact = both_passes(F.linear, [t.detach().double().requires_grad_() for t in given])
    out, width = given[1].shape
    rows = given[0].numel() // width
    terms = {"y": width + 1, "x": out, "weight": rows, "bias": rows}
    for (name, count), *three in zip(terms.items(), both_passes(function, given), both_passes(F.linear, given), exact):
        assert_within_budget(*three, Sum(count), name=name)


@pytest.mark.parametrize("scale", [1.0, 1e12])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "out"), SIZES)
def test_products_in_float32_are_within_the_budget_of_autocast(shape, out, bias, scale, amx):
    amx(False)
    check(ops.linear, operands(shape, out, bias=bias, scale=scale))


def test_compiles_whole(amx):
    amx(False)
    check(torch.compile(ops.linear, fullgraph=True), operands(*SIZES[0]))


def test_rows_of_a_view_in_bfloat16(amx):
    amx(False)
    x, weight, bias = operands((9, 31, 40), 16)
    view = x.detach().bfloat16()[::2, 1:, ::2].requires_grad_()
    whole = view.detach().contiguous().requires_grad_()
    given = weight[:, ::2].detach().requires_grad_(), bias
    for got, want in zip(both_passes(ops.linear, [view, *given]), both_passes(ops.linear, [whole, *given])):
        assert got.dtype == want.dtype
        assert_same_sums(got, want, Sum(20 * 5))  # the longest, over rows


def test_everywhere_else_it_is_torchs(amx):
    given = operands((6, 32), 8)
    assert torch.equal(ops.linear(*given), F.linear(*given))
    amx(True)
    for got, want in zip(both_passes(ops.linear, given), both_passes(F.linear, given)):
        assert torch.equal(got, want)
    amx(False)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(ops.linear(*given), F.linear(*given))


def test_what_is_frozen_gets_no_gradient_and_x_is_kept_in_bfloat16(amx):
    amx(False)
    x, weight, bias = operands((6, 32), 8)
    kept = []

    def frozen(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return ops.linear(x, weight.detach(), bias.detach())

    _, grad = both_passes(frozen, [x])
    assert [(t.dtype, t.shape) for t in kept] == [(torch.bfloat16, (6, 32)), (torch.float32, (8, 32))]
    assert grad.dtype == torch.float32
    exact = randn(6, 8, seed=1, dtype=torch.bfloat16).double() @ weight.detach().double()
    assert (grad - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        both_passes(ops.linear, operands((6, 32), 8)[:1] + operands((6, 31), 8)[1:])


def test_a_backward_pass_under_autocast_is_the_same(amx):
    """As torch.compile runs it."""
    amx(False)
    given = operands((64, 33), 17)
    with torch.autocast("cpu", torch.bfloat16):
        under = gradients(ops.linear(*given), given)
    for got, want in zip(under, both_passes(ops.linear, given)[1:]):
        assert torch.equal(got, want)
