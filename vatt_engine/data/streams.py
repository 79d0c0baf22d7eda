"""One track of a media file read by presentation time: pictures on screen, and sound as mono samples.

Second 0 is the file's first presentation time; see media.py for the rules. Nothing here trusts an index.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vatt_engine.data.manifest import Member
from vatt_engine.faults import raise_if_of_code

ROUNDING = 1e-3  # seconds; times in mkv, webm and flv are rounded to 1 ms
PREROLL = {"video": (0.2, 10.0), "audio": (0.5, 10.0)}  # seconds to seek ahead of a window: first try, second try
MEMBER_SUFFIXES = {"video": (".mp4", ".webm", ".avi"), "audio": (".flac",)}  # what of a shard is opened
# libswscale's flags "area", "full_chroma_int" and "accurate_rnd". Without the last two the colours of an unscaled
# frame, one per 2 x 2 pixels, are repeated instead of interpolated: 30 dB from DALI's where colours are strong, 45 dB
# where pale, and further from the source. They cost 0.3 ms of a frame of 256 x 336.
SCALER = 0x20 | 0x2000 | 0x40000
MEMBER_FORMATS = "mov,matroska,avi,flac"  # as what, by FFmpeg's names


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
    holed: bool = False  # a stretch within the window has no frames or samples


class Source:
    """A file whose tracks are read by time; `zero` is its first presentation time, which the reader sets.

    Or a member of a shard, read where it lies, with one track alone; `path` then only names it. Every failure of FFmpeg
    inside `faults`, of whatever class, leaves as a MediaError; a failure of our own code leaves as it is.
    """

    def __init__(self, path: str | Path, limits: MediaLimits, member: Member | None = None, kind: str | None = None):
        self.path, self.limits, self.zero = Path(path), limits, 0.0
        self.member, self.kinds = member, (kind,) if kind else ("video", "audio")
        file = member.path if member else self.path
        if not os.path.isfile(file):
            what = "a folder" if os.path.isdir(file) else "no such file"
            raise self.error(f"the path must name a file, got {what}.")
        if os.path.getsize(file) == 0:
            raise self.error("the file must hold media, got an empty file.")
        size = member.size if member else os.path.getsize(file)
        if size > limits.max_bytes:
            raise self.error(f"the file must have at most {limits.max_bytes} bytes, got {size}.")
        if member:
            self._check_member(member)
        else:
            self._check_riff(size)

    def _check_riff(self, size: int) -> None:
        """FFmpeg takes a wav or avi that is cut for one that is shorter."""
        with self.faults(), self.path.open("rb") as file:
            head = file.read(8)
        promised = 8 + int.from_bytes(head[4:], "little")
        if head[:4] == b"RIFF" and size + 64 < promised < 0x7FFFF000:  # from there on: written to a pipe, not known
            raise self.error(f"the file must have the {promised} bytes that it promises, got {size}.")

    def _check_member(self, member: Member) -> None:
        """The tar's own header, before the content, must tell what the index does."""
        with self.faults(), member.path.open("rb") as file:
            file.seek(member.offset - tarfile.BLOCKSIZE)
            info = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        names = [self.path.name + suffix for kind in self.kinds for suffix in MEMBER_SUFFIXES[kind]]
        if not info.isreg() or info.name not in names or info.size != member.size:
            text = f"be the file {' or '.join(names)} of {member.size} bytes, got {info.name!r} of {info.size}"
            raise self.error(f"the tar's member must {text}. Is the index of another tar?")
        _check_content(member, self.path)

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
            raise_if_of_code(error, "av", "tarfile", doing=f"reading {self.path}")
            text = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
            raise self.error(f"the file must be media that FFmpeg can decode, got {text}.") from error

    @contextmanager
    def opened(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The container and its best video and audio stream; whatever a playlist says, only local files are read."""
        import av
        from av.stream import Disposition

        url, local = f"file:{self.path}", {"protocol_whitelist": "file"}
        if self.member:
            begin, end = self.member.offset, self.member.offset + self.member.size
            url = f"subfile,,start,{begin},end,{end},,:file:{self.member.path}"
            local = {"protocol_whitelist": "file,subfile", "format_whitelist": MEMBER_FORMATS}
        tags = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}  # 19 reads any bytes
        with av.open(url, options=self._codec_options, container_options=local, **tags) as container:
            streams = {kind: container.streams.best(kind) for kind in self.kinds}
            if streams.get("video") is not None and streams["video"].disposition & Disposition.attached_pic:
                streams["video"] = None  # the cover of a song
            for kind, stream in streams.items():
                if stream is not None and stream.codec_context is None:
                    raise self.error(f"the {kind} codec must be one that FFmpeg decodes, got an unknown one.")
                if stream is not None and not stream.time_base:  # None in PyAV 18, 0/1 in PyAV 19
                    raise self.error(f"the {kind} must have a unit of time, got none.")
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

        with ExitStack() as stack:
            container, streams = stack.enter_context(self.opened())
            stream = streams[kind]
            for other in container.streams:
                other.discard = Discard.default if other is stream else Discard.all
            stream.codec_context.options = self._codec_options
            stream.codec_context.thread_count = 1  # the loader decodes many files at once
            if target > 0:
                with suppress(av.FFmpegError):  # without an index: from the beginning
                    container.seek(int((target + self.zero) / stream.time_base), stream=stream)
            time, step = -math.inf, 0.0
            # Not `container.decode`: a demuxer that is let go, and not closed, keeps 300 bytes for ever (PyAV 18).
            packets = stack.enter_context(closing(container.demux(stream)))
            for number, frame in enumerate(chain.from_iterable(packet.decode() for packet in packets)):
                if number >= self.limits.max_frames:
                    text = f"a window must need at most {self.limits.max_frames} decoded {kind} frames, got more."
                    raise self.error(text)
                stamp = frame.pts if frame.pts is not None else frame.dts
                if not frame.time_base:
                    raise self.error(f"the {kind} must have a unit of time, got a frame without one.")
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
        video, reached = torch.empty(0), {}
        for count, picture in enumerate(self.pictures(times, fps, short_side, reached)):
            if count == 0:
                video = torch.empty(len(times), *picture.shape, dtype=torch.uint8)
            video[count] = picture
        return video, reached["video"]

    def pictures(
        self, times: list[float], fps: float, short_side: int | None, reached: dict[str, Reach], multiple: int = 1
    ) -> Iterator[Tensor]:
        """The picture on screen at each of `times` (increasing), [H, W, 3], one by one; then fills `reached`."""
        rgb = _Rgb(short_side, multiple, self)
        count, shown = 0, None
        begin, length, gap = -math.inf, 0.0, 1 / fps if fps else 0.0
        holed, longest = False, 0.02 + 2.5 / fps if fps else math.inf
        with closing(self.decoded("video", times[0])) as decoded:
            for time, frame in decoded:
                holed = holed or (shown is not None and time > times[0] and time - begin > longest)
                shown = shown or frame
                while count < len(times) and times[count] + ROUNDING < time:
                    yield rgb(shown)
                    count += 1
                if count == len(times):
                    reached["video"] = Reach(time, 0.0, times[-1], len(times), len(times), "frames", holed)
                    return
                if shown is not frame:
                    shown, gap = frame, max(gap, time - begin)
                begin, length = time, float((frame.duration or 0) * frame.time_base)
        if shown is None:
            raise self.error(f"the video must give frames, decoded 0 of {len(times)} from {times[0]:.3f} s.")
        for _ in times[count:]:
            yield rgb(shown)
        step = max(length, gap)
        num_got = sum(time < begin + step for time in times)
        slack = 0.02 + 1.5 * step
        reached["video"] = Reach(begin + step, slack, times[-1], num_got, len(times), "frames", holed)

    def waveform(self, start: float, num_samples: int, sample_rate: int) -> tuple[Tensor, int, Reach]:
        """Mono samples from `start` on, zeros where the track has none; and their number up to the last real one."""
        wave = torch.zeros(num_samples)
        stop = start + num_samples / sample_rate
        end, num_real, missing = -math.inf, 0, 0.0
        for time, pcm in self._runs(start, stop + 0.05, sample_rate):  # the resampler looks a little ahead
            offset = round((time - start) * sample_rate)
            first, last = max(offset, 0), min(offset + len(pcm), num_samples)
            missing += max(time - max(end, start), 0.0) if end > -math.inf else 0.0
            end = max(end, time + len(pcm) / sample_rate)
            if first < last:
                wave[first:last] = pcm[first - offset : last - offset]
                num_real = max(num_real, last)
        slack = max(0.1 - missing, 0.0)  # holes and a lost end add up
        reach = Reach(max(end, 0.0), slack, stop, num_real, num_samples, "samples", missing > 0.1)
        return wave.nan_to_num_().clamp_(-1, 1), num_real, reach

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


def read_member(member: Member, path: Path) -> bytearray:
    """The bytes of a member of the sample that `path` names; they must be those that were prepared.

    Decoders do not notice all damage: of flipped bits they often make wrong pictures, of a lost end fewer ones.

    Raises:
        MediaError: the shard cannot be read, or has other bytes.
    """
    content = bytearray(member.size)
    try:
        with member.path.open("rb") as file:
            file.seek(member.offset)
            size = file.readinto(content)
    except OSError as error:
        raise MediaError(path, f"the shard must be readable, got {error.strerror}.") from error
    if not 0 < size == member.size:
        raise MediaError(path, f"the {member.suffix} must have {member.size or 'some'} bytes, got {size}.")
    digest = sha256(content).hexdigest()
    if digest != member.sha256:
        text = f"have the index's SHA-256, {member.sha256[:12]}..., got {digest[:12]}..."
        raise MediaError(path, f"the {member.suffix} must {text}.")
    return content


@lru_cache(maxsize=1 << 16)
def _check_content(member: Member, path: Path) -> None:
    """As read_member; once per member that is as it should be."""
    read_member(member, path)


def contradictions(zero: float, container: Any, streams: Mapping[str, Any]) -> Iterator[str]:
    """What a damaged container says against itself, where FFmpeg takes it for another, shorter film."""
    if zero > 0.1 and "matroska" in container.format.name:  # the first cluster is lost
        yield f"the file must begin at second 0, got its first frame at {zero:.3f} s."
    video, audio = streams.get("video"), streams.get("audio")
    if video is not None and video.average_rate and video.codec_context.framerate and video.duration:
        told, seconds = float(video.frames / video.average_rate), float(video.duration * video.time_base)
        # A film trimmed by an edit list has more frames than it shows too, but at the rate that its codec was told.
        if told > seconds + 0.5 and video.average_rate < video.codec_context.framerate / 2:
            yield f"the {video.frames} frames must last as long as the video, {seconds:.3f} s, got {told:.3f} s."
    bits = audio is not None and re.search(r"pcm_[fsu](\d+)", audio.codec_context.codec.name)
    if bits and (told := audio.codec_context.bit_rate):
        rate = audio.codec_context.sample_rate * audio.codec_context.channels * int(bits[1])
        if told != rate:
            yield f"the sound must have the {told} bits a second that the file promises, got {rate}."


def scaled_size(width: int, height: int, short_side: int | None, multiple: int = 1) -> tuple[int, int]:
    """Width and height scaled down until the short side is at most `short_side`, each to a multiple."""
    scale = min(1.0, (short_side or math.inf) / max(min(width, height), 1)) / multiple
    return max(round(width * scale), 1) * multiple, max(round(height * scale), 1) * multiple


def _form(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


class _Rgb:
    """Decoded frames as upright RGB [H, W, 3], all of the size of the first; the same frame twice costs once."""

    def __init__(self, short_side: int | None, multiple: int, source: Source):
        from av.video.reformatter import VideoReformatter

        self.short_side, self.multiple, self.source = short_side, multiple, source
        self.reformatter = VideoReformatter()
        self.size, self.last, self.picture = None, None, torch.empty(0)

    def __call__(self, frame: Any) -> Tensor:
        if frame is not self.last:
            self.last, self.picture = frame, self._rgb(frame)
        return self.picture

    def _rgb(self, frame: Any) -> Tensor:
        if frame.is_corrupt:
            raise self.source.error("the video must be undamaged, got a frame that FFmpeg marks as corrupt.")
        turns = round(frame.rotation / 90) % 4
        self.size = self.size or scaled_size(frame.width, frame.height, self.short_side, self.multiple)
        rgb = self.reformatter.reformat(frame, *self.size, format="rgb24", interpolation=SCALER, threads=1)
        picture = torch.from_numpy(rgb.to_ndarray())
        return torch.rot90(picture, turns, (0, 1)) if turns else picture
