"""Dropout that takes few random numbers on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout; eagerly on a CPU four elements share one number of 64 bits of torch's generator.

    There p is rounded to a multiple of 2^-16 (0.1 to 0.100006), and what is left is scaled by 1 / (1 - p) of that p.

    >>> Dropout(0.5).eval()(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and x.is_cpu and 0 < self.p < 1) or torch.compiler.is_compiling():
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = (bits[: x.numel()] >= dropped - 2**15).view(x.shape)
        return (x * (2**16 / (2**16 - dropped))).where(keep, 0.0)
