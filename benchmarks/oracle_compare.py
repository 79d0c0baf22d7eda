"""One window of our reader against ffmpeg's pictures and sound: which pictures, how they stand, when the sound sounds.

Pictures are told by content. A picture of ours is right if the one that should be on screen is as near to it as the
nearest picture of the whole file; where neighbours look alike, either will do. Sound is told by correlation: its lag,
and what is left after the lag is taken out, as a ratio of signal to noise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.oracle_ffmpeg import RATE, Pictures, Sound

ON_SCREEN = 1e-3  # seconds; the rule of vatt_engine.data.media: the last picture with a time <= t + 1 ms
TIE = 2e-4  # seconds around that limit in which either picture is right; times of containers are rounded
ALIKE = 0.1  # levels of 255: two pictures nearer than this cannot be told apart
COLOUR = 5.0  # levels of 255, root mean square over a picture: FFmpeg's versions convert colours to within this
BLOCK = 960  # samples, 20 ms: a dropout of this length is seen even where the rest is perfect
BLOCK_NOISE = 15.0  # dB by which the worst block may be worse than the whole window has to be
SEARCH = 0.2  # seconds in which a lag is looked for
END = 0.06  # seconds by which the last real sample may differ; a frame of HE-AAC at 32 kHz has 0.064
FLOOR = 1e-5  # mean square, -50 dB: noise below a more quiet sound is held against this
TURNS = ("as it is", "turned left", "upside down", "turned right")


class Found(NamedTuple):
    """What a window showed: `differences` in words, and what was measured."""

    differences: list[str]
    frames: int = 0
    told_apart: int = 0
    lag_ms: float = 0.0
    snr: float = math.inf


def compare_pictures(ours: Tensor, prints: Tensor, times: list[float], right: Pictures) -> Found:
    """Compare the pictures of a window with those of the file.

    Args:
        ours: the first picture of the window, [H, W, 3] uint8.
        prints: fingerprints of all of them, [N, rows, columns, 3].
        times: when each should be on screen, seconds of the container's clock.
        right: the pictures of the file.
    """
    distances = distances_of(prints, right.prints)
    nearest = distances.min(1)
    low, high = (_on_screen(right.times, times, ON_SCREEN + side) for side in (-TIE, TIE))
    wrong, seen, told = [], [], 0
    for i in range(len(prints)):
        expected = distances[i, low[i] : high[i] + 1].min()
        told += bool(distances[i].kthvalue(min(2, distances.shape[1])).values > nearest.values[i] + ALIKE)
        seen.append(int(nearest.indices[i]))
        if expected > nearest.values[i] + ALIKE:
            wrong.append(i)
    found = []
    if ours.shape[:2] != right.sizes[low[0]]:
        found.append("the picture is {}x{}, right {}x{}".format(*ours.shape[:2], *right.sizes[low[0]]))
    expected = distances[torch.arange(len(prints)), low]
    if nearest.values.max() > COLOUR:
        found.append(_how_it_stands(prints[0], right.prints[low[0]], float(expected[0])))
    elif wrong:
        got, want = (" ".join(map(str, numbers[:12])) for numbers in (seen, low.tolist()))
        found.append(f"{len(wrong)} of {len(prints)} pictures are others: got {got}, right {want}")
    return Found(found, len(prints), told)


def distances_of(prints: Tensor, others: Tensor) -> Tensor:
    """Root mean square differences of fingerprints, [N, M] in levels of 255."""
    prints, others = prints.flatten(1), others.flatten(1)
    exact = "donot_use_mm_for_euclid_dist"  # the other way loses small differences of large numbers
    return torch.cdist(prints.float(), others.float(), compute_mode=exact) / math.sqrt(prints.shape[1])


def _on_screen(times: Tensor, wanted: list[float], slack: float) -> Tensor:
    """The number of the picture on screen at each of the wanted times."""
    at = torch.tensor(wanted, dtype=torch.float64) + slack
    return (torch.searchsorted(times, at, right=True) - 1).clamp(0, len(times) - 1)


def _how_it_stands(ours: Tensor, right: Tensor, distance: float) -> str:
    """Whether a picture is the right one turned or mirrored, or has other colours."""
    for mirrored in (False, True):
        for turns, name in enumerate(TURNS):
            turned = torch.rot90(right.float().flip(1) if mirrored else right.float(), turns, (0, 1))
            if turned.shape == ours.shape and distances_of(ours[None], turned[None]).item() < min(COLOUR, distance / 4):
                return f"the picture is {name}{', mirrored' if mirrored else ''}"
    return f"colours differ by {distance:.1f} levels"


def compare_sound(ours: Tensor, num_real: int, time: float, right: Sound, tick: float, noise: float = 35.0) -> Found:
    """Compare the sound of a window, [L] at RATE of which `num_real` are from the file, with that of the file.

    Args:
        time: when the window begins, seconds of the container's clock.
        tick: seconds that the times of the container are rounded to.
        noise: dB of signal to noise that the two must have.
    """
    margin = round(SEARCH * RATE)
    count = len(ours)
    wide, mask = right.window(time - margin / RATE, count + 2 * margin)
    inside = mask[margin : margin + count]
    if not inside.any():
        return Found([f"{num_real} samples are called real, right 0"] if num_real else [])
    found = []
    last = int(inside.nonzero().max()) + 1
    if abs(last - num_real) > END * RATE:
        found.append(f"the sound ends after {num_real / RATE:.3f} s of the window, right {last / RATE:.3f} s")
    length = min(num_real, last)
    if length < BLOCK:  # too short to tell
        return Found(found)
    wave = ours[:length]
    allowed = tick + 1 / RATE
    lag, snr, worst = _aligned(wave, wide, mask, margin, round(allowed * RATE) + 1)
    if snr < noise or worst < noise - BLOCK_NOISE:
        far, best, _ = _aligned(wave, wide, mask, margin, margin)
        if best > max(snr + 6, 20):
            found.append(f"the sound is {1e3 * far / RATE:+.2f} ms late (then {best:.0f} dB)")
        else:
            found.append(f"the sound has {snr:.0f} dB, in its worst 20 ms {worst:.0f} dB")
    return Found(found, lag_ms=1e3 * lag / RATE, snr=snr)


def _aligned(wave: Tensor, wide: Tensor, mask: Tensor, margin: int, most: int) -> tuple[float, float, float]:
    """The lag of `wave` in samples, at most `most`, and its signal to noise in all and in its worst block, in dB."""
    length = len(wave)
    size = 1 << (length + 2 * margin).bit_length()
    right = torch.fft.rfft(wide[: length + 2 * margin].double(), size)
    product = right.conj() * torch.fft.rfft(wave.double(), size)
    # Lag d: wave[n] is right[n - d], and right begins `margin` samples before the wave.
    correlation = torch.fft.irfft(product, size).roll(2 * margin)[: 2 * margin + 1]
    coarse = int(correlation[margin - most : margin + most + 1].argmax()) - most
    frequencies = torch.arange(len(right), dtype=torch.float64) * (2 * math.pi / size)

    def likeness(lag: float) -> float:
        angles = frequencies * (lag - margin)
        return float(product.real @ angles.cos() - product.imag @ angles.sin())

    lag = float(coarse)
    for step in (0.5, 0.125, 0.03125, 0.0078125):  # the top of a parabola, then of a narrower one around it
        low, middle, high = (likeness(lag + side) for side in (-step, 0.0, step))
        curvature = low + high - 2 * middle
        lag += step * max(-1.0, min(1.0, 0.5 * (low - high) / curvature)) if curvature < 0 else 0.0
    part, valid = slice(margin, margin + length), _well_inside(mask)
    best = (lag, -math.inf, -math.inf)
    for near in dict.fromkeys((lag, float(round(lag)), 0.0)):  # what lies beyond the window pulls at the likeness
        shifted = torch.fft.irfft(right * torch.polar(torch.ones_like(frequencies), -frequencies * near), size)
        snr, worst = _noise(wave.double(), shifted[part], valid[part])
        best = max(best, (near, snr, worst), key=lambda found: found[1])
    return best


def _well_inside(mask: Tensor) -> Tensor:
    """Where a track goes on for 5 ms on both sides: at its ends a shift by a part of a sample rings."""
    side = BLOCK // 4
    return torch.nn.functional.avg_pool1d(mask[None].double(), 2 * side + 1, 1, side)[0] > 0.999


def _noise(wave: Tensor, right: Tensor, valid: Tensor) -> tuple[float, float]:
    """Signal to noise in dB, of all and of the worst block, where `valid`."""
    error = ((wave - right) * valid).square()
    power = max(float((right * valid).square().mean()), FLOOR)
    blocks = torch.nn.functional.avg_pool1d(error[None], min(BLOCK, len(error)), min(BLOCK, len(error)))[0]
    return tuple(10 * math.log10(power / max(value, 1e-30)) for value in (float(error.mean()), float(blocks.max())))
