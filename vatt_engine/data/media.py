"""Windows of media files, decoded on the CPU by PyAV: frames and waveform of the same seconds, on one clock.

The clock: second 0 is the first presentation time of the video or audio track, whichever is earlier, after the decoder
has dropped its priming samples. Both tracks are read by presentation times alone; an index only helps to seek.
The picture at time t is the frame on screen: the last one that begins at t + 1 ms or before (containers round to 1 ms);
before the first frame it is the first, after the last frame the last. Sample j of a waveform is the sound at
start + j / rate. docs/data.md has every rule in a table.
A window longer than what is left of the file repeats it (as the official pipeline does), both tracks over the same
whole number of frames, so that they stay in step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vatt_engine.data.frame_times import first_second, is_bare
from vatt_engine.data.manifest import Member, Sample
from vatt_engine.data.media_info import MediaInfo, contradictions, described
from vatt_engine.data.pictures import PictureForm, pictures, stacked_pictures
from vatt_engine.data.streams import DEFAULT_LIMITS, ROUNDING, MediaError, MediaLimits, Reach, Source
from vatt_engine.data.waveforms import HOLE, joined, waveform

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
    set_note: str = ""  # what was odd and probably is so in all files of the set

    def repeated(self, num_frames: int, num_samples: int) -> Clip:
        """The clip of this length that repeats what is there, all of which comes from the file."""
        video, audio = self.video, self.audio
        num_real_frames = 0 if video is None else len(video)
        if video is not None and len(video) < num_frames:
            video = video[torch.arange(num_frames) % len(video)]
        if audio is not None and len(audio) < num_samples:
            audio = audio[torch.arange(num_samples) % len(audio)]
        return self._replace(video=video, audio=audio, num_real_frames=num_real_frames)


class Track(NamedTuple):
    """A whole file for a cache in memory: frames at `fps` from second 0, [N, H, W, 3], and samples at `sample_rate`."""

    video: Tensor | None
    audio: Tensor | None
    fps: float
    sample_rate: int
    num_frames: int
    heard: tuple[tuple[int, int], ...]  # stretches of samples that the file has: the first, and behind the last
    note: str = ""
    set_note: str = ""

    @property
    def num_real_samples(self) -> int:
        """Samples up to the last that the file has."""
        return max((end for _, end in self.heard), default=0)

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
        stop = sample + (0 if audio is None else len(audio))
        ends = (min(end, stop) - sample for begin, end in self.heard if begin < stop and end > sample)
        num_real = max(ends, default=0)
        clip = Clip(video, audio, first / self.fps, 0, num_real, self.note, self.set_note)
        return clip.repeated(num_frames, num_samples)


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


def aspect_note(aspect: float | Fraction) -> str:
    """What there is to say about pixels that are not square and taken as if they were."""
    if abs(aspect - 1) < 0.005:
        return ""
    hint = "See data.pixel_aspect."
    return f"the pixels must be square, got {float(aspect):.3f} times as wide as high, taken as stored. {hint}"


def open_media(sample: Sample, limits: MediaLimits = DEFAULT_LIMITS, *, square_pixels: bool = False) -> Media:
    """The media of a sample: its file, or its tracks where they lie in a shard; arguments and errors as Media.

    >>> open_media(read_samples("shards")[0]).info.duration  # doctest: +SKIP
    """
    members = {kind: member for kind in ("video", "audio") if (member := getattr(sample, kind))}
    return Media(sample.path, limits, members=members, duration=sample.duration, square_pixels=square_pixels)


class Media:
    """A media file: `info`, and `read` for its windows. Nothing stays open between calls, so threads may share one.

    Args:
        path: the file.
        limits: what it may ask for.
        members: instead, the tracks of a shard's sample, by "video" and "audio"; `path` then only names it. Second 0 is
            that of both, and a window begins with the frame on screen at its start.
        duration: of those, seconds; None: what they say.
        square_pixels: frames whose pixels are not square are stretched until they are; False takes them as stored.

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
        square_pixels: bool = False,
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
            if "video" in members:
                self.info = self.info._replace(pixel_aspect=members["video"].aspect)
        self.aspect = float(self.info.pixel_aspect) if square_pixels else 1.0
        self.set_note = "" if square_pixels else aspect_note(self.info.pixel_aspect)
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
        clip, _ = self._window(start, num_frames, fps, num_samples, sample_rate, self._form(short_side))
        return clip.repeated(num_frames, num_samples)

    def _form(self, short_side: int | None, multiple: int = 1) -> PictureForm:
        return PictureForm(short_side=short_side, multiple=multiple, aspect=self.aspect)

    def _window(
        self, start: float, num_frames: int, fps: float, num_samples: int, sample_rate: int, form: PictureForm
    ) -> tuple[Clip, tuple[tuple[int, int], ...]]:
        """The window as far as the file goes, and the stretches of its samples that the file has."""
        period = self.frames_left(start, fps)
        video, audio, heard, reached = None, None, (), {}
        with self._source.faults():
            if self.info.has_audio and num_samples:
                wanted = min(num_samples, round(period / fps * sample_rate))
                audio, _, reached["audio"] = waveform(self._sources["audio"], start, wanted, sample_rate)
                heard = self._heard(start, wanted, sample_rate, reached["audio"])
            if self.info.has_video and num_frames:
                times = [start + i / fps for i in range(min(num_frames, period))]
                video, reached["video"] = stacked_pictures(self._sources["video"], times, self.info.fps, form)
            self.check_reached(start, reached)
        holes = [f"the {kind} must be whole, got a hole in it." for kind, reach in reached.items() if reach.holed]
        num_real = max((end for _, end in heard), default=0)
        return Clip(video, audio, start, 0, num_real, " ".join(self._notes + holes), self.set_note), heard

    def _heard(self, start: float, num_samples: int, sample_rate: int, reach: Reach) -> tuple[tuple[int, int], ...]:
        """Of a shard's track, the index knows what is sound of the source and what is silence put in for it."""
        member = self._sources["audio"].member
        if member is None or member.heard is None:
            return reach.heard
        return member.heard_within(start, num_samples, sample_rate)

    def read_all(self, *, fps: float, sample_rate: int, short_side: int | None = None, pictures: bool = True) -> Track:
        """The whole file, or its sound alone; see decode."""
        count = self.frames_left(0.0, fps)
        num_samples = round(count / fps * sample_rate)
        clip, heard = self._window(0.0, count * pictures, fps, num_samples, sample_rate, self._form(short_side))
        return Track(clip.video, clip.audio, fps, sample_rate, count, heard, clip.note, clip.set_note)

    def pictures(
        self, start: float, num_frames: int, *, fps: float, short_side: int | None, reached: dict[str, Reach]
    ) -> Iterator[Tensor]:
        """What `read` gives as video, one by one [H, W, 3] with even sides; check `reached` at the end."""
        times = [start + i / fps for i in range(num_frames)]
        with self._source.faults():
            form = self._form(short_side, multiple=2)
            yield from pictures(self._sources["video"], times, self.info.fps, form, reached)

    def sound(self, start: float, num_samples: int, sample_rate: int, reached: dict[str, Reach]) -> Iterator[Tensor]:
        """What `read` gives as audio, in pieces [L] up to the last sample of the track; check `reached` at the end."""
        silent, step, heard = 0, BLOCK_SECONDS * sample_rate, []
        with self._source.faults():
            for begin in range(0, num_samples, step):
                length = min(step, num_samples - begin)
                at = start + begin / sample_rate
                wave, num_real, reach = waveform(self._sources["audio"], at, length, sample_rate)
                heard += [(begin + first, begin + end) for first, end in reach.heard]
                reached["audio"] = reach._replace(heard=tuple(joined(heard, round(HOLE * sample_rate))))
                if num_real:
                    yield torch.cat([torch.zeros(silent), wave[:num_real]])
                    silent = 0
                silent += length - num_real

    def track_bytes(self, *, fps: float, sample_rate: int, short_side: int | None = None, pictures: bool = True) -> int:
        """The memory that `read_all` will need."""
        count = self.frames_left(0.0, fps)
        width, height = self._form(short_side).size(self.info.width, self.info.height)
        return count * width * height * 3 * pictures + round(count / fps * sample_rate) * 4 * self.info.has_audio

    def _opened(self, source: Source) -> MediaInfo:
        with source.faults(), source.opened() as (container, streams):
            if not (source.member or is_bare(container)):
                starts = [first_second(container, stream) for stream in streams.values()]
                source.zero = min((start for start in starts if start is not None), default=0.0)
            self._notes += contradictions(source.zero, container, streams)
            return described(source.zero, container, streams)

    def _check_limits(self) -> None:
        info, limits = self.info, self._source.limits
        if not (info.has_video or info.has_audio):
            raise self._source.error("the file must have a video or an audio track, got neither.")
        width, height = round(info.width * self.aspect), info.height
        if info.has_video and not (info.width and info.height and width * height <= limits.max_pixels):
            size = f"{width} x {height}" if info.width else "a size that FFmpeg does not tell"
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
