"""Decoded pictures at another size and sound at another rate, on any device, as FFmpeg's libraries make them."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

CROSSINGS, CUTOFF, BETA = 16, 0.97, 9.0  # libswresample's: zero crossings to a side, of the Nyquist rate, Kaiser window


def area_scaled(frames: Tensor, width: int, height: int) -> Tensor:
    """[T, H, W, 3] uint8 scaled as by libswscale's "area": down to the mean of the area that each new pixel covers.

    A side that grows, which pixels that are not square may need, is interpolated linearly.

    >>> area_scaled(torch.tensor([0, 90, 30]).byte().view(1, 1, 3, 1), 2, 1).flatten()
    tensor([30, 50], dtype=torch.uint8)
    """
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    rows, columns = (_shares(old, new).to(frames.device) for old, new in zip(frames.shape[1:3], (height, width)))
    scaled = rows @ frames.permute(0, 3, 1, 2).float() @ columns.T
    return scaled.round_().to(torch.uint8).permute(0, 2, 3, 1)


def _shares(old: int, new: int) -> Tensor:
    """[new, old]: the part of each new pixel that lies in each old one, or that it has by linear interpolation."""
    if new > old:
        place = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp_(0, old - 1)
        return (1 - (place[:, None] - torch.arange(old, dtype=torch.float64)).abs()).clamp_(min=0).float()
    edges = torch.arange(new + 1, dtype=torch.float64)[:, None] * old / new
    place = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:], place + 1) - torch.maximum(edges[:-1], place)
    return (overlap.clamp_(min=0) * new / old).float()


def resampled(wave: Tensor, old: int, new: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Samples first..first + count at the rate `new` of a whole track at the rate `old`; fewer where it ends.

    y[n] = sum_k x[k] h(k - n old / new), h a sinc below 0.97 of the lower Nyquist rate under a Kaiser window, with sum
    1. What the window needs is copied to the device, no more. DALI's `audio_resample` has no low-pass: it folds what
    lies above the new Nyquist rate back into the sound.

    Args:
        wave: [L] float32, on the CPU.
        device: where the result shall be.

    >>> resampled(torch.zeros(48_000), 48_000, 12_000, 11_998, 9_600)
    tensor([0., 0.])
    """
    count = max(min(count, -(-len(wave) * new // old) - first), 0)
    if old == new or not count:
        return wave[first : first + count].to(device)
    kernel, reach = _kernel(old, new)
    phases, step = len(kernel), old // math.gcd(old, new)
    block = first // phases  # where a sample of either rate begins
    num_blocks = -(-(first + count) // phases) - block
    begin, stop = block * step - reach, (block + num_blocks) * step + reach
    piece = wave[max(begin, 0) : stop].to(device)
    piece = torch.nn.functional.pad(piece, (max(-begin, 0), max(stop - len(wave), 0)))
    blocks = piece.unfold(0, kernel.shape[1], step) @ kernel.T.to(device)  # [blocks, phases]
    return blocks.flatten()[first - block * phases :][:count]


@lru_cache
def _kernel(old: int, new: int) -> tuple[Tensor, int]:
    """The filter of each phase, [phases, taps], and how many samples the first tap lies before its block."""
    phases, step = new // math.gcd(old, new), old // math.gcd(old, new)
    factor = min(CUTOFF * new / old, 1.0)
    reach = math.ceil(CROSSINGS / factor)
    taps = torch.arange(-reach, step + reach, dtype=torch.float64)
    time = (taps - torch.arange(phases, dtype=torch.float64)[:, None] * old / new) * factor
    window = torch.special.i0(BETA * (1 - (time / CROSSINGS).square()).clamp(min=0).sqrt())
    kernel = torch.sinc(time) * window * (time.abs() <= CROSSINGS)
    return (kernel / kernel.sum(1, keepdim=True)).float(), reach
