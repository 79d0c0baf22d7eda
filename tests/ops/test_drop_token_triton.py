"""drop_token and sample_keep in Triton, run by its interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter

from vatt_engine.testing import Sum, assert_within_budget, randn

kernels = triton_interpreter.load("drop_token")
M = 1 << 64

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# batch, tokens, width, kept
CASES = [(1, 1, 1, 1), (2, 37, 5, 37), (2, 13, 300, 1), (1, 3, 7, 40)]


def keep_for(case, keep):
    batch, tokens, _, kept = case
    per_sample = torch.randint(tokens, (batch, kept))  # some twice or more
    return {"sample": per_sample, "batch": per_sample[0], "strided": per_sample.T.contiguous().T}[keep]


def gathered(tokens, keep):
    return torch.stack([sample[keep[b] if keep.ndim == 2 else keep] for b, sample in enumerate(tokens)])


@pytest.mark.parametrize("keep", ["sample", "batch", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_and_its_gradient(case, dtype, keep):
    batch, num_tokens, width, kept = case
    keep = keep_for(case, keep)
    tokens = randn(batch, width, num_tokens, dtype=dtype).transpose(1, 2)  # not contiguous
    grad = randn(batch, kept, width, seed=1, dtype=dtype)
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        y = kernels.drop_token_fwd(tokens, keep)
        dx = kernels.drop_token_bwd(grad, keep, num_tokens)
    assert torch.equal(y, gathered(tokens, keep))
    exact = torch.zeros(batch, num_tokens, width, dtype=torch.float64)
    for b in range(batch):
        exact[b].index_add_(0, keep[b] if keep.ndim == 2 else keep, grad[b].double())
    low = exact.to(dtype) if dtype in (torch.bfloat16, torch.float16) else exact.to(torch.float32).to(dtype)
    assert_within_budget(dx, low, exact, Sum(kept), name="dx")


@pytest.mark.parametrize("position", [-1, 4, 2**33])
def test_a_wrong_position_stops_the_run(position):
    with triton_interpreter.running(), pytest.raises(Exception, match="keep must hold positions of tokens"):
        kernels.drop_token_fwd(torch.zeros(1, 4, 3), torch.tensor([0, position]))


@pytest.mark.parametrize(("batch", "kept", "width"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_nothing_kept(batch, kept, width):
    keep = torch.zeros(batch, kept, dtype=torch.int64)
    with triton_interpreter.running():
        assert kernels.drop_token_fwd(torch.ones(batch, 4, width), keep).shape == (batch, kept, width)
        dx = kernels.drop_token_bwd(torch.ones(batch, kept, width), keep, 4)
    assert torch.equal(dx, torch.zeros(batch, 4, width))


def mixed(x):
    """splitmix64 of a Python integer."""
    x = (x + 0x9E3779B97F4A7C15) % M
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % M
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % M
    return x ^ (x >> 31)


def drawn(seed, sample_id, num_tokens, num_kept):
    """The definition of the sample, in Python's integers."""
    stream = mixed(seed % M)
    if sample_id is not None:
        stream = mixed(stream ^ mixed(sample_id % M))

    def key(n):
        value = mixed(stream ^ mixed(n)) >> 20 << 20 | n
        return value - M if value >= M // 2 else value

    return sorted(range(num_tokens), key=key)[:num_kept]


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(("num_tokens", "num_kept"), [(1, 1), (2, 1), (3, 3), (64, 64), (100, 37), (5000, 9)])
def test_sample(num_tokens, num_kept, seed):
    ids = [3, -1, 2**62]
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        shared = kernels.sample_keep(torch.tensor(seed), None, num_tokens, num_kept)
        each = kernels.sample_keep(torch.tensor(seed), torch.tensor(ids), num_tokens, num_kept)
    assert shared.tolist() == drawn(seed, None, num_tokens, num_kept)
    assert each.tolist() == [drawn(seed, sample_id, num_tokens, num_kept) for sample_id in ids]
