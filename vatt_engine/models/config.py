"""What a model is, as frozen dataclasses; the named sizes of the paper are in `registry`.

Defaults follow the released code, since its results come from there; where the paper differs its choice is a value
of the field, and the field's comment says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

KeepMode = Literal["batch", "sample"]
# Fans of a patch projection's Glorot-uniform weight. "conv" is Keras' for a convolution: tokens start some 20 times
# smaller than their positions. "dense" is that of a Linear layer: tokens of unit size, so short runs learn sooner.
PatchInit = Literal["conv", "dense"]

# Of the spectrogram (official vatt/configs: stft_length, stft_step, and make_spectrogram's edges).
FRAME_SECONDS, STEP_SECONDS = 0.04267, 0.02134
MEL_RANGE = (80.0, 7600.0)  # hertz


def spectrogram_frame(sample_rate: int) -> tuple[int, int]:
    """Samples of a spectrogram's frame, and from one frame to the next.

    >>> spectrogram_frame(48_000), spectrogram_frame(16_000)
    ((2048, 1024), (682, 341))
    """
    return int(FRAME_SECONDS * sample_rate), int(STEP_SECONDS * sample_rate)


def _check(condition: bool, where: str, expectation: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{where} must {expectation}, got {value!r}.")


def _check_least(config: object, where: str, **least: int) -> None:
    for name, bound in least.items():
        _check(getattr(config, name) >= bound, f"{where}.{name}", f"be at least {bound}", getattr(config, name))


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A pre-LN transformer (paper section 3.2, Table 7): 12 layers of width 768 is Base."""

    num_layers: int = 12
    dim: int = 768
    ff_dim: int = 3072
    num_heads: int = 12
    head_dim: int = 64
    dropout: float = 0.1
    bias: bool = True  # of q, k, v, o and the feed-forward layers
    norm_eps: float = 1e-6  # of every norm (official; some ViTs have 1e-12)
    # Progressive DropToken, not in the paper: the share of its incoming tokens (AGG not counted, it always stays) that
    # each layer computes on in training, one number per layer; () keeps all. Text is never dropped.
    keep_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_least(self, "transformer", num_layers=1, dim=1, ff_dim=1, num_heads=1, head_dim=1)
        _check(0.0 <= self.dropout < 1.0, "transformer.dropout", "be in [0, 1)", self.dropout)
        _check(self.norm_eps > 0.0, "transformer.norm_eps", "be above 0", self.norm_eps)
        rates = self.keep_rates
        held = len(rates) in (0, self.num_layers) and all(0.0 < rate <= 1.0 for rate in rates)
        expected = f"be () or {self.num_layers} numbers in (0, 1], one per layer"
        _check(held, "transformer.keep_rates", expected, rates)


