"""linear: torch's autocast on a CPU multiplies in bfloat16, which without AMX is slower than float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vatt_engine.dispatch import amx_missing


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, torch.nn.functional.linear but for bfloat16 autocast on a CPU without AMX: products in float32 there.

    What comes out, and what is kept of x for the backward pass, are in bfloat16 as under torch's autocast; the weights
    are not rounded and not copied.

    Args:
        x: [..., I], float.
        weight: [O, I].
        bias: [O].

    Returns:
        [..., O].

    Raises:
        RuntimeError: the sizes do not fit (torch's).

    >>> linear(torch.ones(1, 2), torch.ones(3, 2)).tolist()
    [[2.0, 2.0, 2.0]]
    """
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if not (x.is_cpu and half and amx_missing()):
        return F.linear(x, weight, bias)
    return _Widened.apply(x.to(torch.bfloat16), weight, bias)


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight, bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.float().reshape(-1, len(weight))
        need_x, need_weight, need_bias = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):  # torch.compile traces this under the forward pass's autocast
            return (
                (rows @ weight).view_as(x).to(x.dtype) if need_x else None,
                rows.T @ x.reshape(-1, x.shape[-1]).float() if need_weight else None,
                rows.sum(0) if need_bias else None,
            )
