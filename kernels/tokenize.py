"""y[b, k] = weight @ patch(video[b], keep[b, k]) + bias + pos[keep[b, k]], y[b, 0] = agg; dweight, dbias, dpos, dagg.

A byte x stands for (x - 127.5) 2 / 255. x - 127.5 = (2 x - 255) / 2 has eight significant bits, so bfloat16 and float16
hold it exactly: the products need no offset, and one factor at the end scales the sum.

The patch matrix exists only as tiles in registers. Where addresses allow, the forward reads words of four bytes and
multiplies byte i of all words with the weights of byte i (a "plane"): the order of a sum is free, and a word goes from
memory to the tensor cores' registers as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum import segment_sum, segments
from .tiles import Tiles, arch_of, choose_tiles
from .tokenize_patches import Patches, load_patches, pixels

# The first row that fits is taken. Nobody has measured them on a GPU yet: they are guesses that compile without spills.
# float32 rows are 32 high: from 64 on Triton 3.7 uses TF32 on 100 even where IEEE is asked for. The four planes of a
# large tile do not fit into the tensor memory of 100, so that bytes are read there.
FWD_TILES = (
    Tiles((90,), True, (4,), 4096, block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=2),
    Tiles((90,), True, (1,), 4096, block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3),
    Tiles((100,), True, (1,), 4096, block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    Tiles((80,), True, (4,), 4096, block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    Tiles((80,), True, (1,), 4096, block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    Tiles((80, 90, 100), True, (4, 1), 0, block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4),
    Tiles((80, 90, 100), False, (4, 1), 0, block_m=32, block_n=128, block_k=64, num_warps=4, num_stages=2),
)
# Rows of the result are those of dweight, columns the elements of a patch, and the sum is over tokens.
BWD_TILES = (
    Tiles((90, 100), True, (1,), 4096, block_m=256, block_n=128, block_k=64, num_warps=8, num_stages=3),
    Tiles((80,), True, (1,), 4096, block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    Tiles((80, 90, 100), True, (1,), 0, block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3),
    Tiles((80, 90, 100), False, (1,), 0, block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=2),
)
PROGRAMS = 264  # dweight is split over the tokens until there are about as many: two per multiprocessor of an H100


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
    d0 = tl.program_id(0) % tiles_n * BLOCK_N
    d = d0 + tl.arange(0, BLOCK_N)
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
    b = (row // rows_per_sample).to(tl.int64)
    k = row % rows_per_sample
    if agg_ptr is not None:
        k -= 1
    if keep_ptr is not None:
        kept = keep_ptr + b * keep_stride_b + k * keep_stride_k
        token = tl.load(kept, mask=(row < num_rows) & (k >= 0), other=0)
    else:
        token = k.to(tl.int64)
    # In parts of 64 columns: what is added to a whole tile would not fit into the registers beside it.
    if BLOCK_N == 256:
        one, other = _halves(total)
        for half in tl.static_range(2):
            left, right = _halves(other if half else one)
            first = d0 + 128 * half
            _finish(left, first, row, k, token, bias_ptr, pos_ptr, agg_ptr, out_ptr, num_rows, dim)
            _finish(right, first + 64, row, k, token, bias_ptr, pos_ptr, agg_ptr, out_ptr, num_rows, dim)
    elif BLOCK_N == 128:
        left, right = _halves(total)
        _finish(left, d0, row, k, token, bias_ptr, pos_ptr, agg_ptr, out_ptr, num_rows, dim)
        _finish(right, d0 + 64, row, k, token, bias_ptr, pos_ptr, agg_ptr, out_ptr, num_rows, dim)
    else:
        _finish(total, d0, row, k, token, bias_ptr, pos_ptr, agg_ptr, out_ptr, num_rows, dim)


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _finish(total, first, row, k, token, bias_ptr, pos_ptr, agg_ptr, out_ptr, num_rows, dim):
    """Add bias and pos to columns `first`... of the rows, or put the AGG token where k < 0, and store them."""
    sums: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    d = first + tl.arange(0, total.shape[1])
    mask_d, mask_row = d < dim, row < num_rows
    total = total.to(sums)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(sums)[None, :]
    if pos_ptr is not None:
        pos = (pos_ptr + token * dim)[:, None] + d[None, :]
        total += tl.load(pos, mask=(mask_row & (k >= 0))[:, None] & mask_d[None, :], other=0.0).to(sums)
    if agg_ptr is not None:
        agg = tl.load(agg_ptr + d, mask=mask_d, other=0.0).to(sums)
        total = tl.where((k < 0)[:, None], agg[None, :], total)
    out = (out_ptr + row.to(tl.int64) * dim)[:, None] + d[None, :]
    tl.store(out, total, mask=mask_row[:, None] & mask_d[None, :])


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
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
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
        dy = tl.load(grad_ptr + at, mask=mask[:, None] & mask_d[None, :], other=0.0)
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
    tiles = choose_tiles(FWD_TILES, arch_of(video.device), dtype, word, num_rows)
    word = word if word in tiles.words else 1
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
    """grad [B, K (+ 1), D] -> dweight of `weight_dtype`, dbias, dpos, dagg; [0] for what `needs` leaves out.

    The last three are float32, or float64 if grad is. Every sum is taken in a fixed order: the same bits in every run.
    """
    patches = Patches(video, keep, crop, flip, size, patch, agg)
    need_weight, need_bias, need_pos, need_agg = needs
    dweight = grad.new_empty(0, dtype=weight_dtype)
    sums = torch.promote_types(grad.dtype, torch.float32)
    dbias, dpos, dagg = (grad.new_empty(0, dtype=sums) for _ in range(3))
    if need_weight:
        dweight = _weight_gradient(grad, patches, dtype, weight_dtype)
    if need_pos:
        dpos = _pos_gradient(grad, patches, sums)
    if need_bias:
        dbias = dpos.sum(0) if need_pos else grad[:, int(agg) :].sum((0, 1), dtype=sums)
    if need_agg:
        dagg = grad[:, 0].sum(0, dtype=sums)
    return dweight, dbias, dpos, dagg


def _weight_gradient(grad: Tensor, patches: Patches, dtype: torch.dtype, weight_dtype: torch.dtype) -> Tensor:
    num_rows, dim = grad.shape[0] * grad.shape[1], grad.shape[2]
    if grad.numel() == 0:
        return grad.new_zeros(dim, patches.patch_size, dtype=weight_dtype)
    tiles = choose_tiles(BWD_TILES, arch_of(grad.device), dtype, 1, num_rows)
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
            grad.to(dtype),  # every tile of the patches reads all of it: it is rounded once
            parts,
            num_rows,
            dim,
            patches.rows,
            steps_per_split * tiles.block_k,
            **patches.arguments(),
            AGG=patches.agg,
            **tiles.arguments(),
        )
    return parts[0] if splits == 1 else parts.sum(0).to(weight_dtype)


def _pos_gradient(grad: Tensor, patches: Patches, dtype: torch.dtype) -> Tensor:
    """dpos[n] = the sum of the rows of all samples that hold token n."""
    batch, rows, _ = grad.shape
    keep, agg = patches.keep, int(patches.agg)
    if keep is None:
        return grad[:, agg:].sum(0, dtype=dtype)
    position, start = segments(keep.reshape(1, -1), patches.num_tokens)
    if keep.ndim == 1:
        return segment_sum(grad, position + agg, start, dtype, repeat=batch, step=rows)[0]
    row = position + (torch.div(position, keep.shape[1], rounding_mode="floor") + 1) * agg
    return segment_sum(grad, row, start, dtype)[0]
