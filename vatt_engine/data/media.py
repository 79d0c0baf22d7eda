"""Windows of media files, decoded on the CPU by PyAV: frames and waveform of the same seconds, on one clock.

The clock: second 0 is the first presentation time of the video or audio track, whichever is earlier, after the decoder
has dropped its priming samples. Both tracks are read by presentation times alone; an index only helps to seek.
The picture at time t is the frame on screen: the last one with pts <= t + 1 ms (containers round to 1 ms); before the
first frame it is the first, after the last frame the last. Sample j of a waveform is the sound at start + j / rate.
A window longer than what is left of the file repeats it (as the official pipeline does), both tracks over the same
whole number of frames, so that they stay in step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vatt_engine.data.manifest import Member, Sample
from vatt_engine.data.streams import (
    DEFAULT_LIMITS,
    ROUNDING,
    MediaError,
    MediaLimits,
    Reach,
    Source,
    contradictions,
    scaled_size,
)

ESTIMATED = {"mp3", "aac", "ac3", "eac3", "h264", "hevc", "m4v", "mpegvideo"}  # bare streams: FFmpeg guesses a length
BLOCK_SECONDS = 600  # of sound in memory at a time where it is streamed
_OF_AUDIO = ("has_audio", "audio_codec", "sample_rate", "audio_end")  # fields of MediaInfo

__all__ = [
    "Clip",
    "Media",
    "MediaError",
    "MediaInfo",
    "MediaLimits",
    "Track",
    "decode",
    "decode_clip",
    "open_media",
    "probe",
]


class MediaInfo(NamedTuple):
    """What a file says about itself: seconds on the common clock, frame size as stored (before rotation)."""

    duration: float
    has_video: bool
    has_audio: bool
    width: int
    height: int
    fps: float  # average; 0 where unknown
    video_codec: str
    audio_codec: str
    sample_rate: int
    video_end: float | None  # the end each track promises; None where only the file has a length
    audio_end: float | None
    end: float | None  # the end that the file promises; None where its length is FFmpeg's estimate


class Clip(NamedTuple):
    """A window of one file.

    `video` [T, H, W, 3] uint8, `audio` [L] float32 in [-1, 1], each None without such a track or when none was asked
    for; `start` in seconds; the first `num_real_frames` and `num_real_samples` come from the file, the rest repeats
    them or, where the sound ends before the picture, is silent. No real sample: the window has no sound.
    """

    video: Tensor | None
    audio: Tensor | None
    start: float
    num_real_frames: int
    num_real_samples: int
    note: str = ""  # what was odd


class Track(NamedTuple):
    """A whole file for a cache in memory: frames at `fps` from second 0, [N, H, W, 3], and samples at `sample_rate`."""

    video: Tensor | None
    audio: Tensor | None
    fps: float
    sample_rate: int
    num_frames: int
    num_real_samples: int
    note: str = ""

    @property
    def duration(self) -> float:
        """Seconds, to a whole number of frames."""
        return self.num_frames / self.fps

    def cut(self, start: float, *, num_frames: int, num_samples: int) -> Clip:
        """The window from the frame nearest to `start` on, repeated where the file ends, as decode_clip does it.

        >>> track.cut(1.0, num_frames=32, num_samples=153_600).video.shape  # doctest: +SKIP
        """
        first = min(max(round(start * self.fps), 0), self.num_frames - 1)
        period = self.num_frames - first
        video = None if self.video is None else self.video[first : first + min(period, num_frames)]
        sample, num_left = (round(n / self.fps * self.sample_rate) for n in (first, period))
        audio = None if self.audio is None else self.audio[sample : sample + min(num_left, num_samples)]
        num_real = 0 if audio is None else min(max(self.num_real_samples - sample, 0), len(audio))
        return _repeated(video, audio, first / self.fps, num_frames, num_samples, num_real, self.note)


def probe(path: str | Path, limits: MediaLimits = DEFAULT_LIMITS) -> MediaInfo:
    """What a media file says about itself, without decoding it.

    Raises:
        MediaError: not a readable media file, or over a limit.

    >>> probe("clip.mp4").duration  # doctest: +SKIP
    """
    return Media(path, limits).info


def decode_clip(
    path: str | Path,
    start: float,
    *,
    num_frames: int = 32,
    fps: float = 10.0,
    num_samples: int = 153_600,
    sample_rate: int = 48_000,
    short_side: int | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Clip:
    """Decode one window of a file: frames at start + i / fps, samples at start + j / sample_rate.

    Args:
        path: any file that FFmpeg can decode.
        start: seconds on the common clock of the file, in [0, duration).
        num_frames, fps: frames of the clip; 0 frames decode no picture.
        num_samples, sample_rate: samples of the clip, mixed to mono and resampled by libswresample; 0: no sound.
        short_side: frames whose short side is longer are scaled down to this; None keeps the size.
        limits: what the file may ask for.

    Raises:
        MediaError: the file cannot be decoded, is over a limit, or gives less than it promises in the window.

    Source: paper section 4.1.1 (32 frames at 10 fps, 153,600 samples at 48 kHz of the same window).

    >>> decode_clip("clip.mp4", 1.5, short_side=256).audio.shape  # doctest: +SKIP
    """
    return Media(path, limits).read(
        start, num_frames=num_frames, fps=fps, num_samples=num_samples, sample_rate=sample_rate, short_side=short_side
    )


def decode(
    path: str | Path,
    *,
    fps: float = 10.0,
    sample_rate: int = 48_000,
    short_side: int | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Track:
    """Decode a whole file once, to cut many windows from it; arguments and errors as decode_clip.

    >>> decode("clip.mp4").cut(0.0, num_frames=32, num_samples=153_600).start  # doctest: +SKIP
    0.0
    """
    return Media(path, limits).read_all(fps=fps, sample_rate=sample_rate, short_side=short_side)


def open_media(sample: Sample, limits: MediaLimits = DEFAULT_LIMITS) -> Media:
    """The media of a sample: its file, or its tracks where they lie in a shard; errors as Media.

    >>> open_media(read_samples("shards")[0]).info.duration  # doctest: +SKIP
    """
    members = {kind: member for kind in ("video", "audio") if (member := getattr(sample, kind))}
    return Media(sample.path, limits, members=members, duration=sample.duration)


class Media:
    """A media file: `info`, and `read` for its windows. Nothing stays open between calls, so threads may share one.

    Args:
        path: the file.
        limits: what it may ask for.
        members: instead, the tracks of a shard's sample, by "video" and "audio"; `path` then only names it. Second 0 is
            that of both, and a window begins with the frame on screen at its start.
        duration: of those, seconds; None: what they say.

    Raises:
        MediaError: whatever is wrong with the file, whichever class PyAV raises for it.

    >>> Media("clip.mp4").read_all(fps=10, sample_rate=48_000).duration  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | Path,
        limits: MediaLimits = DEFAULT_LIMITS,
        *,
        members: Mapping[str, Member] | None = None,
        duration: float | None = None,
    ):
        if members:
            self._sources = {kind: Source(path, limits, member, kind) for kind, member in members.items()}
        else:
            self._sources = dict.fromkeys(("video", "audio"), Source(path, limits))
        self._source, self._in_shard, self._notes = next(iter(self._sources.values())), bool(members), []
        infos = {source: self._opened(source) for source in dict.fromkeys(self._sources.values())}
        self.info = next(iter(infos.values()))
        if members:
            if len(infos) == 2:
                sound = infos[self._sources["audio"]]
                self.info = self.info._replace(**{name: getattr(sound, name) for name in _OF_AUDIO})
            seconds = duration or max(info.duration for info in infos.values())
            self.info = self.info._replace(duration=seconds, video_end=seconds if self.info.has_video else None)
        self._check_limits()
        if self.info.video_end is not None and self.info.video_end < self.info.duration - 0.5:
            text = f"last as long as the file, {self.info.duration:.3f} s, got {self.info.video_end:.3f} s"
            self._notes.append(f"the video must {text}.")

    @property
    def duration(self) -> float:
        """Seconds on the common clock."""
        return self.info.duration

    def frames_left(self, start: float, fps: float) -> int:
        """Frames at `fps` from `start` to the end of the file, at least 1."""
        return max(1, round((self.info.duration - start) * fps))

    def read(
        self,
        start: float,
        *,
        num_frames: int,
        fps: float,
        num_samples: int,
        sample_rate: int,
        short_side: int | None = None,
    ) -> Clip:
        """The window that begins at `start`; see decode_clip."""
        if not (num_frames >= 0 and fps > 0 and num_samples >= 0 and sample_rate > 0):
            got = f"{num_frames} frames at {fps} fps and {num_samples} samples at {sample_rate} Hz"
            raise ValueError(f"media.read: the window must have counts >= 0 and rates above 0, got {got}.")
        if not 0 <= start < self.info.duration:
            raise self._source.error(f"start must be in [0, {self.info.duration:.3f}) s, got {start}.")
        if self._in_shard and self.info.fps:
            last = math.ceil((self.info.duration - ROUNDING) * self.info.fps) - 1
            start = max(0, min(math.floor((start + ROUNDING) * self.info.fps), last)) / self.info.fps
        period = self.frames_left(start, fps)
        video, audio, num_real, reached = None, None, 0, {}
        with self._source.faults():
            if self.info.has_audio and num_samples:
                wanted = min(num_samples, round(period / fps * sample_rate))
                audio, num_real, reached["audio"] = self._sources["audio"].waveform(start, wanted, sample_rate)
            if self.info.has_video and num_frames:
                times = [start + i / fps for i in range(min(num_frames, period))]
                video, reached["video"] = self._sources["video"].frames(times, self.info.fps, short_side)
            self.check_reached(start, reached)
        holes = [f"the {kind} must be whole, got a hole in it." for kind, reach in reached.items() if reach.holed]
        return _repeated(video, audio, start, num_frames, num_samples, num_real, " ".join(self._notes + holes))

    def read_all(self, *, fps: float, sample_rate: int, short_side: int | None = None, pictures: bool = True) -> Track:
        """The whole file, or its sound alone; see decode."""
        count = self.frames_left(0.0, fps)
        num_samples = round(count / fps * sample_rate)
        clip = self.read(
            0.0,
            num_frames=count if pictures else 0,
            fps=fps,
            num_samples=num_samples,
            sample_rate=sample_rate,
            short_side=short_side,
        )
        return Track(clip.video, clip.audio, fps, sample_rate, count, clip.num_real_samples, clip.note)

    def pictures(
        self, start: float, num_frames: int, *, fps: float, short_side: int | None, reached: dict[str, Reach]
    ) -> Iterator[Tensor]:
        """What `read` gives as video, one by one [H, W, 3] with even sides; check `reached` at the end."""
        times = [start + i / fps for i in range(num_frames)]
        with self._source.faults():
            yield from self._sources["video"].pictures(times, self.info.fps, short_side, reached, multiple=2)

    def sound(self, start: float, num_samples: int, sample_rate: int, reached: dict[str, Reach]) -> Iterator[Tensor]:
        """What `read` gives as audio, in pieces [L] up to the last sample of the track; check `reached` at the end."""
        silent, step = 0, BLOCK_SECONDS * sample_rate
        with self._source.faults():
            for begin in range(0, num_samples, step):
                length = min(step, num_samples - begin)
                block = self._sources["audio"].waveform(start + begin / sample_rate, length, sample_rate)
                wave, num_real, reached["audio"] = block
                if num_real:
                    yield torch.cat([torch.zeros(silent), wave[:num_real]])
                    silent = 0
                silent += length - num_real

    def track_bytes(self, *, fps: float, sample_rate: int, short_side: int | None = None, pictures: bool = True) -> int:
        """The memory that `read_all` will need."""
        count = self.frames_left(0.0, fps)
        width, height = scaled_size(self.info.width, self.info.height, short_side)
        return count * width * height * 3 * pictures + round(count / fps * sample_rate) * 4 * self.info.has_audio

    def _opened(self, source: Source) -> MediaInfo:
        with source.faults(), source.opened() as (container, streams):
            starts = [s.start_time * s.time_base for s in streams.values() if s.start_time is not None]
            source.zero = 0.0 if source.member else float(min(starts, default=0))
            self._notes += contradictions(source.zero, container, streams)
            return _described(source.zero, container, streams)

    def _check_limits(self) -> None:
        info, limits = self.info, self._source.limits
        if not (info.has_video or info.has_audio):
            raise self._source.error("the file must have a video or an audio track, got neither.")
        if info.has_video and not 0 < info.width * info.height <= limits.max_pixels:
            size = f"{info.width} x {info.height}" if info.width else "a size that FFmpeg does not tell"
            raise self._source.error(f"a frame must have at most {limits.max_pixels} pixels, got {size}.")
        if info.duration > limits.max_seconds:
            text = f"the file must last at most {limits.max_seconds:g} s, got {info.duration:g} s."
            raise self._source.error(text)

    def check_reached(self, start: float, reached: dict[str, Reach]) -> None:
        """Damaged files often end early without an error: compare what came with what the container promises."""
        for kind, reach in reached.items():
            promise = self.info.video_end if kind == "video" else self.info.audio_end
            if promise is None and len(reached) == self.info.has_video + self.info.has_audio:
                promise = self.info.end if reach.end == max(other.end for other in reached.values()) else None
            if promise is not None and reach.end + reach.slack < min(promise, reach.stop):
                text = f"decoded {reach.num_got} of {reach.num_wanted} {reach.unit} from {start:.3f} s"
                raise self._source.error(f"the {kind} must last {promise:.3f} s as promised, got {text}.")


