"""nce_stats and nce_grad by tiles, in plain PyTorch on any device or by fused kernels: no similarity is ever stored.

Memory beside the results: a scaled copy of both sides and a few tiles. For B rows, M = N P columns and width D the
statistics cost 2 B M D FLOPs and the gradient 6 B M D: each tile is computed once more and feeds two products.

On a GPU halves are multiplied as they are, summed in float32, and divided by the norms afterwards; the tile of the
gradient and the scaled copies are rounded to float16 for the other two products. A CPU multiplies float32: without
matrix units for halves that is twice as fast, and more exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from vatt_engine.dispatch import load

# Rows and columns of a tile. GPU, not measured: 4096 x 4096 halves, 32 MB, stay in the 50 MB L2 of an H100 between the
# kernel that writes them and the two that read them.
TILE = {"cpu": (1024, 2048), "cuda": (4096, 4096)}
STRIP = 4096  # rows that a kernel for the statistics has at a time: the sums of their tiles take 128 bytes a column
CUDA_BLOCK = {"mma": (128, 128), "wgmma": (128, 256)}  # outputs of a block
KERNELS = "vatt_engine.kernels.nce"


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
    empty = -torch.inf if offset is None else 0.0
    row, column = (row_scale.new_full((len(x),), empty, dtype=torch.float64) for x in (a, b))
    positive = torch.full_like(row, -torch.inf)
    factors = (a, b) if multiplies_halves(a) else _scaled(a, b, row_scale, column_scale)
    for tile in _tiles(*factors, row_scale, column_scale, column_mask):
        own, similarities = tile.own(first_sample)
        positive[own] = _logsumexp(similarities, (0,))
        if offset is None:
            row[tile.rows] = torch.logaddexp(row[tile.rows], _logsumexp(tile.s, (1, 2)))
            column[tile.samples] = torch.logaddexp(column[tile.samples], _logsumexp(tile.s, (0, 2)))
        else:
            e = tile.s.sub_(offset).exp_()
            row[tile.rows] += e.flatten(1).sum(1)
            column[tile.samples] += e.sum(0).sum(-1)
    if offset is not None:
        row, column = row.log_().add_(offset), column.log_().add_(offset)
    return row, column, positive


def stats_triton(a: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fused_stats(load(f"{KERNELS}:stats_strip"), load(f"{KERNELS}:block_of")(a), a, *given)


def stats_mma(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    from vatt_engine import _C

    return fused_stats(functools.partial(cuda_strip, _C, "mma"), CUDA_BLOCK["mma"], *given)


def stats_wgmma(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    from vatt_engine import _C

    return fused_stats(functools.partial(cuda_strip, _C, "wgmma"), CUDA_BLOCK["wgmma"], *given)


def cuda_strip(native: ModuleType, path: str, a: Tensor, *given: Any) -> None:
    stream = torch.cuda.current_stream(a.device).cuda_stream if a.is_cuda else 0
    native.nce_stats_cuda(path, *(to_dlpack(x) if isinstance(x, Tensor) else x for x in (a, *given)), stream)


def fused_stats(
    strip: Callable[..., None],
    block: tuple[int, int],
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    column_mask: Tensor | None,
    first_sample: int,
    offset: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`stats` by `strip`, which has all columns of some rows and leaves the sums, or log-sum-exps, of every block."""
    num_samples, candidates, _ = b.shape
    a, b, row_scale, column_scale, mask = map(_dense, (a, b, row_scale, column_scale, column_mask))
    row, empty = row_scale.new_empty(len(a), dtype=torch.float64), -torch.inf if offset is None else 0.0
    columns = row_scale.new_full((num_samples * candidates,), empty, dtype=torch.float64)
    positive = row_scale.new_full((len(a), candidates), -torch.inf)
    for rows in _slices(len(a), STRIP):
        part = row[rows]
        row_part = positive.new_empty(-(-len(columns) // block[1]), len(part))
        column_part = positive.new_empty(-(-len(part) // block[0]), len(columns))
        shared = (a[rows], b, row_scale[rows], column_scale, mask, first_sample + rows.start, offset)
        strip(*shared, row_part, column_part, positive[rows])
        if offset is None:
            part.copy_(row_part.double().logsumexp(0))
            columns = torch.logaddexp(columns, column_part.double().logsumexp(0))
        else:
            part.copy_(row_part.double().sum(0).log_().add_(offset))
            columns += column_part.double().sum(0)
    columns = columns.view(num_samples, candidates)
    column = columns.logsumexp(1) if offset is None else columns.sum(1).log_().add_(offset)
    return row, column, positive.double().logsumexp(1)


def grad(*given: Any) -> tuple[Tensor, Tensor]:
    return add_gradients(_gradient_tiles, *given)


def grad_triton(*given: Any) -> tuple[Tensor, Tensor]:
    return fused_grad(load(f"{KERNELS}:gradient_tile"), *given)


def fused_grad(gradient_tile: Callable[..., None], *given: Any) -> tuple[Tensor, Tensor]:
    """`grad` by `gradient_tile`, which writes G of some rows and samples in the dtype of the products."""

    def tiles(x, y, a, b, row_scale, column_scale, mask, first_sample, offset, row, column, positive, *d):
        a, b, row_scale, column_scale, mask = map(_dense, (a, b, row_scale, column_scale, mask))
        for rows, samples, g in _places(x, y, x.dtype):
            first = first_sample + rows.start - samples.start
            part = None if mask is None else mask[samples]
            shared = (a[rows], b[samples], row_scale[rows], column_scale[samples], part)
            vectors = (row[rows], column[samples], positive[rows], d[0][rows], d[1][samples], d[2][rows])
            gradient_tile(*shared, first, offset, *vectors, g.flatten(1))
            yield rows, samples, g.flatten(1)

    return add_gradients(tiles, *given)


def add_gradients(
    tiles: Callable[..., Iterator[tuple[slice, slice, Tensor]]],
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
    *d: Tensor,
) -> tuple[Tensor, Tensor]:
    """da [B, D], db [N, P, D] in the accumulation dtype: every tile of G times both sides."""
    half = multiplies_halves(a)
    x, y = _scaled(a, b, row_scale, column_scale)
    da, db = row_scale.new_zeros(a.shape), row_scale.new_zeros(b.shape)
    if half:
        # In this unit |G| <= 3 x 2^14, and 2^-28 of that is still a normal float16; a power of two rounds nothing.
        unit = torch.stack([each.abs().amax() for each in d]).amax().frexp().exponent - 14
        d = tuple(each.ldexp(-unit) for each in d)
    # An empty sum is -inf and all its members are too: any finite number in its place makes their exp 0.
    exact = [lse.where(lse > -torch.inf, 0.0) for lse in (row, column, positive)]
    vectors = [lse.to(row_scale.dtype) for lse in exact]
    # What exp(s - rounded) has too much, d takes off: it would be the same for a whole row or column.
    seen = vectors if offset is None else [offset, offset, vectors[2]]
    d = [(each * (s - lse).exp()).to(row_scale.dtype) for each, s, lse in zip(d, seen, exact)]
    shared = (a, b, row_scale, column_scale, column_mask, first_sample, offset)
    for rows, samples, g in tiles(x, y, *shared, *vectors, *d):
        _add_product(da[rows], g, y[samples].flatten(0, 1))
        _add_product(db[samples].flatten(0, 1), g.t(), x[rows])
    if half:
        da, db = da.ldexp_(unit), db.ldexp_(unit)
    return da.mul_(row_scale[:, None]), db.mul_(column_scale[..., None])


def _gradient_tiles(
    x, y, a, b, row_scale, column_scale, column_mask, first_sample, offset, row, column, positive, *d
) -> Iterator[tuple[slice, slice, Tensor]]:
    d_row, d_column, d_positive = d
    factors = (a, b) if multiplies_halves(a) else (x, y)
    for tile in _tiles(*factors, row_scale, column_scale, column_mask):
        own, similarities = tile.own(first_sample)
        d_own = (similarities - positive[own]).exp_() * d_positive[own]
        of_row, of_column = (tile.rows, None, None), (tile.samples, None)
        if offset is None:
            by_row = (tile.s - row[of_row]).exp_().mul_(d_row[of_row])
            g = tile.s.sub_(column[of_column]).exp_().mul_(d_column[of_column]).add_(by_row)
        else:
            g = tile.s.sub_(offset).exp_().mul_(d_row[of_row] + d_column[of_column])
        similarities.add_(d_own)  # a view of g by now
        yield tile.rows, tile.samples, g.flatten(1).to(x.dtype)


def _tiles(
    x: Tensor, y: Tensor, row_scale: Tensor, column_scale: Tensor, column_mask: Tensor | None
) -> Iterator[_Tile]:
    """Of halves that are not scaled yet, lest they are rounded before the product; or of scaled floats."""
    half = multiplies_halves(x)
    for rows, samples, s in _places(x, y, row_scale.dtype):
        left, right = x[rows], y[samples].flatten(0, 1).t()
        if half:
            torch.mul(half_product(left, right), row_scale[rows, None], out=s.flatten(1))
            s.mul_(column_scale[samples])
        else:
            torch.mm(left, right, out=s.flatten(1))
        if column_mask is not None:
            s.masked_fill_(~column_mask[samples, None], -torch.inf)
        yield _Tile(rows, samples, s)


def _places(x: Tensor, y: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """The rows and the samples of every tile, and room [r, n, P] for it; it is the same room for all."""
    candidates = y.shape[1]
    num_rows, num_columns = TILE["cpu" if x.device.type == "cpu" else "cuda"]
    step = max(1, num_columns // candidates)
    room = x.new_empty(min(len(x), num_rows) * min(len(y), step) * candidates, dtype=dtype)
    for rows in _slices(len(x), num_rows):
        for samples in _slices(len(y), step):
            shape = (rows.stop - rows.start, samples.stop - samples.start, candidates)
            yield rows, samples, room[: shape[0] * shape[1] * candidates].view(shape)


def _dense(x: Tensor | None) -> Tensor | None:
    """As kernels take it: contiguous, and bytes for bool."""
    if x is None:
        return None
    return x.contiguous().view(torch.uint8) if x.dtype == torch.bool else x.contiguous()


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _logsumexp(s: Tensor, dims: tuple[int, ...]) -> Tensor:
    """In float64, of exponentials in the dtype of s."""
    largest = s.amax(dims, keepdim=True)
    largest = largest.where(largest > -torch.inf, 0.0)
    return (s - largest).exp_().sum(dims, dtype=torch.float64).log_().add_(largest.view(-1))


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


def _scaled(a: Tensor, b: Tensor, row_scale: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides times their scales, in the dtype of the products: unit rows, and so float16 rather than bfloat16."""
    x, y = a * row_scale[:, None], b * column_scale[..., None]
    return (x.half(), y.half()) if multiplies_halves(a) else (x, y)
