"""The hash behind every random choice of ours: splitmix64's finaliser (Steele, Lea and Flood 2014) of a counter.

The same bits on every device, in every implementation, in every order of evaluation.
"""

from __future__ import annotations

from torch import Tensor

# As signed 64-bit integers, which is what torch computes in.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def splitmix64(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose output bits all depend on all input bits.

    Args:
        x: int64 of any shape.

    >>> import torch
    >>> hex(splitmix64(torch.tensor(0)).item() % 2**64)
    '0xe220a8397b1dcdaf'
    """
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
