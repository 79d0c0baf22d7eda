"""The sound of a track from a given second on: mono samples at any rate, in place to a fraction of a sample.

Samples are counted; the times that a container stores tell where a stretch of them begins, and where it ends because
something is missing. They are no clock for each frame: Matroska rounds them to 1 ms, live recordings let them tremble,
and in WebM those of Vorbis jump by 10 ms and more where the codec changes its block size although no sample is missing.
So a jump is a hole if it is large, or if it stays.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from vatt_engine.data.decoding import decoded
from vatt_engine.data.streams import ROUNDING, Reach, Source

LOOKAHEAD = 0.05  # seconds behind a window that its resampler needs
TREMOR = 2 * ROUNDING  # seconds: what containers round, and what adds up of it
HOLE = 0.1  # seconds: a larger jump is a hole at once; holes that add up to more are noted
PATIENCE = 1.0  # seconds after which a smaller jump that stays is a hole


def waveform(source: Source, start: float, num_samples: int, sample_rate: int) -> tuple[Tensor, int, Reach]:
    """Mono samples from `start` on, zeros where the track has none; and their number up to the last real one."""
    wave = torch.zeros(num_samples)
    stop = start + num_samples / sample_rate
    end, heard, missing = -math.inf, [], 0.0
    for time, pcm in _stretches(source, start, stop + LOOKAHEAD, sample_rate):
        offset = round((time - start) * sample_rate)
        first, last = max(offset, 0), min(offset + len(pcm), num_samples)
        missing += max(min(time, stop) - max(end, start), 0.0) if end > -math.inf else 0.0
        end = max(end, time + len(pcm) / sample_rate)
        if first < last:
            wave[first:last] = pcm[first - offset : last - offset]
            heard.append((first, last))
    num_real = max((last for _, last in heard), default=0)
    slack = max(HOLE - missing, 0.0)  # holes and a lost end add up
    reach = Reach(max(end, 0.0), slack, stop, num_real, num_samples, "samples", missing > HOLE, tuple(heard))
    return wave.nan_to_num_().clamp_(-1, 1), num_real, reach


def joined(heard: list[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Stretches of samples in their order, those that are at most `gap` apart made one.

    >>> joined([(0, 5), (6, 9), (20, 30)], 2)
    [(0, 9), (20, 30)]
    """
    whole: list[tuple[int, int]] = []
    for first, last in heard:
        if whole and first - whole[-1][1] <= gap:
            first, last = whole[-1][0], max(whole.pop()[1], last)
        whole.append((first, last))
    return whole


def _stretches(source: Source, start: float, stop: float, sample_rate: int) -> Iterator[tuple[float, Tensor]]:
    """(time of the first sample, resampled mono samples) of each stretch without a hole or a change of format.

    Where the track goes on behind `stop`, the last one is empty and has a time behind it.
    """
    joiner, beyond = _Joiner(sample_rate), None
    with closing(decoded(source, "audio", start)) as frames:
        for time, frame in frames:
            if time >= stop and not joiner.doubtful:
                beyond = time
                break
            yield from joiner.take(time, frame)
    yield from joiner.end()
    if beyond is not None:
        yield beyond, torch.zeros(0)


class _Joiner:
    """Joins frames to stretches; `doubtful` are the frames behind a jump that is not yet known to be a hole."""

    def __init__(self, sample_rate: int):
        self.sample_rate = sample_rate
        self.stretch: _Stretch | None = None
        self.doubtful: list[tuple[float, Any]] = []

    def take(self, time: float, frame: Any) -> Iterator[tuple[float, Tensor]]:
        """Add a frame; the stretch that it ends, if any."""
        if self.stretch is not None and not self.stretch.fits(frame):
            yield from self.end()
        self.stretch = self.stretch or _Stretch(frame, self.sample_rate)
        jump = abs(self.stretch.jump(time, self.doubtful))
        if jump <= TREMOR:
            self.stretch.add([*self.doubtful, (time, frame)])
            self.doubtful = []
        elif jump > HOLE:
            yield from self.end()
            yield from self.take(time, frame)
        else:
            self.doubtful.append((time, frame))
            if _seconds(self.doubtful) > PATIENCE:
                yield from self._part()

    def end(self) -> Iterator[tuple[float, Tensor]]:
        """The last stretch, or the last two."""
        if self.stretch is not None and _seconds(self.doubtful) > PATIENCE / 2:
            yield from self._part()
            yield from self.end()
        elif self.stretch is not None:
            self.stretch.add(self.doubtful)
            stretch, self.stretch, self.doubtful = self.stretch, None, []
            yield stretch.finish()

    def _part(self) -> Iterator[tuple[float, Tensor]]:
        """End the stretch before the doubtful frames, and begin another with them."""
        stretch, late = self.stretch, self.doubtful
        self.stretch, self.doubtful = None, []
        yield stretch.finish()
        for time, frame in late:
            yield from self.take(time, frame)


def _seconds(frames: list[tuple[float, Any]]) -> float:
    return sum(frame.samples / frame.sample_rate for _, frame in frames)


class _Stretch:
    """Sound without a hole on its way through one resampler."""

    def __init__(self, frame: Any, sample_rate: int):
        import av

        options = {"rematrix_maxval": "1.0"}  # the mean of the channels: without it loud stereo clips
        self.resampler = av.AudioResampler("flt", "mono", sample_rate, options=options)
        self.form, self.rate = _form(frame), frame.sample_rate
        self.num_in, self.origins, self.pieces = 0, [], []

    def fits(self, frame: Any) -> bool:
        return _form(frame) == self.form

    def jump(self, time: float, doubtful: list[tuple[float, Any]]) -> float:
        """Seconds by which a frame behind the doubtful ones is later than the samples before it say."""
        if not self.origins:
            return 0.0
        num_before = self.num_in + sum(frame.samples for _, frame in doubtful)
        return time - self.origins[0] - num_before / self.rate

    def add(self, frames: list[tuple[float, Any]]) -> None:
        for time, frame in frames:
            self.origins.append(time - self.num_in / self.rate)
            self.num_in += frame.samples
            frame.pts = None  # the resampler counts for itself
            self.pieces += self.resampler.resample(frame)

    def finish(self) -> tuple[float, Tensor]:
        """When the first sample sounds, and the samples."""
        self.pieces += self.resampler.resample(None)
        pcm = [torch.from_numpy(piece.to_ndarray()[0]) for piece in self.pieces]
        return _agreed(self.origins), torch.cat(pcm) if pcm else torch.zeros(0)


def _agreed(origins: list[float]) -> float:
    """When a stretch began, of which each frame has its own opinion.

    The median is free of the container's rounding. Where the times jump to and fro, it is that of the earliest quarter
    and what agrees with it, so that every window of a file has the same.
    """
    earliest = sorted(origins)[(len(origins) - 1) // 4]
    return statistics.median(origin for origin in origins if abs(origin - earliest) <= TREMOR)


def _form(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate
