"""attention: every implementation against the fp64 reference, the definition, and the edges."""

from __future__ import annotations

import pytest
import torch

from vatt_engine import ops
from vatt_engine.dispatch import use_impl
from vatt_engine.ops.attention import attention_reference
from vatt_engine.testing import assert_within_budget, gradients, impls_of, randn

# batch, heads, tokens, head_dim: VATT's video (50 % kept), one token, odd sizes, the text tower
CASES = [(2, 3, 37, 64), (1, 1, 1, 8), (1, 2, 197, 64), (3, 4, 17, 64), (2, 1, 5, 3)]


def inputs(case, dtype, device="cpu", *, bias, masked):
    batch, heads, tokens, _ = case
    q, k, v = (randn(*case, seed=s, dtype=dtype, device=device).requires_grad_() for s in range(3))
    table = randn(heads, tokens, tokens, seed=3, dtype=dtype, device=device).requires_grad_() if bias else None
    key_mask = None
    if masked:
        key_mask = (torch.arange(tokens) % 3 != 1).repeat(batch, 1).to(device)
        key_mask[-1] &= batch == 1  # else nothing to see
    return q, k, v, table, key_mask


def run(function, q, k, v, bias, key_mask):
    out = function(q, k, v, bias, key_mask)
    return [out, *gradients(out, [t for t in (q, k, v, bias) if t is not None])]


@pytest.mark.parametrize(("bias", "masked"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("impl", "device"), impls_of("attention"))
def test_matches_reference(impl, device, case, dtype, bias, masked):
    def op(q, k, v, bias, key_mask):
        with use_impl(attention=impl):
            return ops.attention(q, k, v, bias=bias, key_mask=key_mask)

    def reference(q, k, v, bias, key_mask):
        return attention_reference(q, k, v, bias, key_mask, 0.0, q.shape[-1] ** -0.5)

    given = inputs(case, dtype, device, bias=bias, masked=masked)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given[:4]] + [given[4]]
    names = ["y", "dq", "dk", "dv", "dbias"]
    for name, got, low, want in zip(names, run(op, *given), run(reference, *given), run(reference, *exact)):
        assert_within_budget(got, low, want, name=name)


def test_reference_is_the_definition():
    """Each output row is the weighted mean over visible keys, written as loops in fp64."""
    q, k, v, bias, key_mask = inputs((2, 2, 5, 3), torch.float64, bias=True, masked=True)
    y = attention_reference(q, k, v, bias, key_mask, 0.0, 0.7)
    for b in range(2):
        for h in range(2):
            for i in range(5):
                seen = [j for j in range(5) if key_mask[b, j]]
                weights = [torch.exp(0.7 * q[b, h, i] @ k[b, h, j] + bias[h, i, j]) for j in seen]
                total = (
                    sum(w * v[b, h, j] for w, j in zip(weights, seen)) / sum(weights)
                    if seen
                    else torch.zeros(3).double()
                )
                assert torch.allclose(y[b, h, i], total, atol=1e-12)
    small = inputs((1, 2, 3, 2), torch.float64, bias=True, masked=False)[:4]
    assert torch.autograd.gradcheck(lambda *t: attention_reference(*t, None, 0.0, 1.0), small)


@pytest.mark.parametrize(("impl", "device"), impls_of("attention"))
def test_compiles(impl, device):
    def op(q, k, v, bias, key_mask):
        return ops.attention(q, k, v, bias=bias, key_mask=key_mask)

    given = inputs((2, 3, 37, 64), torch.float32, device, bias=True, masked=True)
    with use_impl(attention=impl):
        compiled = run(torch.compile(op, fullgraph=True, backend="aot_eager"), *given)
        for got, want in zip(compiled, run(op, *given)):
            assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3)}, r"q must be \[B, H, N, D\], got shape \(2, 3\)"),
        ({"k": torch.zeros(1, 2, 4, 9)}, r"k must have the shape of q \[1, 2, 4, 8\], got \[1, 2, 4, 9\]"),
        ({"v": torch.zeros(1, 2, 5, 8)}, r"v must be \[1, 2, 4, 'E'\], got"),
        ({"v": torch.zeros(1, 2, 4, 8).bfloat16()}, "v must have the dtype of q"),
        ({"bias": torch.zeros(4, 4)}, r"bias must be .* got \[4, 4\]"),
        ({"key_mask": torch.ones(1, 4)}, r"key_mask must be bool \[1, 4\], got torch.float32"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ],
)
def test_rejects_bad_arguments(change, message):
    good = {name: torch.zeros(1, 2, 4, 8) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        ops.attention(**(good | change))


@pytest.mark.parametrize(("impl", "device"), impls_of("attention"))
def test_edges(impl, device):
    with use_impl(attention=impl):
        q, k, v, _, key_mask = inputs((2, 2, 6, 8), torch.float32, device, bias=False, masked=True)
        y = ops.attention(q, k, v, key_mask=key_mask)
        assert not y[-1].any()  # a row that may see nothing gives zeros
        assert all(g.isfinite().all() for g in gradients(y, [q, k, v]))
        huge = ops.attention(q * 1e4, k * 1e4, v)
        assert huge.isfinite().all()
        strided = q.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.allclose(ops.attention(strided, k, v), ops.attention(q, k, v), atol=1e-6)
        dropped = ops.attention(q * 0, k, torch.ones_like(v), dropout_p=0.5)
        assert not torch.allclose(dropped, torch.ones_like(v))
        many = ops.attention(
            torch.zeros(64, 8, 32, 8, device=device),
            torch.zeros(64, 8, 32, 8, device=device),
            torch.ones(64, 8, 32, 8, device=device),
            dropout_p=0.25,
        )
        assert many.mean().item() == pytest.approx(1.0, abs=0.02)  # kept probabilities are scaled up
