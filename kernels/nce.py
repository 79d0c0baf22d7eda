"""row, column and positive log-sum-exps of s = scale_i scale_jp <a_i, b_jp>, and the gradient G of s for two products.

A program has one tile of s. For the statistics it leaves its sums over columns and over rows, which are added up in a
fixed order: the same bits in every run. For the gradient it writes its part of G.

Halves are multiplied as they are and the sums scaled afterwards: no similarity has a rounding but that of its sum.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tiles, arch_of, choose_tiles

# The first row that fits is taken. Nobody has measured them on a GPU yet: they are guesses that compile without spills.
# float32 rows are 32 high: from 64 on Triton 3.7 uses TF32 on 100 even where IEEE is asked for.
TILES = (
    Tiles((90,), True, (1,), 1024, block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4),
    Tiles((80, 100), True, (1,), 1024, block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    Tiles((80, 90, 100), True, (1,), 0, block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
    Tiles((80, 90, 100), False, (1,), 0, block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=2),
)


@triton.jit
def _similarities(
    a_ptr, b_ptr, row_scale_ptr, column_scale_ptr, mask_ptr, row, column, num_rows, num_columns, D, P, BLOCK_K
):
    """s[row, column]; -inf beyond the last of either and where the column's sample is masked."""
    a = a_ptr + tl.minimum(row, num_rows - 1).to(tl.int64) * D
    b = b_ptr + tl.minimum(column, num_columns - 1).to(tl.int64) * D
    total = tl.zeros((row.shape[0], column.shape[0]), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(a[:, None] + k[None, :], mask=(k < D)[None, :], other=0.0)
        right = tl.load(b[None, :] + k[:, None], mask=(k < D)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    in_rows, in_columns = row < num_rows, column < num_columns
    total *= tl.load(row_scale_ptr + row, mask=in_rows, other=0.0)[:, None]
    total *= tl.load(column_scale_ptr + column, mask=in_columns, other=0.0)[None, :]
    if mask_ptr is not None:
        in_columns = in_columns & tl.load(mask_ptr + column // P, mask=in_columns, other=0).to(tl.int1)
    return tl.where(in_rows[:, None] & in_columns[None, :], total, float("-inf"))


@triton.jit
def nce_stats_kernel(
    a_ptr,
    b_ptr,
    row_scale_ptr,
    column_scale_ptr,
    mask_ptr,
    row_part_ptr,
    column_part_ptr,
    positive_ptr,
    num_rows,
    num_columns,
    first_sample,
    offset,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile's parts of every sum of exp(s - offset), or of every log-sum-exp of s, and the positives it meets."""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)  # neighbours share columns: the rows of a strip fit into the L2
    tile_m, tile_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    row, column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    s = _similarities(
        a_ptr, b_ptr, row_scale_ptr, column_scale_ptr, mask_ptr, row, column, num_rows, num_columns, D, P, BLOCK_K
    )
    in_rows, in_columns = row < num_rows, column < num_columns
    first = (first_sample + tile_m * BLOCK_M) * P
    if (first < (tile_n + 1) * BLOCK_N) & (first + BLOCK_M * P > tile_n * BLOCK_N):
        for p in range(P):  # a sum of one: a tile of pointers would not fit into the registers
            own = (first_sample + row) * P + p
            met = tl.sum(tl.where(column[None, :] == own[:, None], s, 0.0), 1)
            here = (own >= tile_n * BLOCK_N) & (own < tl.minimum((tile_n + 1) * BLOCK_N, num_columns))
            tl.store(positive_ptr + row * P + p, met, mask=in_rows & here)
    if offset is None:
        largest = tl.max(s, 1)
        largest = tl.where(largest > float("-inf"), largest, 0.0)
        by_row = largest + tl.log(tl.sum(tl.exp(s - largest[:, None]), 1))
        largest = tl.max(s, 0)
        largest = tl.where(largest > float("-inf"), largest, 0.0)
        by_column = largest + tl.log(tl.sum(tl.exp(s - largest[None, :]), 0))
    else:
        e = tl.exp(s - offset)
        by_row, by_column = tl.sum(e, 1), tl.sum(e, 0)
    tl.store(row_part_ptr + tile_n.to(tl.int64) * num_rows + row, by_row, mask=in_rows)
    tl.store(column_part_ptr + tile_m.to(tl.int64) * num_columns + column, by_column, mask=in_columns)


@triton.jit
def nce_grad_kernel(
    a_ptr,
    b_ptr,
    row_scale_ptr,
    column_scale_ptr,
    mask_ptr,
    row_ptr,
    column_ptr,
    positive_ptr,
    d_row_ptr,
    d_column_ptr,
    d_positive_ptr,
    g_ptr,
    num_rows,
    num_columns,
    first_sample,
    offset,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G = d_row exp(s - row) + d_column exp(s - column) + d_positive exp(s - positive), the last where they meet.

    With an offset d_row and d_column hold their exp(offset - ...) already, and one exp serves both.
    """
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tile_m, tile_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    row, column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    s = _similarities(
        a_ptr, b_ptr, row_scale_ptr, column_scale_ptr, mask_ptr, row, column, num_rows, num_columns, D, P, BLOCK_K
    )
    in_rows, in_columns = row < num_rows, column < num_columns
    d_row = tl.load(d_row_ptr + row, mask=in_rows, other=0.0)[:, None]
    d_column = tl.load(d_column_ptr + column // P, mask=in_columns, other=0.0)[None, :]
    if offset is None:
        g = d_row * tl.exp(s - tl.load(row_ptr + row, mask=in_rows, other=0.0)[:, None])
        g += d_column * tl.exp(s - tl.load(column_ptr + column // P, mask=in_columns, other=0.0)[None, :])
    else:
        g = (d_row + d_column) * tl.exp(s - offset)
    first = (first_sample + tile_m * BLOCK_M) * P
    if (first < (tile_n + 1) * BLOCK_N) & (first + BLOCK_M * P > tile_n * BLOCK_N):
        own = first_sample + row
        positive = tl.load(positive_ptr + row, mask=in_rows, other=0.0)[:, None]
        d_positive = tl.load(d_positive_ptr + row, mask=in_rows, other=0.0)[:, None]
        g += tl.where((column // P)[None, :] == own[:, None], d_positive * tl.exp(s - positive), 0.0)
    out = g_ptr + (row * num_columns)[:, None] + column[None, :]
    tl.store(out, g, mask=in_rows[:, None] & in_columns[None, :])


def block_of(a: Tensor) -> tuple[int, int]:
    """Rows and columns of a program of nce_stats_kernel."""
    tiles = choose_tiles(TILES, arch_of(a.device), a.dtype, 1, len(a))
    return tiles.block_m, tiles.block_n


def stats_strip(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    mask: Tensor | None,
    first_sample: int,
    offset: float | None,
    row_part: Tensor,
    column_part: Tensor,
    positive: Tensor,
) -> None:
    """a [R, D], b [N, P, D] -> row_part [programs along M, R], column_part [programs along R, M], positive [R, P]."""
    shared = (a, b, row_scale, column_scale, mask)
    _launch(nce_stats_kernel, shared, (row_part, column_part, positive), first_sample, offset)


def gradient_tile(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    mask: Tensor | None,
    first_sample: int,
    offset: float | None,
    *vectors_and_g: Tensor,
) -> None:
    """a [R, D], b [N, P, D], row, column, positive and their gradients -> g [R, N P]."""
    _launch(nce_grad_kernel, (a, b, row_scale, column_scale, mask), vectors_and_g, first_sample, offset)


def _launch(
    kernel: Any,
    shared: tuple[Tensor | None, ...],
    others: tuple[Tensor, ...],
    first_sample: int,
    offset: float | None,
) -> None:
    a, b = shared[:2]
    candidates, dim = b.shape[1:]
    num_columns = len(b) * candidates
    tiles = choose_tiles(TILES, arch_of(a.device), a.dtype, 1, len(a))
    grid = (triton.cdiv(len(a), tiles.block_m) * triton.cdiv(num_columns, tiles.block_n),)
    with torch.cuda.device_of(a):
        sizes = (len(a), num_columns, first_sample, offset)
        kernel[grid](*shared, *others, *sizes, D=dim, P=candidates, **tiles.arguments())
