"""Scaled dot-product attention with an additive bias, a key mask, dropout, an index of rows, and packed sequences:

p = softmax_j(scale q_i . k_j + bias_ij),  masked keys have p = 0,  y_i = sum_j dropout(p_ij) v_j
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import flop_counter

from vatt_engine.dispatch import Impl, define_choice, native_missing, triton_missing
from vatt_engine.ops.attention_flash import Options, flash_attention, flash_refuses, native_refuses, split
from vatt_engine.splitmix import splitmix64


def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Bidirectional multi-head attention, softmax(scale q k^T + bias) v.

    Args:
        q, k, v: [B, H, N, D] each, float32, bfloat16 or float16 (float64 for tests); or one tensor [B, N, 3, H, D] in
            place of q, as a fused projection gives it, whose gradient then is one tensor too.
        keep: int64 [K] for all samples, or [B, K] per sample: the rows of q, k and v that take part, in the order of
            the output; no row twice. Their gradients are put back, all others are zero.
        bias: [H, N, N] or [B, H, N, N] in the dtype of q, added to the scaled scores; differentiable. Not together
            with `keep` or `cu_seqlens`.
        key_mask: [B, N] bool, False where a key may not be seen. A row that may see nothing gives zeros.
        cu_seqlens: [S + 1] ascending integers from 0 to N, where S sequences begin and end that are packed into
            one sample (B = 1): a row sees its own sequence alone. A tensor on a GPU is read back, which waits for it.
            `key_mask` may then be [1, M] and cover only the last M rows, whole sequences; rows before are all seen.
            Not together with `keep`.
        dropout_p: probability of dropping an attention probability, in [0, 1).
        seed: an integer, or an int64 tensor of one element: what is dropped is then a function of it, the same in every
            implementation that takes one. By default torch's generator decides.
        scale: multiplies q k^T; 1/sqrt(D) by default (the T5-style text encoder uses 1).

    Returns:
        [B, H, N, D], or [B, H, K, D] with `keep`, the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, arguments exclude one another, dropout_p is outside [0, 1), or
            (on the CPU; a GPU kernel stops the run) keep holds a position outside the rows, or (on the CPU) one twice.

    Source: paper section 3.2; official vatt/modeling/common/transformers.py and backbones/text/t5.py.
    Implementations: cpp (CPU, dropout of dense sequences), sdpa (torch's library attention, no seed), reference (plain
    PyTorch, scores stored), triton (GPU, D of 16, 32 or 64).

    >>> x = torch.ones(1, 1, 2, 4)
    >>> attention(x, x, x).mean().item()
    1.0
    """
    rows = _check_inputs(q, k, v)
    cu_seqlens = _check_packing(rows, cu_seqlens, keep, bias)
    _check_options(rows, keep, bias, key_mask, cu_seqlens, dropout_p)
    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=q.device)
    elif seed is not None:
        seed = seed.to(q.device, torch.int64).reshape(())
    if key_mask is not None and keep is not None:
        key_mask = key_mask[:, keep] if keep.ndim == 1 else key_mask.gather(1, keep)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attention(q, k, v, Options(keep, bias, key_mask, cu_seqlens, dropout_p, seed, scale))


def attention_reference(q: Tensor, k: Tensor | None, v: Tensor | None, options: Options) -> Tensor:
    """The meaning of the op, scores stored."""
    q, k, v = _kept(*split(q, k, v), options.keep)
    if options.cu_seqlens is None:
        return _softmax(q, k, v, options, options.key_mask)
    first_masked = _first_masked(options)
    parts = []
    for start, end in pairwise(options.cu_seqlens):
        mask = options.key_mask[:, start - first_masked : end - first_masked] if start >= first_masked else None
        parts.append(_softmax(*(x[:, :, start:end] for x in (q, k, v)), options, mask, start))
    return torch.cat(parts, 2)


def _softmax(q: Tensor, k: Tensor, v: Tensor, options: Options, mask: Tensor | None, start: int = 0) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) * options.scale
    if options.bias is not None:
        scores = scores + options.bias
    if mask is not None:
        visible = mask[:, None, None, :]
        scores = scores.masked_fill(~visible, -torch.inf)
        # A row with no visible key would be softmax of nothing: its probabilities are zero.
        scores = scores.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        probabilities = scores.softmax(-1) * visible.any(-1, keepdim=True)
    else:
        probabilities = scores.softmax(-1)
    if options.seed is None or options.dropout_p == 0.0:
        return torch.matmul(F.dropout(probabilities, options.dropout_p), v)
    kept = dropout_mask(options.seed, *scores.shape[:3], options.dropout_p, start)
    return torch.matmul(probabilities * kept / (1 - options.dropout_p), v)


