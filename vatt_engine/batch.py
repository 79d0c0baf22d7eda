"""What a loader gives, a model takes, and a loss is given: plain containers of tensors.

B batch, T frames, H W pixels, L audio samples, P text candidates, W words, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One batch of aligned clips; a modality that no sample has is None.

    Args:
        video: [B, T, H, W, 3], uint8 in 0..255, or float in [-1, 1].
        audio: [B, L], float32 in [-1, 1], at the sample rate of the loader's config.
        text: [B, P, W], int64 word ids; 0 is padding.
        audio_mask: [B], bool, False where a sample has no audio (its row of `audio` is then zero).
        text_mask: [B], bool, False where a sample has no captions (its row of `text` is then zero).
        sample_id: [B], int64, a stable name of the sample.
        label: [B], int64 class of the sample; or [B, C] float, the share of each class where samples have several.

    >>> len(Batch(audio=torch.zeros(2, 128)))
    2
    """

    video: Tensor | None = None
    audio: Tensor | None = None
    text: Tensor | None = None
    audio_mask: Tensor | None = None
    text_mask: Tensor | None = None
    sample_id: Tensor | None = None
    label: Tensor | None = None

    def __len__(self) -> int:
        return next(len(tensor) for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return Batch(**{name: t.to(device, non_blocking=non_blocking) for name, t in self.tensors().items()})

    def split(self, num_parts: int) -> list[Batch]:
        """The rows in `num_parts` parts, in order; the first ones are a row longer where it does not come out even.

        Raises:
            ValueError: there would be a part without a row.

        >>> [len(part) for part in Batch(audio=torch.zeros(5, 128)).split(2)]
        [3, 2]
        """
        if not 1 <= num_parts <= len(self):
            raise ValueError(f"Batch.split: num_parts must be in 1..{len(self)}, got {num_parts}.")
        parts = {name: tensor.tensor_split(num_parts) for name, tensor in self.tensors().items()}
        return [Batch(**{name: tensors[i] for name, tensors in parts.items()}) for i in range(num_parts)]


class Embeddings(NamedTuple):
    """Projections into the common spaces, not normalised; None where a modality is absent.

    `video_audio` is the video's embedding in the video-audio space [B, Dva], `audio_video` the audio's [B, Dva];
    `video_text` [B, Dvt] and `text_video` [B, P, Dvt] live in the video-text space (paper section 3.3).
    """

    video_audio: Tensor | None = None
    audio_video: Tensor | None = None
    video_text: Tensor | None = None
    text_video: Tensor | None = None
