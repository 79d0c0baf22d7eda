"""Log-mel spectrogram of the paper's audio ablation, as the official pipeline (tf.signal) computes it."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

FRAME_LENGTH, FRAME_STEP = 2048, 1024  # samples: 42.67 ms and 21.34 ms at 48 kHz


def mel_spectrogram(
    wave: Tensor, *, num_mels: int = 80, sample_rate: int = 48_000, low: float = 80.0, high: float = 7600.0
) -> Tensor:
    """m = log(1 + 10000 mel(|STFT(x)|)), then scaled to [0, 1] within each clip.

    Args:
        wave: [B, L] float, samples.
        num_mels: bands, equally wide on the HTK mel scale between `low` and `high` Hz.

    Returns:
        [B, ceil(L / 1024), num_mels] float32; a silent clip gives zeros.

    Source: official vatt/data/processing.py (make_spectrogram, normalize_spectrogram); tf.signal.stft(pad_end=True,
    periodic Hann) and linear_to_mel_weight_matrix.

    >>> mel_spectrogram(torch.randn(1, 4096)).shape
    torch.Size([1, 4, 80])
    """
    steps = math.ceil(wave.shape[-1] / FRAME_STEP)
    padding = max(0, (steps - 1) * FRAME_STEP + FRAME_LENGTH - wave.shape[-1])
    frames = F.pad(wave.float(), (0, padding)).unfold(-1, FRAME_LENGTH, FRAME_STEP)  # [B, steps, FRAME_LENGTH]
    magnitude = torch.fft.rfft(frames * torch.hann_window(FRAME_LENGTH, device=wave.device)).abs()
    mel = magnitude @ _mel_matrix(num_mels, sample_rate, low, high).to(magnitude)
    log_mel = torch.log1p(10_000 * mel)
    lowest, highest = log_mel.amin((1, 2), keepdim=True), log_mel.amax((1, 2), keepdim=True)
    return (log_mel - lowest) / (highest - lowest).clamp_min(torch.finfo(torch.float32).tiny)


@functools.lru_cache(maxsize=8)
def _mel_matrix(num_mels: int, sample_rate: int, low: float, high: float) -> Tensor:
    """Triangles on the mel scale, [FRAME_LENGTH / 2 + 1, num_mels]; the bin of 0 Hz belongs to none."""

    def mel(hertz: Tensor | float) -> Tensor:
        return 1127.0 * torch.log1p(torch.as_tensor(hertz, dtype=torch.float64) / 700.0)

    bins = mel(torch.linspace(0, sample_rate / 2, FRAME_LENGTH // 2 + 1, dtype=torch.float64))[1:, None]
    edges = torch.linspace(mel(low).item(), mel(high).item(), num_mels + 2, dtype=torch.float64)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return F.pad(torch.minimum(rising, falling).clamp_min(0.0), (0, 0, 1, 0))
