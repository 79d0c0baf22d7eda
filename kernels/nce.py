"""row, column and positive log-sum-exps of s = scale_i scale_jp <a_i, b_jp>, and the gradient G of s for two products.

A program has one tile of s. For the statistics it leaves its sums over columns and over rows, which are added up in a
fixed order: the same bits in every run. For the gradient it writes the tile of G, which stays in the L2 until the
library has multiplied it with both sides.

Halves are multiplied as they are and the sums scaled afterwards: no similarity has a rounding but that of its sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIP = 4096  # rows at a time: their parts of the columns' sums are 4 STRIP / block_m bytes per column
GRADIENT = 4096  # rows and columns of a tile of G: 32 MB in halves, of 50 MB of L2 on an H100


@dataclass(frozen=True)
class Tiles:
    """Block sizes of the kernels."""

    archs: tuple[int, ...]  # compute capabilities the row is for; 80 serves all that are neither 90 nor 100
    half: bool  # bfloat16 and float16 products, else float32
    min_rows: int  # rows of `a` from which on the row is chosen
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages}


# The first row that fits is taken. Nobody has measured them on a GPU yet: they are guesses that compile without spills.
# float32 rows are 32 high: from 64 on Triton 3.7 uses TF32 on 100 even where IEEE is asked for.
TILES = (
    Tiles((90,), True, 1024, block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4),
    Tiles((80, 100), True, 1024, block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    Tiles((80, 90, 100), True, 0, block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
    Tiles((80, 90, 100), False, 0, block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=2),
)


def choose_tiles(table: Sequence[Tiles], arch: int, dtype: torch.dtype, rows: int) -> Tiles:
    half = dtype != torch.float32
    return next(t for t in table if arch in t.archs and t.half == half and rows >= t.min_rows)


def arch_of(device: torch.device) -> int:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return 10 * major if major in (9, 10) else 80


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


def nce_stats(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    column_mask: Tensor | None,
    first_sample: int,
    offset: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """a [B, D], b [N, P, D] -> row [B], column [N], positive [B]."""
    num_samples, candidates, dim = b.shape
    a, b = a.contiguous(), b.contiguous()
    column_mask = None if column_mask is None else column_mask.contiguous()
    tiles = choose_tiles(TILES, arch_of(a.device), a.dtype, len(a))
    row = a.new_empty(len(a), dtype=torch.float32)
    columns = torch.zeros(num_samples * candidates, dtype=torch.float64, device=a.device)
    columns = columns if offset is not None else columns.fill_(-torch.inf)
    positive = torch.full((len(a), candidates), -torch.inf, device=a.device)
    tiles_n = triton.cdiv(num_samples * candidates, tiles.block_n)
    for rows in _slices(len(a), STRIP):
        x = a[rows]
        tiles_m = triton.cdiv(len(x), tiles.block_m)
        row_part = row.new_empty(tiles_n, len(x))
        column_part = row.new_empty(tiles_m, len(columns))
        with torch.cuda.device_of(a):
            nce_stats_kernel[(tiles_m * tiles_n,)](
                x,
                b,
                row_scale[rows],
                column_scale,
                column_mask,
                row_part,
                column_part,
                positive[rows],
                len(x),
                len(columns),
                first_sample + rows.start,
                offset,
                D=dim,
                P=candidates,
                **tiles.arguments(),
            )
        if offset is None:
            row[rows] = row_part.double().logsumexp(0)
            columns = torch.logaddexp(columns, column_part.double().logsumexp(0))
        else:
            row[rows] = row_part.double().sum(0).log_().add_(offset)
            columns += column_part.double().sum(0)
    columns = columns.view(num_samples, candidates)
    column = columns.logsumexp(1) if offset is None else columns.sum(1).log_().add_(offset)
    return row, column.float(), positive.logsumexp(1)


def nce_grad(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    column_mask: Tensor | None,
    first_sample: int,
    offset: float | None,
    row: Tensor,
    column: Tensor,
    positive: Tensor,
    d_row: Tensor,
    d_column: Tensor,
    d_positive: Tensor,
) -> tuple[Tensor, Tensor]:
    """da [B, D], db [N, P, D] in float32, the scales fixed."""
    candidates, dim = b.shape[1:]
    a, b = a.contiguous(), b.contiguous()
    column_mask = None if column_mask is None else column_mask.contiguous()
    tiles = choose_tiles(TILES, arch_of(a.device), a.dtype, len(a))
    x, y = (a * row_scale[:, None]).to(a.dtype), (b * column_scale[..., None]).to(b.dtype)
    da, db = torch.zeros_like(a, dtype=torch.float32), torch.zeros_like(b, dtype=torch.float32)
    # An empty sum is -inf and all its members are too: any finite number in its place makes their exp 0.
    row, column, positive = (lse.where(lse > -torch.inf, 0.0) for lse in (row, column, positive))
    # In this unit |G| <= 3 and most of it is no smaller than float16 can tell; a power of two rounds nothing.
    unit = torch.stack([d.abs().amax() for d in (d_row, d_column, d_positive)]).amax().frexp().exponent
    d_row, d_column, d_positive = (d.ldexp(-unit) for d in (d_row, d_column, d_positive))
    if offset is not None:
        d_row, d_column = d_row * (offset - row).exp(), d_column * (offset - column).exp()
    memory = a.new_empty(min(GRADIENT, len(a)) * min(GRADIENT, len(b)) * candidates)
    for rows in _slices(len(a), GRADIENT):
        for samples in _slices(len(b), max(1, GRADIENT // candidates)):
            shape = (rows.stop - rows.start, (samples.stop - samples.start) * candidates)
            g = memory[: shape[0] * shape[1]].view(shape)
            grid = (triton.cdiv(shape[0], tiles.block_m) * triton.cdiv(shape[1], tiles.block_n),)
            with torch.cuda.device_of(a):
                nce_grad_kernel[grid](
                    a[rows],
                    b[samples],
                    row_scale[rows],
                    column_scale[samples],
                    None if column_mask is None else column_mask[samples],
                    row[rows],
                    column[samples],
                    positive[rows],
                    d_row[rows],
                    d_column[samples],
                    d_positive[rows],
                    g,
                    *shape,
                    first_sample + rows.start - samples.start,
                    offset,
                    D=dim,
                    P=candidates,
                    **tiles.arguments(),
                )
            da[rows] += product(g, y[samples].flatten(0, 1))
            db[samples].flatten(0, 1).add_(product(g.t(), x[rows]))
    return da.ldexp(unit).mul_(row_scale[:, None]), db.ldexp(unit).mul_(column_scale[..., None])


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y summed in float32, by the library."""
    return torch.mm(x, y) if x.dtype == torch.float32 else torch.mm(x, y, out_dtype=torch.float32)


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
