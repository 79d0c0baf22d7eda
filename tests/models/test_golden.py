"""The towers and heads against numbers recorded from the official implementation (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vatt_engine.interop import load_tf_vatt, read_npz
from vatt_engine.models.config import (
    DropTokenConfig,
    HeadConfig,
    PositionConfig,
    TextConfig,
    TransformerConfig,
    VideoConfig,
)
from vatt_engine.models.heads import FactorizedHeads
from vatt_engine.models.text import TextEncoder, relative_bucket
from vatt_engine.models.transformer import Transformer
from vatt_engine.models.vatt import PatchEncoder
from vatt_engine.testing import Sum, assert_same_sums, transformer_terms

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"num_layers": 2, "dim": 32, "ff_dim": 64, "num_heads": 4, "head_dim": 8, "dropout": 0.0}
# What is added up, there as here, before the layers (a patch, a norm), behind them, and for a parameter's gradient.
BEFORE = Sum(4 * 8 * 8 * 3 + 2 * 32)
BEHIND = Sum(BEFORE.terms + transformer_terms(layers=2, dim=32, ff_dim=64, tokens=25))
GRADIENT = Sum(2 * BEHIND.terms + 2 * 25)


def assert_golden(actual: Tensor, expected: np.ndarray, sums: Sum, name: str) -> None:
    assert_same_sums(actual.detach(), torch.as_tensor(expected), sums, name=name)


def assert_gradients(model: nn.Module, expected: nn.Module) -> None:
    """Gradients of `model` against the parameters of `expected`."""
    for (name, parameter), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        if parameter.grad is not None:
            assert_same_sums(parameter.grad, want.detach(), GRADIENT, name=name)


def record_layers(transformer: Transformer, found: dict[str, Tensor]) -> None:
    """Keep what each layer puts out, its attention probabilities, and the final norm."""
    for index, layer in enumerate(transformer.layers):
        layer.register_forward_hook(lambda m, args, out, i=index: found.__setitem__(f"layer{i}_out", out))

        def probabilities(module, args, out, i=index):
            x, bias, key_mask = (*args, None, None)[:3]
            q, k, _ = module.qkv(x).unflatten(-1, (3, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-2, -1) * (module.head_dim**-0.5 if module.scale is None else module.scale)
            scores = scores if bias is None else scores + bias
            scores = scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None], -1e9)
            found[f"layer{i}_attn"] = scores.softmax(-1)

        layer.attention.register_forward_hook(probabilities)
    transformer.final_norm.register_forward_hook(lambda m, args, out: found.__setitem__("final_ln", out))


def video_tower() -> PatchEncoder:
    return PatchEncoder(
        VideoConfig(
            num_frames=8,
            frame_size=(24, 32),
            patch=(4, 8, 8),
            drop_token=DropTokenConfig(keep_rate=0.5),
            position=PositionConfig(dropout=0.0),
            transformer=TransformerConfig(**SMALL),
        )
    )


@pytest.fixture(scope="module")
def video_golden() -> dict[str, np.ndarray]:
    return read_npz(GOLDEN / "a_video_vitx3d.npz")


def weights_of(golden: dict[str, np.ndarray], prefix: str = "w/") -> dict[str, np.ndarray]:
    return {name: array for name, array in golden.items() if name.startswith(prefix)}


def test_video_tower(video_golden):
    tower = video_tower().eval()
    load_tf_vatt(tower, weights_of(video_golden))
    video = torch.as_tensor(video_golden["in/video"])
    found: dict[str, Tensor] = {}
    record_layers(tower.transformer, found)

    tokens = tower(video)
    patches = tower.stem.patch(video, None)
    grid = tower.stem.patch.prepare(video)[1]
    tables = tower.stem.position
    norm, tables.norm = tables.norm, nn.Identity()
    before_norm, tables.norm = tables(grid), norm

    assert grid == (2, 3, 4)
    for name, actual, sums in (
        ("patch_embed_5d", patches.view(2, 2, 3, 4, 32), BEFORE),
        ("pos_sum_before_ln", before_norm, BEFORE),
        ("pos_after_ln", tower.stem.position(grid), BEFORE),
        ("tokens_with_pos", tower.stem(video)[:, 1:], BEFORE),
        ("tx_input", tower.stem(video), BEFORE),
        ("agg", tokens[:, 0], BEHIND),
        ("features_3d", tokens[:, 1:].view(2, 2, 3, 4, 32), BEHIND),
        *((name, value, BEHIND) for name, value in found.items()),
    ):
        assert_golden(actual, video_golden[f"out/{name}"], sums, name)
    assert len(found) == 5


def test_video_tower_with_drop_token(video_golden, monkeypatch):
    tower = video_tower().train()
    load_tf_vatt(tower, weights_of(video_golden))
    kept = torch.as_tensor(video_golden["drop/kept"])
    assert len(kept) == tower.stem.drop_token.num_kept(24)
    monkeypatch.setattr("vatt_engine.models.embeddings.ops.sample_keep", lambda *args, **kwargs: kept)
    video = torch.as_tensor(video_golden["in/video"])
    found: dict[str, Tensor] = {}
    record_layers(tower.transformer, found)

    tokens = tower(video)

    assert_golden(tower.stem(video), video_golden["drop/tx_input"], BEFORE, "tx_input")
    for name, value in {**found, "agg": tokens[:, 0], "predictions": tokens[:, 1:]}.items():
        assert_golden(value, video_golden[f"drop/{name}"], BEHIND, name)


def test_video_tower_gradients(video_golden):
    tower, expected = video_tower().eval(), video_tower()
    load_tf_vatt(tower, weights_of(video_golden))
    load_tf_vatt(expected, {k: v for k, v in weights_of(video_golden, "grad/").items() if k.count("/") > 1})

    loss = (tower(torch.as_tensor(video_golden["in/video"]))[:, 0] * torch.as_tensor(video_golden["grad/c"])).sum()
    loss.backward()

    assert_golden(loss, video_golden["grad/loss"], BEHIND, "loss")
    assert_gradients(tower, expected)


def test_text_tower():
    golden = read_npz(GOLDEN / "c_text_t5.npz")
    config = TextConfig(vocabulary_size=50, embedding_dim=12, transformer=TransformerConfig(**SMALL, bias=False))
    tower = TextEncoder(config).eval()
    load_tf_vatt(tower, weights_of(golden))
    words = torch.as_tensor(golden["in/word_ids"]).long()
    found: dict[str, Tensor] = {}
    record_layers(tower.transformer, found)
    for index, layer in enumerate(tower.transformer.layers):
        layer.ff_norm.register_forward_hook(
            lambda m, args, out, i=index: found.__setitem__(f"layer{i}_after_attn", args[0])
        )

    tokens = tower(words)

    embedded = torch.cat([tower.agg.expand(4, 1, -1), tower.embedding(words)], 1)
    assert_golden(embedded, golden["out/emb_with_agg"], BEFORE, "emb_with_agg")
    projected = F.gelu(tower.pre_projection(embedded))
    assert_golden(projected, golden["out/after_pre_proj"], BEFORE, "after_pre_proj")
    assert_golden(tower.relative_bias(17)[None], golden["out/rel_bias_no_mask"], BEFORE, "rel_bias_no_mask")
    for name, value in {**found, "sentence": tokens[:, 0], "words": tokens[:, 1:]}.items():
        assert_golden(value, golden[f"out/{name}"], BEHIND, name)
    assert len(found) == 7


@pytest.mark.parametrize("suffix", ["", "official"])
def test_factorized_heads(suffix):
    golden = read_npz(GOLDEN / "d_head_fac_syncbn.npz")
    weights = weights_of(golden)
    if suffix:  # the colliding names of a real checkpoint, in creation order, the second occurrence marked
        official = [str(name) for name in golden["meta/official_var_names"]]
        names = [f"{name}__dup1" if name in official[:i] else name for i, name in enumerate(official)]
        by_creation = [*(k for k in weights if "moving" not in k), *(k for k in weights if "moving" in k)]
        weights = {name: weights[key] for name, key in zip(names, by_creation, strict=True)}
    heads = FactorizedHeads(HeadConfig(video_audio_dim=16, video_text_dim=8), 32, 24, 20)
    load_tf_vatt(heads, weights)
    inputs = [torch.as_tensor(golden[f"in/{name}"]) for name in ("video", "audio", "text")]

    for mode in ("eval", "train"):
        outputs = heads.train(mode == "train")(*inputs)
        official = ("video_toaud", "audio_tovid", "video_totxt", "text_tovid")
        for value, name in zip(outputs, official, strict=True):
            assert_golden(value, golden[f"{mode}/{name}"], BEFORE, f"{mode}/{name}")
    after = FactorizedHeads(HeadConfig(video_audio_dim=16, video_text_dim=8), 32, 24, 20)
    load_tf_vatt(after, weights_of(golden, "after_train_step_w/"))
    for name, value in after.state_dict().items():
        assert_golden(heads.state_dict()[name], value.numpy(), BEFORE, f"after a training step: {name}")


@pytest.mark.parametrize("max_distance", [64, 128])
@pytest.mark.parametrize("num_buckets", [8, 32])
def test_relative_buckets(num_buckets, max_distance):
    golden = read_npz(GOLDEN / "h_relative_bucket.npz")
    buckets = relative_bucket(torch.as_tensor(golden["rel"]), num_buckets=num_buckets, max_distance=max_distance)
    expected = golden[f"bucket_nb{num_buckets}_md{max_distance}_bi"]
    assert buckets.tolist() == expected.tolist()