def _described(zero: float, container: Any, streams: dict[str, Any]) -> MediaInfo:
    ends = {kind: _promised_end(zero, container, stream) for kind, stream in streams.items()}
    known = [end for end in ends.values() if end is not None]
    if len(known) < len(streams) and container.duration is not None:
        begin = 0 if "matroska" in container.format.name else (container.start_time or 0)
        known.append((begin + container.duration) / 1e6 - zero)
    video, audio = (streams[kind].codec_context if kind in streams else None for kind in ("video", "audio"))
    rate = streams["video"].average_rate or streams["video"].guessed_rate if video else None
    return MediaInfo(
        duration=max(known, default=0) or _scanned_end(zero, container, streams),
        has_video=video is not None,
        has_audio=audio is not None,
        width=video.width if video else 0,
        height=video.height if video else 0,
        fps=float(rate or 0),
        video_codec=video.codec.name if video else "",
        audio_codec=audio.codec.name if audio else "",
        sample_rate=audio.sample_rate if audio else 0,
        video_end=ends.get("video"),
        audio_end=ends.get("audio"),
        end=max(known, default=None) if container.format.name not in ESTIMATED else None,
    )


def _promised_end(zero: float, container: Any, stream: Any) -> float | None:
    """When the container says that a track ends, in seconds on the common clock."""
    if container.format.name in ESTIMATED:
        return None
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - zero
    clock = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska's tag
    return clock and sum(float(clock[i]) * 60 ** (3 - i) for i in (1, 2, 3)) - zero


def _scanned_end(zero: float, container: Any, streams: dict[str, Any]) -> float:
    """The end of a file without a length (a live recording, a pipe), by its packets."""
    end = 0.04  # a still picture has no time
    for packet in container.demux(list(streams.values())):
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base) - zero)
    return end


def _repeated(
    video: Tensor | None,
    audio: Tensor | None,
    start: float,
    num_frames: int,
    num_samples: int,
    num_real_samples: int,
    note: str,
) -> Clip:
    """The clip of the given length that repeats what is there."""
    num_real_frames = 0 if video is None else len(video)
    if video is not None and len(video) < num_frames:
        video = video[torch.arange(num_frames) % len(video)]
    if audio is not None and len(audio) < num_samples:
        audio = audio[torch.arange(num_samples) % len(audio)]
    return Clip(video, audio, start, num_real_frames, num_real_samples, note)
