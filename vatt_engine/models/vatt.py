"""VATT: three towers, or one shared backbone, and the projection heads (paper section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vatt_engine.batch import Batch, Embeddings
from vatt_engine.models import init
from vatt_engine.models.config import AudioConfig, EncoderConfig, TextConfig, VATTConfig, VideoConfig
from vatt_engine.models.embeddings import PatchStem
from vatt_engine.models.heads import Classifier, FactorizedHeads, JointHeads
from vatt_engine.models.text import LinearTextEncoder, TextEncoder, WordStem, word_mask
from vatt_engine.models.transformer import Seed, Transformer

MODALITIES = ("video", "audio", "text")
# The largest batch whose modalities the modality-agnostic backbone runs packed, by device, as measured by
# benchmarks/bench_transformer.py (table in docs/ops/attention.md). No GPU has measured it.
PACKED_UP_TO = {"cpu": 1, "cuda": 0}


class PatchEncoder(nn.Module):
    """A video or audio tower: stem -> transformer -> [Dense + GELU]."""

    def __init__(self, config: VideoConfig | AudioConfig) -> None:
        super().__init__()
        dim = config.transformer.dim
        self.stem = PatchStem(config, dim)
        self.transformer = Transformer(config.transformer)
        self.post_projection = init.linear(dim, config.post_projection) if config.post_projection else None
        self.out_dim = config.post_projection or dim

    def forward(
        self, x: Tensor, *, seed: Seed = None, sample_id: Tensor | None = None, agg_only: bool = False
    ) -> Tensor:
        """A raw signal (video [B, T, H, W, 3], wave [B, L]) -> tokens [B, 1 + K, D], the pooled AGG at 0.

        With agg_only [B, 1, D]: what only the other tokens need is not computed.
        """
        tokens, ids = self.stem(x, seed=seed, sample_id=sample_id), self.stem.drawn_by(x, sample_id)
        x = self.transformer.forward_dropping(tokens, seed=seed, sample_id=ids, agg_only=agg_only)
        return x if self.post_projection is None else F.gelu(self.post_projection(x))


class AgnosticBackbone(nn.Module):
    """The modality-agnostic backbone: a stem and a last projection per modality around one transformer.

        tokens -> Dense, GELU -> + position, DropToken, AGG -> shared transformer -> Dense, GELU

    Both Dense layers are the official code's; in the paper only linear tokenization comes before the transformer.
    Source: paper section 3.2; official vatt/modeling/backbones/unified/uvatt.py.
    """

    def __init__(self, config: VATTConfig) -> None:
        super().__init__()
        dim = config.shared.dim
        self.stems = nn.ModuleDict(
            {
                "video": PatchStem(config.video, dim),
                "audio": PatchStem(config.audio, dim),
                "text": WordStem(config.text, dim),
            }
        )
        self.transformer = Transformer(config.shared)
        self.post_projections = nn.ModuleDict({m: init.linear(dim, config.shared_projection) for m in MODALITIES})
        self.out_dim = config.shared_projection

    def forward(self, modality: str, x: Tensor, *, seed: Seed = None, sample_id: Tensor | None = None) -> Tensor:
        """A raw signal or word ids [S, W] of `modality` -> tokens [B, 1 + K, D], the pooled AGG at 0."""
        return self._project(modality, self._encode(modality, x, seed, sample_id))

    def pooled(
        self,
        signals: dict[str, Tensor],
        *,
        seeds: dict[str, Seed],
        sample_id: Tensor | None = None,
        packed: bool = False,
    ) -> dict[str, Tensor]:
        """Raw signals and word ids [S, W] by modality -> pooled features [B, D] of each.

        Args:
            packed: run the transformer once, over the sequences of all modalities packed into one set of tokens:
                every product then is one larger one, attention still sees each sequence alone. The same numbers up to
                rounding (and other dropout masks).
        """
        if packed:
            rows = self._encode_packed(signals, seeds, sample_id)
        else:
            rows = {m: self._encode(m, x, seeds.get(m), sample_id, agg_only=True)[:, 0] for m, x in signals.items()}
        return {m: self._project(m, x) for m, x in rows.items()}

    def _project(self, modality: str, x: Tensor) -> Tensor:
        return F.gelu(self.post_projections[modality](x))

    def _encode(
        self, modality: str, x: Tensor, seed: Seed, sample_id: Tensor | None, *, agg_only: bool = False
    ) -> Tensor:
        if modality == "text":
            return self.transformer(self.stems[modality](x), key_mask=word_mask(x), agg_only=agg_only)
        stem = self.stems[modality]
        tokens, ids = stem(x, seed=seed, sample_id=sample_id), stem.drawn_by(x, sample_id)
        return self.transformer.forward_dropping(tokens, seed=seed, sample_id=ids, agg_only=agg_only)

    def _encode_packed(
        self, signals: dict[str, Tensor], seeds: dict[str, Seed], sample_id: Tensor | None
    ) -> dict[str, Tensor]:
        """AGG's row of every sequence, by modality; text is last, so that its mask covers the last tokens."""
        tokens, starts = {}, [0]
        for modality in (m for m in MODALITIES if m in signals):
            drop = {} if modality == "text" else {"seed": seeds.get(modality), "sample_id": sample_id}
            tokens[modality] = self.stems[modality](signals[modality], **drop)
            batch, length, _ = tokens[modality].shape
            starts += [starts[-1] + n * length for n in range(1, batch + 1)]
        x = torch.cat([x.flatten(0, 1) for x in tokens.values()])[None]
        mask = word_mask(signals["text"]) if "text" in signals else None
        x = self.transformer.trunk(x, key_mask=None if mask is None else mask.view(1, -1), cu_seqlens=starts)[0]
        rows = {}
        for part, (m, y) in zip(x.split([y.shape[0] * y.shape[1] for y in tokens.values()]), tokens.items()):
            rows[m] = self.transformer.last(part.view(y.shape), None, mask if m == "text" else None, None, True)[:, 0]
        return rows


