"""One track of a media file read by presentation time: pictures on screen, and sound as mono samples.

Second 0 is the file's first presentation time; see media.py for the rules. Nothing here trusts an index.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-3  # seconds; times in mkv, webm and flv are rounded to 1 ms
PREROLL = {"video": (0.2, 10.0), "audio": (0.5, 10.0)}  # seconds to seek ahead of a window: first try, second try


class MediaError(ValueError):
    """A media file that cannot be used, as `path: reason`."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What a file may ask for before anything is decoded.

    Args:
        max_pixels: height x width of a frame.
        max_seconds: length of the file.
        max_bytes: size of the file.
        max_frames: frames (or audio packets) decoded for one window, from the key frame before it on.
    """

    max_pixels: int = 8192 * 8192
    max_seconds: float = 12 * 3600.0
    max_bytes: int = 1 << 36
    max_frames: int = 100_000

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_seconds", "max_bytes", "max_frames"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MediaLimits: {name} must be above 0, got {getattr(self, name)}.")


DEFAULT_LIMITS = MediaLimits()


class Reach(NamedTuple):
    """How far a track was decoded: to `end` (give or take `slack`) of the wanted `stop`, in seconds, and in units."""

    end: float
    slack: float
    stop: float
    num_got: int
    num_wanted: int
    unit: str


class Source:
    """A file whose tracks are read by time; `zero` is its first presentation time, which the reader sets.

    Every failure of FFmpeg inside `faults`, of whatever class, leaves as a MediaError.
    """

    def __init__(self, path: str | Path, limits: MediaLimits):
        self.path, self.limits, self.zero = Path(path), limits, 0.0
        if not os.path.isfile(self.path):
            what = "a folder" if os.path.isdir(self.path) else "no such file"
            raise self.error(f"the path must name a file, got {what}.")
        if os.path.getsize(self.path) == 0:
            raise self.error("the file must hold media, got an empty file.")
        if os.path.getsize(self.path) > limits.max_bytes:
            text = f"have at most {limits.max_bytes} bytes, got {os.path.getsize(self.path)}"
            raise self.error(f"the file must {text}.")

    @property
    def _codec_options(self) -> dict[str, str]:
        """FFmpeg refuses larger frames before it allocates them, also where it looks into a file to describe it."""
        return {"max_pixels": str(self.limits.max_pixels)}

    def error(self, reason: str) -> MediaError:
        return MediaError(self.path, reason)

    @contextmanager
    def faults(self) -> Iterator[None]:
        try:
            yield
        except MediaError:
            raise
        except Exception as error:  # PyAV raises seven classes on damaged files, MemoryError and IndexError among them
            text = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
            raise self.error(f"the file must be media that FFmpeg can decode, got {text}.") from error

    @contextmanager
    def opened(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The container and its best video and audio stream; whatever a playlist says, only local files are read."""
        import av
        from av.stream import Disposition

        local = {"protocol_whitelist": "file"}
        with av.open(
            f"file:{self.path}", options=self._codec_options, container_options=local, metadata_errors="ignore"
        ) as container:
            streams = {kind: container.streams.best(kind) for kind in ("video", "audio")}
            if streams["video"] is not None and streams["video"].disposition & Disposition.attached_pic:
                streams["video"] = None  # the cover of a song
            for kind, stream in streams.items():
                if stream is not None and stream.codec_context is None:
                    raise self.error(f"the {kind} codec must be one that FFmpeg decodes, got an unknown one.")
            yield container, {kind: stream for kind, stream in streams.items() if stream is not None}

    def decoded(self, kind: str, start: float) -> Iterator[tuple[float, Any]]:
        """(time, frame) of a track; the first is at or before `start`, whatever the index says, where one is."""
        for preroll in (*PREROLL[kind], math.inf):
            frames = self._decoded_from(kind, start - preroll)
            first = next(frames, None)
            if start - preroll <= 0 or (first is not None and first[0] <= start):
                break
            frames.close()
        if first is not None:
            yield first
            yield from frames

    def _decoded_from(self, kind: str, target: float) -> Iterator[tuple[float, Any]]:
        import av
        from av.stream import Discard

        with self.opened() as (container, streams):
            stream = streams[kind]
            for other in container.streams:
                other.discard = Discard.default if other is stream else Discard.all
            stream.codec_context.options = self._codec_options
            stream.codec_context.thread_count = 1  # the loader decodes many files at once
            if target > 0:
                with suppress(av.FFmpegError):  # without an index: from the beginning
                    container.seek(int((target + self.zero) / stream.time_base), stream=stream)
            time, step = -math.inf, 0.0
            for number, frame in enumerate(container.decode(stream)):
                if number >= self.limits.max_frames:
                    text = f"a window must need at most {self.limits.max_frames} decoded {kind} frames, got more."
                    raise self.error(text)
                stamp = frame.pts if frame.pts is not None else frame.dts
                if stamp is not None:
                    time = max(time, float(stamp * frame.time_base) - self.zero)
                elif time == -math.inf:
                    raise self.error(f"the {kind} must have presentation times, got a first frame without one.")
                else:
                    time += step
                step = float((frame.duration or 0) * frame.time_base)
                yield time, frame

    def frames(self, times: list[float], fps: float, short_side: int | None) -> tuple[Tensor, Reach]:
        """The picture on screen at each of `times` (increasing), [N, H, W, 3]."""
        pictures = _Pictures(len(times), short_side, self)
        shown = None
        begin, length, gap = -math.inf, 0.0, 1 / fps if fps else 0.0
        with closing(self.decoded("video", times[0])) as decoded:
            for time, frame in decoded:
                shown = shown or frame
                while pictures.count < len(times) and times[pictures.count] + ROUNDING < time:
                    pictures.add(shown)
                if pictures.count == len(times):
                    return pictures.video, Reach(time, 0.0, times[-1], len(times), len(times), "frames")
                if shown is not frame:
                    shown, gap = frame, max(gap, time - begin)
                begin, length = time, float((frame.duration or 0) * frame.time_base)
        if shown is None:
            raise self.error(f"the video must give frames, decoded 0 of {len(times)} from {times[0]:.3f} s.")
        while pictures.count < len(times):
            pictures.add(shown)
        step = max(length, gap)
        num_got = sum(time < begin + step for time in times)
        return pictures.video, Reach(begin + step, 0.02 + 1.5 * step, times[-1], num_got, len(times), "frames")

    def waveform(self, start: float, num_samples: int, sample_rate: int) -> tuple[Tensor, int, Reach]:
        """Mono samples from `start` on, zeros where the track has none; and their number up to the last real one."""
        wave = torch.zeros(num_samples)
        stop = start + num_samples / sample_rate
        end, num_real = 0.0, 0
        for time, pcm in self._runs(start, stop + 0.05, sample_rate):  # the resampler looks a little ahead
            offset = round((time - start) * sample_rate)
            first, last = max(offset, 0), min(offset + len(pcm), num_samples)
            end = max(end, time + len(pcm) / sample_rate)
            if first < last:
                wave[first:last] = pcm[first - offset : last - offset]
                num_real = max(num_real, last)
        return wave.nan_to_num_().clamp_(-1, 1), num_real, Reach(end, 0.1, stop, num_real, num_samples, "samples")

    def _runs(self, start: float, stop: float, sample_rate: int) -> Iterator[tuple[float, Tensor]]:
        """(time of the first sample, resampled mono samples) of each stretch without a hole or a change of format."""
        run = None
        with closing(self.decoded("audio", start)) as decoded:
            for time, frame in decoded:
                if run is not None and not run.continues(time, frame):
                    yield run.finish()
                    run = None
                if time >= stop:
                    break
                run = run or _Run(frame, sample_rate)
                run.add(time, frame)
        if run is not None:
            yield run.finish()


