"""Launchers of tokenize's native code: the library's matrix product over pieces on a CPU, one kernel on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from vatt_engine.dispatch import amx_missing

PIECE_BYTES = 4 << 20  # of the patch matrix, on a CPU: more gains little time, less costs the product some


def fwd_cpp(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    agg: Tensor | None,
    keep: Tensor | None,
    crop: Tensor | None,
    flip: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """A piece of rows at a time: they start as bias + pos, or agg, and their patches times the weight are added."""
    dim, product = weight.shape[0], _product_dtype(dtype)
    patches = _PatchMatrix(video, keep, crop, flip, size, patch, agg is not None, product)
    out_dtype = dtype if pos is None else torch.promote_types(dtype, pos.dtype)
    sum_dtype = torch.float32 if product == torch.float32 else out_dtype  # in float32, rounded once, at the end
    out = weight.new_empty(patches.num_rows, dim, dtype=out_dtype)
    kernel = weight.to(product).T

    step = max(1, PIECE_BYTES // (patches.num_columns * product.itemsize))
    for first in range(0, patches.num_rows, step):
        rows = out[first : first + step]
        total = rows if out_dtype == sum_dtype else torch.empty_like(rows, dtype=sum_dtype)
        piece = patches.rows(first, len(rows))  # checks the token numbers
        _start_rows(total, bias, pos, agg, patches, first)
        if product == sum_dtype:
            total.addmm_(piece, kernel)
        else:
            total.add_(piece @ kernel)
        if total is not rows:
            rows.copy_(total)
    return out.view(video.shape[0], patches.rows_per_sample, dim)


def bwd_cpp(
    grad: Tensor,
    video: Tensor,
    keep: Tensor | None,
    crop: Tensor | None,
    flip: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
    agg: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dweight by pieces of columns, so that no sum over tokens is taken in steps; the others are sums of rows."""
    dweight = grad.new_empty(0, dtype=weight_dtype)
    if needs[0]:
        patches = _PatchMatrix(video, keep, crop, flip, size, patch, agg, _product_dtype(dtype))
        dweight = _weight_gradient(grad.view(-1, grad.shape[2]), patches, weight_dtype)
        del patches  # and its piece
    return dweight, *_row_sums(grad, keep, agg, _num_tokens(video, size, patch), needs)


