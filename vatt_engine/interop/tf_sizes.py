"""Which model an official checkpoint is, from the shapes of its variables alone.

All sizes stand in the shapes but two: how wide an attention head is (64 in every official config; the text tower's
shows in its table of relative positions), and how many words a modality-specific model reads (16). Published files are
all called ckpt-<step>, so their names tell nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vatt_engine.models import EncoderConfig, VATTConfig, model_config
from vatt_engine.models.config import (
    AudioConfig,
    HeadConfig,
    TextConfig,
    TransformerConfig,
    VideoConfig,
    spectrogram_frame,
)
from vatt_engine.models.registry import ModelConfig

Shape = tuple[int, ...]
HEAD_DIM = 64
_CLASSIFIER = "classification/weights/kernel"


def config_of_shapes(shapes: Mapping[str, Shape], head_dim: Sequence[int] = ()) -> ModelConfig:
    """The config of the model with these variables, by `object_names`' names.

    Args:
        shapes: by name.
        head_dim: width of an attention head: none for 64, one for all, or two, video's and audio's.

    Raises:
        ValueError: a variable is missing or has no such shape, or the heads' width does not fit.

    >>> config_of_shapes(shapes).shared.num_heads  # doctest: +SKIP
    16
    """
    if not 0 <= len(head_dim) <= 2 or any(width < 1 for width in head_dim):
        raise ValueError(f"--head-dim must be one number from 1, or two (video's and audio's), got {list(head_dim)}.")
    sizes = _Sizes(shapes, tuple(head_dim))
    if _CLASSIFIER in shapes:
        return _classifier(sizes)
    if sizes.has("unified_module/"):
        return _agnostic(sizes)
    return _specific(sizes)


class _Sizes:
    """Shapes by name, and what is said when one is not there."""

    def __init__(self, shapes: Mapping[str, Shape], head_dim: tuple[int, ...]) -> None:
        self.shapes, self.head_dim = shapes, head_dim

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)

    def of(self, name: str, axes: int) -> Shape:
        shape = self.shapes.get(name)
        if shape is None or len(shape) != axes or min(shape) < 1:
            scope = name.partition("/")[0]
            others = [other for other in self.shapes if other.startswith(f"{scope}/")]
            got = f"shape {list(shape)}" if shape is not None else f"none, but {min(others)}" if others else "none"
            raise ValueError(
                f"the checkpoint must hold {name} with {axes} axes, got {got}. Models of VATT's ViT, waveform and "
                "spectrogram towers, with T5-style or linear text, can be read."
            )
        return shape

    def width(self, modality: str, inner: int) -> int:
        """Of a head, given all heads' width."""
        place = min(("video", "audio").index(modality), len(self.head_dim) - 1) if self.head_dim else -1
        width = self.head_dim[place] if place >= 0 else HEAD_DIM
        if inner % width:
            hint = (
                "It is the one size that the file does not hold: give it with --head-dim N, or --head-dim VIDEO AUDIO."
            )
            expected = f"divide the {inner} columns of the {modality} tower's queries"
            raise ValueError(f"--head-dim must {expected}, got {width}. {hint}")
        return width


def _classifier(sizes: _Sizes) -> EncoderConfig:
    classes = sizes.of(_CLASSIFIER, 2)[1]
    if sizes.has("video_module/"):
        video = _video(sizes)
        name = _nearest("vit", ("base", "medium", "large"), lambda known: known.video.transformer == video.transformer)
        return EncoderConfig(name=name, modality="video", video=video, num_classes=classes)
    audio = _audio(sizes)
    kind = "spt" if audio.input == "spectrogram" else "wat"
    sizes_known = ("base",) if kind == "spt" else ("base", "medium", "large")
    name = _nearest(kind, sizes_known, lambda known: known.audio.transformer == audio.transformer)
    return EncoderConfig(name=name, modality="audio", audio=audio, num_classes=classes, classifier_dropout=0.0)


def _specific(sizes: _Sizes) -> VATTConfig:
    video, audio, text = _video(sizes), _audio(sizes), _text(sizes)

    def same(known: VATTConfig) -> bool:
        pairs = ((known.video, video), (known.audio, audio), (known.text, text))
        return all(theirs.transformer == ours.transformer for theirs, ours in pairs)

    name = _nearest("vatt", ("bbs", "mbs", "lbs"), same)
    return VATTConfig(name=name, video=video, audio=audio, text=text, heads=_heads(sizes))


def _agnostic(sizes: _Sizes) -> VATTConfig:
    scope = "unified_module/"
    samples = sizes.of(f"{scope}waveform_to_patch/kernel", 3)[0]
    words, width = sizes.of(f"{scope}text_embedding/embeddings", 2)
    last = {modality: sizes.of(f"{scope}{modality}_post_tx_projection/kernel", 2)[1] for modality in _MODALITIES}
    if len(set(last.values())) > 1:
        raise ValueError(f"the last projections must have one width, got {last}.")
    for modality in _MODALITIES:
        sizes.of(f"{scope}{modality}_pre_tx_projection/kernel", 2)
    shared = _transformer(sizes, f"{scope}transformer/", "video")
    return VATTConfig(
        name=_nearest("vatt_ma", ("base", "medium", "large"), lambda known: known.shared == shared),
        backbone="agnostic",
        video=VideoConfig(pre_projection=True, **_clip(sizes, scope, "video_spatio_temporal_embeddings")),
        audio=AudioConfig(
            num_samples=samples * _table(sizes, f"{scope}audio_temporal_embeddings", "temporal"),
            patch=(samples,),
            pre_projection=True,
        ),
        text=TextConfig(
            vocabulary_size=words,
            embedding_dim=width,
            max_words=_table(sizes, f"{scope}text_temporal_embeddings", "temporal"),
        ),
        shared=shared,
        shared_projection=last["video"],
        heads=_heads(sizes),
    )


