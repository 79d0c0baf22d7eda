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


class Dropout(nn.Dropout):
    """nn.Dropout by `ops.dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p) if self.training else x


class QKV(init.Linear):
    """One projection for q, k and v [.., 3 H D]; or attention of AGG's row alone, which needs neither k nor v of a row:

        s_hj = scale (W_k,h^T q_h) . x_j,   y_h = W_v,h (sum_j p_hj x_j) + b_v,h sum_j p_hj

    The bias of k adds the same to all s of a head, which softmax does not see. The weights are read in `forward` alone,
    where ZeRO-3 has gathered them.
    """

    def __init__(self, config: TransformerConfig) -> None:
        inner = config.num_heads * config.head_dim
        super().__init__(config.dim, 3 * inner, bias=config.bias)
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        init.glorot_uniform_(self.weight, config.dim, inner)  # as three Dense layers
        if config.bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, agg: tuple[Tensor | None, Tensor | None, float, float] | None = None) -> Tensor:
        """[B, N, D] -> [B, N, 3 H D]; with `agg`, which is (bias, key_mask, dropout_p, scale), y [B, H D] of row 0."""
        if agg is None:
            return super().forward(x)
        bias, key_mask, dropout_p, scale = agg
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once for both products
        w_q, w_k, w_v = self.weight.unflatten(0, (3, self.num_heads, self.head_dim))
        b_q, _, b_v = (None, None, None) if self.bias is None else self.bias.view(3, -1)
        q = F.linear(x[:, 0], w_q.flatten(0, 1), b_q).unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # [H, B, D]
        scores = (q @ w_k).transpose(0, 1) @ x.mT * scale  # [B, H, N]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if bias is not None:
            scores = scores + bias[..., 0, :]
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None], -torch.inf)  # AGG sees itself at least
        p = ops.dropout(scores.softmax(-1), dropout_p)
        y = ((p @ x).transpose(0, 1) @ w_v.mT).transpose(0, 1).flatten(1)
        return y if b_v is None else y + (b_v.unflatten(0, (self.num_heads, -1)) * p.sum(-1, keepdim=True)).flatten(1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for q, k and v.

    Args:
        scale: of the scores; 1/sqrt(head_dim) by default.
    """

    def __init__(self, config: TransformerConfig, *, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.scale, self.dropout = scale, config.dropout
        self.qkv = QKV(config)
        self.out = init.linear(config.num_heads * config.head_dim, config.dim, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
        agg_only: bool = False,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D], or [B, 1, D] of AGG; bias [H, N, N], key_mask [B, N], cu_seqlens as in ops."""
        batch, tokens, _ = x.shape
        dropout_p = self.dropout if self.training else 0.0
        if agg_only:
            scale = self.head_dim**-0.5 if self.scale is None else self.scale
            return self.out(self.qkv(x, (bias, key_mask, dropout_p, scale)))[:, None]
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        y = ops.attention(
            qkv,
            bias=None if bias is None else bias.to(qkv.dtype),
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            dropout_p=dropout_p,
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
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
        agg_only: bool = False,
    ) -> Tensor:
        """All rows, or AGG's, which is row 0."""
        y = self.attention(self.attention_norm(x), bias, key_mask, cu_seqlens, agg_only)
        x = (x[:, :1] if agg_only else x) + self.dropout(y)
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
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        biases: list[Tensor | None] | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
        agg_only: bool = False,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D], all tokens in every layer.

        Args:
            x: tokens; one sample of packed sequences with `cu_seqlens`.
            biases: one [H, N, N] or None per layer.
            key_mask, cu_seqlens: as for `ops.attention`.
            agg_only: [B, 1, D], the pooled AGG, which is row 0: the last layer computes no other. Not with cu_seqlens.
        """
        x = self.trunk(x, biases=biases, key_mask=key_mask, cu_seqlens=cu_seqlens)
        return self.last(x, None if biases is None else biases[-1], key_mask, cu_seqlens, agg_only)

    def compile_layers(self) -> None:
        """torch.compile of every layer by itself; layers of the same sizes share what is made."""
        # A shape of its own for each modality, for the last layer, and for all of these without gradients.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for layer in self.layers:
            layer.compile(dynamic=False)

    def trunk(
        self,
        x: Tensor,
        *,
        biases: list[Tensor | None] | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
    ) -> Tensor:
        """All layers but the last; arguments as for `forward`."""
        for index, layer in enumerate(self.layers[:-1]):
            x = self._through(layer, x, None if biases is None else biases[index], key_mask, cu_seqlens)
        return x

    def last(self, x: Tensor, *args: object) -> Tensor:
        """The last layer, with a block's arguments, and the norm behind it."""
        return self.dropout(self.final_norm(self._through(self.layers[-1], x, *args)))

    def forward_dropping(self, x: Tensor, *, seed: Seed, sample_id: Tensor | None, agg_only: bool = False) -> Tensor:
        """`forward` with progressive DropToken in training: [B, N, D] -> [B, K, D] or, agg_only, [B, 1, D], AGG at 0.

        A layer's tokens are gathered before it: its projections then see no others, which costs less than to have
        `ops.attention` read q, k and v of all tokens through the index (docs/ops/attention.md).

        Args:
            seed: of the draw, drawn from torch's generator by default; each layer has a stream of its own.
            sample_id: [B] int64; given, every sample draws its own positions.
        """
        if not self.training or not self.keep_rates:
            return self(x, agg_only=agg_only)
        if seed is None:
            seed = torch.randint(2**62, (), device=x.device)
        for index, (layer, rate) in enumerate(zip(self.layers, self.keep_rates)):
            if rate < 1.0:
                others = x.shape[1] - 1
                kept = max(1, int(rate * others))
                stream = seed + ((index + 1) << 48)  # no stem's of this step: theirs are neighbours
                keep = ops.sample_keep(others, kept, seed=stream, sample_id=sample_id, device=x.device) + 1
                x = ops.drop_token(x, F.pad(keep, (1, 0)))
            if layer is not self.layers[-1]:
                x = self._through(layer, x)
        return self.last(x, None, None, None, agg_only)

    def _through(self, layer: Block, x: Tensor, *args: object) -> Tensor:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return checkpoint(layer, x, *args, use_reentrant=False)
        return layer(x, *args)
