"""T5's encoder, randomly initialised by its own library, as a text tower: equal outputs, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch

from vatt_engine.interop import load_t5, load_tf_vatt, t5_config
from vatt_engine.models import build_model
from vatt_engine.models.config import EncoderConfig, TextConfig
from vatt_engine.models.text import TextEncoder
from vatt_engine.testing import Sum, assert_same_sums, assert_within_budget, gradients, randn, transformer_terms

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4}


def theirs(**changes):
    """A T5 encoder whose every weight, norms and biases too, is random and matters."""
    config = transformers.T5Config(**SIZES | changes)
    model = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=index) * (0.3 if parameter.ndim > 1 else 0.1))
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model


def words(num_words: int) -> torch.Tensor:
    ids = torch.randint(2, 50, (4, num_words), generator=torch.Generator().manual_seed(0))
    ids[1, num_words // 2 :] = 0  # padding
    ids[2, 1:] = 0
    return ids


def outputs(model, ids: torch.Tensor, agg: int) -> torch.Tensor:
    ids = torch.cat([torch.full((len(ids), 1), agg), ids], dim=1)
    return model(input_ids=ids, attention_mask=ids.ne(0).long()).last_hidden_state


@pytest.mark.parametrize(("num_words", "agg"), [(16, 1), (150, 7)])  # beyond the distance of the last bucket too
def test_equal_outputs_and_gradients(num_words, agg):
    model, ids = theirs(), words(num_words)
    encoder = TextEncoder(t5_config(model.state_dict())).eval()
    assert load_t5(encoder, model.state_dict(), agg_token=agg).complete
    ours = encoder(ids)
    reference = outputs(model, ids, agg)
    table, reference_table = encoder.relative_bias.table, model.encoder.block[0].layer[0].SelfAttention
    reference_table = reference_table.relative_attention_bias.weight
    grad, reference_grad = gradients(ours, [table])[0], gradients(reference, [reference_table])[0]
    exact = outputs(model.double(), ids, agg)
    terms = transformer_terms(layers=3, dim=32, ff_dim=40, tokens=num_words + 1)
    assert_within_budget(ours, reference, exact, Sum(terms), name="output")
    exact_grad = gradients(exact, [reference_table])[0]  # a sum over pairs of words of what went both ways
    pairs = 4 * (num_words + 1) ** 2
    assert_within_budget(grad, reference_grad, exact_grad, Sum(2 * terms + pairs), name="bias gradient")


def test_a_whole_t5_and_a_model_by_name():
    whole = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES)).eval()
    weights = {name: x.bfloat16() for name, x in whole.state_dict().items()}
    encoder = build_model(EncoderConfig(name="t5", modality="text", text=t5_config(weights))).eval()
    assert load_t5(encoder, weights).complete
    whole = whole.bfloat16().float()
    terms = transformer_terms(layers=3, dim=32, ff_dim=40, tokens=17)
    assert_same_sums(encoder(words(16)), outputs(whole.get_encoder(), words(16), 1), Sum(terms))


def test_published_sizes():
    """t5-small: the tower of its config has its parameters, and AGG."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.T5EncoderModel(transformers.T5Config(d_ff=2048, num_layers=6, num_heads=8))
        config = t5_config(model.state_dict())
        encoder = TextEncoder(config)
    assert (config.transformer.head_dim, config.max_distance, config.vocabulary_size) == (64, 128, 32128)
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in model.parameters()) + 512


def test_refusals():
    model = theirs()
    weights = model.state_dict()
    config = t5_config(weights)
    with pytest.raises(ValueError, match="got a gated one"):
        t5_config(theirs(feed_forward_proj="gated-gelu").state_dict())
    with pytest.raises(ValueError, match=r"must hold a T5 encoder, got none of shared\.weight"):
        t5_config({})
    with pytest.raises(ValueError, match=r"text\.style 't5', got TextEncoder"):
        load_t5(TextEncoder(TextConfig(vocabulary_size=50)), weights)
    with pytest.raises(ValueError, match=r"agg_token must be in 0\.\.49, got 50"):
        load_t5(TextEncoder(config), weights, agg_token=50)
    weights.pop("encoder.block.2.layer.0.SelfAttention.k.weight")
    with pytest.raises(ValueError, match=r"missing: transformer\.layers\.2\.attention\.qkv\.weight \(from encoder"):
        load_t5(TextEncoder(config), weights)
    with pytest.raises(ValueError, match=r"text\.embedding_dim must equal text\.transformer\.dim 512 for .*, got 300"):
        TextConfig(style="t5")
    with pytest.raises(ValueError, match=r"text\.style must be 'code', got 't5'"):
        load_tf_vatt(TextEncoder(config), {})
