"""out[z, g] = sum of the rows of x that belong to group g, without atomics: the same bits in every run.

The gradient of a gather. Positions are sorted by group first, so that every output row is written once, by one program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class SegmentTiles:
    """Groups and columns per program."""

    block_g: int
    block_d: int
    num_warps: int

    def arguments(self) -> dict[str, int]:
        return {"BLOCK_G": self.block_g, "BLOCK_D": self.block_d, "num_warps": self.num_warps}


TILES = (SegmentTiles(block_g=16, block_d=128, num_warps=4),)  # not measured on a GPU yet


@triton.jit
def segment_sum_kernel(
    x_ptr,
    row_ptr,
    start_ptr,
    out_ptr,
    num_groups,
    width,
    row_stride_z,
    start_stride_z,
    x_rows_z,
    repeat,
    step,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[z, g] = sum_{i in start[g]..start[g + 1]} sum_{s < repeat} x[z x_rows_z + row[i] + s step]."""
    tiles = tl.cdiv(num_groups, BLOCK_G)
    z = (tl.program_id(0) // tiles).to(tl.int64)
    group = tl.program_id(0) % tiles * BLOCK_G + tl.arange(0, BLOCK_G)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_group, in_width = group < num_groups, d < width
    first = tl.load(start_ptr + z * start_stride_z + group, mask=in_group, other=0)
    last = tl.load(start_ptr + z * start_stride_z + group + 1, mask=in_group, other=0)
    count = (last - first) * repeat

    total = tl.zeros((BLOCK_G, BLOCK_D), dtype=ACC)
    for i in range(0, tl.max(count, 0)):
        inside = i < count
        row = tl.load(row_ptr + z * row_stride_z + first + i // repeat, mask=inside, other=0)
        row = z * x_rows_z + row + i % repeat * step
        x = tl.load(x_ptr + row[:, None] * width + d[None, :], mask=inside[:, None] & in_width[None, :], other=0.0)
        total += x.to(ACC)
    out = out_ptr + (z * num_groups + group)[:, None] * width + d[None, :]
    tl.store(out, total, mask=in_group[:, None] & in_width[None, :])


def segments(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Positions in `group` [Z, M], sorted by it (stable), and where each group begins there, [Z, num_groups + 1].

    Positions whose group lies outside 0..num_groups - 1 are in none.
    """
    ordered, position = group.contiguous().sort(dim=-1, stable=True)  # results have the strides of what is sorted
    bounds = torch.arange(num_groups + 1, device=group.device).expand(group.shape[0], -1).contiguous()
    return position, torch.searchsorted(ordered, bounds)


def segment_sum(
    x: Tensor,
    rows: Tensor,
    start: Tensor,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    x_rows: int = 0,
    repeat: int = 1,
    step: int = 0,
) -> Tensor:
    """Sum rows of x over segments: [batch, num_groups, D] of `dtype`, summed in float32 (float64 of float64).

    Args:
        x: [..., D], contiguous; its rows are numbered from 0.
        rows: [Z, M] row numbers in the order of the segments; Z is 1 (the same for the batch) or `batch`.
        start: [Z, num_groups + 1], where each segment begins in `rows`.
        dtype: of the result.
        batch: how often the whole is done, each time on rows that lie `x_rows` further.
        x_rows: see `batch`.
        repeat: every entry of `rows` stands for this many rows of x, each `step` further than the one before.
        step: see `repeat`.
    """
    num_groups, width = start.shape[1] - 1, x.shape[-1]
    out = x.new_empty(batch, num_groups, width, dtype=dtype)
    if out.numel() == 0:
        return out
    tiles = TILES[0]
    shared = rows.shape[0] == 1
    grid = (batch * triton.cdiv(num_groups, tiles.block_g), triton.cdiv(width, tiles.block_d))
    with torch.cuda.device_of(x):
        segment_sum_kernel[grid](
            x,
            rows,
            start,
            out,
            num_groups,
            width,
            0 if shared else rows.shape[1],
            0 if shared else start.shape[1],
            x_rows,
            repeat,
            step,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            **tiles.arguments(),
        )
    return out
