"""VATT: three towers, or one shared backbone, and the projection heads (paper section 3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vatt_engine.batch import Batch, Embeddings
from vatt_engine.models import init
from vatt_engine.models.config import AudioConfig, EncoderConfig, TextConfig, VATTConfig, VideoConfig
from vatt_engine.models.embeddings import PatchStem
from vatt_engine.models.heads import Classifier, FactorizedHeads, JointHeads
from vatt_engine.models.text import LinearTextEncoder, TextEncoder, WordStem, word_mask
from vatt_engine.models.transformer import Transformer

MODALITIES = ("video", "audio", "text")


class PatchEncoder(nn.Module):
    """A video or audio tower: stem -> transformer -> [Dense + GELU]."""

    def __init__(self, config: VideoConfig | AudioConfig) -> None:
        super().__init__()
        dim = config.transformer.dim
        self.stem = PatchStem(config, dim)
        self.transformer = Transformer(config.transformer)
        self.post_projection = init.linear(dim, config.post_projection) if config.post_projection else None
        self.out_dim = config.post_projection or dim

    def forward(self, x: Tensor, *, seed: int | None = None, sample_id: Tensor | None = None) -> Tensor:
        """A raw signal (video [B, T, H, W, 3], wave [B, L]) -> tokens [B, 1 + K, D], the pooled AGG at 0."""
        x = self.transformer(self.stem(x, seed=seed, sample_id=sample_id))
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

    def forward(self, modality: str, x: Tensor, *, seed: int | None = None, sample_id: Tensor | None = None) -> Tensor:
        """A raw signal or word ids [S, W] of `modality` -> tokens [B, 1 + K, D], the pooled AGG at 0."""
        if modality == "text":
            x = self.transformer(self.stems[modality](x), key_mask=word_mask(x))
        else:
            x = self.transformer(self.stems[modality](x, seed=seed, sample_id=sample_id))
        return F.gelu(self.post_projections[modality](x))


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

    def encode_video(self, video: Tensor, *, seed: int | None = None, sample_id: Tensor | None = None) -> Tensor:
        """Video [B, T, H, W, 3] (uint8, or float in [-1, 1]) -> pooled features [B, D]."""
        return self._pooled("video", video, seed=seed, sample_id=sample_id)

    def encode_audio(self, audio: Tensor, *, seed: int | None = None, sample_id: Tensor | None = None) -> Tensor:
        """Waveform [B, L] in [-1, 1] -> pooled features [B, D]."""
        return self._pooled("audio", audio, seed=seed, sample_id=sample_id)

    def encode_text(self, text: Tensor) -> Tensor:
        """Word ids [..., W], 0 for padding -> pooled features [..., D]."""
        return self._pooled("text", text.flatten(0, -2)).view(*text.shape[:-1], -1)

    def _pooled(self, modality: str, x: Tensor, **drop_token: object) -> Tensor:
        if self.config.backbone == "agnostic":
            return self.backbone(modality, x, **drop_token)[:, 0]
        return getattr(self, modality)(x, **drop_token)[:, 0]

    def forward(self, batch: Batch, *, seed: int | None = None) -> Embeddings:
        """Embed a batch into the common spaces.

        Args:
            batch: any of video, audio and text may be None.
            seed: of DropToken in training; the modalities draw from different streams of it. By default it is
                drawn from torch's generator.

        Returns:
            The projections, not normalised, see `Embeddings`.
        """
        streams = {m: None if seed is None else seed * len(MODALITIES) + i for i, m in enumerate(MODALITIES)}
        features: dict[str, Tensor | None] = dict.fromkeys(MODALITIES)
        if batch.video is not None:
            features["video"] = self.encode_video(batch.video, seed=streams["video"], sample_id=batch.sample_id)
        if batch.audio is not None:
            features["audio"] = self.encode_audio(batch.audio, seed=streams["audio"], sample_id=batch.sample_id)
        if batch.text is not None:
            features["text"] = self.encode_text(batch.text)
        return self.heads(**features)


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
