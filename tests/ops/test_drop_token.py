"""drop_token and sample_keep: gather with gradient, and positions that depend on the seed alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_engine import ops
from vatt_engine.dispatch import use_impl
from vatt_engine.ops.drop_token import _bwd, _fwd, _mix, drop_token_reference
from vatt_engine.testing import assert_within_budget, gradients, impls_of, randn

# batch, tokens, width, kept
CASES = [(2, 1568, 16, 784), (1, 1, 1, 1), (3, 37, 5, 37), (2, 13, 7, 1)]


def keep_for(case, per_sample):
    batch, tokens, _, kept = case
    ids = torch.arange(batch) if per_sample else None
    return ops.sample_keep(tokens, kept, seed=1, sample_id=ids)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("impl", "device"), impls_of("drop_token"))
def test_matches_reference(impl, device, case, dtype, per_sample):
    keep = keep_for(case, per_sample).to(device)
    x = randn(*case[:3], dtype=dtype, device=device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    with use_impl(drop_token=impl):
        y = ops.drop_token(x, keep)
        (dx,) = gradients(y, [x])
    low, want = drop_token_reference(x, keep), drop_token_reference(exact, keep)
    assert_within_budget(y, low, want, name="y")
    assert_within_budget(dx, gradients(low, [x])[0], gradients(want, [exact])[0], name="dx")


@pytest.mark.parametrize("keep", [torch.tensor([2, 0, 2]), torch.tensor([[2, 0, 1], [1, 1, 1]])])
def test_reference_is_the_definition(keep):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = drop_token_reference(x, keep)
    for b in range(2):
        for i in range(3):
            position = keep[i] if keep.ndim == 1 else keep[b, i]
            assert torch.equal(y[b, i], x[b, position])
    assert torch.autograd.gradcheck(lambda t: ops.drop_token(t, keep), x)  # positions kept twice add up


def test_registration():
    x, keep = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    torch.library.opcheck(_fwd, (x, keep))
    torch.library.opcheck(_bwd, (x[:, :2], keep, 5))


def test_compiles():
    def op(x, keep):
        return ops.drop_token(x, keep)

    x, keep = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([3, 1])
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, keep), op(x, keep))
    assert torch.equal(gradients(compiled(x, keep), [x])[0], gradients(op(x, keep), [x])[0])


@pytest.mark.parametrize(
    ("tokens", "keep", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0]), r"tokens must be \[B, N, D\], got shape \(2, 3\)"),
        (torch.zeros(2, 3, 4), torch.tensor([0.0]), "keep must be int64, got torch.float32"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 1).long(), r"keep must be \[K\] or \[2, K\], got shape \(3, 1\)"),
    ],
)
def test_rejects_bad_arguments(tokens, keep, message):
    with pytest.raises(ValueError, match=message):
        ops.drop_token(tokens, keep)
    with pytest.raises(ValueError, match=r"num_kept must be in 1\.\.8, got 9"):
        ops.sample_keep(8, 9, seed=0)


def test_edges():
    x = torch.randn(3, 4, 5).transpose(0, 1)  # [4, 3, 5], not contiguous
    keep = torch.tensor([2, 0])
    assert torch.equal(ops.drop_token(x, keep), x[:, [2, 0]])


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(1, 300), data=st.data(), seed=st.integers(0, 2**63 - 1))
def test_positions_are_distinct_and_in_range(tokens, data, seed):
    kept = data.draw(st.integers(1, tokens))
    keep = ops.sample_keep(tokens, kept, seed=seed, sample_id=torch.arange(3))
    for row in (*keep, ops.sample_keep(tokens, kept, seed=seed)):
        assert len(set(row.tolist())) == kept
        assert 0 <= row.min() <= row.max() < tokens


def test_positions_depend_on_seed_and_sample_alone():
    everyone = ops.sample_keep(100, 50, seed=7, sample_id=torch.tensor([11, 12, 13]))
    alone = ops.sample_keep(100, 50, seed=7, sample_id=torch.tensor([13]))
    assert torch.equal(everyone[2], alone[0])
    assert not torch.equal(everyone[0], everyone[1])
    assert torch.equal(ops.sample_keep(100, 50, seed=torch.tensor([7])), ops.sample_keep(100, 50, seed=7))
    assert not torch.equal(ops.sample_keep(100, 50, seed=8), ops.sample_keep(100, 50, seed=7))


def test_positions_are_uniform():
    """Every position is kept equally often, and in every place: chi-square of 10,000 draws of 4 of 8."""
    ids = torch.arange(10_000)
    keep = ops.sample_keep(8, 4, seed=0, sample_id=ids)
    for place in range(4):
        counts = torch.bincount(keep[:, place], minlength=8).double()
        chi_square = ((counts - 1250) ** 2 / 1250).sum().item()
        assert chi_square < 24.3  # 99.9 % of chi-square with 7 degrees of freedom
    pairs = torch.bincount(keep[:, 0] * 8 + keep[:, 1], minlength=64).double()
    assert ((pairs[pairs > 0] - 10_000 / 56) ** 2 / (10_000 / 56)).sum().item() < 93.2  # 55 degrees of freedom


def test_hash_is_splitmix64():
    """The published first outputs of splitmix64 seeded with 1234567."""
    seed = torch.tensor(1234567)
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    outputs = [_mix(seed + i * golden).item() % (1 << 64) for i in range(2)]
    assert outputs == [6457827717110365317, 3203168211198807973]