def dropout_mask(seed: Tensor, batch: int, heads: int, rows: int, dropout_p: float, start: int = 0) -> Tensor:
    """Which probabilities [B, H, rows, rows] stay: those whose 31 hashed bits are not below dropout_p 2^31.

    A row has a key of 64 bits, splitmix64(splitmix64(seed) ^ (2^32 (b H + h) + i)); its halves are hashed with the
    column by two multiplications (constants of lowbias32, Wellons 2018), which costs a kernel little. Rows and columns
    count from `start`, the sequence's first among the packed.
    """
    head = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1)
    number = torch.arange(start, start + rows, device=seed.device)
    key = splitmix64(splitmix64(seed) ^ ((head << 32) + number))[..., None]
    word = 0xFFFFFFFF
    x = (key & word) ^ (number * 0x9E3779B9 & word)
    x = (x ^ (x >> 16)) * 0x7FEB352D & word
    x = (x ^ (x >> 15) ^ (key >> 32 & word)) * 0x846CA68B & word
    return ((x ^ (x >> 16)) >> 1) >= round(dropout_p * 2**31)


def attention_sdpa(q: Tensor, k: Tensor | None, v: Tensor | None, options: Options) -> Tensor:
    """torch's library attention; bias and mask are joined into its one additive mask.

    Packed sequences of one length that follow each other are one call, on views of the packed tensors.
    """
    if options.cu_seqlens is None:
        return _library(*_kept(*split(q, k, v), options.keep), options, options.key_mask)
    runs = _runs(options.cu_seqlens, _first_masked(options))
    masks = iter(())
    if options.key_mask is not None:
        masks = iter(options.key_mask[0].split([run.count * run.length for run in runs if run.masked]))
    parts = []
    for run, piece in zip(runs, _pieces(q, k, v, runs)):
        mask = next(masks).view(run.count, run.length) if run.masked else None
        parts.append(_library(*piece, options, mask).transpose(1, 2).flatten(0, 1))  # [rows, H, D]
    return torch.cat(parts).transpose(0, 1)[None]


def _library(q: Tensor, k: Tensor, v: Tensor, options: Options, key_mask: Tensor | None) -> Tensor:
    bias, rest = options.bias, {"dropout_p": options.dropout_p, "scale": options.scale}
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **rest)
    visible = key_mask[:, None, None, :]
    some = visible.any(-1, keepdim=True)
    hidden = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible & some, -torch.inf)
    mask = hidden if bias is None else bias + hidden
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **rest) * some


