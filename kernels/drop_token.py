"""y[b, k] = x[b, keep[b, k]], its gradient, and the positions to keep, drawn by a counter-based hash.

keep = positions of the K smallest of key[n] = (hash of seed, sample and n) with n in its low 20 bits, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum import segment_sum, segments
from .splitmix import splitmix64


@dataclass(frozen=True)
class GatherTiles:
    """Rows and columns per program."""

    block_k: int
    block_d: int
    num_warps: int

    def arguments(self) -> dict[str, int]:
        return {"BLOCK_K": self.block_k, "BLOCK_D": self.block_d, "num_warps": self.num_warps}


@dataclass(frozen=True)
class SortTiles:
    """The most keys that one program sorts in registers, a power of two."""

    num_tokens: int
    num_warps: int


# Not measured on a GPU yet. The first row that is large enough is taken; still more keys are sorted by torch.
TILES = (GatherTiles(block_k=16, block_d=256, num_warps=4),)
SORT_TILES = (SortTiles(num_tokens=1024, num_warps=4), SortTiles(num_tokens=4096, num_warps=8))
KEY_BLOCK = 1024

# The low bits of a key hold its position.
POSITION_MASK = tl.constexpr((1 << 20) - 1)


@triton.jit
def drop_token_fwd_kernel(
    x_ptr,
    keep_ptr,
    out_ptr,
    num_tokens,
    num_kept,
    width,
    x_stride_b,
    x_stride_n,
    x_stride_d,
    keep_stride_b,
    keep_stride_k,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y[b, k] = x[b, keep[b, k]]; a position outside the tokens stops the run."""
    tiles = tl.cdiv(num_kept, BLOCK_K)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(keep_ptr + b * keep_stride_b + k.to(tl.int64) * keep_stride_k, mask=k < num_kept, other=0)
    inside = (token >= 0) & (token < num_tokens)
    tl.device_assert(inside, "drop_token: keep must hold positions of tokens")
    mask = ((k < num_kept) & inside)[:, None] & (d < width)[None, :]
    x = tl.load(x_ptr + (b * x_stride_b + token * x_stride_n)[:, None] + (d * x_stride_d)[None, :], mask=mask)
    tl.store(out_ptr + (b * num_kept + k)[:, None] * width + d[None, :], x, mask=mask)


@triton.jit
def _key(seed_ptr, sample_id_ptr, sample, n):
    """What position n of a sample is ordered by, a signed 64-bit integer that no other position of it has."""
    stream = splitmix64(tl.load(seed_ptr))
    if sample_id_ptr is not None:
        stream = splitmix64(stream ^ splitmix64(tl.load(sample_id_ptr + sample)))
    n = n.to(tl.int64)
    return (splitmix64(stream ^ splitmix64(n)) & ~POSITION_MASK) | n


@triton.jit
def sample_keep_kernel(seed_ptr, sample_id_ptr, keep_ptr, num_tokens, num_kept, BLOCK_N: tl.constexpr):
    """The positions of the smallest keys of one sample, in ascending order of the keys."""
    sample = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    last = 0x7FFFFFFFFFFFFFFF  # beyond every key: those have a position below BLOCK_N in their low bits
    key = tl.sort(tl.where(n < num_tokens, _key(seed_ptr, sample_id_ptr, sample, n), last))
    tl.store(keep_ptr + sample * num_kept + n, key & POSITION_MASK, mask=n < num_kept)


@triton.jit
def sample_keys_kernel(seed_ptr, sample_id_ptr, key_ptr, num_tokens, BLOCK_N: tl.constexpr):
    """The keys of one sample, unsorted."""
    sample = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    key = _key(seed_ptr, sample_id_ptr, sample, n)
    tl.store(key_ptr + sample * num_tokens + n, key, mask=n < num_tokens)


def drop_token_fwd(tokens: Tensor, keep: Tensor) -> Tensor:
    """tokens [B, N, D] of any strides, keep int64 [K] or [B, K] -> [B, K, D]."""
    batch, num_tokens, width = tokens.shape
    kept = keep.shape[-1]
    out = tokens.new_empty(batch, kept, width)
    if out.numel() == 0:
        return out
    tiles = TILES[0]
    grid = (batch * triton.cdiv(kept, tiles.block_k), triton.cdiv(width, tiles.block_d))
    with torch.cuda.device_of(tokens):
        drop_token_fwd_kernel[grid](
            tokens,
            keep,
            out,
            num_tokens,
            kept,
            width,
            *tokens.stride(),
            keep.stride(0) if keep.ndim == 2 else 0,
            keep.stride(-1),
            **tiles.arguments(),
            debug=True,  # keeps the assertion, and with the next no other
            sanitize_overflow=False,
        )
    return out


def drop_token_bwd(grad: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
    """dx[b, keep[k]] += dy[b, k] in float32, rounded once to grad's dtype; rows that were dropped are zero."""
    batch, kept = grad.shape[:2]
    rows, start = segments(keep if keep.ndim == 2 else keep[None], num_tokens)
    return segment_sum(grad.contiguous(), rows, start, grad.dtype, batch=batch, x_rows=kept)


def sample_keep(seed: Tensor, sample_id: Tensor | None, num_tokens: int, num_kept: int) -> Tensor:
    """seed: int64 scalar, sample_id int64 [B] or None -> positions int64 [B, K] or [K]."""
    batch = 1 if sample_id is None else sample_id.shape[0]
    sample_id = None if sample_id is None else sample_id.contiguous()
    shape = (num_kept,) if sample_id is None else (batch, num_kept)
    if batch * num_kept == 0:
        return seed.new_empty(shape)
    tiles = next((tiles for tiles in SORT_TILES if num_tokens <= tiles.num_tokens), None)
    with torch.cuda.device_of(seed):
        if tiles is not None:
            keep = seed.new_empty(shape)
            block = max(2, triton.next_power_of_2(num_tokens))
            sample_keep_kernel[(batch,)](
                seed, sample_id, keep, num_tokens, num_kept, BLOCK_N=block, num_warps=tiles.num_warps
            )
            return keep
        keys = seed.new_empty(batch, num_tokens)
        grid = (batch, triton.cdiv(num_tokens, KEY_BLOCK))
        sample_keys_kernel[grid](seed, sample_id, keys, num_tokens, BLOCK_N=KEY_BLOCK, num_warps=4)
    return (keys.sort(dim=-1).values[:, :num_kept] & POSITION_MASK.value).view(shape)
