"""nce_stats and nce_grad by tiles of plain PyTorch, on any device: the similarities are never stored.

Memory beside the results: a scaled copy of both sides and a few tiles. For B rows, M = N P columns and width D the
statistics cost 2 B M D FLOPs and the gradient 6 B M D: each tile is computed once more and feeds two products.

On a GPU halves are multiplied as they are, summed in float32, and divided by the norms afterwards; the tile of the
gradient and the scaled copies are rounded to halves for the other two products. A CPU multiplies float32: without
matrix units for halves that is twice as fast, and more exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Rows and columns of a tile. CPU: from 512 x 2048 to 2048 x 2048 the products differ by 4 %. GPU, not measured: 4096 x
# 4096 halves, 32 MB, stay in the 50 MB L2 of an H100 between the kernel that writes them and the two that read them.
TILE = {"cpu": (1024, 2048), "cuda": (4096, 4096)}


class _Tile(NamedTuple):
    rows: slice
    samples: slice
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
    # Vectors are summed in float64: an error of row[i] is one of the whole row's gradient.
    empty = -torch.inf if offset is None else 0.0
    row, column = (row_scale.new_full((len(x),), empty, dtype=torch.float64) for x in (a, b))
    positive = row_scale.new_full((len(a),), -torch.inf)
    for tile in _tiles(*_factors(a, b, row_scale, column_scale), column_mask):
        own, similarities = tile.own(first_sample)
        positive[own] = similarities.logsumexp(0)
        if offset is None:
            row[tile.rows] = torch.logaddexp(row[tile.rows], _logsumexp(tile.s, (1, 2)))
            column[tile.samples] = torch.logaddexp(column[tile.samples], _logsumexp(tile.s, (0, 2)))
        else:
            e = tile.s.sub_(offset).exp_()
            row[tile.rows] += e.flatten(1).sum(1)
            column[tile.samples] += e.sum(0).sum(-1)
    if offset is not None:
        row, column = row.log_().add_(offset), column.log_().add_(offset)
    return row.to(row_scale.dtype), column.to(row_scale.dtype), positive


def _logsumexp(s: Tensor, dims: tuple[int, int]) -> Tensor:
    """In float64, of sums in the dtype of s."""
    largest = s.amax(dims, keepdim=True)
    largest = largest.where(largest > -torch.inf, 0.0)
    return (s - largest).exp_().sum(dims).double().log_().add_(largest.view(-1))


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
    factors = _factors(a, b, row_scale, column_scale)
    x, y = factors[:2]
    if multiplies_halves(a):
        x, y = (x * row_scale[:, None]).to(x.dtype), (y * column_scale[..., None]).to(y.dtype)
        # In this unit |G| <= 3 and most of it is no smaller than float16 can tell; a power of two rounds nothing.
        unit = torch.stack([d.abs().amax() for d in (d_row, d_column, d_positive)]).amax().frexp().exponent
        d_row, d_column, d_positive = (d.ldexp(-unit) for d in (d_row, d_column, d_positive))
    da, db = row_scale.new_zeros(a.shape), row_scale.new_zeros(b.shape)
    # An empty sum is -inf and all its members are too: any finite number in its place makes their exp 0.
    row, column, positive = (lse.where(lse > -torch.inf, 0.0) for lse in (row, column, positive))
    if offset is not None:
        d_row, d_column = d_row * (offset - row).exp(), d_column * (offset - column).exp()
    for tile in _tiles(*factors, column_mask):
        own, similarities = tile.own(first_sample)
        d_own = (similarities - positive[own]).exp_() * d_positive[own]
        of_row, of_column = (tile.rows, None, None), (tile.samples, None)
        if offset is None:
            by_row = (tile.s - row[of_row]).exp_().mul_(d_row[of_row])
            g = tile.s.sub_(column[of_column]).exp_().mul_(d_column[of_column]).add_(by_row)
        else:
            g = tile.s.sub_(offset).exp_().mul_(d_row[of_row] + d_column[of_column])
        similarities.add_(d_own)  # a view of g by now
        g = g.flatten(1).to(x.dtype)
        _add_product(da[tile.rows], g, y[tile.samples].flatten(0, 1))
        _add_product(db[tile.samples].flatten(0, 1), g.t(), x[tile.rows])
    if multiplies_halves(a):
        da, db = da.ldexp_(unit), db.ldexp_(unit)
    return da.mul_(row_scale[:, None]), db.mul_(column_scale[..., None])


def _factors(
    a: Tensor, b: Tensor, row_scale: Tensor, column_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What is multiplied for the similarities, and what scales the product: halves must not be rounded before it."""
    if multiplies_halves(a):
        return a, b, row_scale, column_scale
    return a * row_scale[:, None], b * column_scale[..., None], None, None


def _tiles(
    x: Tensor, y: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, column_mask: Tensor | None
) -> Iterator[_Tile]:
    num_rows, (num_samples, candidates, _) = len(x), y.shape
    rows_per_tile, columns_per_tile = TILE["cpu" if x.device.type == "cpu" else "cuda"]
    step = max(1, columns_per_tile // candidates)
    dtype = torch.promote_types(x.dtype, torch.float32)
    memory = x.new_empty(min(num_rows, rows_per_tile) * min(num_samples, step) * candidates, dtype=dtype)
    for i in range(0, num_rows, rows_per_tile):
        rows = slice(i, min(i + rows_per_tile, num_rows))
        for j in range(0, num_samples, step):
            samples = slice(j, min(j + step, num_samples))
            left, right = x[rows], y[samples].flatten(0, 1)
            s = memory[: len(left) * len(right)].view(len(left), len(right))
            if row_scale is None:
                torch.mm(left, right.t(), out=s)
            else:
                torch.mul(half_product(left, right.t()), row_scale[rows, None], out=s)
                s.mul_(column_scale[samples].flatten())
            s = s.view(len(s), -1, candidates)
            if column_mask is not None:
                s.masked_fill_(~column_mask[samples, None], -torch.inf)
            yield _Tile(rows, samples, s)


def multiplies_halves(a: Tensor) -> bool:
    """Whether the products are of halves, summed in float32."""
    return a.dtype in (torch.bfloat16, torch.float16) and a.device.type == "cuda"


def half_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of halves in float32, which torch knows on GPUs only."""
    return torch.mm(x, y, out_dtype=torch.float32)


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x @ y. addmm takes no halves for a float32 total in every version of torch that we support."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += half_product(x, y)
