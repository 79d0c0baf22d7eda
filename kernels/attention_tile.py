"""What the passes of attention share: where a tile lies, rows through an index, scores, and the dropout mask."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .splitmix import splitmix64
from .tiles import arch_of

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class AttentionTiles:
    """Rows of queries and of keys per step of one kernel, for sequences of at least `min_rows` rows."""

    archs: tuple[int, ...]  # compute capabilities; 80 serves all that are neither 90 nor 100
    half: bool  # bfloat16 and float16, else float32
    bias: bool  # whether scores may have one; its tile needs as many registers as theirs
    min_rows: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tail_of(rows: int, block: int, packed: bool) -> int:
    """Width of the last, narrower step over `rows`: a power of two of at least 16, 0 where whole steps suffice.

    785 keys are six steps of 128 and one of 32, where whole steps alone would be 14 % more work. The lengths of packed
    sequences are not known at compile time: their last step is a whole one.
    """
    rest = rows % block
    return block if packed else max(16, triton.next_power_of_2(rest)) if rest else 0


@functools.lru_cache(maxsize=64)
def tile_table(cu_seqlens: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """int32 [tiles, 3]: first row within its sequence, where the sequence begins, and how long it is.

    Kept, so that the layers of a model share one copy to the device, and so that a captured CUDA graph makes none.
    """
    rows = [
        (row, start, end - start)
        for start, end in itertools.pairwise(cu_seqlens)
        for row in range(0, end - start, block)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 3)


class Call(NamedTuple):
    """The arguments of one call of the op, as its kernels take them.

    q, k and v share their strides, all else is contiguous; `key_mask` covers the last rows, in the order of `keep`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None
    bias: Tensor | None
    key_mask: Tensor | None
    seed: Tensor | None
    cu_seqlens: tuple[int, ...] | None
    dropout_p: float
    scale: float

    @property
    def num_rows(self) -> int:
        return self.q.shape[2] if self.keep is None else self.keep.shape[-1]

    def tiles_of(self, table: Sequence[AttentionTiles]) -> AttentionTiles:
        """The first row of the table that fits; packed sequences take that of the longest."""
        rows = self.num_rows
        if self.cu_seqlens is not None:
            rows = max(end - start for start, end in itertools.pairwise(self.cu_seqlens))
        arch, half = arch_of(self.q.device), self.q.dtype != torch.float32
        return next(
            tiles
            for tiles in table
            if arch in tiles.archs
            and tiles.half == half
            and tiles.bias >= (self.bias is not None)
            and rows >= tiles.min_rows
        )

    def grid(self, block: int) -> tuple[tuple[int], dict[str, Any]]:
        """One program for `block` rows of a head; and what tells it which."""
        table = None if self.cu_seqlens is None else tile_table(self.cu_seqlens, block, self.q.device)
        num_tiles = triton.cdiv(self.num_rows, block) if table is None else table.shape[0]
        return (num_tiles * self.q.shape[0] * self.q.shape[1],), {"tile_ptr": table, "num_tiles": num_tiles}

    def arguments(self) -> dict[str, Any]:
        """What all kernels take alike."""
        _, heads, tokens, dim = self.q.shape
        keep, bias, mask = self.keep, self.bias, self.key_mask
        strides = dict(zip(("stride_b", "stride_h", "stride_n"), self.q.stride()))
        return strides | {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "keep_ptr": keep,
            "bias_ptr": bias,
            "mask_ptr": mask,
            "seed_ptr": self.seed,
            "num_heads": heads,
            "num_rows": self.num_rows,
            "num_tokens": tokens,
            "keep_stride_b": self.num_rows if keep is not None and keep.ndim == 2 else 0,
            "bias_stride_b": heads * self.num_rows**2 if bias is not None and bias.ndim == 4 else 0,
            "mask_first": 0 if mask is None else self.num_rows - mask.shape[1],
            "scale": self.scale,
            "threshold": round(self.dropout_p * 2**31),
            "inverse_keep": 1 / (1 - self.dropout_p),
            "D": dim,
            **({} if keep is None else {"debug": True, "sanitize_overflow": False}),  # keeps the assertion alone
        }


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: Sequence[int] | None,
    dropout_p: float,
    scale: float,
) -> Call:
    """Copies q, k and v only where their strides are unlike or the innermost is not 1."""
    if not q.stride() == k.stride() == v.stride() or q.stride(3) != 1:
        q, k, v = (x.contiguous() for x in (q, k, v))
    keep, bias, key_mask = (None if x is None else x.contiguous() for x in (keep, bias, key_mask))
    lengths = None if cu_seqlens is None else tuple(cu_seqlens)
    return Call(q, k, v, keep, bias, key_mask, seed if dropout_p > 0 else None, lengths, dropout_p, scale)


@triton.jit
def place(tile_ptr, num_tiles, num_rows, BLOCK: tl.constexpr):
    """batch * heads + head, this tile's first row in its sequence, the sequence's first row, and its length."""
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    first, start, length = tile * BLOCK, tl.full((), 0, tl.int32), num_rows
    if tile_ptr is not None:
        first = tl.load(tile_ptr + 3 * tile)
        start = tl.load(tile_ptr + 3 * tile + 1)
        length = tl.load(tile_ptr + 3 * tile + 2)
    return head, first, start, length


@triton.jit
def positions(keep_ptr, row, length, num_tokens):
    """Where rows of the sequence lie among the tokens; one outside the tokens stops the run."""
    at = row.to(tl.int64)
    if keep_ptr is not None:
        at = tl.load(keep_ptr + at, mask=row < length, other=0)
        tl.device_assert((at >= 0) & (at < num_tokens), "attention: keep must hold positions of tokens")
    return at


@triton.jit
def load_rows(ptr, at, stride, inside, D: tl.constexpr, BOUND: tl.constexpr):
    """[rows, D] of the tokens `at`, zero where not `inside`; without BOUND all are."""
    ptrs = ptr + (at * stride)[:, None] + tl.arange(0, D)[None, :]
    if BOUND:
        return tl.load(ptrs, mask=inside[:, None], other=0.0)
    return tl.load(ptrs)


@triton.jit
def scores(product, scale, i, j, start, length, bias_ptr, num_rows, mask_ptr, mask_first, BOUND: tl.constexpr):
    """log2(e) (scale q k^T + bias), -inf where a key may not be seen; i and j are columns and rows that broadcast.

    The mask begins with row `mask_first` of all sequences; keys before it may be seen.
    """
    s = product * (scale * LOG2E)
    if bias_ptr is not None:
        inside = (i < length) & (j < length)
        s += tl.load(bias_ptr + i.to(tl.int64) * num_rows + j, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if mask_ptr is not None:
        at = start + j - mask_first
        seen = tl.load(mask_ptr + at, mask=(at >= 0) & (j < length), other=True)
        s = tl.where(seen & (j < length), s, float("-inf"))
    elif BOUND:
        s = tl.where(j < length, s, float("-inf"))
    return s


@triton.jit
def row_keys(seed_ptr, head, row):
    """64 random bits for every row of queries of a head, as two halves."""
    key = splitmix64(splitmix64(tl.load(seed_ptr)) ^ ((head << 32) + row)).to(tl.uint64, bitcast=True)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def survives(low, high, column, threshold):
    """Whether a probability is kept: 31 bits hashed of its row's key and its column are not below the threshold.

    Two multiplications for each; their constants are lowbias32's (Wellons 2018).
    """
    x = low ^ (column.to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ high) * 0x846CA68B
    return ((x ^ (x >> 16)) >> 1) >= threshold