def _kept(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if keep is None:
        return q, k, v
    if keep.ndim == 1:
        return q.index_select(2, keep), k.index_select(2, keep), v.index_select(2, keep)
    index = keep[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    return q.gather(2, index), k.gather(2, index), v.gather(2, index)


class _Run(NamedTuple):
    """Packed sequences of one length that follow each other."""

    count: int
    length: int
    masked: bool


def _runs(cu_seqlens: tuple[int, ...], first_masked: int) -> list[_Run]:
    runs: list[_Run] = []
    masked = False
    for start, end in pairwise(cu_seqlens):
        if start >= first_masked:  # under torch.compile a guard; two comparisons of symbols could not be compared
            masked = True
        run = _Run(1, end - start, masked)
        if runs and runs[-1][1:] == run[1:]:
            run = _Run(runs.pop().count + 1, *run[1:])
        if run.length > 0:
            runs.append(run)
    return runs


def _pieces(q: Tensor, k: Tensor | None, v: Tensor | None, runs: list[_Run]) -> Iterator[Sequence[Tensor]]:
    """q, k and v [count, H, length, D] of every run: views by `split`, whose gradient is one copy and not a sum."""
    rows = [run.count * run.length for run in runs]
    if k is None:
        for run, piece in zip(runs, q[0].split(rows)):
            yield split(piece.unflatten(0, (run.count, run.length)), None, None)
        return
    for run, *piece in zip(runs, *(x[0].split(rows, 1) for x in (q, k, v))):
        yield [x.unflatten(1, (run.count, run.length)).transpose(0, 1) for x in piece]


def _first_masked(options: Options) -> int:
    """The row of the packed sequences at which `key_mask` begins."""
    rows = options.cu_seqlens[-1]
    return rows if options.key_mask is None else rows - options.key_mask.shape[1]


def _check_inputs(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[int, int, int, torch.dtype, torch.device]:
    """B, H, N, dtype and device of q, k and v that fit one another."""
    if (k is None) != (v is None):
        raise ValueError("attention: k and v must be given together, or neither with a packed qkv, got one of them.")
    if k is None:
        if q.ndim != 5 or q.shape[2] != 3:
            raise ValueError(f"attention: qkv must be [B, N, 3, H, D], got shape {tuple(q.shape)}.")
        batch, tokens, _, heads, _ = q.shape
        return batch, heads, tokens, q.dtype, q.device
    if q.ndim != 4:
        raise ValueError(f"attention: q must be [B, H, N, D], got shape {tuple(q.shape)}.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"attention: {name} must have the shape of q {list(q.shape)}, got {list(tensor.shape)}.")
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(
                f"attention: {name} must be {q.dtype} on {q.device} like q, got {tensor.dtype} on {tensor.device}."
            )
    return *q.shape[:3], q.dtype, q.device


def _check_packing(
    rows: tuple[int, int, int, torch.dtype, torch.device],
    cu_seqlens: Sequence[int] | Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
) -> tuple[int, ...] | None:
    if bias is not None and (keep is not None or cu_seqlens is not None):
        raise ValueError("attention: bias must be None with keep or cu_seqlens, got a tensor.")
    if cu_seqlens is None:
        return None
    if keep is not None:
        raise ValueError("attention: keep must be None with cu_seqlens, got a tensor.")
    batch, _, tokens, _, _ = rows
    if batch != 1 or tokens == 0:
        raise ValueError(f"attention: q must have a batch size of 1 and rows with cu_seqlens, got {batch} x {tokens}.")
    ends = tuple(cu_seqlens.tolist()) if isinstance(cu_seqlens, Tensor) else tuple(cu_seqlens)
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
        raise ValueError(
            f"attention: cu_seqlens must ascend from 0 to {tokens}, got {list(ends[:4])}..{list(ends[-1:])}."
        )
    return ends


def _check_options(
    rows: tuple[int, int, int, torch.dtype, torch.device],
    keep: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: tuple[int, ...] | None,
    dropout_p: float,
) -> None:
    batch, heads, tokens, dtype, device = rows
    if keep is not None:
        _check_keep(keep, batch, tokens)
    if bias is not None and (bias.shape[-3:] != (heads, tokens, tokens) or bias.shape[:-3] not in ((), (batch,))):
        raise ValueError(f"attention: bias must be [({batch},) {heads}, {tokens}, {tokens}], got {list(bias.shape)}.")
    if bias is not None and bias.dtype != dtype:
        raise ValueError(f"attention: bias must have the dtype of q {dtype}, got {bias.dtype}.")
    if key_mask is not None:
        covered = tokens if cu_seqlens is None or key_mask.ndim != 2 else key_mask.shape[1]
        if key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, covered):
            raise ValueError(
                f"attention: key_mask must be bool [{batch}, {tokens}], got {key_mask.dtype} {list(key_mask.shape)}."
            )
        if cu_seqlens is not None and tokens - covered not in cu_seqlens:
            raise ValueError(
                f"attention: key_mask must cover whole sequences, got the last {covered} rows of {tokens}."
            )
    for name, tensor in (("keep", keep), ("bias", bias), ("key_mask", key_mask)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"attention: {name} must be on {device} like q, got {tensor.device}.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"attention: dropout_p must be in [0, 1), got {dropout_p}.")


def _check_keep(keep: Tensor, batch: int, tokens: int) -> None:
    if keep.dtype != torch.int64:
        raise ValueError(f"attention: keep must be int64, got {keep.dtype}.")
    if keep.ndim not in (1, 2) or (keep.ndim == 2 and keep.shape[0] != batch):
        raise ValueError(f"attention: keep must be [K] or [{batch}, K], got shape {tuple(keep.shape)}.")
    if not keep.is_cpu or keep.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in keep.aminmax())
    if low < 0 or high >= tokens:
        raise ValueError(f"attention: keep must hold positions in [0, {tokens}), got {low if low < 0 else high}.")
    if bool((keep.sort(-1).values.diff() == 0).any()):
        raise ValueError("attention: keep must hold no position twice, got one.")


def _sdpa_refuses(q: Tensor, k: Tensor | None, v: Tensor | None, options: Options) -> str | None:
    seeded = options.seed is not None and options.dropout_p > 0
    return "draws its dropout from torch's generator, not from a seed" if seeded else None


_attention = define_choice(
    "attention",
    impls=[
        Impl("cpp", "cpu", flash_attention, missing=native_missing, refuses=native_refuses),
        Impl("sdpa", "any", attention_sdpa, refuses=_sdpa_refuses),
        Impl("triton", "cuda", flash_attention, missing=triton_missing, refuses=flash_refuses),
        Impl("reference", "any", attention_reference),
    ],
)

# torch counts its attention on GPUs; on a CPU it read zero up to torch 2.14.
_CPU = "_scaled_dot_product_flash_attention_for_cpu"
for _name, _formula in ((_CPU, flop_counter.sdpa_flop), (f"{_CPU}_backward", flop_counter.sdpa_backward_flop)):
    if getattr(torch.ops.aten, _name) not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(getattr(torch.ops.aten, _name))(_formula)
