"""y[b, k] = weight @ patch(video[b], keep[b, k]) + bias + pos[keep[b, k]], y[b, 0] = agg; dweight, dbias, dpos, dagg.

A byte x stands for (x - 127.5) 2 / 255. x - 127.5 = (2 x - 255) / 2 has eight significant bits, so bfloat16 and float16
hold it exactly: the products need no offset, and one factor at the end scales the sum.

The patch matrix exists only as tiles in registers. Where addresses allow, the forward reads words of four bytes and
multiplies byte i of all words with the weights of byte i (a "plane"): the order of a sum is free, and a word goes from
memory to the tensor cores' registers as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum import segment_sum, segments
from .tokenize_patches import Patches, load_patches, pixels


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel: output rows and columns, and elements (not words) of the sum per step."""

    archs: tuple[int, ...]  # compute capabilities the row is for: 80 serves what is neither 90 nor 100
    half: bool  # bfloat16 and float16 products, else float32
    min_size: int  # rows (forward) or tokens (backward) from which on the row is chosen
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages}


# The first row that fits is taken. Nobody has measured them on a GPU yet: they are guesses that compile without spills.
FWD_TILES = (
    Tiles(archs=(90, 100), half=True, min_size=4096, block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3),
    Tiles(archs=(80,), half=True, min_size=4096, block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    Tiles(archs=(80, 90, 100), half=True, min_size=0, block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4),
    Tiles(archs=(80, 90, 100), half=False, min_size=0, block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2),
)
# block_m: rows of dweight, block_n: elements of a patch, block_k: tokens.
BWD_TILES = (
    Tiles(archs=(90, 100), half=True, min_size=4096, block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3),
    Tiles(archs=(80,), half=True, min_size=4096, block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    Tiles(archs=(80, 90, 100), half=True, min_size=0, block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3),
    Tiles(archs=(80, 90, 100), half=False, min_size=0, block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2),
)
PROGRAMS = 264  # dweight is split over the tokens until there are about as many: two per multiprocessor of an H100
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def choose_tiles(table: Sequence[Tiles], device: torch.device, dtype: torch.dtype, size: int) -> Tiles:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    arch = 10 * major if major in (9, 10) else 80
    half = dtype != torch.float32
    return next(row for row in table if arch in row.archs and row.half == half and size >= row.min_size)


@triton.jit
def tokenize_fwd_kernel(
    video_ptr,
    corner_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    agg_ptr,
    keep_ptr,
    out_ptr,
    num_rows,
    dim,
    rows_per_sample,
    keep_stride_b,
    keep_stride_k,
    stride_t,
    stride_y,
    P: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    WORD: tl.constexpr,
    ALIGN: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = scale patches weight^T + bias + pos for BLOCK_M rows of [B (K + 1), D]; weight is [D, WORD, P / WORD]."""
    WORDS: tl.constexpr = P // WORD
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    tiles_n = tl.cdiv(dim, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the last repeat it: they are computed, but not stored.
    corner = tl.load(corner_ptr + tl.minimum(row, num_rows - 1))
    weight = weight_ptr + tl.minimum(d, dim - 1).to(tl.int64) * P

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, WORDS, BLOCK_K // WORD):
        k = start + tl.arange(0, BLOCK_K // WORD)
        loaded = load_patches(
            video_ptr, corner, None, k, stride_t, stride_y, P, RUN, CHANNELS, PATCH_H, WORD, ALIGN, FLIP
        )
        for plane in tl.static_range(WORD):
            w = tl.load(weight[None, :] + (plane * WORDS + k)[:, None], mask=(k < WORDS)[:, None], other=0.0)
            total = tl.dot(pixels(loaded, plane, dtype), w, total, input_precision="ieee")

    if not video_ptr.dtype.element_ty.is_floating():
        total *= 2.0 / 255.0
    mask_d = d < dim
    b = (row // rows_per_sample).to(tl.int64)
    k = row % rows_per_sample
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if agg_ptr is not None:
        k -= 1
    if pos_ptr is not None:
        mask_token = (row < num_rows) & (k >= 0)
        if keep_ptr is not None:
            token = tl.load(keep_ptr + b * keep_stride_b + k * keep_stride_k, mask=mask_token, other=0)
        else:
            token = k.to(tl.int64)
        pos = tl.load(
            pos_ptr + (token * dim)[:, None] + d[None, :], mask=mask_token[:, None] & mask_d[None, :], other=0
        )
        total += pos.to(tl.float32)
    if agg_ptr is not None:
        agg = tl.load(agg_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
        total = tl.where((k < 0)[:, None], agg[None, :], total)
    out = out_ptr + (row.to(tl.int64) * dim)[:, None] + d[None, :]
    tl.store(out, total, mask=(row < num_rows)[:, None] & mask_d[None, :])


@triton.jit
def tokenize_bwd_kernel(
    video_ptr,
    corner_ptr,
    grad_ptr,
    out_ptr,
    num_rows,
    dim,
    rows_per_sample,
    rows_per_split,
    stride_t,
    stride_y,
    dtype: tl.constexpr,
    AGG: tl.constexpr,
    P: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    ALIGN: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dweight = scale dy^T patches over the rows of one split, [splits, D, P]."""
    tiles_p = tl.cdiv(P, BLOCK_N)
    d = tl.program_id(0) // tiles_p * BLOCK_M + tl.arange(0, BLOCK_M)
    p = tl.program_id(0) % tiles_p * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    mask_d = d < dim

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    begin = split * rows_per_split
    for start in range(begin, tl.minimum(begin + rows_per_split, num_rows), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        mask = row < num_rows
        if AGG:
            mask = mask & (row % rows_per_sample > 0)
        corner = tl.load(corner_ptr + row, mask=mask, other=0)
        at = (row.to(tl.int64) * dim)[:, None] + d[None, :]
        dy = tl.load(grad_ptr + at, mask=mask[:, None] & mask_d[None, :], other=0.0).to(dtype)
        loaded = load_patches(video_ptr, corner, mask, p, stride_t, stride_y, P, RUN, CHANNELS, PATCH_H, 1, ALIGN, FLIP)
        total = tl.dot(tl.trans(dy), pixels(loaded, 0, dtype), total, input_precision="ieee")

    if not video_ptr.dtype.element_ty.is_floating():
        total *= 2.0 / 255.0
    out = out_ptr + ((split * dim).to(tl.int64) + d)[:, None] * P + p[None, :]
    tl.store(out, total, mask=mask_d[:, None] & (p < P)[None, :])


def tokenize_fwd(
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
    """video [B, T, H, W, C], weight [D, P], bias [D], pos [N, D], agg [D] -> [B, K (+ 1), D]; products in `dtype`."""
    patches = Patches(video, keep, crop, flip, size, patch, agg is not None)
    dim = weight.shape[0]
    out_dtype = dtype if pos is None else torch.promote_types(dtype, pos.dtype)
    out = video.new_empty(video.shape[0], patches.rows, dim, dtype=out_dtype)
    if out.numel() == 0:
        return out
    num_rows = video.shape[0] * patches.rows
    word = 4 if video.dtype == torch.uint8 and patches.align % 4 == 0 else 1
    tiles = choose_tiles(FWD_TILES, video.device, dtype, num_rows)
    with torch.cuda.device_of(video):
        planes = weight.new_empty(dim, word, patches.patch_size // word, dtype=dtype)
        planes.copy_(weight.reshape(dim, -1, word).transpose(1, 2))
        tokenize_fwd_kernel[(triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(dim, tiles.block_n),)](
            video,
            patches.corners(),
            planes,
            *(None if term is None else term.contiguous() for term in (bias, pos, agg)),
            keep,
            out,
            num_rows,
            dim,
            patches.rows,
            *patches.keep_strides,
            **patches.arguments(),
            WORD=word,
            **tiles.arguments(),
        )
    return out


def tokenize_bwd(
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
    """grad [B, K (+ 1), D] -> dweight of `weight_dtype`, dbias, dpos, dagg in float32; [0] for what `needs` leaves out.

    Every sum is taken in a fixed order: the same bits in every run.
    """
    patches = Patches(video, keep, crop, flip, size, patch, agg)
    need_weight, need_bias, need_pos, need_agg = needs
    dweight = grad.new_empty(0, dtype=weight_dtype)
    dbias, dpos, dagg = (grad.new_empty(0, dtype=torch.float32) for _ in range(3))
    if need_weight:
        dweight = _weight_gradient(grad, patches, dtype, weight_dtype)
    if need_pos:
        dpos = _pos_gradient(grad, patches)
    if need_bias:
        dbias = dpos.sum(0) if need_pos else grad[:, int(agg) :].sum((0, 1), dtype=torch.float32)
    if need_agg:
        dagg = grad[:, 0].sum(0, dtype=torch.float32)
    return dweight, dbias, dpos, dagg


def _weight_gradient(grad: Tensor, patches: Patches, dtype: torch.dtype, weight_dtype: torch.dtype) -> Tensor:
    num_rows, dim = grad.shape[0] * grad.shape[1], grad.shape[2]
    if grad.numel() == 0:
        return grad.new_zeros(dim, patches.patch_size, dtype=weight_dtype)
    tiles = choose_tiles(BWD_TILES, grad.device, dtype, num_rows)
    programs = triton.cdiv(dim, tiles.block_m) * triton.cdiv(patches.patch_size, tiles.block_n)
    steps = triton.cdiv(num_rows, tiles.block_k)
    steps_per_split = triton.cdiv(steps, triton.cdiv(PROGRAMS, programs))
    splits = triton.cdiv(steps, steps_per_split)
    part_dtype = weight_dtype if splits == 1 else torch.float32
    parts = grad.new_empty(splits, dim, patches.patch_size, dtype=part_dtype)
    with torch.cuda.device_of(grad):
        tokenize_bwd_kernel[(programs, splits)](
            patches.video,
            patches.corners(),
            grad,
            parts,
            num_rows,
            dim,
            patches.rows,
            steps_per_split * tiles.block_k,
            **patches.arguments(),
            dtype=TL_DTYPES[dtype],
            AGG=patches.agg,
            **tiles.arguments(),
        )
    return parts[0] if splits == 1 else parts.sum(0).to(weight_dtype)


def _pos_gradient(grad: Tensor, patches: Patches) -> Tensor:
    """dpos[n] = the sum of the rows of all samples that hold token n."""
    batch, rows, _ = grad.shape
    keep, agg = patches.keep, int(patches.agg)
    if keep is None:
        return grad[:, agg:].sum(0, dtype=torch.float32)
    position, start = segments(keep.reshape(1, -1), patches.num_tokens)
    if keep.ndim == 1:
        return segment_sum(grad, position + agg, start, torch.float32, repeat=batch, step=rows)[0]
    row = position + (torch.div(position, keep.shape[1], rounding_mode="floor") + 1) * agg
    return segment_sum(grad, row, start, torch.float32)[0]
