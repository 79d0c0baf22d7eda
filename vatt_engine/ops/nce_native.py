"""Launchers of nce's CUDA kernels, which have the statistics only; the gradient is the library's, by tiles."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

STRIP = 4096  # rows at a time: their parts of the columns' sums are 128 bytes per column
TILE_ROWS = 128
TILE_COLUMNS = {"mma": 128, "wgmma": 256}


def stats_mma(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    from vatt_engine import _C

    return stats(_C, "mma", *arguments)


def stats_wgmma(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    from vatt_engine import _C

    return stats(_C, "wgmma", *arguments)


def stats(
    native: ModuleType,
    path: str,
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    column_mask: Tensor | None,
    first_sample: int,
    offset: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """row [B], column [N], positive [B]; the parts of all tiles are added up in float64, in a fixed order."""
    num_samples, candidates, _ = b.shape
    a, b = a.contiguous(), b.contiguous()
    mask = None if column_mask is None else column_mask.contiguous().view(torch.uint8)
    stream = torch.cuda.current_stream(a.device).cuda_stream if a.is_cuda else 0
    row = row_scale.new_empty(len(a))
    empty = -torch.inf if offset is None else 0.0
    columns = row_scale.new_full((num_samples * candidates,), empty, dtype=torch.float64)
    positive = row_scale.new_full((len(a), candidates), -torch.inf)
    for start in range(0, len(a), STRIP):
        rows = slice(start, min(start + STRIP, len(a)))
        num_rows = rows.stop - rows.start
        row_part = row.new_empty(math.ceil(len(columns) / TILE_COLUMNS[path]), num_rows)
        column_part = row.new_empty(math.ceil(num_rows / TILE_ROWS), len(columns))
        native.nce_stats_cuda(
            path,
            *(None if x is None else to_dlpack(x) for x in (a[rows], b, row_scale[rows], column_scale, mask)),
            first_sample + start,
            offset,
            *map(to_dlpack, (row_part, column_part, positive[rows])),
            stream,
        )
        if offset is None:
            row[rows] = row_part.double().logsumexp(0)
            columns = torch.logaddexp(columns, column_part.double().logsumexp(0))
        else:
            row[rows] = row_part.double().sum(0).log_().add_(offset)
            columns += column_part.double().sum(0)
    columns = columns.view(num_samples, candidates)
    column = columns.logsumexp(1) if offset is None else columns.sum(1).log_().add_(offset)
    return row, column.to(row.dtype), positive.logsumexp(1)
