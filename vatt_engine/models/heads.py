"""Projection heads into the common spaces, their cross-replica BatchNorm, and the downstream classifier."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vatt_engine.batch import Batch, Embeddings
from vatt_engine.collectives import all_reduce_sum
from vatt_engine.models import init
from vatt_engine.models.config import HeadConfig
from vatt_engine.models.transformer import Dropout


class SyncBatchNorm(nn.Module):
    """BatchNorm over the rows of all ranks, on any device.

        y = (x - mean) / sqrt(var + eps) * weight + bias;  running = 0.9 running + 0.1 batch

    Both variances are the biased one, as in Keras; torch.nn.SyncBatchNorm stores the unbiased one and refuses CPU
    tensors. Statistics are computed in float32.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, momentum: float = 0.9, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]; statistics over all leading axes and ranks."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        if self.training:
            count = all_reduce_sum(rows.new_full((1,), rows.shape[0]))
            mean = all_reduce_sum(rows.sum(0)) / count
            var = all_reduce_sum((rows - mean).square().sum(0)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), 1 - self.momentum)
                self.running_var.lerp_(var.to(self.running_var), 1 - self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        y = (rows - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias
        return y.to(x.dtype).view(x.shape)


class _Projection(nn.Sequential):
    """A Dense with bias (code), or a Dense without and a BatchNorm behind (paper)."""

    def __init__(self, in_dim: int, out_dim: int, *, norm: bool) -> None:
        layers: list[nn.Module] = [init.linear(in_dim, out_dim, bias=not norm)]
        super().__init__(*layers, *([SyncBatchNorm(out_dim)] if norm else []))


class FactorizedHeads(nn.Module):
    """The FAC heads: a fine video-audio space, and a coarser video-text space reached from it.

        video -> Dense, BN, ReLU, Dense, BN = z_va;   z_va -> ReLU, Dense, BN = z_vt
        audio -> Dense = z_av;                        text -> Dense = z_tv

    The paper has BN behind the audio and text layers too and no ReLU before z_vt: `style="paper"`.
    Source: paper section 3.3; official vatt/modeling/heads/bridge.py.
    """

    def __init__(self, config: HeadConfig, video_dim: int, audio_dim: int, text_dim: int) -> None:
        super().__init__()
        paper = config.style == "paper"
        dim_va, dim_vt = config.video_audio_dim, config.video_text_dim
        self.video_hidden = _Projection(video_dim, dim_va, norm=True)
        self.video_audio = _Projection(dim_va, dim_va, norm=True)
        self.video_text = _Projection(dim_va, dim_vt, norm=True)
        self.audio_video = _Projection(audio_dim, dim_va, norm=paper)
        self.text_video = _Projection(text_dim, dim_vt, norm=paper)
        self.between = nn.Identity() if paper else nn.ReLU()

    def forward(self, video: Tensor | None, audio: Tensor | None, text: Tensor | None) -> Embeddings:
        """Pooled features [B, D], [B, D] and [B, P, D], each may be None."""
        video_audio = video_text = None
        if video is not None:
            video_audio = self.video_audio(F.relu(self.video_hidden(video)))
            video_text = self.video_text(self.between(video_audio))
        audio_video = None if audio is None else self.audio_video(audio)
        text_video = None if text is None else self.text_video(text)
        return Embeddings(video_audio, audio_video, video_text, text_video)


class JointHeads(nn.Module):
    """One space for all: each modality -> ReLU -> Dense -> BN (official mlp_joint; not used by the paper's models)."""

    def __init__(self, config: HeadConfig, video_dim: int, audio_dim: int, text_dim: int) -> None:
        super().__init__()
        self.video = _Projection(video_dim, config.video_audio_dim, norm=True)
        self.audio = _Projection(audio_dim, config.video_audio_dim, norm=True)
        self.text = _Projection(text_dim, config.video_audio_dim, norm=True)

    def forward(self, video: Tensor | None, audio: Tensor | None, text: Tensor | None) -> Embeddings:
        """Pooled features [B, D], [B, D] and [B, P, D], each may be None."""
        z_video = None if video is None else self.video(F.relu(video))
        z_audio = None if audio is None else self.audio(F.relu(audio))
        z_text = None if text is None else self.text(F.relu(text))
        return Embeddings(z_video, z_audio, z_video, z_text)


class Classifier(nn.Module):
    """An encoder, dropout on its pooled feature, and a Dense to `num_classes` logits (official fine-tuning head).

    Args:
        multi_label: start as the official audio head, made for independent sigmoids: Glorot-uniform weight and a bias
            of -log(num_classes - 1), so that every class has probability 1 / num_classes. The official video head,
            made for a softmax, starts with a Glorot-normal weight and no bias.

    Source: official vatt/modeling/backbones/{video,audio}/factory.py.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, dropout: float, *, multi_label: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = Dropout(dropout)
        self.head = init.linear(encoder.out_dim, num_classes)
        if multi_label:
            nn.init.constant_(self.head.bias, -math.log(max(1, num_classes - 1)))
        else:
            init.glorot_normal_(self.head.weight, encoder.out_dim, num_classes)

    def forward(self, x: Tensor, *, seed: int | None = None, sample_id: Tensor | None = None) -> Tensor:
        """A raw signal -> logits [B, num_classes]."""
        return self.heads(self.encoder(x, seed=seed, sample_id=sample_id, agg_only=True)[:, 0])

    def features(self, batch: Batch, *, seed: int | Tensor | None = None) -> dict[str, Tensor]:
        """What `heads` takes, of the batch's signal of `config.modality`; no row depends on another."""
        signal = getattr(batch, self.config.modality)
        return {"pooled": self.encoder(signal, seed=seed, sample_id=batch.sample_id, agg_only=True)[:, 0]}

    def heads(self, pooled: Tensor) -> Tensor:
        """Pooled features [B, D] -> logits [B, num_classes]."""
        return self.head(self.dropout(pooled))
