"""Pre-LN transformer of the video, audio and modality-agnostic backbones; the text encoder reuses its blocks.

x = x + Drop(Attention(Norm(x)));  x = x + Drop(W_o Drop(GELU(W_i LN(x))))
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from vatt_engine import ops
from vatt_engine.models import init
from vatt_engine.models.config import TransformerConfig

EPS = 1e-6  # of every norm in the official code


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm with the official epsilon."""
    return nn.LayerNorm(dim, eps=EPS)


class RMSNorm(nn.RMSNorm):
    """w x / sqrt(mean(x^2) + eps), in the dtype of w under autocast too, as LayerNorm is computed there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def rms_norm(dim: int) -> nn.RMSNorm:
    """The norm before the text encoder's attention."""
    return RMSNorm(dim, eps=EPS)


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

    def forward(self, x: Tensor, bias: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; bias [H, N, N], key_mask [B, N] bool."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, head_dim] each
        if bias is not None:
            bias = bias.to(q.dtype)
        dropout_p = self.dropout if self.training else 0.0
        y = ops.attention(q, k, v, bias=bias, key_mask=key_mask, dropout_p=dropout_p, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and beside its residual."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention_norm: Callable[[int], nn.Module] = layer_norm,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm(config.dim)
        self.attention = SelfAttention(config, scale=scale)
        self.ff_norm = layer_norm(config.dim)
        self.ff_in = init.linear(config.dim, config.ff_dim, bias=config.bias)
        self.ff_out = init.linear(config.ff_dim, config.dim, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), bias, key_mask))
        hidden = self.dropout(F.gelu(self.ff_in(self.ff_norm(x))))
        return x + self.dropout(self.ff_out(hidden))


class Transformer(nn.Module):
    """`num_layers` blocks, then a norm and dropout (official TransformerEncoder with pre_norm=True).

    Args:
        attention_norm: norm before attention and at the end; LayerNorm, or RMS for the T5-style text encoder.
        scale: of the attention scores; 1 for the T5-style text encoder.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention_norm: Callable[[int], nn.Module] = layer_norm,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(config, attention_norm=attention_norm, scale=scale) for _ in range(config.num_layers)
        )
        self.final_norm = attention_norm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, *, biases: list[Tensor | None] | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]; `biases` holds one [H, N, N] or None per layer, key_mask is bool [B, N]."""
        for index, layer in enumerate(self.layers):
            x = layer(x, None if biases is None else biases[index], key_mask)
        return self.dropout(self.final_norm(x))
