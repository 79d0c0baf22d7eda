"""Checkpoints of the official trainers: their names, sizes and numbers, in and out again."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from interop.official import FOLDERS, HEAD_DIMS, worst_error

from vatt_engine.interop import load_tf_vatt, read_tf_checkpoint
from vatt_engine.interop.tf_export import GRAPH, _matched, write_tf_checkpoint
from vatt_engine.interop.tf_model import official_model
from vatt_engine.interop.tf_names import VALUE, object_names
from vatt_engine.interop.tf_sizes import config_of_shapes
from vatt_engine.models import VATT, EncoderConfig, VATTConfig, build_model, model_config, read_config
from vatt_engine.models.config import AudioConfig, HeadConfig, TextConfig, TransformerConfig, VideoConfig

SMALL = TransformerConfig(num_layers=2, dim=16, ff_dim=24, num_heads=2, head_dim=8)
TINY = VATTConfig(
    name="vatt",
    video=VideoConfig(num_frames=4, frame_size=(16, 24), patch=(2, 8, 8), transformer=SMALL),
    audio=AudioConfig(num_samples=96, patch=(16,), transformer=SMALL),
    text=TextConfig(vocabulary_size=30, embedding_dim=6, transformer=dataclasses.replace(SMALL, bias=False)),
    heads=HeadConfig(video_audio_dim=12, video_text_dim=10),
)
SPECTROGRAM = dataclasses.replace(
    model_config("spt_base").audio,
    num_samples=20 * 1024,
    patch=(4, 5),
    num_mels=20,
    transformer=dataclasses.replace(SMALL, bias=False),
)
VARIANTS = {
    "specific": TINY,
    "joint heads": dataclasses.replace(TINY, heads=HeadConfig(kind="joint", video_audio_dim=9, video_text_dim=9)),
    "linear text": dataclasses.replace(
        TINY, text=TextConfig(encoder="linear", vocabulary_size=30, embedding_dim=6, linear_dim=7)
    ),
    "spectrogram": dataclasses.replace(TINY, audio=SPECTROGRAM),
    "towers with projections": dataclasses.replace(
        TINY, video=dataclasses.replace(TINY.video, pre_projection=True, post_projection=14)
    ),
    "agnostic": VATTConfig(
        name="vatt_ma",
        backbone="agnostic",
        video=VideoConfig(num_frames=4, frame_size=(16, 16), patch=(2, 8, 8), pre_projection=True),
        audio=AudioConfig(num_samples=96, patch=(16,), pre_projection=True),
        text=TextConfig(vocabulary_size=30, embedding_dim=6, max_words=5),
        shared=SMALL,
        shared_projection=14,
        heads=HeadConfig(video_audio_dim=12, video_text_dim=10),
    ),
    "sounds": EncoderConfig(
        name="wat",
        modality="audio",
        num_classes=3,
        classifier_dropout=0.0,
        audio=dataclasses.replace(TINY.audio, pre_projection=True, post_projection=14),
    ),
    "sounds of a spectrogram": EncoderConfig(
        name="spt", modality="audio", num_classes=3, classifier_dropout=0.0, audio=SPECTROGRAM
    ),
}
FULL_SIZE = {
    "vatt_bbs": model_config("vatt_bbs"),
    "vatt_ma_medium": model_config("vatt_ma_medium"),
    "vit_base at 320": model_config("vit_base", num_classes=400, video={"frame_size": (320, 320)}),
    "wat_medium": model_config("wat_medium", num_classes=527),
    "spt_base": model_config("spt_base", num_classes=527),
}


def opened(name: str):
    return official_model(read_tf_checkpoint(FOLDERS / name), head_dim=HEAD_DIMS[name])


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every number of a model drawn anew, so that no two tensors are alike."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(value.shape, generator=generator) for name, value in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------ names and sizes


@pytest.mark.parametrize("name", HEAD_DIMS)
def test_names_are_keras(name):
    """Against TensorFlow's own walk over the objects, without the scopes that every variable of a tower shares."""
    document = json.loads((FOLDERS / name / "names.json").read_text())
    found = object_names(document["keras_name_of"])
    of_key = {key: ours for ours, key in found.variables.items()}
    assert of_key.keys() == document["keras_name_of"].keys()
    dropped = {"backbone_stack", "unified_backbone", "head_stack", "bridge", "mlp_fac", "tx_mlp_fac", "uvatt_mlp_fac"}
    dropped |= {"vit_base", "wat_base", "t5_small", "ut_base", "vit_medium", "wat_medium"}
    # The paths tell the two BatchNorms apart; two layers of the heads go by their attribute.
    heads = {"bn": "batch_norm", "pre_bn": "batch_norm", "aud_to_va": "aud_to_vid", "txt_to_vat": "txt_to_vid"}
    for key, keras in document["keras_name_of"].items():
        wanted = [part for part in keras.removesuffix(":0").split("/") if part not in dropped]
        got = [heads.get(part, part) for part in of_key[key].split("/")]
        if wanted[1:3] == ["classification", "weights"]:
            wanted = wanted[1:]
        assert got == wanted, key


