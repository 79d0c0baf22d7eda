"""DropToken: train on a random subset of the tokens (paper section 3.3).

y[b, k] = x[b, keep[k]]                  (one permutation for the batch, as the official code draws it)
y[b, k] = x[b, keep[b, k]]               (one permutation per sample)
"""

from __future__ import annotations

import torch
from torch import Tensor

from vatt_engine.dispatch import Impl, define_op

# Constants of the splitmix64 finaliser (Steele, Lea and Flood 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def sample_keep(
    num_tokens: int,
    num_kept: int,
    *,
    seed: int | Tensor,
    sample_id: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw `num_kept` of `num_tokens` positions uniformly without replacement, in random order.

    Every position gets a 64-bit hash of (seed, sample id, position); the positions of the smallest hashes are kept.
    The result is therefore the same on every device and for any number of ranks, and needs no host synchronisation.

    Args:
        num_tokens: N, tokens to choose from.
        num_kept: K, 1 <= K <= N.
        seed: an integer, or an int64 tensor of one element.
        sample_id: [B] int64; given, every sample draws its own positions.
        device: where the result lies; by default that of `sample_id` or `seed`, else the CPU.

    Returns:
        keep: int64 [K], or [B, K] with `sample_id`.

    Raises:
        ValueError: `num_kept` is outside 1..num_tokens.

    Source: official `random_patch_sampling` of vatt/modeling/backbones/video/vitx3d.py (there one tf.random.shuffle).

    >>> sample_keep(8, 4, seed=0).shape
    torch.Size([4])
    """
    if not 1 <= num_kept <= num_tokens:
        raise ValueError(f"sample_keep: num_kept must be in 1..{num_tokens}, got {num_kept}.")
    for source in (sample_id, seed):
        if device is None and isinstance(source, Tensor):
            device = source.device
    stream = _mix(torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(()))
    if sample_id is not None:
        stream = _mix(stream ^ _mix(sample_id.to(device))).unsqueeze(-1)
    position = torch.arange(num_tokens, device=device, dtype=torch.int64)
    return torch.argsort(_mix(stream ^ _mix(position)), dim=-1, stable=True)[..., :num_kept]


def drop_token(tokens: Tensor, keep: Tensor) -> Tensor:
    """Gather the kept tokens of every sample, y[b, k] = tokens[b, keep[k]]; the gradient is scattered back.

    Args:
        tokens: [B, N, D], any float dtype.
        keep: int64 [K] for all samples, or [B, K] per sample; positions in 0..N-1.

    Returns:
        [B, K, D] in the order of `keep`.

    Raises:
        ValueError: ranks, batch sizes or the index dtype do not fit.

    Implementations: reference (plain PyTorch).

    >>> drop_token(torch.arange(6.0).view(1, 3, 2), torch.tensor([2, 0]))[0, :, 0].tolist()
    [4.0, 0.0]
    """
    if tokens.ndim != 3:
        raise ValueError(f"drop_token: tokens must be [B, N, D], got shape {tuple(tokens.shape)}.")
    if keep.dtype != torch.int64:
        raise ValueError(f"drop_token: keep must be int64, got {keep.dtype}.")
    if keep.ndim not in (1, 2) or (keep.ndim == 2 and keep.shape[0] != tokens.shape[0]):
        raise ValueError(f"drop_token: keep must be [K] or [{tokens.shape[0]}, K], got shape {tuple(keep.shape)}.")
    return _DropToken.apply(tokens, keep)


def drop_token_reference(tokens: Tensor, keep: Tensor) -> Tensor:
    """The meaning of the op: index_select, or one gather per sample."""
    if keep.ndim == 1:
        return tokens.index_select(1, keep)
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def drop_token_bwd_reference(grad: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
    """dx[b, keep[k]] += dy[b, k]; rows that were dropped get zero, a position kept twice gets the sum."""
    out = grad.new_zeros(grad.shape[0], num_tokens, grad.shape[-1])
    if keep.ndim == 1:
        return out.index_add_(1, keep, grad)
    return out.scatter_add_(1, keep.unsqueeze(-1).expand_as(grad), grad)


def _mix(x: Tensor) -> Tensor:
    """splitmix64: a bijection of 64-bit integers whose output bits all depend on all input bits."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


_fwd = define_op(
    "drop_token",
    "drop_token_fwd(Tensor tokens, Tensor keep) -> Tensor",
    fake=lambda tokens, keep: tokens.new_empty(tokens.shape[0], keep.shape[-1], tokens.shape[2]),
    impls=[Impl("reference", "any", drop_token_reference)],
)
_bwd = define_op(
    "drop_token",
    "drop_token_bwd(Tensor grad, Tensor keep, SymInt num_tokens) -> Tensor",
    fake=lambda grad, keep, num_tokens: grad.new_empty(grad.shape[0], num_tokens, grad.shape[2]),
    impls=[Impl("reference", "any", drop_token_bwd_reference)],
)


class _DropToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.num_tokens = tokens.shape[1]
        return _fwd(tokens, keep)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _bwd(grad.contiguous(), keep, ctx.num_tokens), None
