"""nce_stats and nce_grad by tiles of plain PyTorch, on any device: the similarities are never stored.

Memory beside the results: one strip of rows and a few tiles, whatever B is. For B rows, M = N P columns and width D the
statistics cost 2 B M D FLOPs and the gradient 6 B M D: each tile is computed once more and feeds two products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS, _COLUMNS = 512, 2048  # of a tile; bench_nce: flat within noise from 256 x 1024 to 1024 x 4096


class _Tile(NamedTuple):
    rows: slice
    samples: slice
    x: Tensor  # [r, D], scaled rows of a
    y: Tensor  # [n P, D], scaled rows of b
    s: Tensor  # [r, n, P], similarities, masked ones at -inf; the next tile overwrites them

    def own(self, first_sample: int) -> tuple[slice, Tensor]:
        """The rows of `a` whose own sample lies in this tile, and the view [P, rows] of `s` where they meet it."""
        shift = first_sample + self.rows.start - self.samples.start
        view = self.s.diagonal(shift, 0, 1)
        start = self.rows.start + max(0, -shift)
        return slice(start, start + view.shape[1]), view


def stats(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    column_mask: Tensor | None,
    first_sample: int,
    offset: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """row [B], column [N], positive [B]; an `offset` >= every s lets one exp serve the sums of rows and columns."""
    start = -torch.inf if offset is None else 0.0
    row, column = row_scale.new_full((len(a),), start), row_scale.new_full((len(b),), start)
    positive = torch.empty_like(row)
    for tile in _tiles(a, b, row_scale, column_scale, column_mask):
        own, similarities = tile.own(first_sample)
        positive[own] = similarities.logsumexp(0)
        if offset is None:
            row[tile.rows] = torch.logaddexp(row[tile.rows], tile.s.flatten(1).logsumexp(1))
            column[tile.samples] = torch.logaddexp(column[tile.samples], tile.s.logsumexp(0).logsumexp(-1))
        else:
            e = tile.s.sub_(offset).exp_()
            row[tile.rows] += e.flatten(1).sum(1)
            column[tile.samples] += e.sum(0).sum(-1)
    if offset is None:
        return row, column, positive
    return row.log_().add_(offset), column.log_().add_(offset), positive


def grad(
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
    """da [B, D], db [N, P, D] in the accumulation dtype: the tile of s becomes that of G in place."""
    da, db = row_scale.new_zeros(a.shape), row_scale.new_zeros(b.shape)
    # An empty sum is -inf and all its members are too: any finite number in its place makes their exp 0.
    row, column, positive = (lse.where(lse > -torch.inf, 0.0) for lse in (row, column, positive))
    if offset is not None:
        d_row, d_column = d_row * (offset - row).exp(), d_column * (offset - column).exp()
    for tile in _tiles(a, b, row_scale, column_scale, column_mask):
        own, similarities = tile.own(first_sample)
        d_own = (similarities - positive[own]).exp_() * d_positive[own]
        of_row, of_column = (tile.rows, None, None), (tile.samples, None)
        if offset is None:
            by_row = (tile.s - row[of_row]).exp_().mul_(d_row[of_row])
            g = tile.s.sub_(column[of_column]).exp_().mul_(d_column[of_column]).add_(by_row)
        else:
            g = tile.s.sub_(offset).exp_().mul_(d_row[of_row] + d_column[of_column])
        similarities.add_(d_own)  # a view of g by now
        g = g.flatten(1)
        da[tile.rows].addmm_(g, tile.y)
        db[tile.samples].view_as(tile.y).addmm_(g.t(), tile.x)
    return da.mul_(row_scale[:, None]), db.mul_(column_scale[..., None])


def _tiles(
    a: Tensor, b: Tensor, row_scale: Tensor, column_scale: Tensor, column_mask: Tensor | None
) -> Iterator[_Tile]:
    num_rows, (num_samples, candidates, _) = len(a), b.shape
    step = max(1, _COLUMNS // candidates)
    memory = row_scale.new_empty(min(num_rows, _ROWS) * min(num_samples, step) * candidates)
    for i in range(0, num_rows, _ROWS):
        rows = slice(i, min(i + _ROWS, num_rows))
        x = a[rows].to(row_scale.dtype) * row_scale[rows, None]
        for j in range(0, num_samples, step):
            samples = slice(j, min(j + step, num_samples))
            y = (b[samples].to(x.dtype) * column_scale[samples, :, None]).flatten(0, 1)
            s = torch.mm(x, y.t(), out=memory[: len(x) * len(y)].view(len(x), len(y)))
            s = s.view(len(x), -1, candidates)
            if column_mask is not None:
                s.masked_fill_(~column_mask[samples, None], -torch.inf)
            yield _Tile(rows, samples, x, y, s)