@pytest.mark.parametrize("name", HEAD_DIMS)
def test_the_config_is_in_the_shapes(name):
    wanted = read_config(FOLDERS / name / "model.json")
    found = opened(name).config
    if name == "tx":  # no shape tells how many words a modality-specific model reads
        wanted = dataclasses.replace(wanted, text=dataclasses.replace(wanted.text, max_words=16))
    assert dataclasses.replace(found, name=wanted.name) == wanted


@pytest.mark.parametrize("name", [*VARIANTS, *FULL_SIZE])
def test_every_kind_of_model_is_found_out(name):
    config = (VARIANTS | FULL_SIZE)[name]
    matches, _, _ = _matched(config, ["iter"])
    shapes = {key: source.shape for one in matches for key, source in zip(one.keys, one.rule.sources)}
    assert config_of_shapes(shapes, () if name in FULL_SIZE else (8,)) == config


def test_a_width_of_heads_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"ckpt-4\.index: --head-dim must divide the 24 columns .* got 64\."):
        official_model(read_tf_checkpoint(FOLDERS / "tx"))
    with pytest.raises(ValueError, match="--head-dim must divide the 16 columns of the audio tower's queries, got 6"):
        official_model(read_tf_checkpoint(FOLDERS / "tx"), head_dim=(6,))


# ------------------------------------------------------------------------------------------------ numbers in


@pytest.mark.parametrize("name", HEAD_DIMS)
def test_outputs_are_tensorflows(name, capsys):
    found = opened(name)
    model = build_model(found.config)
    report = load_tf_vatt(model, found.checkpoint)
    assert report.complete
    assert capsys.readouterr().err.count("\n") == 1
    errors = worst_error(model.eval(), name)
    assert max(errors.values()) <= 2e-6, errors
    weights = dict(found.weights())
    assert weights.keys() == model.state_dict().keys()
    assert all(np.array_equal(weights[key], value.numpy()) for key, value in model.state_dict().items())


def test_moments_are_those_of_their_parameters():
    """Adam's slots in our layout, by the rules that the weights go by; none for word vectors and statistics."""
    found = opened("tx")
    moments = dict(found.moments())
    assert found.optimizer == "adam"
    assert found.step == 4
    assert found.frozen == ["text.embedding.weight"]
    trained = {name for name, _ in create_like(found).named_parameters()} - set(found.frozen)
    assert moments.keys() == {f"{name}/{moment}" for name in trained for moment in ("exp_avg", "exp_avg_sq")}
    base = "model/layer_with_weights-0/_base_layer/aud_backbone/_base/tx/layers/1/mha"
    slots = [found.checkpoint[f"{base}/{letter}/kernel/.OPTIMIZER_SLOT/optimizer/v{VALUE}"] for letter in "qkv"]
    assert np.array_equal(moments["audio.transformer.layers.1.attention.qkv.weight/exp_avg_sq"], np.hstack(slots).T)
    assert dict(opened("vit").moments()).keys() == {
        f"{name}/velocity" for name, _ in create_like(opened("vit")).named_parameters()
    }


