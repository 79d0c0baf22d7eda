"""Models by name: `create_model("vatt_mbs")`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from vatt_engine import schema
from vatt_engine.models.config import (
    AudioConfig,
    EncoderConfig,
    HeadConfig,
    PositionConfig,
    TextConfig,
    TransformerConfig,
    VATTConfig,
    VideoConfig,
)
from vatt_engine.models.vatt import VATT, build_encoder

ModelConfig = VATTConfig | EncoderConfig

# Paper, Table 7; T5-Base is the official configuration of that name.
_SIZES = {
    "base": TransformerConfig(num_layers=12, dim=768, ff_dim=3072, num_heads=12),
    "medium": TransformerConfig(num_layers=12, dim=1024, ff_dim=4096, num_heads=16),
    "large": TransformerConfig(num_layers=24, dim=1024, ff_dim=4096, num_heads=16),
}
_SMALL_TEXT = TextConfig()
_BASE_TEXT = TextConfig(transformer=replace(_SIZES["base"], bias=False))


def _specific(name: str, video: str, audio: str) -> VATTConfig:
    return VATTConfig(
        name=name,
        video=VideoConfig(transformer=_SIZES[video]),
        audio=AudioConfig(transformer=_SIZES[audio]),
        text=_SMALL_TEXT,
    )


def _agnostic(name: str, size: str) -> VATTConfig:
    return VATTConfig(
        name=name,
        backbone="agnostic",
        video=VideoConfig(pre_projection=True),
        audio=AudioConfig(pre_projection=True),
        shared=_SIZES[size],
    )


def _tiny(name: str) -> VATTConfig:
    """The demo's model: 4 layers of width 128 on 8 frames of 48 x 48 and 9,600 samples; trains on a CPU."""
    transformer = TransformerConfig(num_layers=4, dim=128, ff_dim=256, num_heads=4, head_dim=32, dropout=0.0)
    position = PositionConfig(dropout=0.0)
    return VATTConfig(
        name=name,
        video=VideoConfig(
            num_frames=8,
            frame_size=(48, 48),
            patch=(4, 8, 8),
            patch_init="dense",
            transformer=transformer,
            position=position,
        ),
        audio=AudioConfig(num_samples=9600, patch_init="dense", transformer=transformer, position=position),
        text=TextConfig(vocabulary_size=1024, embedding_dim=64, transformer=replace(transformer, bias=False)),
        heads=HeadConfig(video_audio_dim=128, video_text_dim=128),
    )


_MODELS: dict[str, Callable[[str], ModelConfig]] = {
    "vatt_bbs": lambda name: _specific(name, "base", "base"),
    "vatt_mbs": lambda name: _specific(name, "medium", "base"),
    "vatt_lbs": lambda name: _specific(name, "large", "base"),
    "vatt_ma_base": lambda name: _agnostic(name, "base"),
    "vatt_ma_medium": lambda name: _agnostic(name, "medium"),
    "vatt_ma_large": lambda name: _agnostic(name, "large"),
    "vatt_tiny": _tiny,
    "spt_base": lambda name: EncoderConfig(
        name=name,
        modality="audio",
        classifier_dropout=0.0,
        audio=AudioConfig(
            input="spectrogram",
            patch=(16, 5),
            drop_token=replace(AudioConfig().drop_token, keep_rate=1.0),
            transformer=replace(_SIZES["base"], bias=False),
        ),
    ),
    "t5_small": lambda name: EncoderConfig(name=name, modality="text", text=_SMALL_TEXT),
    "t5_base": lambda name: EncoderConfig(name=name, modality="text", text=_BASE_TEXT),
    "linear_text": lambda name: EncoderConfig(name=name, modality="text", text=TextConfig(encoder="linear")),
}
for _size, _transformer in _SIZES.items():
    _MODELS[f"vit_{_size}"] = lambda name, t=_transformer: EncoderConfig(
        name=name, modality="video", video=VideoConfig(transformer=t)
    )
    _MODELS[f"wat_{_size}"] = lambda name, t=_transformer: EncoderConfig(
        name=name, modality="audio", audio=AudioConfig(transformer=t), classifier_dropout=0.0
    )


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, filtered by a shell pattern.

    >>> list_models("vatt_ma_*")
    ['vatt_ma_base', 'vatt_ma_large', 'vatt_ma_medium']
    """
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration behind a name; overrides as for `create_model`.

    Raises:
        ValueError: no such model, or no such field in it.
    """
    if name not in _MODELS:
        hint = schema.nearest(name, list_models())
        raise ValueError(f"create_model: name must be one of list_models(), got {name!r}. {hint}")
    return schema.replace(_MODELS[name](name), overrides, where="create_model")


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build a model by name, with freshly initialised weights.

    Args:
        name: one of `list_models()`; vatt_* are whole models, the others single encoders.
        overrides: fields of its config, nested as dicts or with dots: `video={"num_frames": 16}` or
            `**{"video.drop_token.keep_rate": 0.25}`; `num_classes=400` on a video or audio encoder adds a classifier.

    Raises:
        ValueError: an unknown name, field or value.

    Sizes are those of the official constructors: 212, 279 and 430 M parameters for the backbones of vatt_bbs, vatt_mbs
    and vatt_lbs, 181 M for vatt_ma_medium's. The paper's 197, 264 and 415 M add up the towers of its Table 7, and its
    155 M are the table's Medium; word vectors are left out.

    Source: paper Table 7 and official vatt/configs.

    >>> create_model("vatt_tiny", video={"frame_size": (32, 32)}).config.video.grid
    (2, 4, 4)
    """
    return build_model(model_config(name, **overrides))


def build_model(config: ModelConfig) -> nn.Module:
    """The module that a config describes."""
    return VATT(config) if isinstance(config, VATTConfig) else build_encoder(config)
