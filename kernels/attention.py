"""y_i = sum_j dropout(p_ij) v_j,  p = softmax_j(scale q_i . k_j + bias_ij), in one pass over the keys.

Scores live in registers, in units of log2; a row keeps its running maximum m and sum l. lse = m + log2 l is stored for
the backward pass, +inf for a row that sees nothing (then exp2(s - lse) is 0 there too).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import AttentionTiles, load_rows, place, positions, prepare, row_keys, scores, survives, tail_of

# The first row that fits is taken. The half row of 90 is the fastest of 16 on an H200 (785 rows, D = 64, dropout 0.1);
# nobody has measured the others: they are guesses that compile without spills. float32 tiles are 32 high: from 64 on
# Triton 3.7 uses TF32 on 100 even where IEEE is asked for.
FWD_TILES = (
    AttentionTiles((90,), True, False, 65, block_m=64, block_n=64, num_warps=4, num_stages=3),
    AttentionTiles((80, 100), True, False, 65, block_m=128, block_n=64, num_warps=8, num_stages=2),
    AttentionTiles((80, 90, 100), True, True, 0, block_m=32, block_n=32, num_warps=4, num_stages=2),
    AttentionTiles((80,), False, True, 0, block_m=32, block_n=32, num_warps=4, num_stages=1),
    AttentionTiles((90, 100), False, True, 0, block_m=32, block_n=32, num_warps=8, num_stages=1),
)


@triton.jit
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    keep_ptr,
    bias_ptr,
    mask_ptr,
    tile_ptr,
    seed_ptr,
    num_heads,
    num_tiles,
    num_rows,
    num_tokens,
    stride_b,
    stride_h,
    stride_n,
    keep_stride_b,
    bias_stride_b,
    mask_first,
    scale,
    threshold,
    inverse_keep,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
):
    """BLOCK_M rows of one head; out is [B, rows, H, D], lse [B, H, rows]."""
    head, first, start, length = place(tile_ptr, num_tiles, num_rows, BLOCK_M)
    b, h = head // num_heads, head % num_heads
    at = b * stride_b + h * stride_h + start.to(tl.int64) * stride_n
    if keep_ptr is not None:
        keep_ptr += b * keep_stride_b
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + h * num_rows * num_rows
    if mask_ptr is not None:
        mask_ptr += b * num_rows
    dtype: tl.constexpr = v_ptr.dtype.element_ty

    i = first + tl.arange(0, BLOCK_M)
    inside = i < length
    q = load_rows(q_ptr + at, positions(keep_ptr, i, length, num_tokens), stride_n, inside, D, True)
    if seed_ptr is not None:
        low, high = row_keys(seed_ptr, head, start + i)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    whole = length // BLOCK_N * BLOCK_N
    for last in tl.static_range(2):  # steps of BLOCK_N keys, then one of TAIL
        if last == 0 or TAIL > 0:
            for j_first in range(
                0 if last == 0 else whole, whole if last == 0 else length, TAIL if last == 1 else BLOCK_N
            ):
                j = j_first + tl.arange(0, TAIL if last == 1 else BLOCK_N)
                key = positions(keep_ptr, j, length, num_tokens)
                k = load_rows(k_ptr + at, key, stride_n, j < length, D, last == 1)
                v = load_rows(v_ptr + at, key, stride_n, j < length, D, last == 1)
                product = tl.dot(q, tl.trans(k), input_precision="ieee")
                s = scores(
                    product,
                    scale,
                    i[:, None],
                    j[None, :],
                    start,
                    length,
                    bias_ptr,
                    num_rows,
                    mask_ptr,
                    mask_first,
                    last == 1,
                )
                new = tl.maximum(largest, tl.max(s, 1))
                shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen so far
                p = tl.exp2(s - shift[:, None])
                decay = tl.exp2(largest - shift)
                total = total * decay + tl.sum(p, 1)
                if seed_ptr is not None:
                    kept = survives(low[:, None], high[:, None], (start + j)[None, :], threshold)
                    p = tl.where(kept, p, 0.0)
                acc = tl.dot(p.to(dtype), v, acc * decay[:, None], input_precision="ieee")
                largest = new

    empty = total == 0.0
    acc *= (inverse_keep / tl.where(empty, 1.0, total))[:, None]
    row = b * num_rows + start + i
    out = out_ptr + (row * num_heads + h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out, acc.to(dtype), mask=inside[:, None])
    lse = tl.where(empty, float("inf"), largest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + head * num_rows + start + i, lse, mask=inside)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, N, D], options as of `prepare` -> y [B, H, K, D] (rows first in memory), lse [B, H, K] of log2."""
    call = prepare(q, k, v, *options)
    batch, heads, _, dim = q.shape
    out = q.new_empty(batch, call.num_rows, heads, dim)
    lse = q.new_empty(batch, heads, call.num_rows, dtype=torch.float32)
    if out.numel():
        tiles = call.tiles_of(FWD_TILES)
        grid, where = call.grid(tiles.block_m)
        tail = tail_of(call.num_rows, tiles.block_n, packed=call.cu_seqlens is not None)
        with torch.cuda.device_of(q):
            attention_fwd_kernel[grid](
                out_ptr=out, lse_ptr=lse, TAIL=tail, **where, **call.arguments(), **tiles.arguments()
            )
    return out.transpose(1, 2), lse
