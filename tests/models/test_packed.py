"""The modality-agnostic backbone: all modalities as one packed set of sequences against a pass for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vatt_engine import Batch, create_model
from vatt_engine.dispatch import use_impl
from vatt_engine.models import vatt
from vatt_engine.models.vatt import MODALITIES
from vatt_engine.testing import Sum, assert_same_formula, assert_same_sums, gradients, randn, transformer_terms

B = 3
LAYERS = transformer_terms(layers=2, dim=768, ff_dim=3072, tokens=40)


def model(name="vatt_ma_base", *, keep_mode="batch", **overrides):
    """Real widths, few layers, clips of 8 frames of 32 x 32 and 1,280 samples; no dropout, whose masks would differ."""
    torch.manual_seed(0)
    tower = {"position": {"dropout": 0.0}, "drop_token": {"keep_mode": keep_mode}}
    return create_model(
        name,
        video=tower | {"num_frames": 8, "frame_size": (32, 32)},
        audio=tower | {"num_samples": 1280},
        text={"vocabulary_size": 50, "position": {"dropout": 0.0}},
        **{"shared": {"num_layers": 2, "dropout": 0.0}} | overrides,
    ).train()


def clips():
    text = torch.randint(1, 50, (B, 2, 16), generator=torch.Generator().manual_seed(1))
    text[0, :, 5:] = 0
    text[1] = 0  # padding alone, as where a clip has no captions
    video = torch.randint(0, 256, (B, 8, 32, 32, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Batch(video=video, audio=randn(B, 1280).clamp(-1, 1), text=text, sample_id=torch.tensor([7, 1, 4]))


def run(module, batch, packed):
    """The pooled features, and the gradients of every parameter they depend on.

    Not through the heads: BatchNorm over three samples would multiply every rounding.
    """
    signals = {name: x for name in MODALITIES if (x := getattr(batch, name)) is not None}
    if "text" in signals:
        signals["text"] = signals["text"].flatten(0, 1)
    seeds = {"video": 3, "audio": 4}
    found = module.backbone.pooled(signals, seeds=seeds, sample_id=batch.sample_id, packed=packed)
    flat = torch.cat([x.flatten() for x in found.values()])
    used = [p for p in module.backbone.parameters() if p.requires_grad]
    grads = torch.autograd.grad((flat * randn(flat.numel(), seed=5).to(flat)).sum(), used, allow_unused=True)
    return [*found.values(), *(g for g in grads if g is not None)]


def in_double(batch):
    return batch if batch.audio is None else replace(batch, audio=batch.audio.double())


def assert_equal(packed, apart):
    assert len(packed) == len(apart)
    for got, want in zip(packed, apart):
        assert_same_formula(got, want)


@pytest.mark.parametrize(
    ("name", "layers", "keep_mode"),
    [
        ("vatt_ma_base", 2, "batch"),
        ("vatt_ma_base", 1, "sample"),
        ("vatt_ma_medium", 1, "batch"),
        ("vatt_ma_large", 1, "batch"),
    ],
)
def test_equal_to_separate_passes(name, layers, keep_mode):
    """Features and the gradient of every parameter."""
    module = model(name, keep_mode=keep_mode, shared={"num_layers": layers, "dropout": 0.0}).double()
    packed, apart = (run(module, in_double(clips()), packed) for packed in (True, False))
    assert len(packed) > 3 + 16 * layers
    assert_equal(packed, apart)


@pytest.mark.parametrize("absent", ["video", "audio", "text"])
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_any_two_modalities(impl, absent):
    module = model(shared={"num_layers": 1, "dropout": 0.0}).double()
    batch = in_double(replace(clips(), **{absent: None}))
    with use_impl(attention=impl):
        assert_equal(*(run(module, batch, packed) for packed in (True, False)))


def test_the_batch_size_decides(monkeypatch):
    calls = []
    monkeypatch.setattr(vatt, "PACKED_UP_TO", {"cpu": B})
    module, batch = model().eval(), clips()
    packed = type(module.backbone)._encode_packed
    monkeypatch.setattr(type(module.backbone), "_encode_packed", lambda *args: calls.append(0) or packed(*args))
    with torch.no_grad():
        together = module(batch)
        module(Batch(video=batch.video))  # nothing to pack
        module(Batch(**{name: torch.cat([x, x]) for name, x in batch.tensors().items()}))
        module.config = replace(module.config, packed=False)
        apart = module(batch)
    assert len(calls) == 1
    assert [e.shape for e in together] == [e.shape for e in apart] == [(B, 512), (B, 512), (B, 256), (B, 2, 256)]
    for got, want in zip(together, apart):
        assert_same_sums(got, want, Sum(3072 + LAYERS + 768))  # patches, layers, heads


@pytest.mark.parametrize("change", [{"backbone": "specific"}, {"shared": {"num_layers": 2, "keep_rates": (1.0, 0.5)}}])
def test_packed_where_it_cannot_be(change):
    with pytest.raises(ValueError, match="packed must be false"):
        model(packed=True, **change)


def test_compiles():
    module = model().eval()
    x = randn(1, 40, 768)
    rest = {"key_mask": torch.rand(1, 12) > 0.3, "cu_seqlens": [0, 14, 28, 34, 40]}
    compiled = torch.compile(module.backbone.transformer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_sums(compiled(x, **rest), module.backbone.transformer(x, **rest), Sum(LAYERS))


def test_a_row_of_another_sequence_has_no_part():
    module = model().double().eval()
    x = randn(1, 20, 768, dtype=torch.float64).requires_grad_()
    y = module.backbone.transformer(x, cu_seqlens=[0, 8, 20])
    (dx,) = gradients(y[:, 8:], [x])
    assert not dx[:, :8].any()
    assert dx[:, 8:].any(-1).all()