def create_like(found) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(found.config)


def test_a_dump_of_the_checkpoint_is_taken_by_its_paths(capsys):
    """What a loop over tf.train.load_checkpoint gives, with read-only arrays, and the model below another object."""
    checkpoint = read_tf_checkpoint(FOLDERS / "ut")
    dump = {f"trainer/{key}": array for key, array in checkpoint.items()}
    for array in dump.values():
        array.flags.writeable = False
    model = VATT(opened("ut").config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_tf_vatt(model, dump)
    assert report.complete
    assert max(worst_error(model.eval(), "ut").values()) <= 2e-6
    message = capsys.readouterr().err
    assert message.startswith("load_tf_vatt: the 292 keys are paths of a TensorFlow 2 checkpoint; its 100 variables ")
    assert message.count("\n") == 1


def test_word_vectors_are_frozen_unless_they_were_trained():
    found = opened("tx")
    model = VATT(found.config)
    load_tf_vatt(model, found.checkpoint)
    assert not model.word_embedding.weight.requires_grad
    key = found.names.variables["text_module/embedding/embeddings"].removesuffix(VALUE)
    trained = {**found.checkpoint, f"{key}/.OPTIMIZER_SLOT/optimizer/m{VALUE}": found.checkpoint[key + VALUE]}
    model = VATT(found.config)
    load_tf_vatt(model, trained)
    assert model.word_embedding.weight.requires_grad
    text = dataclasses.replace(found.config.text, freeze_embedding=False)
    model = VATT(dataclasses.replace(found.config, text=text))
    load_tf_vatt(model, found.checkpoint)
    assert model.word_embedding.weight.requires_grad


@pytest.mark.parametrize("strict", [True, False])
def test_names_that_have_lost_a_batch_norm_are_refused(strict):
    """{v.name: v.numpy()} has 120 names for 124 variables: the second BatchNorm of hid_to_va replaces the first."""
    found = opened("tx")
    document = json.loads((FOLDERS / "tx" / "names.json").read_text())
    by_name = {name: found.checkpoint[key] for key, name in document["keras_name_of"].items()}
    assert len(by_name) == len(document["keras_name_of"]) - 4
    with pytest.raises(ValueError, match=r"must hold both BatchNorms of hid_to_va, not .*Give `read_tf_ch") as e:
        load_tf_vatt(VATT(found.config), by_name, strict=strict)
    assert "\n" not in str(e.value)
    assert load_tf_vatt(VATT(found.config).text, by_name, strict=False).missing == []  # no heads, no doubt


@pytest.mark.parametrize("strict", [True, False])
def test_loading_nothing_is_an_error(strict):
    with pytest.raises(ValueError, match=r"must (hold some of|match) the VATT") as caught:
        load_tf_vatt(VATT(TINY), {"a/b": np.ones(1), "c": np.ones(2)}, strict=strict)
    assert len(str(caught.value).splitlines()) <= 12


def test_variables_that_we_have_no_place_for_are_reported(tmp_path):
    """A model trained with masking has one more vector; so has one with an attribute that nobody knows."""
    checkpoint = dict(read_tf_checkpoint(FOLDERS / "wat"))
    root = "model/layer_with_weights-0/_base"
    checkpoint[f"{root}/mask_embedding{VALUE}"] = checkpoint[f"{root}/novelty/kernel{VALUE}"] = np.ones(16, np.float32)
    model = build_model(opened("wat").config)
    report = load_tf_vatt(model, checkpoint, strict=False)
    assert report.unused == ["audio_module/mask_embedding", "audio_module/novelty/kernel"]
    assert not report.missing
    assert max(worst_error(model.eval(), "wat").values()) <= 2e-6


def test_other_attributes_of_one_variable():
    """TensorFlow names a variable by the first attribute it meets; another version may meet another one first."""
    base, head = "model/layer-3/_base_layer", "model/layer-3/_head_layer/aud_to_va/bias"
    paths = {
        f"{base}/vid_backbone/_base/agg_token_embd": "video_module/agg_embedding",
        f"{base}/txt_backbone/agg_token_embd": "text_module/agg_embedding",
        head: "aud_to_va/bias",
    }
    assert object_names(path + VALUE for path in paths).variables == {n: p + VALUE for p, n in paths.items()}
    shared = f"{base}/unified_backbone/unified_transformer/agg_token/text{VALUE}"
    assert list(object_names([shared]).variables) == ["unified_module/txt_agg_embedding"]


def test_two_models_in_one_checkpoint_are_refused():
    path = "_base/agg_embedding" + VALUE
    with pytest.raises(ValueError, match="must hold one model, got those below a/ and b/"):
        object_names([f"a/{path}", f"b/{path}"])
    both = [f"m/_base/{name}{VALUE}" for name in ("agg_embedding", "agg_token_embd")]
    with pytest.raises(ValueError, match="agg_embedding must have one value, got those of m/_base/agg_emb"):
        object_names(both)


# ------------------------------------------------------------------------------------------------ numbers out


@pytest.mark.parametrize("name", HEAD_DIMS)
def test_what_is_written_is_what_the_official_trainer_wrote(tmp_path, name):
    """Every tensor and every byte of the graph of objects, which TensorFlow restores a checkpoint by."""
    found = opened(name)
    weights = {key: torch.from_numpy(array.copy()) for key, array in found.weights()}
    moments = {key: torch.from_numpy(array.copy()) for key, array in found.moments()}
    prefix = write_tf_checkpoint(tmp_path, found.config, weights, moments=moments, step=found.step)
    written = read_tf_checkpoint(tmp_path)
    assert prefix.name == "ckpt-4"
    assert written.keys() == found.checkpoint.keys()
    assert written[GRAPH].item() == found.checkpoint[GRAPH].item()
    for key in written.keys() - {GRAPH, f"save_counter{VALUE}"}:
        assert written[key].dtype == found.checkpoint[key].dtype
        assert np.array_equal(written[key], found.checkpoint[key]), key
    assert (tmp_path / "checkpoint").read_text().startswith('model_checkpoint_path: "ckpt-4"\n')


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_goes_out_and_comes_back(tmp_path, name):
    config = VARIANTS[name]
    given = state(build_model(config))
    write_tf_checkpoint(tmp_path, config, given, step=7)
    found = official_model(read_tf_checkpoint(tmp_path), head_dim=(8,))
    assert found.config == config
    assert found.step == 7
    assert not found.unused
    assert dict(found.moments()) == {}
    model = build_model(config)
    load_tf_vatt(model, found.checkpoint)
    assert all(torch.equal(value, given[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (dataclasses.replace(TINY, heads=dataclasses.replace(TINY.heads, style="paper")), "heads.style must be 'code'"),
        (
            dataclasses.replace(
                TINY,
                video=dataclasses.replace(TINY.video, position=dataclasses.replace(TINY.video.position, norm=False)),
            ),
            "a model that the official code has, got no video_module/spatio_temporal_embeddings/layer_norm/beta",
        ),
        (
            dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, relative_bias="first")),
            r"got text\.relative_bias 'first'",
        ),
        (model_config("t5_small"), "must be of a whole model, or of a video or audio tower, got t5_small"),
    ],
)
def test_a_model_that_the_official_code_has_not_is_refused(tmp_path, config, text):
    with pytest.raises(ValueError, match=text):
        write_tf_checkpoint(tmp_path / "out", config, {})
    assert not (tmp_path / "out").exists()
