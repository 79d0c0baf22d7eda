"""Dropout that takes few random numbers: torch draws one per element, which costs more than the layers around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout; eagerly on a CPU and compiled on a GPU, where torch's own is slow, the masks are drawn otherwise.

    CPU: four elements share one number of 64 bits of torch's generator, and p is rounded to a multiple of 2^-16 (0.1 to
    0.100006). GPU: a number of torch's generator for the call, hashed with the place of each element; p is rounded to
    a multiple of 2^-31. What is left is scaled by 1 / (1 - p) of the rounded p.

    >>> Dropout(0.5).eval()(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        compiled = torch.compiler.is_compiling()
        if not (self.training and 0 < self.p < 1) or (compiled if x.is_cpu else not compiled):
            return super().forward(x)
        bits = 16 if x.is_cpu else 31
        dropped = min(round(self.p * 2**bits), 2**bits - 1)
        if x.is_cpu:
            drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
            keep = drawn.view(torch.int16)[: x.numel()] >= dropped - 2**15
        else:
            key = _made(torch.randint(2**62, (), device=x.device))
            keep = hashed(key, x.numel()) >= dropped
        return (x * (2**bits / (2**bits - dropped))).where(keep.view(x.shape), 0.0)


@torch.library.custom_op("vatt::made", mutates_args=())
def _made(x: Tensor) -> Tensor:
    """x, which torch.compile then has in memory: it would compute a number anew for every element that needs it."""
    return x.clone()


@_made.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def hashed(key: Tensor, count: int) -> Tensor:
    """31 bits [count] int32 of an int64 `key` and the places 0 to count - 1, by two multiplications of 32 bits.

    Constants of lowbias32 (Wellons 2018). torch has no unsigned shift: int32's sign is masked away.
    """
    x = torch.arange(count, device=key.device).to(torch.int32) ^ key.to(torch.int32)
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF) ^ (key >> 32).to(torch.int32)) * (0x846CA68B - 2**32)
    return (x ^ (x >> 16 & 0xFFFF)) & 0x7FFFFFFF
