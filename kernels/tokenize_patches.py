"""Where the patches of a video lie, and how a kernel reads a tile of them.

One small kernel finds the corner of every patch, and stops the run if a token or a window lies outside the video; other
kernels read each patch from its corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CORNER_BLOCK = 256


@dataclass(frozen=True)
class Patches:
    """The kept patches of the windows of a video, one for every row of [B, rows] but each sample's AGG row.

    Args:
        video: [B, T, H, W, C], uint8 or float; a row [W, C] has no gaps.
        keep: int64 [K] or [B, K] token numbers, None for all.
        crop: int64 [B, 2], the corner (y, x) of each window, or None.
        flip: bool [B], which windows are mirrored left to right, or None.
        size: (height, width) of the windows.
        patch: (t, h, w).
        agg: the first row of each sample is its AGG token, which reads nothing.
    """

    video: Tensor
    keep: Tensor | None
    crop: Tensor | None
    flip: Tensor | None
    size: Sequence[int]
    patch: Sequence[int]
    agg: bool

    @property
    def grid(self) -> list[int]:
        """Tokens along time, height and width; a rest that fills no patch is left out."""
        return [extent // step for extent, step in zip((self.video.shape[1], *self.size), self.patch)]

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def rows(self) -> int:
        """Rows per sample."""
        return self.agg + (self.num_tokens if self.keep is None else self.keep.shape[-1])

    @property
    def run(self) -> int:
        """Elements of a patch that lie side by side."""
        return self.patch[2] * self.video.shape[4]

    @property
    def patch_size(self) -> int:
        return self.patch[0] * self.patch[1] * self.run

    @property
    def align(self) -> int:
        """The largest number of elements, up to 16 bytes, that divides where any run begins, and its length."""
        if self.crop is not None or self.flip is not None:
            return 1  # corners of windows are known on the device alone
        strides = [stride for stride, extent in zip(self.video.stride()[:3], self.video.shape) if extent > 1]
        begin = self.video.data_ptr() // self.video.itemsize
        return math.gcd(16 // self.video.itemsize, self.run, begin, *strides)

    @property
    def keep_strides(self) -> tuple[int, int]:
        """Between samples and between positions; a keep of one axis serves all samples."""
        if self.keep is None:
            return 0, 0
        return self.keep.stride(0) if self.keep.ndim == 2 else 0, self.keep.stride(-1)

    def arguments(self) -> dict[str, int]:
        """What `load_patches` takes beside the corners."""
        return {
            "stride_t": self.video.stride(1) // self.align,
            "stride_y": self.video.stride(2) // self.align,
            "P": self.patch_size,
            "RUN": self.run,
            "CHANNELS": self.video.shape[4],
            "PATCH_H": self.patch[1],
            "ALIGN": self.align,
            "FLIP": self.flip is not None,
        }

    def corners(self) -> Tensor:
        """int64 [B * rows], see `patch_corner_kernel`."""
        video = self.video
        corner = video.new_empty(video.shape[0] * self.rows, dtype=torch.int64)
        patch_corner_kernel[(triton.cdiv(corner.numel(), CORNER_BLOCK),)](
            self.keep,
            None if self.crop is None else self.crop.contiguous(),
            None if self.flip is None else self.flip.contiguous(),
            corner,
            corner.numel(),
            self.rows,
            *self.keep_strides,
            *video.stride()[:3],
            *video.shape[2:4],
            *self.size,
            *self.grid,
            AGG=int(self.agg),
            ALIGN=self.align,
            CHANNELS=video.shape[4],
            PATCH_T=self.patch[0],
            PATCH_H=self.patch[1],
            PATCH_W=self.patch[2],
            BLOCK=CORNER_BLOCK,
            debug=True,  # keeps the assertions, and with the next no others
            sanitize_overflow=False,
        )
        return corner


@triton.jit
def patch_corner_kernel(
    keep_ptr,
    crop_ptr,
    flip_ptr,
    corner_ptr,
    num_rows,
    rows_per_sample,
    keep_stride_b,
    keep_stride_k,
    stride_b,
    stride_t,
    stride_y,
    height,
    width,
    size_h,
    size_w,
    grid_t,
    grid_h,
    grid_w,
    AGG: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the leftmost pixel of each patch's first run lies in the video, in units of ALIGN elements.

    A mirrored window is marked by the complement, ~corner. The row of an AGG token gets the corner of token 0.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    b = (tl.where(inside, row, 0) // rows_per_sample).to(tl.int64)
    k = row % rows_per_sample - AGG
    if keep_ptr is not None:
        token = tl.load(keep_ptr + b * keep_stride_b + k * keep_stride_k, mask=inside & (k >= 0), other=0)
    else:
        token = tl.maximum(k, 0).to(tl.int64)
    tokens = grid_t * grid_h * grid_w
    tl.device_assert((token >= 0) & (token < tokens), "tokenize: keep must hold token numbers of the grid")
    token = tl.minimum(tl.maximum(token, 0), tokens - 1).to(tl.int32)
    y = (token // grid_w % grid_h * PATCH_H).to(tl.int64)
    x = (token % grid_w * PATCH_W).to(tl.int64)
    if flip_ptr is not None:
        flipped = tl.load(flip_ptr + b) != 0
        x = tl.where(flipped, size_w - x - PATCH_W, x)
    if crop_ptr is not None:
        top, left = tl.load(crop_ptr + 2 * b), tl.load(crop_ptr + 2 * b + 1)
        fits = (top >= 0) & (top + size_h <= height) & (left >= 0) & (left + size_w <= width)
        tl.device_assert(fits, "tokenize: crop must be corners of windows inside the video")
        y += top
        x += left
    frame = (token // (grid_w * grid_h) * PATCH_T).to(tl.int64)
    corner = (b * stride_b + frame * stride_t + y * stride_y + x * CHANNELS) // ALIGN
    if flip_ptr is not None:
        corner = tl.where(flipped, ~corner, corner)
    tl.store(corner_ptr + row, corner, mask=inside)


@triton.jit
def load_patches(
    video_ptr,
    corner,
    mask_m,
    k,
    stride_t,
    stride_y,
    P: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    WORD: tl.constexpr,
    ALIGN: tl.constexpr,
    FLIP: tl.constexpr,
):
    """Elements k (words of WORD bytes) of the patches at `corner`, [M, K]; strides in units of ALIGN elements."""
    UNIT: tl.constexpr = ALIGN // WORD
    run = k // (RUN // WORD)
    element = k % (RUN // WORD)
    offset = (run // PATCH_H * stride_t + run % PATCH_H * stride_y) * UNIT
    if FLIP:
        mirrored = corner < 0
        corner = tl.where(mirrored, ~corner, corner)
        backward = RUN - CHANNELS - element + 2 * (element % CHANNELS)  # pixels backward, channels forward
        within = tl.where(mirrored[:, None], backward[None, :], element[None, :])
        at = (corner * UNIT)[:, None] + (offset[None, :] + within)
    else:
        at = (corner * UNIT)[:, None] + (offset + element)[None, :]
    if WORD == 4:
        video_ptr = video_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    mask = (k < P // WORD)[None, :]
    if mask_m is not None:
        mask = mask & mask_m[:, None]
    return tl.load(video_ptr + at, mask=mask, other=0)


@triton.jit
def pixels(loaded, plane: tl.constexpr, dtype: tl.constexpr):
    """Byte `plane` of integers less 127.5, float as it is, as `dtype`."""
    if loaded.dtype.is_floating():
        value = loaded
    else:
        # 32768 + x as a float32, put together from its bits: cheaper than a conversion, and exact.
        byte = (loaded.to(tl.int32) >> (8 * plane)) & 0xFF
        value = ((byte << 8) | 0x47000000).to(tl.float32, bitcast=True) - 32895.5
    return value.to(dtype)
