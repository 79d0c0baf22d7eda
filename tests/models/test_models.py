"""Named models: exact sizes, overrides, files, and what no golden number covers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.nn import functional as F

from vatt_engine.batch import Batch
from vatt_engine.models import create_model, from_pretrained, list_models, model_config, save_pretrained
from vatt_engine.testing import Sum, assert_same_sums, transformer_terms

# Total and trainable parameters of the official constructors at full size (trainable: word vectors frozen).
COUNTS = {
    "vit_base": (87_446_016, 87_446_016),
    "vit_medium": (154_343_424, 154_343_424),
    "vit_large": (305_498_112, 305_498_112),
    "wat_base": (86_078_976, 86_078_976),
    "wat_medium": (152_520_704, 152_520_704),
    "wat_large": (303_675_392, 303_675_392),
    "t5_small": (38_699_052, 19_038_252),
    "t5_base": (104_854_956, 85_194_156),
    "linear_text": (20_277_248, 616_448),
    "vatt_bbs": (212_224_044 + 1_316_608, 192_563_244 + 1_316_608 - 2_560),
    "vatt_mbs": (279_121_452 + 1_447_680, 259_460_652 + 1_447_680 - 2_560),
    "vatt_lbs": (430_276_140 + 1_447_680, 410_615_340 + 1_447_680 - 2_560),
    "vatt_ma_base": (111_919_104 + 1_709_824, 92_258_304 + 1_709_824 - 2_560),
    "vatt_ma_medium": (180_943_872 + 1_709_824, 161_283_072 + 1_709_824 - 2_560),
    "vatt_ma_large": (332_098_560 + 1_709_824, 312_437_760 + 1_709_824 - 2_560),
}


# What vatt_tiny adds up on the way to an embedding: a patch of 4 x 8 x 8 pixels, the layers of a tower, three heads.
WHOLE = Sum(768 + transformer_terms(layers=4, dim=128, ff_dim=256, tokens=73) + 3 * 128)


def tiny_batch(model_name: str = "vatt_tiny", size: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    config = model_config(model_name)
    return Batch(
        video=torch.randint(256, (size, 8, 48, 48, 3), dtype=torch.uint8, generator=generator),
        audio=torch.rand(size, config.audio.num_samples, generator=generator) * 2 - 1,
        text=torch.randint(1, 1024, (size, 5, 16), generator=generator),
    )


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    text = {"freeze_embedding": True}
    with torch.device("meta"):
        model = create_model(name, text=text)
    total = sum(t.numel() for t in model.state_dict().values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (total, trainable) == COUNTS[name]


@pytest.mark.parametrize(("name", "expected"), [("vit_base", 87_455_232), ("vit_large", 305_510_400)])
def test_parameter_counts_at_320(name, expected):
    with torch.device("meta"):
        model = create_model(name, video={"frame_size": (320, 320)})
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", list_models())
def test_no_parameter_without_dimensions(name):
    with torch.device("meta"):
        model = create_model(name)
    assert all(tensor.ndim >= 1 for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", ["vit_base", "vatt_tiny"])
def test_initialisation_follows_keras(name):
    torch.manual_seed(0)
    model = create_model(name)
    stem = model.stem if name == "vit_base" else model.video.stem
    dim = stem.agg.numel()
    volume = torch.Size(stem.patch.patch).numel()
    fan_out = volume * dim if name == "vit_base" else dim  # vatt_tiny asks for patch_init="dense"
    bound = (6 / (volume * 3 + fan_out)) ** 0.5
    assert stem.patch.weight.abs().max().item() == pytest.approx(bound, rel=1e-2)
    table = torch.cat([t.flatten() for t in stem.position.tables])
    assert table.std().item() == pytest.approx(0.88 * dim**-0.5, rel=0.05)
    assert stem.agg.std().item() == pytest.approx(dim**-0.5, rel=0.2)
    block = (model if name == "vit_base" else model.video).transformer.layers[0]
    inner = block.attention.out.in_features
    assert block.attention.qkv.weight.abs().max().item() == pytest.approx((6 / (dim + inner)) ** 0.5, rel=1e-2)
    assert not block.attention.qkv.bias.any()


def test_unknown_names_have_a_hint():
    with pytest.raises(ValueError, match="Did you mean 'vatt_mbs'"):
        create_model("vat_mbs")
    with pytest.raises(ValueError, match=r"video\.keep_rate .*unknown"):
        create_model("vatt_tiny", video={"keep_rate": 0.5})
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 0"):
        create_model("vatt_tiny", **{"video.drop_token.keep_rate": 0.0})
    with pytest.raises(ValueError, match="patch must fit into"):
        create_model("vatt_tiny", video={"frame_size": (4, 4)})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("video.patch", (0, 8, 8)),
        ("video.post_projection", -1),
        ("video.transformer.dim", 0),
        ("audio.patch", (0,)),
        ("text.embedding_dim", 0),
        ("text.num_buckets", 3),
        ("text.max_distance", 8),  # of 32 buckets, 8 hold one distance each
        ("text.linear_dim", 0),
        ("heads.video_audio_dim", 0),
        ("heads.video_text_dim", -1),
        ("shared_projection", 0),
    ],
)
def test_refuses_sizes_that_no_model_has(field, value):
    with pytest.raises(ValueError, match=rf"create_model: {field} must .*, got {re.escape(repr(value))}\."):
        create_model("vatt_tiny", **{field: value})


@pytest.mark.parametrize("overrides", [{}, {"backbone": "agnostic", "video.pre_projection": True}])
def test_every_parameter_learns(overrides):
    if overrides:
        overrides["shared"] = {"num_layers": 2, "dim": 64, "ff_dim": 64, "num_heads": 2, "head_dim": 32}
    model = create_model("vatt_tiny", **overrides).train()
    embeddings = model(tiny_batch(), seed=0)
    sum((e * torch.randn_like(e)).sum() for e in embeddings).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("agnostic", [False, True])
def test_padding_does_not_change_a_sentence(agnostic):
    model = create_model("vatt_tiny", backbone="agnostic" if agnostic else "specific").eval()
    words = torch.tensor([[5, 9, 3, 0, 0, 0]])
    longer = F.pad(words, (0, 10))
    shorter = words if not agnostic else longer.clone()  # absolute positions are resampled for another length
    assert_same_sums(model.encode_text(shorter), model.encode_text(longer), WHOLE)
    model.word_embedding.weight.data[0] += 1.0  # the padding's vector is never seen
    changed = model.encode_text(longer)
    model.word_embedding.weight.data[0] -= 1.0
    assert_same_sums(changed, model.encode_text(longer), WHOLE)


def test_evaluation_sees_all_tokens_and_training_half():
    model = create_model("vatt_tiny")
    batch = tiny_batch()
    assert model.eval().video(batch.video).shape[1] == 1 + 72
    assert model.train().video(batch.video).shape[1] == 1 + 36
    assert model.audio(batch.audio).shape[1] == 1 + 37


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_drop_token_is_a_function_of_the_seed(mode):
    model = create_model("vatt_tiny", **{"video.drop_token.keep_mode": mode, "audio.drop_token.keep_mode": mode})
    batch, other = tiny_batch(), tiny_batch(size=2)
    model.train()
    model.heads.eval()  # BatchNorm's statistics apart, a sample's embedding is its own
    first, again = model(batch, seed=3).video_audio, model(batch, seed=3).video_audio
    assert torch.equal(first, again)
    assert not torch.allclose(first, model(batch, seed=4).video_audio, atol=1e-3)
    assert_same_sums(first[:2], model(other, seed=3).video_audio, WHOLE)


def test_tile_sized_drop_token():
    video = model_config("vit_base", **{"video.drop_token.keep_multiple": 128}).video
    audio = model_config("wat_base", **{"audio.drop_token.keep_multiple": 128}).audio
    assert video.drop_token.num_kept(1568) == 767
    assert audio.drop_token.num_kept(1200) == 639
    assert model_config("vit_base").video.drop_token.num_kept(1568) == 784


def test_saved_and_loaded_bit_for_bit(tmp_path):
    model = create_model("vatt_tiny").eval()
    save_pretrained(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    batch = tiny_batch()
    for mine, theirs in zip(model(batch), loaded(batch), strict=True):
        assert torch.equal(mine, theirs)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_classifier_is_saved_with_its_encoder(tmp_path):
    small = {"num_layers": 1, "dim": 32, "ff_dim": 32, "num_heads": 1, "head_dim": 32}
    model = create_model("vit_base", video={"frame_size": (32, 32), "transformer": small}, num_classes=7).eval()
    save_pretrained(model, tmp_path)
    video = torch.randint(256, (2, 32, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(from_pretrained(tmp_path)(video), model(video))


def test_classifiers_start_as_the_official_ones():
    small = {"num_layers": 1, "dim": 64, "ff_dim": 64, "num_heads": 1, "head_dim": 64}
    video = create_model("vit_base", video={"transformer": small}, num_classes=400)
    assert video.dropout.p == 0.5
    assert not video.head.bias.any()
    std = (2 / (64 + 400)) ** 0.5  # glorot_normal, whose cut at two deviations lies above glorot_uniform's bound
    assert video.head.weight.std().item() == pytest.approx(std, rel=0.05)
    assert video.head.weight.abs().max().item() > 3**0.5 * std
    for name in ("wat_base", "spt_base"):
        audio = create_model(name, audio={"transformer": small}, num_classes=400)
        assert audio.dropout.p == 0.0
        assert torch.allclose(audio.head.bias.sigmoid(), torch.full((400,), 1 / 400))
        assert audio.head.weight.abs().max().item() <= 3**0.5 * std
    assert not create_model("wat_base", audio={"transformer": small}, num_classes=1).head.bias.any()


@pytest.mark.parametrize("damage", ["flip", "truncate", "config", "shape"])
def test_damaged_files_are_named(tmp_path, damage):
    save_pretrained(create_model("t5_small", text={"vocabulary_size": 20}), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "flip":
        weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "config":
        config.write_text(config.read_text()[:40])
    else:
        document = json.loads(config.read_text())
        document["config"]["text"]["vocabulary_size"] = 21
        config.write_text(json.dumps(document))
    expected = {
        "config": r"config\.json: the file must be a config",
        "shape": r"embedding\.weight has shape \[20, 300\]",
    }
    with pytest.raises(ValueError, match=expected.get(damage, r"model\.safetensors: the file must be intact")):
        from_pretrained(tmp_path)


def test_word_vectors_freeze_when_loaded():
    embedding = create_model("vatt_tiny").word_embedding
    assert embedding.weight.requires_grad
    before = embedding.weight.detach().clone()
    vectors, found = torch.randn(1024, 64), torch.arange(1024) % 2 == 0
    embedding.load_vectors(vectors, found)
    assert not embedding.weight.requires_grad
    assert torch.equal(embedding.weight[found], vectors[found])
    assert torch.equal(embedding.weight[~found], before[~found])
    with pytest.raises(ValueError, match=r"word vectors must be \[1024, 64\], got \[3, 64\]"):
        embedding.load_vectors(torch.randn(3, 64))
    trainable = create_model("vatt_tiny", text={"freeze_embedding": False}).word_embedding
    trainable.load_vectors(vectors)
    assert trainable.weight.requires_grad


def test_norms_are_float32_under_autocast(recwarn):
    model = create_model("vatt_tiny").train()
    seen = []
    for norm in (model.text.transformer.final_norm, model.video.transformer.final_norm):
        norm.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tiny_batch(), seed=0)
    assert seen == [torch.float32] * 2
    assert [str(warning.message) for warning in recwarn if "rms_norm" in str(warning)] == []


def test_relative_bias_in_all_layers_or_the_first_only():
    words = torch.tensor([[5, 9, 3, 7]])
    for where, layers in (("all", [True] * 4), ("first", [True, False, False, False])):
        model = create_model("vatt_tiny", text={"relative_bias": where}).text.eval()
        seen: list[bool] = []
        for layer in model.transformer.layers:
            layer.attention.register_forward_hook(lambda m, args, out, s=seen: s.append(args[1] is not None))
        model(words)
        assert seen == layers


def test_paper_heads_have_batch_norm_everywhere():
    heads = create_model("vatt_tiny", heads={"style": "paper"}).heads.train()
    z = heads(torch.randn(64, 128), torch.randn(64, 128), torch.randn(64, 5, 128))
    for embedding in z:
        rows = embedding.flatten(0, -2)
        assert torch.allclose(rows.mean(0), torch.zeros(128), atol=1e-4)
        assert torch.allclose(rows.var(0, correction=0), torch.ones(128), atol=1e-2)
    linear = heads.between(torch.tensor([-1.0]))
    assert linear.item() == -1.0


def test_whole_model_compiles_without_a_graph_break():
    model = create_model("vatt_tiny").train()
    batch = tiny_batch()

    def forward(video, audio, text):
        return model(Batch(video=video, audio=audio, text=text), seed=1)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    model.heads.eval()
    for got, want in zip(
        compiled(batch.video, batch.audio, batch.text), forward(batch.video, batch.audio, batch.text), strict=True
    ):
        assert_same_sums(got, want, WHOLE)