@dataclass(frozen=True, kw_only=True)
class DropTokenConfig:
    """Which part of the tokens a training step sees (paper section 3.3); evaluation sees all.

    The released code keeps int(keep_rate * N); `keep_multiple=128` rounds so that kept tokens + AGG fill whole tiles
    of 128 (767 + 1 of 1568 video tokens, 639 + 1 of 1200 audio tokens), so that attention in such tiles has no padding.
    """

    keep_rate: float = 0.5
    keep_mode: KeepMode = "batch"  # one permutation for the whole batch, or one per sample
    keep_multiple: int = 1

    def __post_init__(self) -> None:
        _check(0.0 < self.keep_rate <= 1.0, "drop_token.keep_rate", "be in (0, 1]", self.keep_rate)
        _check(self.keep_mode in ("batch", "sample"), "drop_token.keep_mode", "be 'batch' or 'sample'", self.keep_mode)
        _check_least(self, "drop_token", keep_multiple=1)

    def num_kept(self, num_tokens: int) -> int:
        """Tokens kept of `num_tokens`, AGG not counted."""
        if self.keep_rate == 1.0:
            return num_tokens
        kept = max(1, int(self.keep_rate * num_tokens))
        if self.keep_multiple > 1:
            tiles = max(1, round((kept + 1) / self.keep_multiple))
            kept = tiles * self.keep_multiple - 1
        return min(kept, num_tokens)


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """Sum of one learned table per axis, then LayerNorm, then dropout on token + position (official code).

    The paper's equations 1 and 2 have no LayerNorm: `norm=False`. They also add a position to AGG; a learned vector
    on top of the learned AGG is the same model, so there is no choice for it. `tables="frame"`, for video, is the
    layout of an image ViT with time added: one table over time, and one over all places of a frame.
    """

    tables: Literal["axis", "frame"] = "axis"
    norm: bool = True
    dropout: float = 0.1  # not tied to the transformer's: the released model keeps 0.1 even where that is 0

    def __post_init__(self) -> None:
        _check(0.0 <= self.dropout < 1.0, "position.dropout", "be in [0, 1)", self.dropout)
        _check(self.tables in ("axis", "frame"), "position.tables", "be 'axis' or 'frame'", self.tables)


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Video tower: voxel patches of [num_frames, *frame_size] clips. The sizes fix the position tables."""

    num_frames: int = 32
    frame_size: tuple[int, int] = (224, 224)  # height, width
    patch: tuple[int, int, int] = (4, 16, 16)  # frames, height, width
    patch_init: PatchInit = "conv"
    pre_projection: bool = False  # Dense + GELU before the position; the modality-agnostic models have it
    post_projection: int = 0  # width of the Dense + GELU behind the transformer; 0 for none
    drop_token: DropTokenConfig = field(default_factory=DropTokenConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)

    def __post_init__(self) -> None:
        _check_least(self, "video", post_projection=0)
        _check(min(self.patch) >= 1, "video.patch", "hold positive sizes", self.patch)
        _check(min(self.grid) >= 1, "video.patch", f"fit into {(self.num_frames, *self.frame_size)}", self.patch)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width; a remainder is cut off, as by a VALID convolution (paper: kept)."""
        sizes = (self.num_frames, *self.frame_size)
        return tuple(size // step for size, step in zip(sizes, self.patch))


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Audio tower: patches of the raw waveform, or of its log-mel spectrogram (the paper's ablation).

    The official spectrogram tower has neither DropToken nor biases in its transformer; `spt_base` is that.
    """

    input: Literal["waveform", "spectrogram"] = "waveform"
    num_samples: int = 153_600  # 3.2 s at 48 kHz
    # Samples per second. A spectrogram needs it to know the seconds of its steps and the hertz of its bands; patches
    # of a waveform are so many samples at any rate.
    sample_rate: int = 48_000
    patch: tuple[int, ...] = (128,)  # samples, or (spectrogram steps, mel bins)
    patch_init: PatchInit = "conv"
    num_mels: int = 80
    # The released code gives spectrogram patch n = t*S + s the position (t', s') = (n mod T, n div T); "grid" gives
    # it (t, s). The waveform has one axis and no such choice.
    spectrogram_positions: Literal["official", "grid"] = "official"
    pre_projection: bool = False
    post_projection: int = 0
    drop_token: DropTokenConfig = field(default_factory=DropTokenConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)

    def __post_init__(self) -> None:
        axes = 1 if self.input == "waveform" else 2
        _check(self.input in ("waveform", "spectrogram"), "audio.input", "be 'waveform' or 'spectrogram'", self.input)
        _check(len(self.patch) == axes, "audio.patch", f"have {axes} numbers for a {self.input}", self.patch)
        _check_least(self, "audio", post_projection=0)
        _check(self.position.tables == "axis", "audio.position.tables", "be 'axis'", self.position.tables)
        _check(min(self.patch) >= 1, "audio.patch", "hold positive sizes", self.patch)
        _check_least(self, "audio", sample_rate=1)
        if self.input == "spectrogram":
            lowest = math.ceil(2 * MEL_RANGE[1])
            expectation = f"be at least {lowest} for a spectrogram, whose bands reach {MEL_RANGE[1]:.0f} Hz"
            _check(self.sample_rate >= lowest, "audio.sample_rate", expectation, self.sample_rate)
        _check(min(self.grid) >= 1, "audio.patch", f"fit into {self.num_samples} samples", self.patch)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along time, and along frequency for a spectrogram."""
        if self.input == "waveform":
            return (self.num_samples // self.patch[0],)
        num_steps = math.ceil(self.num_samples / spectrogram_frame(self.sample_rate)[1])
        return (num_steps // self.patch[0], self.num_mels // self.patch[1])


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text tower: word vectors, then a T5-style encoder, or one linear layer and a maximum over words.

    In a modality-agnostic model the words go through the shared transformer and `encoder` is not used.
    """

    encoder: Literal["t5", "linear"] = "t5"
    # Of the t5 encoder. "code": Dense + GELU on word vectors, LayerNorm and GELU in the feed-forward; "t5": T5 itself,
    # no Dense (so embedding_dim is the transformer's width), RMS norm and ReLU; T5's own max_distance is 128.
    style: Literal["code", "t5"] = "code"
    vocabulary_size: int = 65_536
    max_words: int = 16
    embedding_dim: int = 300
    # None: trainable until word vectors are loaded, frozen from then on (the official word2vec is frozen;
    # the paper's equation reads as a learned projection: False).
    freeze_embedding: bool | None = None
    relative_bias: Literal["all", "first"] = "all"  # all layers reuse the first one's (code), or the first only (paper)
    num_buckets: int = 32
    max_distance: int = 64
    linear_dim: int = 2048
    position: PositionConfig = field(default_factory=PositionConfig)  # of the modality-agnostic model only
    transformer: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(num_layers=6, dim=512, ff_dim=2048, num_heads=8, bias=False)
    )

    def __post_init__(self) -> None:
        _check(self.encoder in ("t5", "linear"), "text.encoder", "be 't5' or 'linear'", self.encoder)
        _check(self.style in ("code", "t5"), "text.style", "be 'code' or 't5'", self.style)
        _check(self.position.tables == "axis", "text.position.tables", "be 'axis'", self.position.tables)
        if self.style == "t5" and self.embedding_dim != self.transformer.dim:
            width = f"equal text.transformer.dim {self.transformer.dim} for text.style 't5'"
            raise ValueError(f"text.embedding_dim must {width}, got {self.embedding_dim}.")
        _check(self.relative_bias in ("all", "first"), "text.relative_bias", "be 'all' or 'first'", self.relative_bias)
        _check_least(self, "text", vocabulary_size=2, max_words=1, embedding_dim=1, num_buckets=4, linear_dim=1)
        _check(not self.transformer.keep_rates, "text.transformer.keep_rates", "be ()", self.transformer.keep_rates)
        farthest = self.num_buckets // 4  # of the buckets that hold one distance each
        _check(self.max_distance > farthest, "text.max_distance", f"be above {farthest}", self.max_distance)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Projections into the common spaces (paper section 3.3)."""

    kind: Literal["factorized", "joint"] = "factorized"
    # "code": audio and text heads are one Dense with bias, ReLU before the video-text projection;
    # "paper": every linear layer is followed by BatchNorm, the video-text projection is linear.
    style: Literal["code", "paper"] = "code"
    video_audio_dim: int = 512
    video_text_dim: int = 256

    def __post_init__(self) -> None:
        _check(self.kind in ("factorized", "joint"), "heads.kind", "be 'factorized' or 'joint'", self.kind)
        _check(self.style in ("code", "paper"), "heads.style", "be 'code' or 'paper'", self.style)
        _check_least(self, "heads", video_audio_dim=1, video_text_dim=1)


@dataclass(frozen=True, kw_only=True)
class VATTConfig:
    """A whole model: three towers, or three stems around one shared transformer, and the projection heads."""

    name: str = "vatt_bbs"
    backbone: Literal["specific", "agnostic"] = "specific"
    video: VideoConfig = field(default_factory=VideoConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    text: TextConfig = field(default_factory=TextConfig)
    shared: TransformerConfig = field(default_factory=TransformerConfig)  # of the modality-agnostic backbone
    shared_projection: int = 1024  # width behind the shared transformer
    # Whether the modality-agnostic backbone runs all modalities of a batch as one packed set of sequences; None decides
    # by the batch size as measured, see `models.vatt.PACKED_UP_TO`.
    packed: bool | None = None
    heads: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        _check(self.backbone in ("specific", "agnostic"), "backbone", "be 'specific' or 'agnostic'", self.backbone)
        _check(self.shared_projection >= 1, "shared_projection", "be at least 1", self.shared_projection)
        if self.packed and (self.backbone == "specific" or self.shared.keep_rates):
            raise ValueError(
                "packed must be false for modality-specific backbones and with shared.keep_rates, got True."
            )


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """One tower alone: `create_model("vit_base")` and its like; `num_classes` adds a classifier, see `heads`."""

    name: str = "vit_base"
    modality: Literal["video", "audio", "text"] = "video"
    video: VideoConfig = field(default_factory=VideoConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    text: TextConfig = field(default_factory=TextConfig)
    num_classes: int = 0
    classifier_dropout: float = 0.5  # official for video; 0 for wat_* and spt_* (the paper states neither)

    def __post_init__(self) -> None:
        _check(self.num_classes >= 0, "num_classes", "be at least 0", self.num_classes)
        if self.num_classes and self.modality == "text":
            raise ValueError("num_classes must be 0 for a text encoder: classifiers are for video and audio.")
