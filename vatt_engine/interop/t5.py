"""The encoder of T5 (Hugging Face's names) as our text tower, with equal outputs.

The tower must be T5's own kind, `TextConfig(style="t5")`, which `t5_config` reads off the weights. T5 has no AGG: it
becomes the vector of one of T5's tokens, so our output on words w is T5's on [that token, w]. Words are T5's
sentencepiece ids (0 is padding in both). Decoders are left out; gated feed-forward layers (T5 1.1, Flan) have no
counterpart here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor, nn

from vatt_engine.interop.rules import ImportReport, Rule, Source, fill, first_of, named, same
from vatt_engine.models.config import TextConfig, TransformerConfig
from vatt_engine.models.text import TextEncoder

_BLOCK = "encoder.block.{}.layer.{}."
_TABLE = _BLOCK.format(0, 0) + "SelfAttention.relative_attention_bias.weight"
_WORDS = ("shared.weight", "encoder.embed_tokens.weight")  # one table under two names
END = 1  # </s>


def t5_config(weights: Mapping[str, Tensor], *, max_distance: int = 128) -> TextConfig:
    """The text tower that T5's weights fit into.

    Args:
        weights: a state dict of T5EncoderModel or a whole T5.
        max_distance: of the relative positions, which no weight tells; 128 in every published T5.

    Raises:
        ValueError: no T5 encoder, or one with gated feed-forward layers.

    >>> t5_config(load_file("t5-small.safetensors")).transformer.num_layers  # doctest: +SKIP
    6
    """
    if _BLOCK.format(0, 1) + "DenseReluDense.wi_0.weight" in weights:
        raise ValueError("t5_config: weights must be of a T5 with a plain feed-forward, got a gated one (1.1, Flan).")
    queries, hidden = _BLOCK.format(0, 0) + "SelfAttention.q.weight", _BLOCK.format(0, 1) + "DenseReluDense.wi.weight"
    words = next((name for name in _WORDS if name in weights), None)
    absent = [name for name in (words or _WORDS[0], _TABLE, queries, hidden) if name not in weights]
    if absent:
        raise ValueError(f"t5_config: weights must hold a T5 encoder, got none of {', '.join(absent)}.")
    vocabulary_size, dim = weights[words].shape
    num_buckets, num_heads = weights[_TABLE].shape
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.block.")}
    return TextConfig(
        style="t5",
        vocabulary_size=vocabulary_size,
        embedding_dim=dim,
        num_buckets=num_buckets,
        max_distance=max_distance,
        transformer=TransformerConfig(
            num_layers=len(layers),
            dim=dim,
            ff_dim=weights[hidden].shape[0],
            num_heads=num_heads,
            head_dim=weights[queries].shape[0] // num_heads,
            bias=False,
        ),
    )


def load_t5(
    encoder: nn.Module, weights: Mapping[str, Tensor], *, agg_token: int = END, strict: bool = True
) -> ImportReport:
    """Copy a T5 encoder into a text tower, `create_model("t5_small", text=...)` or `model.text`.

    Args:
        encoder: a TextEncoder of `t5_config`'s kind.
        weights: a state dict of T5EncoderModel or a whole T5.
        agg_token: the token whose vector AGG starts from; by default </s>.
        strict: raise unless every parameter is loaded and, decoder and language head aside, every weight is used.

    Raises:
        ValueError: another kind of module, or the report when `strict`.

    >>> load_t5(encoder, load_file("t5-small.safetensors"))  # doctest: +SKIP
    """
    if not isinstance(encoder, TextEncoder) or encoder.pre_projection is not None:
        raise ValueError(
            f"load_t5: encoder must be a TextEncoder with text.style 't5', got {type(encoder).__name__}. "
            "`t5_config(weights)` gives its config."
        )
    arrays = named({name: x for name, x in weights.items() if not name.startswith(("decoder.", "lm_head."))})
    if _WORDS[0] in arrays:
        arrays.pop(_WORDS[1], None)
    return fill(encoder, _rules(encoder, agg_token), arrays, first_of(arrays), where="load_t5", strict=strict)


def _rules(encoder: TextEncoder, agg_token: int) -> Iterator[Rule]:
    table = encoder.embedding.weight
    if not 0 <= agg_token < len(table):
        raise ValueError(f"load_t5: agg_token must be in 0..{len(table) - 1}, got {agg_token}.")
    yield same("embedding.weight", _WORDS, table)
    yield Rule("agg", (Source(_WORDS, tuple(table.shape)),), lambda arrays: arrays[0][agg_token])
    yield same("relative_bias.table", _TABLE, encoder.relative_bias.table)
    for index, block in enumerate(encoder.transformer.layers):
        ours, attention, feed_forward = f"transformer.layers.{index}", _BLOCK.format(index, 0), _BLOCK.format(index, 1)
        inner, dim = block.attention.out.in_features, block.attention.out.out_features
        letters = tuple(Source((f"{attention}SelfAttention.{x}.weight",), (inner, dim)) for x in "qkv")
        yield same(f"{ours}.attention_norm.weight", f"{attention}layer_norm.weight", block.attention_norm.weight)
        yield Rule(f"{ours}.attention.qkv.weight", letters, np.concatenate)
        yield same(f"{ours}.attention.out.weight", f"{attention}SelfAttention.o.weight", block.attention.out.weight)
        yield same(f"{ours}.ff_norm.weight", f"{feed_forward}layer_norm.weight", block.ff_norm.weight)
        yield same(f"{ours}.ff_in.weight", f"{feed_forward}DenseReluDense.wi.weight", block.ff_in.weight)
        yield same(f"{ours}.ff_out.weight", f"{feed_forward}DenseReluDense.wo.weight", block.ff_out.weight)
    norm = encoder.transformer.final_norm
    yield same("transformer.final_norm.weight", "encoder.final_layer_norm.weight", norm.weight)