def _weight_gradient(grad: Tensor, patches: _PatchMatrix, dtype: torch.dtype) -> Tensor:
    rows = grad.to(patches.dtype)
    step = max(1, PIECE_BYTES // max(1, patches.num_rows * patches.run_size * patches.dtype.itemsize))
    step = min(step, patches.num_runs)
    first = patches.columns(0, step)  # before `out`: the heap has room for what ends with this call
    out = grad.new_empty(grad.shape[1], patches.num_columns, dtype=dtype)
    for run in range(0, patches.num_runs, step):
        piece = patches.columns(run, min(step, patches.num_runs - run)) if run else first
        out[:, run * patches.run_size :][:, : piece.shape[1]] = rows.T @ piece
    return out


def _start_rows(
    rows: Tensor, bias: Tensor | None, pos: Tensor | None, agg: Tensor | None, patches: _PatchMatrix, first: int
) -> None:
    """What the product is added to: bias + pos, and agg in the first row of a sample."""
    if pos is None:
        rows.zero_()
    else:
        rows.copy_(pos.index_select(0, patches.token_of_row[first : first + len(rows)]))
    if bias is not None:
        rows += bias
    if agg is not None:
        rows[-first % patches.rows_per_sample :: patches.rows_per_sample] = agg.to(rows.dtype)


def _row_sums(
    grad: Tensor, keep: Tensor | None, agg: bool, num_tokens: int, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dbias [D], dpos [N, D] and dagg [D] in float32, empty where not needed."""
    dbias, dpos, dagg = (grad.new_empty(0, dtype=torch.float32) for _ in range(3))  # an op's outputs share no memory
    rows = grad[:, int(agg) :]
    if needs[2] and keep is not None and keep.ndim == 2:
        rows = rows.flatten(0, 1).float()
        dpos = rows.new_zeros(num_tokens, rows.shape[1])
        dpos.scatter_add_(0, keep.flatten()[:, None].expand_as(rows), rows)
        dbias = dpos.sum(0) if needs[1] else dbias
    elif needs[1] or needs[2]:
        by_position = _sum_of_samples(rows)
        dbias = by_position.sum(0) if needs[1] else dbias
        if needs[2]:
            zeros = by_position.new_zeros(num_tokens, rows.shape[2])
            dpos = by_position if keep is None else zeros.index_add_(0, keep, by_position)
    if needs[3]:
        dagg = grad[:, 0].sum(0, dtype=torch.float32)
    return dbias, dpos, dagg


def _sum_of_samples(rows: Tensor) -> Tensor:
    """sum(0) in float32; on a CPU the library's would make all rows float32 first."""
    if not rows.is_cpu or rows.dtype == torch.float32:
        return rows.sum(0, dtype=torch.float32)
    total = rows.new_zeros(rows.shape[1:], dtype=torch.float32)
    wide = torch.empty_like(total)
    for sample in rows:
        total += wide.copy_(sample)
    return total


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matrix product: bfloat16 where the CPU multiplies that faster than float32."""
    return dtype if dtype == torch.bfloat16 and not amx_missing() else torch.float32


class _PatchMatrix:
    """The patch matrix [B * (K + agg), t*h*w*C] of a call, whose rows or columns can be had; AGG's rows are zero."""

    def __init__(
        self,
        video: Tensor,
        keep: Tensor | None,
        crop: Tensor | None,
        flip: Tensor | None,
        size: Sequence[int],
        patch: Sequence[int],
        agg: bool,
        dtype: torch.dtype,
    ) -> None:
        video = video if video.dtype == torch.uint8 else video.float()
        crop = None if crop is None else crop.contiguous()
        flip = None if flip is None else flip.contiguous()
        self._write = _native().tokenize_patches
        self._tensors = (video, keep, crop, flip)
        self._geometry = (list(size), list(patch), agg)
        self.dtype = dtype
        self._buffer = torch.empty(0, dtype=dtype)  # of one piece; the next overwrites it
        self.num_tokens = _num_tokens(video, size, patch)
        self.num_runs, self.run_size = patch[0] * patch[1], patch[2] * video.shape[4]
        self.num_columns = self.num_runs * self.run_size
        kept = torch.arange(self.num_tokens) if keep is None else keep
        rows = kept.expand(video.shape[0], kept.shape[-1])
        if agg:
            rows = torch.cat([rows.new_zeros(len(rows), 1), rows], dim=1)
        self.rows_per_sample = rows.shape[1]
        self.num_rows = rows.numel()
        self.token_of_row = rows.flatten()  # 0 in AGG's rows

    def rows(self, first: int, count: int) -> Tensor:
        return self._piece(first, count, 0, self.num_runs)

    def columns(self, first_run: int, num_runs: int) -> Tensor:
        return self._piece(0, self.num_rows, first_run, num_runs)

    def _piece(self, row: int, num_rows: int, run: int, num_runs: int) -> Tensor:
        columns = num_runs * self.run_size
        if self._buffer.numel() < num_rows * columns:
            self._buffer = torch.empty(num_rows * columns, dtype=self.dtype)
        out = self._buffer[: num_rows * columns].view(num_rows, columns)
        self._write(*_capsules(*self._tensors, out), *self._geometry, row, run, torch.get_num_threads())
        return out


def _fwd_cuda(
    path: str,
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    agg: Tensor | None,
    keep: Tensor | None,
    crop: Tensor | None,
    flip: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """One kernel, after the weight is rounded to the product's dtype."""
    kept = _num_tokens(video, size, patch) if keep is None else keep.shape[-1]
    out_dtype = dtype if pos is None else torch.promote_types(dtype, pos.dtype)
    out = video.new_empty(video.shape[0], kept + (agg is not None), weight.shape[0], dtype=out_dtype)
    weight = weight.to(dtype).contiguous()
    terms = (None if term is None else term.float().contiguous() for term in (bias, pos, agg))
    where = (keep, None if crop is None else crop.contiguous(), None if flip is None else flip.contiguous())
    tensors = _capsules(video, weight, *terms, *where, out)
    _native().tokenize_fwd_cuda(path, *tensors, list(size), list(patch), _stream(video))
    return out


def _bwd_cuda(
    path: str,
    grad: Tensor,
    video: Tensor,
    keep: Tensor | None,
    crop: Tensor | None,
    flip: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
    agg: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One kernel for dweight, in parts that fill the device; the other gradients are sums of rows."""
    dweight = grad.new_empty(0, dtype=weight_dtype)
    if needs[0]:
        dim, columns = grad.shape[2], patch[0] * patch[1] * patch[2] * video.shape[4]
        splits = _native().tokenize_bwd_splits(grad.shape[0] * grad.shape[1], dim, columns, grad.device.index or 0)
        parts = grad.new_empty(splits, dim, columns, dtype=weight_dtype if splits == 1 else torch.float32)
        where = (keep, None if crop is None else crop.contiguous(), None if flip is None else flip.contiguous())
        tensors = _capsules(grad.to(dtype), video, *where, parts)
        _native().tokenize_bwd_weight_cuda(path, *tensors, agg, list(size), list(patch), _stream(grad))
        dweight = parts[0] if splits == 1 else parts.sum(0).to(weight_dtype)
    return dweight, *_row_sums(grad, keep, agg, _num_tokens(video, size, patch), needs)


fwd_mma, bwd_mma = functools.partial(_fwd_cuda, "mma"), functools.partial(_bwd_cuda, "mma")
fwd_wgmma, bwd_wgmma = functools.partial(_fwd_cuda, "wgmma"), functools.partial(_bwd_cuda, "wgmma")


def _native() -> ModuleType:
    from vatt_engine import _C

    return _C


def _capsules(*tensors: Tensor | None) -> list[object]:
    """What native code takes; it knows no bool, which is a byte."""
    views = (x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in tensors)
    return [None if x is None else to_dlpack(x) for x in views]


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _num_tokens(video: Tensor, size: Sequence[int], patch: Sequence[int]) -> int:
    return (video.shape[1] // patch[0]) * (size[0] // patch[1]) * (size[1] // patch[2])