_MODALITIES = ("video", "audio", "text")


def _video(sizes: _Sizes) -> VideoConfig:
    scope = "video_module/"
    return VideoConfig(
        transformer=_transformer(sizes, f"{scope}transformer/", "video"),
        **_clip(sizes, scope, "spatio_temporal_embeddings"),
        **_projections(sizes, scope),
    )


def _clip(sizes: _Sizes, scope: str, positions: str) -> dict[str, Any]:
    """Patches of a video tower, and the clip that its tables of positions cover."""
    patch = sizes.of(f"{scope}voxel_to_patch/kernel", 5)[:3]
    tables = [_table(sizes, f"{scope}{positions}", axis) for axis in ("temporal", "vertical", "horizontal")]
    frames, *size = (places * step for places, step in zip(tables, patch))
    return {"num_frames": frames, "frame_size": tuple(size), "patch": tuple(patch)}


def _audio(sizes: _Sizes) -> AudioConfig:
    scope = "audio_module/"
    more = {"transformer": _transformer(sizes, f"{scope}transformer/", "audio"), **_projections(sizes, scope)}
    if not sizes.has(f"{scope}spectrum_to_patch/"):
        patch = sizes.of(f"{scope}waveform_to_patch/kernel", 3)[0]
        return AudioConfig(
            num_samples=patch * _table(sizes, f"{scope}temporal_embeddings", "temporal"), patch=(patch,), **more
        )
    patch = sizes.of(f"{scope}spectrum_to_patch/kernel", 4)[:2]
    grid = tuple(_table(sizes, f"{scope}spectro_temporal_embeddings", axis) for axis in ("temporal", "spectoral"))
    known = replace(model_config("spt_base").audio, patch=tuple(patch), **more)
    # A table counts whole patches; the official 3.2 s and 80 bands have a remainder, which only their config tells.
    num_samples = (
        known.num_samples if known.grid[0] == grid[0] else grid[0] * patch[0] * spectrogram_frame(known.sample_rate)[1]
    )
    num_mels = known.num_mels if known.grid[1] == grid[1] else grid[1] * patch[1]
    return replace(known, num_samples=num_samples, num_mels=num_mels)


def _text(sizes: _Sizes) -> TextConfig:
    scope = "text_module/"
    words, width = sizes.of(f"{scope}embedding/embeddings", 2)
    common = {"vocabulary_size": words, "embedding_dim": width}
    if sizes.has(f"{scope}text_conv1/"):
        return TextConfig(encoder="linear", linear_dim=sizes.of(f"{scope}text_conv1/kernel", 3)[2], **common)
    layer = f"{scope}layer_0/"
    buckets, heads = sizes.of(f"{layer}self_attention/relative_attention_bias/embeddings", 2)
    inner = sizes.of(f"{layer}self_attention/q/kernel", 2)[1]
    if inner % heads:
        raise ValueError(
            f"the text tower's {heads} heads must divide the {inner} columns of its queries, got a remainder."
        )
    return TextConfig(
        num_buckets=buckets,
        transformer=TransformerConfig(
            num_layers=_num_layers(sizes, scope),
            dim=sizes.of(f"{scope}pre_proj/kernel", 2)[1],
            ff_dim=sizes.of(f"{layer}feed_forward/dense_gelu_dense/wi/kernel", 2)[1],
            num_heads=heads,
            head_dim=inner // heads,
            bias=False,
        ),
        **common,
    )


def _heads(sizes: _Sizes) -> HeadConfig:
    if sizes.has("vid_to_vat/"):
        dim = sizes.of("vid_to_vat/linear_projection/kernel", 2)[1]
        return HeadConfig(kind="joint", video_audio_dim=dim, video_text_dim=dim)
    dims = [sizes.of(f"{name}/linear_projection/kernel", 2)[1] for name in ("hid_to_va", "va_to_vat")]
    return HeadConfig(video_audio_dim=dims[0], video_text_dim=dims[1])


def _transformer(sizes: _Sizes, scope: str, modality: str) -> TransformerConfig:
    layer = f"{scope}layer_0/"
    dim, inner = sizes.of(f"{layer}multi_head_attention/q/kernel", 2)
    width = sizes.width(modality, inner)
    return TransformerConfig(
        num_layers=_num_layers(sizes, scope),
        dim=dim,
        ff_dim=sizes.of(f"{layer}feed_forward/dense_gelu_dense/wi/kernel", 2)[1],
        num_heads=inner // width,
        head_dim=width,
        bias=f"{layer}multi_head_attention/q/bias" in sizes.shapes,
    )


def _projections(sizes: _Sizes, scope: str) -> dict[str, int | bool]:
    """The Dense layers around the transformer, which towers out of a modality-agnostic model have."""
    post = f"{scope}post_tx_projection/kernel"
    width = sizes.of(post, 2)[1] if post in sizes.shapes else 0
    return {"pre_projection": sizes.has(f"{scope}pre_tx_projection/"), "post_projection": width}


def _table(sizes: _Sizes, layer: str, axis: str) -> int:
    return sizes.of(f"{layer}/{axis}_position_embeddings/embeddings", 2)[0]


def _num_layers(sizes: _Sizes, scope: str) -> int:
    pattern = re.compile(re.escape(scope) + r"layer_(\d+)/")
    return len({match[1] for name in sizes.shapes if (match := pattern.match(name))})


def _nearest(kind: str, known: Sequence[str], same: Callable[[Any], bool]) -> str:
    """The registry's name of the same transformers, else the kind alone."""
    return next((f"{kind}_{size}" for size in known if same(model_config(f"{kind}_{size}"))), kind)
