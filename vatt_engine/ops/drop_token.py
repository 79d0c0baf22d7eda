"""DropToken: train on a random subset of the tokens (paper section 3.3).

y[b, k] = x[b, keep[k]]                  (one permutation for the batch, as the official code draws it)
y[b, k] = x[b, keep[b, k]]               (one permutation per sample)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vatt_engine.dispatch import Impl, define_op, native_missing, no_flops, triton_missing
from vatt_engine.splitmix import splitmix64

_POSITION = (1 << 20) - 1  # the low bits of a key, which hold its position
_MAX_TOKENS_CUDA = 1 << 13  # whose keys the CUDA kernel sorts in shared memory
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sample_keep(
    num_tokens: int,
    num_kept: int,
    *,
    seed: int | Tensor,
    sample_id: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw `num_kept` of `num_tokens` positions uniformly without replacement, in random order.

    Every position n gets the key (hash of (seed, sample id, n), its low 20 bits replaced by n); the positions of the
    smallest keys are kept, in the order of their keys. No two keys are equal, so the result is the same to the bit on
    every device, in every implementation and for any number of ranks; it needs no host synchronisation.

    Args:
        num_tokens: N, tokens to choose from, at most 2^20.
        num_kept: K, 1 <= K <= N.
        seed: an integer, or an int64 tensor of one element.
        sample_id: [B] int64; given, every sample draws its own positions.
        device: where the result lies; by default that of `sample_id` or `seed`, else the CPU.

    Returns:
        keep: int64 [K], or [B, K] with `sample_id`.

    Raises:
        ValueError: `num_tokens` is above 2^20, `num_kept` outside 1..num_tokens, or `sample_id` is not int64 [B].

    Source: official `random_patch_sampling` of vatt/modeling/backbones/video/vitx3d.py (there one tf.random.shuffle).
    Implementations: cpp, reference (plain PyTorch), triton, cuda (at most 8192 tokens).

    >>> sample_keep(8, 4, seed=0).shape
    torch.Size([4])
    """
    if num_tokens > _POSITION + 1:
        raise ValueError(f"sample_keep: num_tokens must be at most {_POSITION + 1}, got {num_tokens}.")
    if not 1 <= num_kept <= num_tokens:
        raise ValueError(f"sample_keep: num_kept must be in 1..{num_tokens}, got {num_kept}.")
    if sample_id is not None and (sample_id.dtype != torch.int64 or sample_id.ndim != 1):
        raise ValueError(f"sample_keep: sample_id must be int64 [B], got {sample_id.dtype} {list(sample_id.shape)}.")
    for source in (sample_id, seed):
        if device is None and isinstance(source, Tensor):
            device = source.device
    if isinstance(seed, Tensor):
        seed = seed.to(device, torch.int64).reshape(())
    else:
        seed = torch.full((), seed, dtype=torch.int64, device=device)  # a fill, where a copy would wait for the device
    return _sample(seed, None if sample_id is None else sample_id.to(device), num_tokens, num_kept)


def drop_token(tokens: Tensor, keep: Tensor) -> Tensor:
    """Gather the kept tokens of every sample, y[b, k] = tokens[b, keep[k]]; the gradient is scattered back.

    Args:
        tokens: [B, N, D], any float dtype.
        keep: int64 [K] for all samples, or [B, K] per sample; positions in 0..N-1. The gradients of a position that
            is kept twice add up.

    Returns:
        [B, K, D] in the order of `keep`.

    Raises:
        ValueError: ranks, batch sizes, devices or the index dtype do not fit, or (on the CPU) a position lies outside
            the tokens. On a GPU the kernel stops the run then.

    Implementations: cpp, reference (plain PyTorch), triton, cuda. All but the reference take
    float32, bfloat16 and float16.

    >>> drop_token(torch.arange(6.0).view(1, 3, 2), torch.tensor([2, 0]))[0, :, 0].tolist()
    [4.0, 0.0]
    """
    if tokens.ndim != 3:
        raise ValueError(f"drop_token: tokens must be [B, N, D], got shape {tuple(tokens.shape)}.")
    if keep.dtype != torch.int64:
        raise ValueError(f"drop_token: keep must be int64, got {keep.dtype}.")
    if keep.ndim not in (1, 2) or (keep.ndim == 2 and keep.shape[0] != tokens.shape[0]):
        raise ValueError(f"drop_token: keep must be [K] or [{tokens.shape[0]}, K], got shape {tuple(keep.shape)}.")
    if keep.device != tokens.device:
        raise ValueError(f"drop_token: keep must be on the device of tokens, {tokens.device}, got {keep.device}.")
    return _DropToken.apply(tokens, keep)


