"""Gradients of attention. With the probabilities p made again from lse, and delta_i = y_i . dy_i:

ds_ij = p_ij (dropout(dy_i . v_j) - delta_i),  dq = scale ds k,  dk = scale ds^T q,  dv = dropout(p)^T dy,
dbias = the sum of ds over the samples

One kernel owns rows of dq, one rows of dk and dv, one a tile of dbias: every sum has a fixed order, so the bits are the
same in every run, for seven products in place of the five that one kernel with atomics would take.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import (
    AttentionTiles,
    Call,
    load_rows,
    place,
    positions,
    prepare,
    row_keys,
    scores,
    survives,
    tail_of,
)

# The half rows of 90 are the fastest of 24 on an H200 each, as those of the forward (of DKV the second, by 0.2 %: the
# first spills under Triton 3.7); the others are not measured.
DQ_TILES = (
    AttentionTiles((90,), True, False, 65, block_m=64, block_n=32, num_warps=4, num_stages=3),
    AttentionTiles((100,), True, False, 65, block_m=128, block_n=64, num_warps=8, num_stages=2),
    AttentionTiles((80,), True, False, 65, block_m=64, block_n=64, num_warps=4, num_stages=2),
    AttentionTiles((80, 90, 100), True, True, 0, block_m=32, block_n=32, num_warps=4, num_stages=2),
    AttentionTiles((80, 90, 100), False, True, 0, block_m=32, block_n=32, num_warps=8, num_stages=1),
)
DKV_TILES = (
    AttentionTiles((90,), True, False, 65, block_m=64, block_n=64, num_warps=4, num_stages=2),
    AttentionTiles((100,), True, False, 65, block_m=64, block_n=128, num_warps=8, num_stages=2),
    AttentionTiles((80,), True, False, 65, block_m=32, block_n=64, num_warps=4, num_stages=2),
    AttentionTiles((80, 90, 100), True, True, 0, block_m=32, block_n=32, num_warps=8, num_stages=1),
    AttentionTiles((80, 90), False, True, 0, block_m=32, block_n=32, num_warps=8, num_stages=1),
    AttentionTiles((100,), False, True, 0, block_m=16, block_n=32, num_warps=8, num_stages=1),
)
DBIAS_TILES = (
    AttentionTiles((80, 90, 100), True, True, 0, block_m=32, block_n=32, num_warps=4, num_stages=2),
    AttentionTiles((80, 90, 100), False, True, 0, block_m=32, block_n=32, num_warps=8, num_stages=1),
)
PROGRAMS = 264  # dbias is split over the samples until there are about as many: two per multiprocessor of an H100


@triton.jit
def attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
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
    """dq of BLOCK_M rows of one head, and their delta for the other kernels; a walk over the keys as in the forward.

    dqkv is [B, tokens, 3, H, D].
    """
    head, first, start, length = place(tile_ptr, num_tiles, num_rows, BLOCK_M)
    b, h = head // num_heads, head % num_heads
    at = b * stride_b + h * stride_h + start.to(tl.int64) * stride_n
    if keep_ptr is not None:
        keep_ptr += b * keep_stride_b
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + h * num_rows * num_rows
    if mask_ptr is not None:
        mask_ptr += b * num_rows
    dtype: tl.constexpr = k_ptr.dtype.element_ty

    i = first + tl.arange(0, BLOCK_M)
    inside = i < length
    query = positions(keep_ptr, i, length, num_tokens)
    q = load_rows(q_ptr + at, query, stride_n, inside, D, True)
    row = (b * num_rows + start + i) * num_heads + h
    out = load_rows(out_ptr, row, D, inside, D, True)
    dout = load_rows(dout_ptr, row, D, inside, D, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    statistic = head * num_rows + start + i
    tl.store(delta_ptr + statistic, delta, mask=inside)
    lse = tl.load(lse_ptr + statistic, mask=inside, other=float("inf"))
    if seed_ptr is not None:
        low, high = row_keys(seed_ptr, head, start + i)
    dq = tl.zeros((BLOCK_M, D), tl.float32)

    whole = length // BLOCK_N * BLOCK_N
    for last in tl.static_range(2):
        if last == 0 or TAIL > 0:
            for j_first in range(
                0 if last == 0 else whole, whole if last == 0 else length, TAIL if last == 1 else BLOCK_N
            ):
                j = j_first + tl.arange(0, TAIL if last == 1 else BLOCK_N)
                key = positions(keep_ptr, j, length, num_tokens)
                k = load_rows(k_ptr + at, key, stride_n, j < length, D, last == 1)
                v = load_rows(v_ptr + at, key, stride_n, j < length, D, last == 1)
                s = scores(
                    tl.dot(q, tl.trans(k), input_precision="ieee"),
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
                p = tl.exp2(s - lse[:, None])
                dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
                if seed_ptr is not None:
                    kept = survives(low[:, None], high[:, None], (start + j)[None, :], threshold)
                    dp = tl.where(kept, dp * inverse_keep, 0.0)
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(dtype), k, dq, input_precision="ieee")

    row = ((b * num_tokens + start + query) * 3 * num_heads + h) * D
    tl.store(dqkv_ptr + row[:, None] + tl.arange(0, D)[None, :], (dq * scale).to(dtype), mask=inside[:, None])


@triton.jit
def attention_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
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
    """dk and dv of BLOCK_N rows of one head; a walk over the queries, all tiles transposed: [keys, queries]."""
    head, first, start, length = place(tile_ptr, num_tiles, num_rows, BLOCK_N)
    b, h = head // num_heads, head % num_heads
    at = b * stride_b + h * stride_h + start.to(tl.int64) * stride_n
    if keep_ptr is not None:
        keep_ptr += b * keep_stride_b
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + h * num_rows * num_rows
    if mask_ptr is not None:
        mask_ptr += b * num_rows
    dtype: tl.constexpr = k_ptr.dtype.element_ty

    j = first + tl.arange(0, BLOCK_N)
    inside = j < length
    key = positions(keep_ptr, j, length, num_tokens)
    k = load_rows(k_ptr + at, key, stride_n, inside, D, True)
    v = load_rows(v_ptr + at, key, stride_n, inside, D, True)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)

    whole = length // BLOCK_M * BLOCK_M
    for last in tl.static_range(2):
        if last == 0 or TAIL > 0:
            for i_first in range(
                0 if last == 0 else whole, whole if last == 0 else length, TAIL if last == 1 else BLOCK_M
            ):
                i = i_first + tl.arange(0, TAIL if last == 1 else BLOCK_M)
                query = positions(keep_ptr, i, length, num_tokens)
                row = (b * num_rows + start + i) * num_heads + h
                q = load_rows(q_ptr + at, query, stride_n, i < length, D, last == 1)
                dout = load_rows(dout_ptr, row, D, i < length, D, last == 1)
                statistic = head * num_rows + start + i
                lse = tl.load(lse_ptr + statistic, mask=i < length, other=float("inf"))
                delta = tl.load(delta_ptr + statistic, mask=i < length, other=0.0)
                s = scores(
                    tl.dot(k, tl.trans(q), input_precision="ieee"),
                    scale,
                    i[None, :],
                    j[:, None],
                    start,
                    length,
                    bias_ptr,
                    num_rows,
                    mask_ptr,
                    mask_first,
                    True,  # keys beyond the sequence would be exp2(0 - lse), which may overflow
                )
                p = tl.exp2(s - lse[None, :])
                dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
                dropped = p
                if seed_ptr is not None:
                    low, high = row_keys(seed_ptr, head, start + i)
                    kept = survives(low[None, :], high[None, :], (start + j)[:, None], threshold)
                    dropped = tl.where(kept, p, 0.0)
                    dp = tl.where(kept, dp * inverse_keep, 0.0)
                dv = tl.dot(dropped.to(dtype), dout, dv, input_precision="ieee")
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(dtype), q, dk, input_precision="ieee")

    row = (((b * num_tokens + start + key) * 3 + 1) * num_heads + h) * D
    to = dqkv_ptr + row[:, None] + tl.arange(0, D)[None, :]
    tl.store(to, (dk * scale).to(dtype), mask=inside[:, None])
    tl.store(to + num_heads * D, (dv * inverse_keep).to(dtype), mask=inside[:, None])


@triton.jit
def attention_dbias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dbias_ptr,
    bias_ptr,
    mask_ptr,
    seed_ptr,
    batch,
    samples,
    num_heads,
    num_rows,
    stride_b,
    stride_h,
    stride_n,
    bias_stride_b,
    scale,
    threshold,
    inverse_keep,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum of ds over `samples` samples, for a tile of one head's bias; dbias is [splits, H, rows, rows]."""
    tiles_j = tl.cdiv(num_rows, BLOCK_N)
    i = tl.program_id(0) // tiles_j * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % tiles_j * BLOCK_N + tl.arange(0, BLOCK_N)
    h, split = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    in_i, in_j = i < num_rows, j < num_rows
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(0, tl.minimum(samples, batch - split * samples)):
        b = split * samples + n
        at, head = b * stride_b + h * stride_h, b * num_heads + h
        q = load_rows(q_ptr + at, i.to(tl.int64), stride_n, in_i, D, True)
        k = load_rows(k_ptr + at, j.to(tl.int64), stride_n, in_j, D, True)
        v = load_rows(v_ptr + at, j.to(tl.int64), stride_n, in_j, D, True)
        dout = load_rows(dout_ptr, (b * num_rows + i) * num_heads + h, D, in_i, D, True)
        lse = tl.load(lse_ptr + head * num_rows + i, mask=in_i, other=float("inf"))
        delta = tl.load(delta_ptr + head * num_rows + i, mask=in_i, other=0.0)
        s = scores(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            scale,
            i[:, None],
            j[None, :],
            0,
            num_rows,
            bias_ptr + b * bias_stride_b + h * num_rows * num_rows,
            num_rows,
            None if mask_ptr is None else mask_ptr + b * num_rows,
            0,
            True,
        )
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if seed_ptr is not None:
            low, high = row_keys(seed_ptr, head, i)
            kept = survives(low[:, None], high[:, None], j[None, :], threshold)
            dp = tl.where(kept, dp * inverse_keep, 0.0)
        total += tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    to = dbias_ptr + ((split * num_heads + h) * num_rows + i)[:, None] * num_rows + j[None, :]
    tl.store(to, total, mask=in_i[:, None] & in_j[None, :])


def attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options_and_needs_bias: Any
) -> tuple[Tensor, Tensor]:
    """grad, out [B, H, K, D], options as of `prepare` -> dqkv [B, N, 3, H, D] and dbias.

    Rows of dqkv that `keep` leaves out are zero; dbias is [0] where nobody needs it.
    """
    *options, needs_bias = options_and_needs_bias
    call = prepare(q, k, v, *options)
    batch, heads, tokens, dim = q.shape
    dqkv = q.new_empty(batch, tokens, 3, heads, dim)
    if call.keep is not None:
        dqkv.zero_()
    dbias = q.new_empty(0)
    if call.num_rows * q.numel() == 0:
        return dqkv, torch.zeros_like(call.bias) if needs_bias else dbias
    delta = lse.new_empty(lse.shape)
    rows = {"dout_ptr": grad.transpose(1, 2).contiguous(), "lse_ptr": lse, "delta_ptr": delta, **call.arguments()}
    packed = call.cu_seqlens is not None
    with torch.cuda.device_of(q):
        tiles = call.tiles_of(DQ_TILES)
        grid, where = call.grid(tiles.block_m)
        tail = tail_of(call.num_rows, tiles.block_n, packed)
        out = out.transpose(1, 2).contiguous()
        attention_dq_kernel[grid](out_ptr=out, dqkv_ptr=dqkv, TAIL=tail, **where, **rows, **tiles.arguments())
        tiles = call.tiles_of(DKV_TILES)
        grid, where = call.grid(tiles.block_n)
        tail = tail_of(call.num_rows, tiles.block_m, packed)
        attention_dkv_kernel[grid](dqkv_ptr=dqkv, TAIL=tail, **where, **rows, **tiles.arguments())
        if needs_bias:
            dbias = _bias_gradient(call, rows)
    return dqkv, dbias


def _bias_gradient(call: Call, rows: dict[str, object]) -> Tensor:
    batch, heads, num_rows, _ = call.q.shape
    tiles = call.tiles_of(DBIAS_TILES)
    programs = triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_rows, tiles.block_n)
    samples = 1 if call.bias.ndim == 4 else triton.cdiv(batch, triton.cdiv(PROGRAMS, programs * heads))
    splits = triton.cdiv(batch, samples)
    parts = call.q.new_empty(splits, heads, num_rows, num_rows, dtype=torch.float32)
    taken = {name: rows[name] for name in attention_dbias_kernel.arg_names if name in rows}
    attention_dbias_kernel[(programs, heads, splits)](
        dbias_ptr=parts, batch=batch, samples=samples, **taken, **tiles.arguments()
    )
    return (parts if call.bias.ndim == 4 else parts.sum(0)).to(call.bias.dtype)
