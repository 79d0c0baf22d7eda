"""Image ViTs, randomly initialised by their own library, inflated to a video tower: equal outputs on static clips."""

from __future__ import annotations

import re

import pytest
import torch

from vatt_engine import create_model
from vatt_engine.interop import load_tf_vatt, load_vit, vit_config
from vatt_engine.models import build_model
from vatt_engine.models.config import EncoderConfig, VideoConfig
from vatt_engine.models.embeddings import PositionEmbedding, resample_frame, resample_table
from vatt_engine.models.vatt import PatchEncoder
from vatt_engine.testing import Sum, assert_same_sums, assert_within_budget, randn, transformer_terms

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
SIZES |= {"image_size": 32, "patch_size": 8}
PATCH = Sum(12 * 8 * 8 * 3 + 2)  # at most twelve frames, bias and position
SPLINE = Sum(4 + 4 + 2)  # places along each axis, and the other axes
TOWER = Sum(PATCH.terms + transformer_terms(layers=2, dim=24, ff_dim=40, tokens=17) + 24)  # and the head


def theirs(kind=None, **changes):
    """A ViT whose every weight is random and matters."""
    model = (kind or transformers.ViTModel)(transformers.ViTConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            parameter.copy_(randn(*parameter.shape, seed=index) * 0.3)
            if re.search(r"norm\w*\.weight", name):
                parameter.add_(1.0)
    return model


def older(weights):
    """The names of transformers before 5, which most files have."""
    renamed = {}
    for name, tensor in weights.items():
        name = re.sub(r"^layers\.", "encoder.layer.", name)
        for new, old in (("q", "query"), ("k", "key"), ("v", "value")):
            name = name.replace(f"attention.{new}_proj", f"attention.attention.{old}")
        name = name.replace("attention.o_proj", "attention.output.dense")
        renamed[name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")] = tensor
    return renamed


def timm(weights):
    """The names of timm's VisionTransformer, q, k and v in one."""
    renamed = {"cls_token": weights["embeddings.cls_token"], "pos_embed": weights["embeddings.position_embeddings"]}
    for kind in ("weight", "bias"):
        renamed[f"patch_embed.proj.{kind}"] = weights[f"embeddings.patch_embeddings.projection.{kind}"]
        renamed[f"norm.{kind}"] = weights[f"layernorm.{kind}"]
        for index in range(SIZES["num_hidden_layers"]):
            ours, block = f"layers.{index}.", f"blocks.{index}."
            qkv = [weights[f"{ours}attention.{letter}_proj.{kind}"] for letter in "qkv"]
            renamed[f"{block}attn.qkv.{kind}"] = torch.cat(qkv)
            pairs = {"attn.proj": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"}
            for new, old in (pairs | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
                renamed[f"{block}{new}.{kind}"] = weights[f"{ours}{old}.{kind}"]
    return renamed


def static(image: torch.Tensor, frames: int) -> torch.Tensor:
    """[B, 3, H, W] as a clip [B, T, H, W, 3]."""
    return image.permute(0, 2, 3, 1)[:, None].expand(-1, frames, -1, -1, -1)


@pytest.mark.parametrize(("naming", "eps"), [(dict, 1e-12), (older, 1e-12), (timm, 1e-6)])
def test_equal_output_on_a_static_clip_of_one_step(naming, eps):
    model = theirs(layer_norm_eps=eps)
    weights = naming(model.state_dict())
    config = vit_config(weights, num_frames=4, num_heads=3)
    assert (config.frame_size, config.patch, config.transformer.norm_eps) == ((32, 32), (4, 8, 8), eps)
    tower = build_model(EncoderConfig(name="vit", video=config)).eval()
    assert load_vit(tower, weights).complete
    image = randn(3, 3, 32, 32, seed=99)
    ours, reference = tower(static(image, 4)), model(image).last_hidden_state
    assert_within_budget(ours, reference, model.double()(image.double()).last_hidden_state, TOWER)


def test_equal_tokens_at_every_step_of_a_static_clip():
    model = theirs()
    tower = PatchEncoder(vit_config(model.state_dict(), num_frames=12, patch_frames=2, num_heads=3)).eval()
    load_vit(tower, model.state_dict())
    image = randn(2, 3, 32, 32, seed=99)
    reference, exact = model.embeddings(image), model.double().embeddings(image.double())
    tokens = tower.stem(static(image, 12))
    assert tokens.shape[1] == 1 + 6 * 16
    assert_within_budget(tokens[:, :1], reference[:, :1], exact[:, :1], PATCH, name="AGG")
    for step, part in enumerate(tokens[:, 1:].split(16, dim=1)):
        assert_within_budget(part, reference[:, 1:], exact[:, 1:], PATCH, name=f"step {step}")


def test_a_classifier_in_bfloat16():
    model = theirs(transformers.ViTForImageClassification, num_labels=7).bfloat16()
    config = vit_config(model.state_dict(), num_frames=4, num_heads=3)
    ours = build_model(EncoderConfig(name="vit", video=config, num_classes=7)).eval()
    assert load_vit(ours, model.state_dict()).complete
    image = randn(2, 3, 32, 32, seed=99)
    model = model.float()
    logits, exact = model(image).logits, model.double()(image.double()).logits
    assert_within_budget(ours(static(image, 4)), logits, exact, TOWER)
    report = load_vit(ours.encoder, model.state_dict(), strict=False)
    assert report.unused == ["classifier.bias", "classifier.weight"]
    assert not report.missing


def test_the_tower_of_a_whole_model():
    model = theirs(hidden_size=128, num_attention_heads=4, intermediate_size=256)
    wanted = vit_config(model.state_dict(), num_frames=8, num_heads=4)
    tower = create_model(
        "vatt_tiny", video={"position": {"tables": "frame", "norm": False}, "frame_size": (32, 32)}
    ).video
    assert tower.stem.position.tables[1].shape == (16, 128)
    with pytest.raises(ValueError, match=r"missing: transformer\.layers\.2\.attention_norm\.weight"):
        load_vit(tower, model.state_dict())
    assert wanted.grid == (2, 4, 4)


def test_another_frame_is_resampled_and_nothing_else():
    weights = theirs().state_dict()
    config = vit_config(weights, num_heads=3)
    larger = PatchEncoder(VideoConfig(**vars_of(config) | {"frame_size": (40, 48)}))
    with pytest.raises(ValueError, match=r"position_embeddings: \[1, 17, 24\], expected \[1, 31, 24\]"):
        load_vit(larger, weights)
    assert load_vit(larger, weights, resample_positions=True).complete
    same_size = PatchEncoder(config)
    load_vit(same_size, weights, resample_positions=True)
    positions = weights["embeddings.position_embeddings"][0]
    assert_same_sums(larger.stem.position.tables[1], resample_frame(positions[1:], (4, 4), (5, 6)), SPLINE)
    assert torch.equal(same_size.stem.position.tables[1], positions[1:])
    assert torch.equal(larger.stem.agg, same_size.stem.agg)
    # The same at run time: a tower of 4 x 4 places on a clip of 5 x 6.
    assert_same_sums(same_size.stem.position((8, 5, 6)), larger.stem.position((8, 5, 6)), SPLINE)


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_a_frame_of_sums_is_resampled_like_its_axes():
    """Where E_hw[h, w] = E_h[h] + E_w[w] both kinds of tables are one position embedding, at every size."""
    rows, columns, times = randn(4, 6), randn(3, 6, seed=1), randn(2, 6, seed=2)
    table = (rows[:, None] + columns).flatten(0, 1)
    expected = resample_table(rows, 7)[:, None] + resample_table(columns, 5)
    assert_same_sums(resample_frame(table, (4, 3), (7, 5)), expected.flatten(0, 1), SPLINE)
    position = VideoConfig().position
    by_axis = PositionEmbedding((2, 4, 3), 6, position)
    by_frame = PositionEmbedding((2, 4, 3), 6, type(position)(tables="frame"))
    with torch.no_grad():
        for own, values in zip([*by_axis.tables, *by_frame.tables], [times, rows, columns, times, table]):
            own.copy_(values)
    for grid in ((2, 4, 3), (3, 7, 5)):
        assert_same_sums(by_frame(grid), by_axis(grid), SPLINE)


def test_refusals():
    weights = theirs().state_dict()
    with pytest.raises(ValueError, match=r"must hold a ViT, got none of embeddings\.position_embeddings, pos_embed"):
        vit_config({})
    odd = weights | {"embeddings.position_embeddings": torch.zeros(1, 16, 24)}
    with pytest.raises(ValueError, match=r"1 \+ n \* n positions, got 16"):
        vit_config(odd)
    with pytest.raises(ValueError, match=r"position\.tables 'frame' and no position\.norm, got PatchEncoder"):
        load_vit(create_model("vatt_tiny").video, weights)
    with pytest.raises(ValueError, match="got TextEncoder"):
        load_vit(create_model("vatt_tiny").text, weights)
    with pytest.raises(ValueError, match=r"position\.tables must be 'axis', got 'frame'"):
        load_tf_vatt(PatchEncoder(vit_config(weights, num_heads=3)), {})
    with pytest.raises(ValueError, match=r"audio\.position\.tables must be 'axis', got 'frame'"):
        create_model("vatt_tiny", audio={"position": {"tables": "frame"}})
