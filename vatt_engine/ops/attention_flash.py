"""The private ops behind the kernels of attention, which store no scores, and the function that joins their passes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vatt_engine.dispatch import Impl, define_op, native_missing, triton_missing

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_DIMS = (16, 32, 64)


class Options(NamedTuple):
    """What stands beside q, k and v in one call, checked; see `ops.attention`."""

    keep: Tensor | None
    bias: Tensor | None
    key_mask: Tensor | None
    cu_seqlens: tuple[int, ...] | None
    dropout_p: float
    seed: Tensor | None
    scale: float


def split(q: Tensor, k: Tensor | None, v: Tensor | None) -> Sequence[Tensor]:
    """q, k and v [B, H, N, D], views if they come packed into one [B, N, 3, H, D], whose gradient is then one copy."""
    return [x.transpose(1, 2) for x in q.unbind(2)] if k is None else (q, k, v)


def flash_attention(q: Tensor, k: Tensor | None, v: Tensor | None, options: Options) -> Tensor:
    """`attention` by the private ops; a call with dropout and without a seed draws one from torch's generator."""
    seed = options.seed
    if options.dropout_p > 0 and seed is None:
        seed = torch.randint(2**62, (), device=q.device)
    shared = (options.bias, options.keep, options.key_mask, seed)
    return _FlashAttention.apply(q, k, v, *shared, options.cu_seqlens, options.dropout_p, options.scale)


def flash_refuses(q: Tensor, k: Tensor | None, v: Tensor | None, options: Options) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if q.dtype not in _DTYPES:
        return f"multiplies float32, bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] not in _HEAD_DIMS:
        return f"takes a head_dim of 16, 32 or 64, got {q.shape[-1]}"
    return None


def native_refuses(q: Tensor, k: Tensor | None, v: Tensor | None, options: Options) -> str | None:
    """Why the native code, which is for the dropout of dense sequences, cannot take these arguments, or None."""
    if q.dtype not in _DTYPES:
        return f"multiplies float32, bfloat16 or float16, got {q.dtype}"
    given = [name for name in ("keep", "bias", "key_mask", "cu_seqlens") if getattr(options, name) is not None]
    if given:
        return f"takes no {given[0]}"
    return None if options.dropout_p > 0 else "drops probabilities; without dropout torch's library is as fast"


def _native_refuses_pass(*args: object) -> str | None:
    """The same for either private op, whose tensors before `keep` are three or six."""
    first = 3 if len(args) == 10 else 6
    keep, bias, key_mask, seed, cu_seqlens, dropout_p, scale = args[first : first + 7]
    return native_refuses(*args[:3], Options(keep, bias, key_mask, cu_seqlens, dropout_p, seed, scale))


def _rows_of(q: Tensor, keep: Tensor | None) -> int:
    return q.shape[2] if keep is None else keep.shape[-1]


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    batch, heads, _, dim = q.shape
    rows = _rows_of(q, keep)
    return q.new_empty(batch, rows, heads, dim).transpose(1, 2), q.new_empty(batch, heads, rows, dtype=torch.float32)


def _bwd_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    bias, needs_bias = rest[1], rest[-1]
    return q.new_empty(batch, tokens, 3, heads, dim), torch.empty_like(bias) if needs_bias else q.new_empty(0)


def _pairs(rows: int, cu_seqlens: Sequence[int] | None) -> int:
    """Pairs of a query and a key in one head."""
    return rows * rows if cu_seqlens is None else sum((b - a) ** 2 for a, b in pairwise(cu_seqlens))


def _fwd_flops(q: torch.Size, *rest: object, out_shape: tuple[torch.Size, torch.Size]) -> int:
    """Two products."""
    batch, heads, rows, dim = out_shape[0]
    return 2 * 2 * batch * heads * dim * _pairs(rows, rest[6])


def _bwd_flops(grad: torch.Size, *rest: object, **_: object) -> int:
    """The scores once more, and four products, as torch counts for its own attention; the kernels run seven."""
    batch, heads, rows, dim = grad
    return 5 * 2 * batch * heads * dim * _pairs(rows, rest[9])


_SHARED = (
    "Tensor? keep, Tensor? bias, Tensor? key_mask, Tensor? seed, SymInt[]? cu_seqlens, float dropout_p, float scale"
)
_fwd = define_op(
    "attention",
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_SHARED}) -> (Tensor, Tensor)",
    fake=_fwd_fake,
    impls=[
        Impl(
            "cpp",
            "cpu",
            "vatt_engine.ops.attention_native:fwd_cpp",
            missing=native_missing,
            refuses=_native_refuses_pass,
        ),
        Impl("triton", "cuda", "vatt_engine.kernels.attention:attention_fwd", missing=triton_missing),
    ],
    flops=_fwd_flops,
)
_bwd = define_op(
    "attention",
    f"attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SHARED}, bool needs_bias) "
    "-> (Tensor, Tensor)",
    fake=_bwd_fake,
    impls=[
        Impl(
            "cpp",
            "cpu",
            "vatt_engine.ops.attention_native:bwd_cpp",
            missing=native_missing,
            refuses=_native_refuses_pass,
        ),
        Impl("triton", "cuda", "vatt_engine.kernels.attention_bwd:attention_bwd", missing=triton_missing),
    ],
    flops=_bwd_flops,
)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, keep, key_mask, seed, *how):
        out, lse = _fwd(*split(q, k, v), keep, bias, key_mask, seed, *how)
        ctx.save_for_backward(q, k, v, out, lse, keep, bias, key_mask, seed)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *saved = ctx.saved_tensors
        needs_bias = ctx.needs_input_grad[3]
        dqkv, dbias = _bwd(grad, *split(q, k, v), *saved, *ctx.how, needs_bias)
        inputs = (dqkv, None, None) if k is None else dqkv.permute(2, 0, 3, 1, 4).unbind()
        return *inputs, dbias if needs_bias else None, *[None] * 6
