"""Dropout: how much is dropped, what is left, and that nothing but torch's generator decides which."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from vatt_engine import ops
from vatt_engine.models.transformer import Dropout
from vatt_engine.ops.dropout import _made, hashed
from vatt_engine.testing import randn

SIZE = (61, 67, 71)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_a_share_p_is_dropped_and_the_rest_scaled(p, dtype):
    """float64, which the native code does not take, is torch's own."""
    x = randn(*SIZE, dtype=dtype).where(randn(*SIZE, dtype=dtype) != 0, 1.0).requires_grad_()
    y = Dropout(p)(x)
    kept, count = y != 0, x.numel()
    assert abs(kept.sum().item() - count * (1 - p)) < 5 * math.sqrt(count * p * (1 - p)) + (x == 0).sum().item()
    torch.testing.assert_close(y, (x.double() / (1 - p)).to(dtype) * kept)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (torch.ones_like(x, dtype=torch.float64) / (1 - p)).to(dtype) * kept)


@pytest.mark.parametrize("threads", [1, 3])
def test_native_masks_are_those_of_the_hash(threads):
    """Whatever the pieces that threads take; of a view, by its rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.ones(397, 523).T
        torch.manual_seed(5)
        kept = Dropout(0.25)(x) != 0
    finally:
        torch.set_num_threads(before)
    torch.manual_seed(5)
    expected = hashed(torch.randint(2**62, ()), x.numel()) >= 2**29
    assert torch.equal(kept, expected.view(x.shape))


def test_torchs_generator_decides():
    x = torch.ones(100)
    torch.manual_seed(3)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.5)(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_edges(dtype):
    x = randn(3, 5, dtype=dtype)
    assert torch.equal(Dropout(0.4).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert Dropout(0.4)(x).dtype == dtype
    assert Dropout(0.4)(x[:0]).shape == (0, 5)
    assert Dropout(1 - 1e-9)(x).isfinite().all()
    assert not Dropout(1.0)(x).any()
    with pytest.raises(ValueError, match="between 0 and 1"):
        ops.dropout(x, 1.5)


def test_the_hash_is_that_of_unsigned_words():
    key, word = 0x1234567_89ABCDEF, 0xFFFFFFFF
    expected = []
    for place in range(1000):
        x = place ^ (key & word)
        x = (x ^ (x >> 16)) * 0x7FEB352D & word
        x = (x ^ (x >> 15) ^ (key >> 32)) * 0x846CA68B & word
        expected.append((x ^ (x >> 16)) & 0x7FFFFFFF)
    assert hashed(torch.tensor(key), 1000).tolist() == expected


def test_hashed_bits_are_even_and_apart():
    """Shares of small numbers in rows and columns of a layer's size, and of pairs of neighbours."""
    for seed in range(3):
        torch.manual_seed(seed)
        low = (hashed(torch.randint(2**62, ()), 785 * 768) < round(0.1 * 2**31)).view(785, 768).double()
        for axis, count in ((0, 785), (1, 768)):
            deviation = low.mean(axis).std().item() / math.sqrt(0.09 / count)
            assert 0.85 < deviation < 1.15  # five deviations of the estimate
        pairs = (low[:, 1:] * low[:, :-1]).mean().item()
        assert abs(pairs - 0.01) < 5 * math.sqrt(0.01 / low.numel())


class OnAGPU(Dropout):
    """The masks of compiled code on a GPU, drawn on the CPU."""

    def forward(self, x):
        keep = hashed(_made(torch.randint(2**62, ())), x.numel()) >= round(self.p * 2**31)
        return (x / (1 - self.p)).where(keep.view(x.shape), 0.0)


def test_compiled_masks_differ_by_call_and_are_the_same_in_both_passes():
    """Of one graph with two dropouts; the backward pass makes the mask again from its key alone."""
    twice = torch.nn.Sequential(OnAGPU(0.5), OnAGPU(0.5))
    compiled, x = torch.compile(copy.deepcopy(twice), fullgraph=True), torch.ones(4096, requires_grad=True)
    y, other = compiled(x), compiled(x)
    kept = (y != 0).double().mean().item()
    assert abs(kept - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4096)  # one mask twice would keep a half
    assert not torch.equal(y, other)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y)
