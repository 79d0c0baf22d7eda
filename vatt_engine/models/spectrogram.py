"""Log-mel spectrogram of the paper's audio ablation, as the official pipeline (tf.signal) computes it."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vatt_engine.models.config import MEL_RANGE, spectrogram_frame


def mel_spectrogram(wave: Tensor, *, num_mels: int = 80, sample_rate: int = 48_000) -> Tensor:
    """m = log(1 + 10000 mel(|STFT(x)|)), then scaled to [0, 1] within each clip.

    A frame lasts 42.67 ms and the next one begins 21.34 ms later, whatever the rate; at 48 kHz these are 2048 and 1024
    samples.

    Args:
        wave: [B, L] float, samples.
        num_mels: bands, equally wide on the HTK mel scale between 80 and 7600 Hz.
        sample_rate: of the waveform, in samples per second; at least twice the highest band.

    Returns:
        [B, ceil(L / step), num_mels] float32, a step being `spectrogram_frame(sample_rate)[1]` samples; a silent clip
        gives zeros.

    Raises:
        ValueError: at this rate a waveform has no 7600 Hz.

    Source: official vatt/data/processing.py (make_spectrogram, normalize_spectrogram); tf.signal.stft(pad_end=True,
    periodic Hann) and linear_to_mel_weight_matrix.

    >>> mel_spectrogram(torch.randn(1, 4096)).shape
    torch.Size([1, 4, 80])
    """
    if sample_rate < 2 * MEL_RANGE[1]:
        expectation = f"be at least {2 * MEL_RANGE[1]:.0f}, twice the highest band"
        raise ValueError(f"mel_spectrogram: sample_rate must {expectation}, got {sample_rate}.")
    length, step = spectrogram_frame(sample_rate)
    steps = math.ceil(wave.shape[-1] / step)
    padding = max(0, (steps - 1) * step + length - wave.shape[-1])
    frames = F.pad(wave.float(), (0, padding)).unfold(-1, length, step)  # [B, steps, length]
    magnitude = torch.fft.rfft(frames * torch.hann_window(length, device=wave.device)).abs()
    mel = magnitude @ _mel_matrix(num_mels, sample_rate, *MEL_RANGE).to(magnitude)
    log_mel = torch.log1p(10_000 * mel)
    lowest, highest = log_mel.amin((1, 2), keepdim=True), log_mel.amax((1, 2), keepdim=True)
    return (log_mel - lowest) / (highest - lowest).clamp_min(torch.finfo(torch.float32).tiny)


@functools.lru_cache(maxsize=8)
def _mel_matrix(num_mels: int, sample_rate: int, low: float, high: float) -> Tensor:
    """Triangles on the mel scale, [Fourier bins of a frame, num_mels]; the bin of 0 Hz belongs to none."""

    def mel(hertz: Tensor | float) -> Tensor:
        return 1127.0 * torch.log1p(torch.as_tensor(hertz, dtype=torch.float64) / 700.0)

    length = spectrogram_frame(sample_rate)[0]
    bins = mel(torch.fft.rfftfreq(length, 1 / sample_rate, dtype=torch.float64))[1:, None]
    edges = torch.linspace(mel(low).item(), mel(high).item(), num_mels + 2, dtype=torch.float64)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return F.pad(torch.minimum(rising, falling).clamp_min(0.0), (0, 0, 1, 0))