def drop_token_reference(tokens: Tensor, keep: Tensor) -> Tensor:
    """The meaning of the op: index_select, or one gather per sample."""
    _check_positions(keep, tokens.shape[1])
    if keep.ndim == 1:
        return tokens.index_select(1, keep)
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def drop_token_bwd_reference(grad: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
    """dx[b, keep[k]] += dy[b, k]; rows that were dropped get zero, a position kept twice gets the sum."""
    _check_positions(keep, num_tokens)
    out = grad.new_zeros(grad.shape[0], num_tokens, grad.shape[-1])
    if keep.ndim == 1:
        return out.index_add_(1, keep, grad)
    return out.scatter_add_(1, keep.unsqueeze(-1).expand_as(grad), grad)


def sample_keep_reference(seed: Tensor, sample_id: Tensor | None, num_tokens: int, num_kept: int) -> Tensor:
    """The meaning of the sample: all keys sorted, the positions of the first `num_kept`."""
    stream = splitmix64(seed)
    if sample_id is not None:
        stream = splitmix64(stream ^ splitmix64(sample_id)).unsqueeze(-1)
    position = torch.arange(num_tokens, device=seed.device, dtype=torch.int64)
    keys = splitmix64(stream ^ splitmix64(position)) & ~_POSITION | position
    return keys.sort(dim=-1).values[..., :num_kept] & _POSITION


def _check_positions(keep: Tensor, num_tokens: int) -> None:
    """On a GPU this would need a synchronisation: there the index kernel's own bound check stops the run."""
    if keep.is_cpu and keep.numel():
        low, high = (int(bound) for bound in keep.aminmax())
        if low < 0 or high >= num_tokens:
            wrong = low if low < 0 else high
            raise ValueError(f"drop_token: keep must hold positions in [0, {num_tokens}), got {wrong}.")


def _fwd_fake(tokens: Tensor, keep: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], keep.shape[-1], tokens.shape[2])


def _bwd_fake(grad: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[2])


def _sample_fake(seed: Tensor, sample_id: Tensor | None, num_tokens: int, num_kept: int) -> Tensor:
    return seed.new_empty([num_kept] if sample_id is None else [sample_id.shape[0], num_kept])


def _fwd_native(tokens: Tensor, keep: Tensor) -> Tensor:
    return _move_rows(tokens, keep, _fwd_fake(tokens, keep), scatter=False)


def _bwd_native(grad: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
    return _move_rows(grad, keep, _bwd_fake(grad, keep, num_tokens), scatter=True)


def _move_rows(rows: Tensor, keep: Tensor, out: Tensor, *, scatter: bool) -> Tensor:
    from torch.utils.dlpack import to_dlpack

    from vatt_engine import _C

    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    _C.drop_token(to_dlpack(rows), to_dlpack(keep), to_dlpack(out), scatter, *_how(rows))
    return out


def _sample_native(seed: Tensor, sample_id: Tensor | None, num_tokens: int, num_kept: int) -> Tensor:
    from torch.utils.dlpack import to_dlpack

    from vatt_engine import _C

    out = _sample_fake(seed, sample_id, num_tokens, num_kept)
    ids = None if sample_id is None else to_dlpack(sample_id.contiguous())
    _C.sample_keep(to_dlpack(seed), ids, num_tokens, to_dlpack(out), *_how(seed))
    return out


def _how(x: Tensor) -> tuple[int, int]:
    """Threads on a CPU, the current stream on a GPU."""
    return torch.get_num_threads(), torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _rows_refuse(rows: Tensor, *_args: object) -> str | None:
    return None if rows.dtype in _NATIVE_DTYPES else f"moves float32, bfloat16 or float16, got {rows.dtype}"


def _sort_refuses(seed: Tensor, sample_id: Tensor | None, num_tokens: int, num_kept: int) -> str | None:
    if num_tokens > _MAX_TOKENS_CUDA:
        return f"sorts at most {_MAX_TOKENS_CUDA} tokens in shared memory, got {num_tokens}"
    return None


def _impls(op: str, reference: Callable[..., Tensor], native: Callable[..., Tensor], *, rows: bool) -> list[Impl]:
    """The table of one op, which moves rows or sorts keys; on a GPU in the order in which an H200 moves rows."""
    refuses = {"refuses": _rows_refuse} if rows else {}
    triton = f"vatt_engine.kernels.drop_token:{op}"
    cuda = {"missing": lambda: native_missing(cuda=True), "refuses": _rows_refuse if rows else _sort_refuses}
    return [
        Impl("cpp", "cpu", native, missing=native_missing, **refuses),
        Impl("cuda", "cuda", native, **cuda),
        Impl("triton", "cuda", triton, missing=triton_missing, **refuses),
        Impl("reference", "any", reference),
    ]


_fwd = define_op(
    "drop_token",
    "drop_token_fwd(Tensor tokens, Tensor keep) -> Tensor",
    fake=_fwd_fake,
    impls=_impls("drop_token_fwd", drop_token_reference, _fwd_native, rows=True),
    flops=no_flops,
)
_bwd = define_op(
    "drop_token",
    "drop_token_bwd(Tensor grad, Tensor keep, SymInt num_tokens) -> Tensor",
    fake=_bwd_fake,
    impls=_impls("drop_token_bwd", drop_token_bwd_reference, _bwd_native, rows=True),
    flops=no_flops,
)
_sample = define_op(
    "drop_token",
    "sample_keep(Tensor seed, Tensor? sample_id, SymInt num_tokens, SymInt num_kept) -> Tensor",
    fake=_sample_fake,
    impls=_impls("sample_keep", sample_keep_reference, _sample_native, rows=False),
    flops=no_flops,
)


class _DropToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.num_tokens = tokens.shape[1]
        return _fwd(tokens, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _bwd(grad.contiguous(), keep, ctx.num_tokens), None
