"""Pre-LN transformer of the video, audio and modality-agnostic backbones; the text encoder reuses its blocks.

x = x + Drop(Attention(Norm(x)));  x = x + Drop(W_o Drop(GELU(W_i LN(x))))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vatt_engine import ops
from vatt_engine.models import init
from vatt_engine.models.config import TransformerConfig

Norm = Callable[[int, float], nn.Module]
Seed = int | Tensor | None  # of DropToken; a tensor is int64 of one element; None draws one from torch's generator
EPS = 1e-6  # of every norm in the official code


def layer_norm(dim: int, eps: float = EPS) -> nn.LayerNorm:
    """LayerNorm with the official epsilon."""
    return nn.LayerNorm(dim, eps=eps)


class RMSNorm(nn.RMSNorm):
    """w x / sqrt(mean(x^2) + eps), in the dtype of w under autocast too, as LayerNorm is computed there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def rms_norm(dim: int, eps: float = EPS) -> nn.RMSNorm:
    """The norm before the text encoder's attention."""
    return RMSNorm(dim, eps=eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for q, k and v.

    Args:
        scale: of the scores; 1/sqrt(head_dim) by default.
    """

    def __init__(self, config: TransformerConfig, *, scale: float | None = None) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.scale, self.dropout = scale, config.dropout
        self.qkv = init.linear(config.dim, 3 * inner, bias=config.bias)
        init.glorot_uniform_(self.qkv.weight, config.dim, inner)  # as three Dense layers
        self.out = init.linear(inner, config.dim, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]; bias [H, N, N], key_mask [B, N] bool, cu_seqlens as for `ops.attention`."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        y = ops.attention(
            qkv,
            bias=None if bias is None else bias.to(qkv.dtype),
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and beside its residual."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention_norm: Norm = layer_norm,
        ff_norm: Norm = layer_norm,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config, scale=scale)
        self.ff_norm = ff_norm(config.dim, config.norm_eps)
        self.activation = activation
        self.ff_in = init.linear(config.dim, config.ff_dim, bias=config.bias)
        self.ff_out = init.linear(config.ff_dim, config.dim, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), bias, key_mask, cu_seqlens))
        hidden = self.dropout(self.activation(self.ff_in(self.ff_norm(x))))
        return x + self.dropout(self.ff_out(hidden))


class Transformer(nn.Module):
    """`num_layers` blocks, then a norm and dropout (official TransformerEncoder with pre_norm=True).

    Args:
        attention_norm: norm before attention and at the end; LayerNorm, or RMS for the T5-style text encoder.
        options: `ff_norm` and `activation` of the feed-forward layers (LayerNorm and GELU; T5 itself has RMS and ReLU),
            `scale` of the attention scores (1/sqrt(head_dim); 1 for the T5-style text encoder).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention_norm: Norm = layer_norm,
        **options: Any,
    ) -> None:
        super().__init__()
        self.keep_rates = config.keep_rates
        self.checkpoint_activations = False  # True: a layer keeps its input alone and is computed again in backward
        self.layers = nn.ModuleList(
            Block(config, attention_norm=attention_norm, **options) for _ in range(config.num_layers)
        )
        self.final_norm = attention_norm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        biases: list[Tensor | None] | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D], all tokens in every layer.

        Args:
            x: tokens; one sample of packed sequences with `cu_seqlens`.
            biases: one [H, N, N] or None per layer.
            key_mask, cu_seqlens: as for `ops.attention`.
        """
        for index, layer in enumerate(self.layers):
            x = self._through(layer, x, None if biases is None else biases[index], key_mask, cu_seqlens)
        return self.dropout(self.final_norm(x))

    def forward_dropping(self, x: Tensor, *, seed: Seed, sample_id: Tensor | None) -> Tensor:
        """`forward` with progressive DropToken in training: [B, N, D] -> [B, K, D], AGG at 0.

        A layer's tokens are gathered before it: its projections then see no others, which costs less than to have
        `ops.attention` read q, k and v of all tokens through the index (docs/ops/attention.md).

        Args:
            seed: of the draw, drawn from torch's generator by default; each layer has a stream of its own.
            sample_id: [B] int64; given, every sample draws its own positions.
        """
        if not self.training or not self.keep_rates:
            return self(x)
        if seed is None:
            seed = torch.randint(2**62, (), device=x.device)
        for index, (layer, rate) in enumerate(zip(self.layers, self.keep_rates)):
            if rate < 1.0:
                others = x.shape[1] - 1
                kept = max(1, int(rate * others))
                stream = seed + ((index + 1) << 48)  # no stem's of this step: theirs are neighbours
                keep = ops.sample_keep(others, kept, seed=stream, sample_id=sample_id, device=x.device) + 1
                x = ops.drop_token(x, F.pad(keep, (1, 0)))
            x = self._through(layer, x)
        return self.dropout(self.final_norm(x))

    def _through(self, layer: Block, x: Tensor, *args: object) -> Tensor:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return checkpoint(layer, x, *args, use_reentrant=False)
        return layer(x, *args)
