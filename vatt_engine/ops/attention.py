"""Scaled dot-product attention with an additive bias and a key mask:

p = softmax_j(scale * q_i . k_j + bias_ij),  masked keys have p = 0,  y_i = sum_j dropout(p_ij) v_j
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vatt_engine.dispatch import Impl, define_choice


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Bidirectional multi-head attention, softmax(scale q k^T + bias) v.

    Args:
        q, k: [B, H, N, D], float32, bfloat16 or float16 (float64 for tests).
        v: [B, H, N, E], the dtype of q.
        bias: [H, N, N] or [B, H, N, N], added to the scaled scores; differentiable.
        key_mask: [B, N] bool, False where a key may not be seen. A row that may see nothing gives zeros.
        dropout_p: probability of dropping an attention probability, in [0, 1).
        scale: multiplies q k^T; 1/sqrt(D) by default (the T5-style text encoder uses 1).

    Returns:
        [B, H, N, E], the dtype of q.

    Raises:
        ValueError: shapes or dtypes do not fit, or dropout_p is outside [0, 1).

    Source: paper section 3.2; official vatt/modeling/common/transformers.py and backbones/text/t5.py.
    Implementations: sdpa (torch's library attention), reference (plain PyTorch).

    >>> x = torch.ones(1, 1, 2, 4)
    >>> attention(x, x, x).mean().item()
    1.0
    """
    _check(q, k, v, bias, key_mask, dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attention(q, k, v, bias, key_mask, dropout_p, scale)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, dropout_p: float, scale: float
) -> Tensor:
    """The meaning of the op, scores stored."""
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    if bias is not None:
        scores = scores + bias
    if key_mask is not None:
        visible = key_mask[:, None, None, :]
        scores = scores.masked_fill(~visible, -torch.inf)
        # A row with no visible key would be softmax of nothing: its probabilities are zero.
        scores = scores.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        probabilities = scores.softmax(-1) * visible.any(-1, keepdim=True)
    else:
        probabilities = scores.softmax(-1)
    return torch.matmul(F.dropout(probabilities, dropout_p), v)


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, dropout_p: float, scale: float
) -> Tensor:
    """torch's library attention; bias and mask are joined into its one additive mask."""
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    visible = key_mask[:, None, None, :]
    some = visible.any(-1, keepdim=True)
    hidden = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible & some, -torch.inf)
    mask = hidden if bias is None else bias + hidden
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale) * some


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, dropout_p: float) -> None:
    if q.ndim != 4:
        raise ValueError(f"attention: q must be [B, H, N, D], got shape {tuple(q.shape)}.")
    if k.shape != q.shape:
        raise ValueError(f"attention: k must have the shape of q {list(q.shape)}, got {list(k.shape)}.")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"attention: v must be {[*q.shape[:3], 'E']}, got {list(v.shape)}.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"attention: {name} must have the dtype of q {q.dtype}, got {tensor.dtype}.")
    batch, heads, tokens, _ = q.shape
    if bias is not None and tuple(bias.shape) not in ((heads, tokens, tokens), (batch, heads, tokens, tokens)):
        raise ValueError(f"attention: bias must be [({batch},) {heads}, {tokens}, {tokens}], got {list(bias.shape)}.")
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, tokens)):
        raise ValueError(
            f"attention: key_mask must be bool [{batch}, {tokens}], got {key_mask.dtype} {list(key_mask.shape)}."
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"attention: dropout_p must be in [0, 1), got {dropout_p}.")


_attention = define_choice(
    "attention",
    impls=[Impl("sdpa", "any", attention_sdpa), Impl("reference", "any", attention_reference)],
)
