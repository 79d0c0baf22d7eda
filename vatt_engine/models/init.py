"""Initialisers of the official code (Keras), applied in place."""

from __future__ import annotations

import math

from torch import Tensor, nn

from vatt_engine import ops

# Standard deviation of a unit normal cut at +-2; Keras' glorot_normal divides by it.
_TRUNCATED_STD = 0.87962566103423978


class Linear(nn.Linear):
    """nn.Linear by `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


def linear(in_features: int, out_features: int, *, bias: bool = True) -> Linear:
    """A Dense layer: Glorot-uniform weight, zero bias."""
    layer = Linear(in_features, out_features, bias=bias)
    glorot_uniform_(layer.weight, in_features, out_features)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def glorot_uniform_(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """U(-a, a) with a = sqrt(6 / (fan_in + fan_out))."""
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)


def glorot_normal_(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Normal cut at two deviations, of standard deviation sqrt(2 / (fan_in + fan_out)) after the cut."""
    std = math.sqrt(2.0 / (fan_in + fan_out)) / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def truncated_normal_(weight: Tensor, std: float) -> None:
    """Normal of deviation `std` cut at two deviations, not corrected for the cut."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def agg_token(dim: int) -> nn.Parameter:
    """The AGG vector [dim]: glorot_normal of a vector, whose fans are both `dim`."""
    agg = nn.Parameter(Tensor(dim))
    glorot_normal_(agg, dim, dim)
    return agg
