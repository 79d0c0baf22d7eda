"""Official TensorFlow variables into every module of ours: names, layouts, and what a bad set reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vatt_engine.interop import load_tf_vatt, read_npz
from vatt_engine.models import VATT, VATTConfig
from vatt_engine.models.config import AudioConfig, HeadConfig, TextConfig, TransformerConfig, VideoConfig
from vatt_engine.models.heads import Classifier, FactorizedHeads, JointHeads
from vatt_engine.models.text import LinearTextEncoder, TextEncoder
from vatt_engine.models.vatt import AgnosticBackbone, PatchEncoder
from vatt_engine.testing import Sum, assert_same_sums

NAMES = json.loads((Path(__file__).parents[1] / "golden" / "tf_variables.json").read_text())
SMALL = TransformerConfig(num_layers=2, dim=32, ff_dim=64, num_heads=4, head_dim=8)
NO_BIAS = replace(SMALL, bias=False)
VIDEO = VideoConfig(num_frames=8, frame_size=(24, 32), patch=(4, 8, 8), transformer=SMALL)
TEXT = TextConfig(vocabulary_size=50, embedding_dim=12, transformer=NO_BIAS)
HEADS = HeadConfig(video_audio_dim=16, video_text_dim=8)
FINE_TUNED = replace(VIDEO, pre_projection=True, post_projection=24)
SPECTROGRAM = AudioConfig(input="spectrogram", num_samples=24 * 1024, num_mels=20, patch=(8, 5), transformer=NO_BIAS)
AGNOSTIC = VATTConfig(
    backbone="agnostic",
    video=replace(VIDEO, frame_size=(24, 24), pre_projection=True),
    audio=AudioConfig(num_samples=256, patch=(16,), pre_projection=True),
    text=TEXT,
    shared=SMALL,
    shared_projection=24,
)
WHOLE = VATTConfig(
    video=replace(VIDEO, frame_size=(16, 16)),
    audio=AudioConfig(num_samples=128, patch=(16,), transformer=SMALL),
    text=TEXT,
    heads=HEADS,
)
MODULES = {
    "a_video_vitx3d": lambda: PatchEncoder(VIDEO),
    "a3_video_finetune_ma_views": lambda: Classifier(PatchEncoder(FINE_TUNED), 7, 0.5),
    "b_audio_autx1d": lambda: PatchEncoder(AudioConfig(num_samples=256, patch=(16,), transformer=SMALL)),
    "b2_audio_autx2d_spectrogram": lambda: PatchEncoder(SPECTROGRAM),
    "c_text_t5": lambda: TextEncoder(TEXT),
    "d_head_fac_syncbn": lambda: FactorizedHeads(HEADS, 32, 24, 20),
    "d_head_fac_bn": lambda: FactorizedHeads(HEADS, 32, 24, 20),
    "d_head_joint_bn": lambda: JointHeads(HEADS, 32, 24, 20),
    "f_unified_uvatt": lambda: AgnosticBackbone(AGNOSTIC),
    "j_end_to_end_txfac": lambda: VATT(WHOLE),
}


def variables(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in NAMES[name].items()}


def test_every_official_module_is_covered():
    assert MODULES.keys() == NAMES.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_loads_one_to_one(name):
    model, given = MODULES[name](), variables(name)
    report = load_tf_vatt(model, given)
    assert report.complete
    assert sum(v.numel() for v in model.state_dict().values()) == sum(v.size for v in given.values())
    loaded = torch.cat([v.flatten() for v in model.state_dict().values()]).double().sort().values
    wanted = torch.as_tensor(np.concatenate([v.ravel() for v in given.values()])).double().sort().values
    assert torch.equal(loaded, wanted)


def test_layouts():
    """Dense kernels are transposed, Conv kernels flattened patch first, q, k and v stacked."""
    model, given = PatchEncoder(VIDEO), variables("a_video_vitx3d")
    load_tf_vatt(model, given)
    prefix = "w/video_module/vit_base/"
    kernel = given[prefix + "voxel_to_patch/kernel"]
    assert model.stem.patch.weight[5].view(4, 8, 8, 3)[1, 2, 3, 2] == torch.tensor(kernel[1, 2, 3, 2, 5])
    attention = model.transformer.layers[1].attention
    key = given[prefix + "transformer/layer_1/multi_head_attention/k/kernel"]
    assert torch.equal(attention.qkv.weight[32:64], torch.as_tensor(key.T))
    bias = given[prefix + "transformer/layer_1/multi_head_attention/v/bias"]
    assert torch.equal(attention.qkv.bias[64:], torch.as_tensor(bias))


def test_a_tower_out_of_a_whole_checkpoint():
    given = variables("j_end_to_end_txfac")
    tower = TextEncoder(TEXT)
    report = load_tf_vatt(tower, given, strict=False)
    assert not report.missing
    assert not report.misshaped
    assert all("text_module" not in name for name in report.unused)
    name = "w_text/text_module/t5_small/layer_0/feed_forward/layer_norm/gamma"
    assert torch.equal(tower.transformer.layers[0].ff_norm.weight, torch.as_tensor(given[name]))


@pytest.mark.parametrize(("modality", "shape"), [("video", (2, 8, 24, 24, 3)), ("audio", (2, 256))])
def test_a_tower_out_of_the_agnostic_backbone(modality, shape):
    """As official fine-tuning restores one: pre_projection, post_projection and the shared transformer."""
    given = variables("f_unified_uvatt")
    backbone = AgnosticBackbone(AGNOSTIC).eval()
    load_tf_vatt(backbone, given)
    tower = PatchEncoder(replace(getattr(AGNOSTIC, modality), post_projection=24, transformer=SMALL)).eval()
    report = load_tf_vatt(tower, given, strict=False)
    assert not report.missing
    assert not report.misshaped
    x = torch.rand(shape) * 2 - 1
    assert torch.equal(tower(x), backbone(modality, x))


def test_linear_text_encoder():
    rng = np.random.default_rng(0)
    given = {
        "text_module/embedding/embeddings:0": rng.standard_normal((50, 12), np.float32),
        "text_module/linear_lm/text_conv1/kernel:0": rng.standard_normal((1, 12, 6), np.float32),
        "text_module/linear_lm/text_conv1/bias:0": rng.standard_normal(6, np.float32),
    }
    model = LinearTextEncoder(replace(TEXT, encoder="linear", linear_dim=6))
    load_tf_vatt(model, given)
    words = torch.tensor([[3, 7, 0]])
    word_vectors, kernel, bias = given.values()
    expected = np.maximum(word_vectors[[3, 7, 0]] @ kernel[0] + bias, 0).max(0)
    assert_same_sums(model(words)[0, 0], torch.as_tensor(expected), Sum(12 + 1))


def test_report_names_every_fault():
    given = variables("a_video_vitx3d")
    prefix = "w/video_module/vit_base/"
    del given[prefix + "transformer/layer_0/multi_head_attention/q/kernel"]
    given[prefix + "voxel_to_patch/kernel"] = np.zeros((8, 4, 8, 3, 32), np.float32)  # same size, other patch
    given["w/global_step"] = np.zeros(1)
    with pytest.raises(ValueError, match="must match the PatchEncoder one to one") as caught:
        load_tf_vatt(PatchEncoder(VIDEO), given)
    message = str(caught.value)
    missing = (
        "missing: transformer.layers.0.attention.qkv.weight (from transformer/layer_0/multi_head_attention/q/kernel)"
    )
    assert missing in message
    assert "misshaped: stem.patch.weight" in message
    assert "unused: w/global_step" in message


def test_ambiguous_names_are_refused():
    given = variables("d_head_fac_bn")
    given["other/vid_to_hid/kernel"] = given["w/vid_to_hid/kernel"]
    with pytest.raises(ValueError, match="must name one variable"):
        load_tf_vatt(FactorizedHeads(HEADS, 32, 24, 20), given)


def test_positions_resample_on_request():
    model = PatchEncoder(replace(VIDEO, frame_size=(48, 32)))
    given = variables("a_video_vitx3d")
    with pytest.raises(ValueError, match=r"misshaped: stem\.position\.tables\.1"):
        load_tf_vatt(model, given)
    load_tf_vatt(model, given, resample_positions=True)
    table = given["w/video_module/vit_base/spatio_temporal_embeddings/vertical_position_embeddings/embeddings"]
    assert_same_sums(model.stem.position.tables[1][::2], torch.as_tensor(table), Sum(3))  # i/3 are knots


def test_npz_never_unpickles(tmp_path):
    np.savez(tmp_path / "evil.npz", a=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match=r"must be an \.npz of plain arrays"):
        read_npz(tmp_path / "evil.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"must be an \.npz of plain arrays"):
        read_npz(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "absent.npz")