class VATT(nn.Module):
    """Video-Audio-Text Transformer.

    Args:
        config: sizes and choices, see `vatt_engine.models.config`; `create_model(name)` gives the paper's.

    >>> import vatt_engine
    >>> vatt_engine.create_model("vatt_tiny").encode_audio(torch.zeros(2, 9600)).shape
    torch.Size([2, 128])
    """

    def __init__(self, config: VATTConfig) -> None:
        super().__init__()
        self.config = config
        if config.backbone == "agnostic":
            self.backbone = AgnosticBackbone(config)
            dims = [self.backbone.out_dim] * 3
        else:
            self.video = PatchEncoder(config.video)
            self.audio = PatchEncoder(config.audio)
            self.text = text_encoder(config.text)
            dims = [self.video.out_dim, self.audio.out_dim, self.text.out_dim]
        heads = FactorizedHeads if config.heads.kind == "factorized" else JointHeads
        self.heads = heads(config.heads, *dims)

    @property
    def word_embedding(self) -> nn.Embedding:
        """The table of word vectors."""
        return self.backbone.stems["text"].embedding if self.config.backbone == "agnostic" else self.text.embedding

    def encode_video(self, video: Tensor, *, seed: Seed = None, sample_id: Tensor | None = None) -> Tensor:
        """Video [B, T, H, W, 3] (uint8, or float in [-1, 1]) -> pooled features [B, D]."""
        return self._pooled("video", video, seed=seed, sample_id=sample_id)

    def encode_audio(self, audio: Tensor, *, seed: Seed = None, sample_id: Tensor | None = None) -> Tensor:
        """Waveform [B, L] in [-1, 1] -> pooled features [B, D]."""
        return self._pooled("audio", audio, seed=seed, sample_id=sample_id)

    def encode_text(self, text: Tensor) -> Tensor:
        """Word ids [..., W], 0 for padding -> pooled features [..., D]."""
        return self._pooled("text", text.flatten(0, -2)).view(*text.shape[:-1], -1)

    def _pooled(self, modality: str, x: Tensor, seed: Seed = None, sample_id: Tensor | None = None) -> Tensor:
        if self.config.backbone == "agnostic":
            return self.backbone.pooled({modality: x}, seeds={modality: seed}, sample_id=sample_id)[modality]
        drop = {} if modality == "text" else {"seed": seed, "sample_id": sample_id}
        return getattr(self, modality)(x, agg_only=True, **drop)[:, 0]

    def forward(self, batch: Batch, *, seed: Seed = None) -> Embeddings:
        """Embed a batch into the common spaces: `heads(**features(batch, seed=seed))`.

        Args:
            batch: any of video, audio and text may be None.
            seed: of DropToken in training, an integer, or an int64 tensor of one element (a CUDA graph reads it anew).
                The modalities draw from different streams of it. By default it is drawn from torch's generator.

        Returns:
            The projections, not normalised, see `Embeddings`.
        """
        return self.heads(**self.features(batch, seed=seed))

    def features(self, batch: Batch, *, seed: Seed = None) -> dict[str, Tensor | None]:
        """The pooled features that the heads take, by modality: [B, D], text [B, P, D], None where there is none.

        No row depends on another one here; in the heads it does, by their BatchNorm. So the engine may compute the
        features of a large batch part by part.
        """
        streams = {m: None if seed is None else seed * len(MODALITIES) + i for i, m in enumerate(MODALITIES)}
        if self._packs(batch):
            return self._features_packed(batch, streams)
        features: dict[str, Tensor | None] = dict.fromkeys(MODALITIES)
        if batch.video is not None:
            features["video"] = self.encode_video(batch.video, seed=streams["video"], sample_id=batch.sample_id)
        if batch.audio is not None:
            features["audio"] = self.encode_audio(batch.audio, seed=streams["audio"], sample_id=batch.sample_id)
        if batch.text is not None:
            features["text"] = self.encode_text(batch.text)
        return features

    def _features_packed(self, batch: Batch, streams: dict[str, Seed]) -> dict[str, Tensor | None]:
        signals = {m: x for m in MODALITIES if (x := getattr(batch, m)) is not None}
        if batch.text is not None:
            signals["text"] = batch.text.flatten(0, -2)
        features = self.backbone.pooled(signals, seeds=streams, sample_id=batch.sample_id, packed=True)
        if batch.text is not None:
            features["text"] = features["text"].view(*batch.text.shape[:-1], -1)
        return dict.fromkeys(MODALITIES) | features

    def _packs(self, batch: Batch) -> bool:
        """Whether the modalities of this batch go through the backbone together."""
        given = [x for x in (batch.video, batch.audio, batch.text) if x is not None]
        if self.config.backbone == "specific" or self.config.shared.keep_rates or len(given) < 2:
            return False
        if self.config.packed is not None:
            return self.config.packed
        return len(given[0]) <= PACKED_UP_TO.get(given[0].device.type, 0)


def text_encoder(config: TextConfig) -> TextEncoder | LinearTextEncoder:
    """The text tower that `config.encoder` names."""
    return TextEncoder(config) if config.encoder == "t5" else LinearTextEncoder(config)


def build_encoder(config: EncoderConfig) -> nn.Module:
    """One tower, with a classifier where `num_classes` asks for one."""
    if config.modality == "text":
        model: nn.Module = text_encoder(config.text)
    else:
        model = PatchEncoder(config.video if config.modality == "video" else config.audio)
        if config.num_classes:
            multi_label = config.modality == "audio"
            model = Classifier(model, config.num_classes, config.classifier_dropout, multi_label=multi_label)
    model.config = config
    return model
