"""What torch.utils.flop_counter counts of every op: the products it needs, whichever implementation computes them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vatt_engine import ops
from vatt_engine.dispatch import use_impl
from vatt_engine.testing import impls_of, randn

CPU = {stem: [name for name, device in impls_of(stem) if device == "cpu"] for stem in ("tokenize", "nce", "drop_token")}


def counted(function, *inputs):
    """FLOPs of the forward pass, and of the backward pass for all inputs that require grad."""
    with FlopCounterMode(display=False) as forward:
        y = function(*inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), [x for x in inputs if x.requires_grad])
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("impl", CPU["tokenize"])
@pytest.mark.parametrize("agg", [False, True])
def test_tokenize_counts_the_kept_patches_as_a_linear_layer(impl, agg):
    video = torch.zeros(2, 8, 32, 48, 3, dtype=torch.uint8)
    weight, keep = randn(7, 3072).requires_grad_(), torch.tensor([3, 0, 11, 5, 2])
    row = torch.zeros(7, requires_grad=True) if agg else None
    with use_impl(tokenize=impl):
        found = counted(lambda w: ops.tokenize_video(video, w, agg=row, keep=keep), weight)
    patches = torch.zeros(2, 5, 3072)
    assert found == counted(lambda w: F.linear(patches, w), weight) == (2 * 2 * 5 * 3072 * 7,) * 2


def test_tokenize_counts_no_gradient_that_nobody_wants():
    wave, weight, bias = torch.zeros(2, 64), torch.zeros(7, 16), torch.zeros(7, requires_grad=True)
    assert counted(lambda b: ops.tokenize_waveform(wave, weight, b, patch=16), bias) == (2 * 2 * 4 * 16 * 7, 0)


@pytest.mark.parametrize("impl", CPU["nce"])
def test_nce_counts_one_product_and_three(impl):
    """s forward; in the backward s again, and one product per side."""
    video, text = (randn(*shape, seed=len(shape)).requires_grad_() for shape in ((6, 9), (6, 5, 9)))
    with use_impl(nce=impl):
        assert counted(lambda a, b: ops.mil_nce(a, b, 0.07), video, text) == (2 * 6 * 30 * 9, 6 * 6 * 30 * 9)


@pytest.mark.parametrize("impl", CPU["drop_token"])
def test_drop_token_multiplies_nothing(impl):
    with use_impl(drop_token=impl):
        keep = ops.sample_keep(8, 3, seed=1)
        assert counted(lambda x: ops.drop_token(x, keep), torch.ones(2, 8, 4, requires_grad=True)) == (0, 0)


def test_every_op_has_a_formula():
    """The private ops are all those whose schema torch keeps in our namespace."""
    from torch.utils.flop_counter import flop_registry

    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("vatt::")}
    assert {"vatt::tokenize_fwd", "vatt::nce_grad", "vatt::drop_token_bwd"} <= names
    assert {name for name in names if getattr(torch.ops.vatt, name[6:]) not in flop_registry} == set()
