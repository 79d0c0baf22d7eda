"""drop_token and sample_keep, over shapes that hypothesis draws (in a file of its own: a GPU machine may lack it)."""

import pytest
import torch

from vatt_engine import ops
from vatt_engine.dispatch import use_impl
from vatt_engine.ops.drop_token import _bwd, _fwd, drop_token_bwd_reference, drop_token_reference
from vatt_engine.testing import Sum, assert_within_budget, impls_of, randn

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(("impl", "device"), impls_of("drop_token"))
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_gather_and_scatter(impl, device, data):
    batch, tokens, width = (data.draw(st.integers(*bounds)) for bounds in ((0, 4), (1, 80), (1, 40)))
    kept = data.draw(st.integers(0, 2 * tokens))  # more than there are: some positions occur twice
    keep = torch.randint(tokens, data.draw(st.sampled_from([(kept,), (batch, kept)]))).to(device)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x, grad = (randn(batch, rows, width, seed=rows, dtype=dtype, device=device) for rows in (tokens, kept))
    with use_impl(drop_token=impl):
        y, dx = _fwd(x, keep), _bwd(grad, keep, tokens)
    assert torch.equal(y, drop_token_reference(x, keep))
    low, exact = (drop_token_bwd_reference(g, keep, tokens) for g in (grad, grad.double()))
    assert_within_budget(dx, low, exact, Sum(kept), name="dx")


@pytest.mark.parametrize(("impl", "device"), impls_of("drop_token"))
@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 300), data=st.data(), seed=st.integers(-(2**63), 2**63 - 1))
def test_positions_are_distinct_and_in_range(impl, device, tokens, data, seed):
    kept = data.draw(st.integers(1, tokens))
    ids = torch.arange(3, device=device)
    with use_impl(drop_token=impl):
        keep = ops.sample_keep(tokens, kept, seed=seed, sample_id=ids)
        shared = ops.sample_keep(tokens, kept, seed=seed, device=device)
    for row in (*keep, shared):
        assert len(set(row.tolist())) == kept
        assert 0 <= row.min() <= row.max() < tokens
    with use_impl(drop_token="reference"):
        assert torch.equal(keep, ops.sample_keep(tokens, kept, seed=seed, sample_id=ids))
