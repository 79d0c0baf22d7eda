"""dropout: torch draws a random number per element, on a CPU an eighth of the step of two Base layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.dlpack import to_dlpack
from torch.utils.flop_counter import register_flop_formula

from vatt_engine.dispatch import native_missing, no_flops

_BITS = 31
_NATIVE = (torch.float32, torch.bfloat16, torch.float16)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with a share p of its elements, drawn anew in every call, set to 0 and the others divided by 1 - p.

    Eagerly on a CPU and compiled on a GPU the masks are a hash of one number of torch's generator and the place of each
    element, and are made again in the backward pass; p is then rounded to a multiple of 2^-31. Elsewhere torch's own.

    Args:
        x: float tensor of any shape.
        p: in [0, 1].

    Returns:
        Of the shape and dtype of x.

    Raises:
        ValueError: p is outside [0, 1].

    >>> dropout(torch.ones(3), 0.0).tolist()
    [1.0, 1.0, 1.0]
    """
    if not 0 < p < 1:
        return F.dropout(x, p)
    if torch.compiler.is_compiling():
        return F.dropout(x, p) if x.is_cpu else _compiled(x, p)
    if x.is_cpu and x.dtype in _NATIVE and native_missing() is None:
        return _Native.apply(x, torch.randint(2**62, ()), _dropped(p))
    return F.dropout(x, p)


def _dropped(p: float) -> int:
    """Of 2^31 hashes, and never all."""
    return min(round(p * 2**_BITS), 2**_BITS - 1)


class _Native(torch.autograd.Function):
    """One pass over x, and one over the gradient."""

    @staticmethod
    def forward(ctx, x, key, dropped):
        ctx.save_for_backward(key)
        ctx.dropped = dropped
        return _native(x, key, dropped)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _native(grad, *ctx.saved_tensors, ctx.dropped), None, None


@torch.library.custom_op("vatt::dropout_cpp", mutates_args=(), device_types="cpu")
def _native(x: Tensor, key: Tensor, dropped: int) -> Tensor:
    from vatt_engine import _C

    x = x.contiguous()
    out = torch.empty_like(x)
    scale = 2**_BITS / (2**_BITS - dropped)
    _C.dropout(to_dlpack(x), to_dlpack(out), key.item(), dropped, scale, torch.get_num_threads())
    return out


@_native.register_fake
def _(x: Tensor, key: Tensor, dropped: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _compiled(x: Tensor, p: float) -> Tensor:
    """What torch.compile joins with what comes before and after it."""
    dropped = _dropped(p)
    key = _made(torch.randint(2**62, (), device=x.device))
    keep = hashed(key, x.numel()) >= dropped
    return (x * (2**_BITS / (2**_BITS - dropped))).where(keep.view(x.shape), 0.0)


@torch.library.custom_op("vatt::made", mutates_args=())
def _made(x: Tensor) -> Tensor:
    """x, which torch.compile then has in memory: it would compute a number anew for every element that needs it."""
    return x.clone()


@_made.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


register_flop_formula([torch.ops.vatt.dropout_cpp, torch.ops.vatt.made])(no_flops)


def hashed(key: Tensor, count: int) -> Tensor:
    """31 bits [count] int32 of an int64 `key` and the places 0 to count - 1, by two multiplications of 32 bits.

    Constants of lowbias32 (Wellons 2018). torch has no unsigned shift: int32's sign is masked away.
    """
    x = torch.arange(count, device=key.device).to(torch.int32) ^ key.to(torch.int32)
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF) ^ (key >> 32).to(torch.int32)) * (0x846CA68B - 2**32)
    return (x ^ (x >> 16 & 0xFFFF)) & 0x7FFFFFFF
