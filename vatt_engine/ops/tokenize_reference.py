"""What tokenize means, in plain PyTorch: patches cut, scaled, projected, placed; and the gradients of that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def tokenize_reference(
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
    """The meaning of the op: cut the grid, take the kept patches, scale, project, add positions, AGG first."""
    patches = patches_reference(video, keep, crop, flip, size, patch, dtype)
    tokens = F.linear(patches, weight.to(dtype), None if bias is None else bias.to(dtype))
    if pos is not None:
        tokens = tokens + (pos if keep is None else pos[keep])
    if agg is not None:
        tokens = torch.cat([agg.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1)
    return tokens


def tokenize_bwd_reference(
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
    """Gradients of weight, bias, pos and agg, empty where not needed; patches are cut again instead of kept."""
    sums = torch.promote_types(grad.dtype, torch.float32)
    dweight, dbias, dpos, dagg = (grad.new_empty(0, dtype=d) for d in (weight_dtype, sums, sums, sums))
    rows = grad[:, int(agg) :]
    if needs[0]:
        patches = patches_reference(video, keep, crop, flip, size, patch, dtype).flatten(0, 1)
        dweight = (rows.flatten(0, 1).to(dtype).T @ patches).to(weight_dtype)
    if needs[1]:
        dbias = rows.sum((0, 1), dtype=sums)
    if needs[2]:
        num_tokens = (video.shape[1] // patch[0]) * (size[0] // patch[1]) * (size[1] // patch[2])
        token = torch.arange(num_tokens, device=grad.device) if keep is None else keep
        dpos = grad.new_zeros(num_tokens, grad.shape[2], dtype=sums)
        dpos.index_add_(0, token.expand(rows.shape[:2]).flatten(), rows.flatten(0, 1).to(sums))
    if needs[3]:
        dagg = grad[:, 0].sum(0, dtype=sums)
    return dweight, dbias, dpos, dagg


def patches_reference(
    video: Tensor,
    keep: Tensor | None,
    crop: Tensor | None,
    flip: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The patch matrix [B, K, t*h*w*C] of `dtype`."""
    if crop is not None or flip is not None:
        video = video[_window_index(video, crop, flip, size)].permute(0, 3, 1, 2, 4)
    else:
        video = video[:, :, : size[0], : size[1]]
    cells = _cut(video, patch)
    if keep is None:
        patches = cells.flatten(1, 3)
    else:
        _check_token_numbers(keep, cells.shape[1] * cells.shape[2] * cells.shape[3])
        patches = cells[_cell_index(keep, cells)]
    patches = patches.flatten(2)
    if video.dtype == torch.uint8:
        patches = patches.to(torch.promote_types(dtype, torch.float32)) * 2 / 255 - 1
    return patches.to(dtype)


def video_bwd_reference(
    grad: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    keep: Tensor | None,
    crop: Tensor | None,
    flip: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
) -> Tensor:
    """The gradient [B, T, H, W, C] of float video: every patch's back to its place, zero where nothing was read."""
    grad = grad.to(weight.dtype) @ weight
    video = grad.new_zeros(shape)
    moved = crop is not None or flip is not None
    window = grad.new_zeros(*shape[:2], *size, shape[4]) if moved else video[:, :, : size[0], : size[1]]
    cells = _cut(window, patch)
    grad = grad.unflatten(2, cells.shape[4:])
    if keep is None:
        cells.copy_(grad.unflatten(1, cells.shape[1:4]))
    else:
        cells.index_put_(_cell_index(keep, cells), grad, accumulate=True)
    if moved:
        video[_window_index(video, crop, flip, size)] = window.permute(0, 2, 3, 1, 4)
    return video


def _window_index(
    video: Tensor, crop: Tensor | None, flip: Tensor | None, size: Sequence[int]
) -> tuple[Tensor, slice, Tensor, Tensor]:
    """An index that picks every sample's window out of [B, T, H, W, C] as [B, H', W', T, C]."""
    batch, device = video.shape[0], video.device
    rows = torch.arange(size[0], device=device).expand(batch, -1)
    columns = torch.arange(size[1], device=device).expand(batch, -1)
    if flip is not None:
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    if crop is not None:
        _check_windows(crop, video.shape[2] - size[0], video.shape[3] - size[1])
        rows, columns = rows + crop[:, :1], columns + crop[:, 1:]
    sample = torch.arange(batch, device=device)[:, None, None]
    return sample, slice(None), rows[:, :, None], columns[:, None, :]


def _cut(video: Tensor, patch: Sequence[int]) -> Tensor:
    """A view of [B, T, H, W, C] as [B, grid_t, grid_h, grid_w, t, h, w, C]; what fills no patch is left out."""
    for axis, size in zip((1, 3, 5), patch):
        count = video.shape[axis] // size
        video = video.narrow(axis, 0, count * size).unflatten(axis, (count, size))
    return video.permute(0, 1, 3, 5, 2, 4, 6, 7)


def _cell_index(keep: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    """Indices into the first four axes of `cells` that pick the kept tokens of every sample, each [B, K]."""
    batch, _, rows, columns = cells.shape[:4]
    sample = torch.arange(batch, device=keep.device)[:, None]
    row = torch.div(keep, columns, rounding_mode="floor")
    return sample, torch.div(row, rows, rounding_mode="floor"), row % rows, keep % columns


def _check_token_numbers(keep: Tensor, num_tokens: int) -> None:
    """On a GPU this would need a synchronisation: there the index kernel's own bound check stops the run."""
    if keep.is_cpu and keep.numel():
        low, high = (int(bound) for bound in keep.aminmax())
        if low < 0 or high >= num_tokens:
            wrong = low if low < 0 else high
            raise ValueError(f"tokenize: keep must hold token numbers in [0, {num_tokens}), got {wrong}.")


def _check_windows(crop: Tensor, last_row: int, last_column: int) -> None:
    """As for token numbers, only where it costs no synchronisation."""
    if crop.is_cpu:
        outside = ((crop < 0) | (crop > torch.tensor([last_row, last_column]))).any(1)
        if outside.any():
            got = crop[outside][0].tolist()
            raise ValueError(f"tokenize: crop must lie in [0, {last_row}] x [0, {last_column}], got {got}.")
