"""Word vectors, and the two text encoders of the official code: T5-style and linear."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vatt_engine.models import init
from vatt_engine.models.config import TextConfig
from vatt_engine.models.embeddings import PositionEmbedding, prepend
from vatt_engine.models.transformer import Dropout, Transformer, rms_norm

PAD_ID = 0


class WordEmbedding(nn.Embedding):
    """Word vectors [V, embedding_dim]: trainable until loaded from a file, frozen from then on."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.vocabulary_size, config.embedding_dim)
        nn.init.uniform_(self.weight, -0.05, 0.05)
        self.freeze = config.freeze_embedding
        self.weight.requires_grad_(config.freeze_embedding is not True)

    @torch.no_grad()
    def load_vectors(self, vectors: Tensor, found: Tensor | None = None) -> None:
        """Take the rows of `vectors` [V, embedding_dim], or those marked in `found` [V] bool, and freeze the table.

        Raises:
            ValueError: the shape is not the table's.
        """
        if vectors.shape != self.weight.shape:
            raise ValueError(f"word vectors must be {list(self.weight.shape)}, got {list(vectors.shape)}.")
        rows = slice(None) if found is None else found
        self.weight[rows] = vectors.to(self.weight)[rows]
        self.freeze_loaded()

    def freeze_loaded(self, *, trained: bool = False) -> None:
        """Freeze a table whose vectors have come from elsewhere, unless the config says otherwise.

        Args:
            trained: whether they were trained there; they then stay trainable.
        """
        self.weight.requires_grad_(self.freeze is False or (trained and self.freeze is None))


def relative_bucket(relative: Tensor, *, num_buckets: int = 32, max_distance: int = 64) -> Tensor:
    """Bucket of a relative position (key - query) of the bidirectional T5 bias.

    Half of the buckets serve each direction; of these, half are single distances and the others grow
    logarithmically up to `max_distance`.

    >>> relative_bucket(torch.tensor([-100, -1, 0, 1, 7, 8, 100])).tolist()
    [15, 1, 0, 17, 23, 24, 31]
    """
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp_max(half - 1)
    return torch.where(relative > 0, half, 0) + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """bias[h, i, j] = table[bucket(j - i), h], learned; positions count AGG as 0."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.table = nn.Parameter(torch.empty(config.num_buckets, config.transformer.num_heads))
        nn.init.uniform_(self.table, -0.05, 0.05)

    def forward(self, num_tokens: int) -> Tensor:
        """[H, N, N]."""
        position = torch.arange(num_tokens, device=self.table.device)
        relative = position[None, :] - position[:, None]
        bucket = relative_bucket(relative, num_buckets=self.num_buckets, max_distance=self.max_distance)
        return self.table[bucket].permute(2, 0, 1)


class TextEncoder(nn.Module):
    """Words -> AGG first -> Dense + GELU (no bias) -> T5-style transformer; the sentence is the AGG row.

    Scores are not scaled, nothing has a bias but the feed-forward's LayerNorm, and the relative bias and the padding
    mask made for layer 0 serve every layer (paper: the first only). T5 itself, `style="t5"`, has ReLU, an RMS norm
    before the feed-forward, distances up to 128, and words of the transformer's width. The paper's text tokens are one
    learned projection of one-hot words; here, as in the official code, word vectors go through Dense + GELU.
    Source: official vatt/modeling/backbones/text/{factory,t5}.py.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        t5 = config.style == "t5"
        dim, self.num_layers = config.transformer.dim, config.transformer.num_layers
        self.num_biased = self.num_layers if config.relative_bias == "all" else 1
        self.embedding = WordEmbedding(config)
        self.agg = init.agg_token(config.embedding_dim)
        self.pre_projection = None if t5 else init.linear(config.embedding_dim, dim, bias=False)
        self.relative_bias = RelativeBias(config)
        self.dropout = Dropout(config.transformer.dropout)
        feed_forward = {"ff_norm": rms_norm, "activation": F.relu} if t5 else {}
        self.transformer = Transformer(config.transformer, attention_norm=rms_norm, scale=1.0, **feed_forward)
        self.out_dim = dim

    def forward(self, words: Tensor, *, agg_only: bool = False) -> Tensor:
        """Word ids [S, W] -> sentence and words [S, 1 + W, D], the sentence at 0; with agg_only that alone."""
        x = prepend(self.agg, self.embedding(words))
        x = self.dropout(x if self.pre_projection is None else F.gelu(self.pre_projection(x)))
        bias = self.relative_bias(x.shape[1])
        biases = [bias] * self.num_biased + [None] * (self.num_layers - self.num_biased)
        return self.transformer(x, biases=biases, key_mask=word_mask(words), agg_only=agg_only)


class LinearTextEncoder(nn.Module):
    """relu(Dense(word vectors)); the sentence is the maximum over all words, padding included (official LinearLM)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embedding = WordEmbedding(config)
        self.projection = init.linear(config.embedding_dim, config.linear_dim)
        self.out_dim = config.linear_dim

    def forward(self, words: Tensor, *, agg_only: bool = False) -> Tensor:
        """Word ids [S, W] -> sentence and words [S, 1 + W, D], the sentence at 0; with agg_only that alone."""
        features = F.relu(self.projection(self.embedding(words)))
        sentence = features.amax(1, keepdim=True)
        return sentence if agg_only else torch.cat([sentence, features], dim=1)


class WordStem(nn.Module):
    """Words of the modality-agnostic model: Dense + GELU, absolute positions, AGG first; never dropped."""

    def __init__(self, config: TextConfig, dim: int) -> None:
        super().__init__()
        self.embedding = WordEmbedding(config)
        self.pre_projection = init.linear(config.embedding_dim, dim)
        self.position = PositionEmbedding((config.max_words,), dim, config.position)
        self.dropout = Dropout(config.position.dropout)
        self.agg = init.agg_token(dim)

    def forward(self, words: Tensor) -> Tensor:
        """Word ids [S, W] -> [S, 1 + W, D]."""
        tokens = F.gelu(self.pre_projection(self.embedding(words)))
        return prepend(self.agg, self.dropout(tokens + self.position(words.shape[1:])))


def word_mask(words: Tensor) -> Tensor:
    """[S, 1 + W] bool: AGG and every word but padding may be seen."""
    return F.pad(words != PAD_ID, (1, 0), value=True)
