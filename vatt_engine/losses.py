"""Embeddings to named loss terms: video-audio NCE and video-text MIL-NCE, across ranks.

total = (w_va video_audio + w_vt video_text) / (w_va + w_vt)         over the pairs that are there

This mean is the official code's; the paper adds the terms, NCE + lambda MIL-NCE, which for lambda = 1 is twice as much.

Every rank computes one block of similarities, its own videos against the other side of all ranks, and from it complete
row statistics and partial column statistics; the columns' are merged over ranks as (maximum, sum). So there is one
gather of embeddings per pair, in their own dtype, one reduce-scatter of their gradient, and vectors otherwise. Where
memory is short the other side travels around the ranks instead, block by block (gather="ring").
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from vatt_engine.batch import Batch, Embeddings
from vatt_engine.collectives import all_gather, all_reduce_max, all_reduce_sum, rank, ring_shift, world_size
from vatt_engine.ops.nce import FORMS, Ring, check_pair, nce_statistics, sample_losses

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1.0  # bounds of a learnable one


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What `VATTLoss` computes.

    Args:
        form: "joint" (official), "symmetric" or "one_way" (paper eq. 4-5); the formulas are in `vatt_engine.ops.nce`.
        temperature: divides the cosines; the initial value where it is learnable.
        learnable_temperature: learn one temperature for both pairs, within 0.01..1 (official: fixed).
        video_audio_weight, video_text_weight: weights of the terms; a pair of weight 0 is not computed.
        average: "global" divides by the number of valid samples of all ranks, and equals one big batch for any number
            of ranks; "rank" is the official mean over the valid samples of each replica, 0 if it has none.
        gather: "all" brings the other side of all ranks to each; "ring" passes it around, so that a rank never holds
            more than two ranks' part, in exchange for as many messages as ranks, and no torch.compile.

    Raises:
        ValueError: a value is outside its range.

    >>> LossConfig(form="one_way", average="rank").temperature
    0.07
    """

    form: Literal["joint", "symmetric", "one_way"] = "joint"
    temperature: float = 0.07
    learnable_temperature: bool = False
    video_audio_weight: float = 1.0
    video_text_weight: float = 1.0
    average: Literal["global", "rank"] = "global"
    gather: Literal["all", "ring"] = "all"

    def __post_init__(self) -> None:
        for name, known in (("form", FORMS), ("average", ("global", "rank")), ("gather", ("all", "ring"))):
            if getattr(self, name) not in known:
                raise ValueError(f"LossConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"LossConfig: temperature must be positive, got {self.temperature}.")
        if self.learnable_temperature and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"LossConfig: temperature must be in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}], got {self.temperature}. "
                "These are the bounds of a learnable one."
            )
        for name in ("video_audio_weight", "video_text_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"LossConfig: {name} must be finite and not negative, got {getattr(self, name)}.")
        if self.video_audio_weight == self.video_text_weight == 0:
            raise ValueError("LossConfig: video_audio_weight must be positive if video_text_weight is 0, got 0.0.")


class LossTerms(NamedTuple):
    """Scalars in float32; a pair that is not there is 0 and has no part in the total."""

    total: Tensor
    video_audio: Tensor
    video_text: Tensor


class VATTLoss(nn.Module):
    """Weighted mean of the video-audio NCE and the video-text MIL-NCE, over all ranks of `group`.

    Gradients follow `collectives`: average the parameters' gradients over ranks, as DDP does, and the result is the
    gradient of the global loss (average="global"), or of the mean over ranks of their losses (average="rank").
    With average="global" every rank returns the same global values. A learnable temperature is the parameter
    `log_temperature` of shape (1,), brought back in place to log 0.01..log 1 before it is used (so that, unlike under
    a clamp in the graph, its gradient never vanishes); like the model's parameters, its gradient is to be averaged.

    Args:
        config: the form, temperature, weights and average.
        group: the processes that share one batch of negatives; all by default.

    Source: paper section 3.4; official vatt/utils/train/objectives.py.

    >>> video, audio = torch.eye(4), torch.eye(4)
    >>> loss = VATTLoss()(Embeddings(video_audio=video, audio_video=audio))
    >>> round(loss.total.item(), 4), loss.video_text.item()
    (0.6931, 0.0)
    """

    def __init__(self, config: LossConfig | None = None, *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self.group = group
        if self.config.learnable_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(self.config.temperature)]))

    def forward(
        self, embeddings: Embeddings, *, audio_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> LossTerms:
        """The loss terms of this rank's batch among all ranks'.

        Args:
            embeddings: those of this rank, not normalised; batch size and None fields alike on all ranks.
            audio_mask, text_mask: [B] bool, False where a sample has no audio or text; None alike on all ranks.

        Raises:
            ValueError: no pair is there, or shapes and dtypes do not fit.
        """
        config, group = self.config, self.group
        video_audio, audio_video, video_text, text_video = embeddings
        pairs: dict[str, Tensor] = {}  # name -> [sum of losses, number of valid samples]
        if config.video_audio_weight > 0 and video_audio is not None and audio_video is not None:
            names = ("video_audio", "audio_video", "audio_mask")
            check_pair("VATTLoss", video_audio, audio_video, audio_mask, names=names)
            pairs["video_audio"] = self._pair(video_audio, audio_video.unsqueeze(1), audio_mask)
        if config.video_text_weight > 0 and video_text is not None and text_video is not None:
            names = ("video_text", "text_video", "text_mask")
            check_pair("VATTLoss", video_text, text_video, text_mask, names=names, candidates=True)
            pairs["video_text"] = self._pair(video_text, text_video, text_mask)
        if not pairs:
            raise ValueError(
                "VATTLoss: embeddings must hold a pair of positive weight, got none. "
                "Pairs are video_audio with audio_video, and video_text with text_video."
            )
        sums = torch.stack(list(pairs.values()))
        if config.average == "global":
            sums = all_reduce_sum(sums, group)
        means = sums[:, 0] / sums[:, 1].clamp_min(1)  # float64, as the statistics
        given = next(x for x in embeddings if x is not None)
        terms = dict(zip(pairs, means.to(torch.promote_types(given.dtype, torch.float32))))
        weights = {name: getattr(config, f"{name}_weight") for name in terms}
        total = sum(weights[name] * term for name, term in terms.items()) / sum(weights.values())
        absent = torch.zeros_like(total)
        return LossTerms(total, terms.get("video_audio", absent), terms.get("video_text", absent))

    def temperature(self) -> float | Tensor:
        """The temperature in use: a float, or a tensor of shape (1,) with its graph where it is learnable."""
        if not self.config.learnable_temperature:
            return self.config.temperature
        with torch.no_grad():
            self.log_temperature.clamp_(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
        return self.log_temperature.exp()

    def _pair(self, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
        """[sum of the losses of this rank's samples, how many of them are valid]; a [B, D], b [B, P, D]."""
        first = rank(self.group) * len(a)
        mask_all = None if mask is None else all_gather(mask, self.group)
        if self.config.gather == "ring":
            shift = functools.partial(ring_shift, group=self.group)
            ring = Ring(first, rank(self.group), world_size(self.group), shift)
        else:
            b, ring = all_gather(b, self.group), Ring(first)
        row, column, positive = nce_statistics(a, b, self.temperature(), column_mask=mask_all, ring=ring)
        if self.config.form != "one_way" and world_size(self.group) > 1:
            column = self._merge(column)
        losses = sample_losses(self.config.form, row, column[first : first + len(a)], positive, mask)
        num_valid = losses.new_full((), len(a)) if mask is None else mask.sum().to(losses)
        return torch.stack([losses.sum(), num_valid])

    def _merge(self, column: Tensor) -> Tensor:
        """log sum exp over ranks; 0, without gradient, where no rank has anything (a masked sample, never read)."""
        largest = all_reduce_max(column, self.group)
        largest = largest.where(largest > -torch.inf, 0.0)
        # The largest one adds exactly 1, so clamp_min only meets the empty sums.
        return largest + all_reduce_sum((column - largest).exp(), self.group).clamp_min(1.0).log()


@dataclass(frozen=True, kw_only=True)
class ClassLossConfig:
    """How a classifier is trained; which loss it is, its labels say.

    Args:
        label_smoothing: share of the target that goes to all classes alike; of one class per sample only.
        balanced: weigh samples by how rare their classes are in the batch; of several classes per sample only.
    """

    label_smoothing: float = 0.0
    balanced: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"ClassLossConfig: label_smoothing must be in [0, 1), got {self.label_smoothing}.")


class ClassTerms(NamedTuple):
    """Scalars in float32; `accuracy` is the share of the batch whose class has the largest logit."""

    total: Tensor
    accuracy: Tensor | None = None


class ClassLoss(nn.Module):
    """Cross-entropy of one class per sample, or binary cross-entropies of several, over this rank's batch.

        label [B]:     mean_i -sum_c q_ic log softmax(x_i)_c,   q_i = (1 - s) onehot(y_i) + s / C
        label [B, C]:  mean_i w_i sum_c -(y_ic log sigmoid(x_ic) + (1 - y_ic) log(1 - sigmoid(x_ic)))

    with s the label smoothing, and w_i = 1, or of balanced classes `balanced_weights`.

    Source: paper appendix A.2; official vatt/experiments/finetune.py.

    >>> ClassLoss()(torch.zeros(2, 4), Batch(label=torch.tensor([0, 3]))).total.item()
    1.386294...
    """

    def __init__(self, config: ClassLossConfig | None = None) -> None:
        super().__init__()
        self.config = config or ClassLossConfig()

    def forward(self, logits: Tensor, batch: Batch) -> ClassTerms:
        """Logits [B, C] and the labels of their batch -> the loss."""
        logits, labels = logits.float(), batch.label
        if labels.ndim == 1:
            total = functional.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            return ClassTerms(total, (logits.argmax(1) == labels).float().mean())
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
        return ClassTerms((losses * balanced_weights(labels) if self.config.balanced else losses).mean())

    def monitors(self) -> dict[str, float]:
        """Nothing but the terms."""
        return {}


def balanced_weights(labels: Tensor) -> Tensor:
    """Weight of each sample of a batch: the mean over its classes of one over how often the batch has them.

        w_i = 1 / n_i sum_c y_ic / sum_b y_bc,   n_i = sum_c y_ic

    Args:
        labels: [B, C] float, >= 0; mixed ones too. A sample without a class has weight 0 (NaN in the official code).

    >>> balanced_weights(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist()
    [0.75, 0.5]
    """
    shares = labels / labels.sum(0).clamp_min(torch.finfo(labels.dtype).tiny)
    return shares.sum(1) / labels.sum(1).clamp_min(torch.finfo(labels.dtype).tiny)
