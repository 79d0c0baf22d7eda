"""Which seconds of a file make a clip, and which captions belong to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vatt_engine.data.manifest import Caption


def random_window(duration: float, clip_seconds: float, generator: torch.Generator) -> float:
    """A start drawn uniformly from [0, max(duration - clip_seconds, 0)], for training (official input pipeline).

    >>> random_window(10.0, 3.2, torch.Generator().manual_seed(0)) <= 6.8
    True
    """
    return max(duration - clip_seconds, 0.0) * torch.rand((), dtype=torch.float64, generator=generator).item()


def even_windows(duration: float, clip_seconds: float, num_windows: int = 1) -> list[float]:
    """Starts for evaluation: the centre for one window, else evenly spaced from the first to the last possible start.

    >>> even_windows(10.0, 4.0), even_windows(10.0, 4.0, 3)
    ([3.0], [0.0, 3.0, 6.0])
    """
    room = max(duration - clip_seconds, 0.0)
    if num_windows == 1:
        return [room / 2]
    return [room * i / (num_windows - 1) for i in range(num_windows)]


def nearest_captions(captions: Sequence[Caption], start: float, end: float, num_candidates: int) -> list[Caption]:
    """The `num_candidates` captions nearest in time to the window [start, end], nearest first, repeated if too few.

    Nearest: least gap to the window (0 if they overlap), then most overlap, then nearest centre, then manifest order.

    >>> [c.text for c in nearest_captions([Caption("a", 0, 1), Caption("b", 9, 12)], 8.0, 10.0, 3)]
    ['b', 'a', 'b']
    """

    def distance(caption: Caption) -> tuple[float, float, float]:
        overlap = min(end, caption.end) - max(start, caption.start)
        return max(-overlap, 0.0), -max(overlap, 0.0), abs(caption.start + caption.end - start - end)

    nearest = sorted(captions, key=distance)[:num_candidates]
    return [nearest[i % len(nearest)] for i in range(num_candidates)] if nearest else []