class _Run:
    """A stretch of sound on its way through one resampler."""

    def __init__(self, frame: Any, sample_rate: int):
        import av

        options = {"rematrix_maxval": "1.0"}  # the mean of the channels: without it loud stereo clips
        self.resampler = av.AudioResampler("flt", "mono", sample_rate, options=options)
        self.form, self.rate = _form(frame), frame.sample_rate
        self.num_in, self.origins, self.pieces = 0, [], []

    def continues(self, time: float, frame: Any) -> bool:
        expected = self.origins[0] + self.num_in / self.rate
        return _form(frame) == self.form and abs(time - expected) <= 2 * ROUNDING

    def add(self, time: float, frame: Any) -> None:
        self.origins.append(time - self.num_in / self.rate)
        self.num_in += frame.samples
        frame.pts = None  # the resampler counts for itself
        self.pieces += self.resampler.resample(frame)

    def finish(self) -> tuple[float, Tensor]:
        """When the first sample sounds: each frame tells, the median is free of the container's rounding."""
        self.pieces += self.resampler.resample(None)
        pcm = [torch.from_numpy(piece.to_ndarray()[0]) for piece in self.pieces]
        return statistics.median(self.origins), torch.cat(pcm) if pcm else torch.zeros(0)


def scaled_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Width and height scaled down until the short side is at most `short_side`."""
    scale = min(1.0, (short_side or math.inf) / max(min(width, height), 1))
    return round(width * scale), round(height * scale)


def _form(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


class _Pictures:
    """Decoded frames as upright RGB, `video` [N, H, W, 3], all of the size of the first."""

    def __init__(self, num_frames: int, short_side: int | None, source: Source):
        from av.video.reformatter import VideoReformatter

        self.num_frames, self.short_side, self.source = num_frames, short_side, source
        self.reformatter = VideoReformatter()
        self.video, self.last, self.count = torch.empty(0), None, 0

    def add(self, frame: Any) -> None:
        picture = self.video[self.count - 1] if frame is self.last else self._rgb(frame)
        if self.count == 0:
            self.video = torch.empty(self.num_frames, *picture.shape, dtype=torch.uint8)
        self.video[self.count] = picture
        self.last, self.count = frame, self.count + 1

    def _rgb(self, frame: Any) -> Tensor:
        if frame.is_corrupt:
            raise self.source.error("the video must be undamaged, got a frame that FFmpeg marks as corrupt.")
        turns = round(frame.rotation / 90) % 4
        if self.count == 0:
            self.size = scaled_size(frame.width, frame.height, self.short_side)
        rgb = self.reformatter.reformat(frame, *self.size, format="rgb24", interpolation="AREA", threads=1)
        picture = torch.from_numpy(rgb.to_ndarray())
        return torch.rot90(picture, turns, (0, 1)) if turns else picture
