"""Frames and a waveform into one media file: the writer behind the demo world, the tests and the benchmarks."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain, count, pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class _Suffix(NamedTuple):
    video_codec: str | None  # what is used when the caller names none; None: the container takes no video
    audio_codec: str
    can_start: bool  # the container stores a first time that is not zero
    can_vary: bool  # the container stores a time per frame


_SUFFIXES = {
    ".mp4": _Suffix("libx264", "aac", True, True),
    ".mov": _Suffix("libx264", "aac", True, True),
    ".mkv": _Suffix("libx264", "aac", True, True),
    ".webm": _Suffix("libvpx-vp9", "libopus", True, True),
    ".avi": _Suffix("mpeg4", "libmp3lame", False, False),
    ".m4a": _Suffix(None, "aac", True, False),
    ".ogg": _Suffix(None, "libopus", False, False),
    ".mp3": _Suffix(None, "libmp3lame", False, False),
    ".flac": _Suffix(None, "flac", False, False),
    ".wav": _Suffix(None, "pcm_s16le", False, False),
}
_TICKS = (
    60_000  # ticks per second of the exact clock: below the 65,535 that MPEG-4 allows, a multiple of 24, 25, 30 fps
)
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def write_media(
    path: str | os.PathLike,
    frames: Tensor | None,
    *,
    fps: float | Fraction | None = None,
    times: Sequence[float] | Tensor | None = None,
    waveform: Tensor | None = None,
    sample_rate: int = 48_000,
    video_codec: str | None = None,
    audio_codec: str | None = None,
    options: Mapping[str, str] | None = None,
    audio_options: Mapping[str, str] | None = None,
    start: float = 0.0,
) -> None:
    """Encodes frames and a waveform into one media file, whole or not at all (a temporary file, then a rename).

    Frame i is shown at start + i / fps, or at start + times[i]; audio sample n is heard at start + n / sample_rate.
    A `start` above zero keeps these times; what a codec needs to warm up (AAC: 1,024 samples) may then be heard before.
    Avi stores neither times nor such delays: there, as in mp3, compressed audio is late by 23 ms, and H.264 by a frame.

    Args:
        path: the file; .mp4 .mov .mkv .webm .avi, or audio alone: .m4a .ogg .mp3 .flac .wav.
        frames: [T, H, W, 3], uint8 RGB, tensor or array; height and width even. None: no video track.
        fps: frames per second, constant; a Fraction such as 30000/1001 stays exact.
        times: [T] seconds, increasing, for a variable frame rate; stored on the container's clock (1/60000 s in mp4,
            1 ms in mkv and webm). Give this or `fps`.
        waveform: [L] or [L, C], float32 in [-1, 1]; 1, 2 or 6 channels. None: no audio track.
        sample_rate: samples per second; the codec must have it (Opus: 8, 12, 16, 24, 48 kHz).
        video_codec: an FFmpeg encoder (libx264, libx265, libvpx-vp9, libsvtav1, mpeg4, mjpeg, ...); None: by suffix.
        audio_codec: aac, libopus, libmp3lame, flac, pcm_s16le, ...; None: by suffix.
        options: options of the video encoder, such as {"preset": "ultrafast", "crf": "28", "g": "10"}.
        audio_options: options of the audio encoder, such as {"b": "48000"}.
        start: seconds at which both tracks begin.

    Raises:
        ValueError: a wrong argument, or one that the container or the codec cannot hold.

    >>> write_media("grey.mp4", torch.full((8, 32, 32, 3), 128, dtype=torch.uint8), fps=10)
    """
    path = Path(path)
    suffix = _suffix_of(path, start)
    if frames is None and waveform is None:
        raise ValueError("write_media: frames must be given when waveform is not, got None for both.")
    frames, waveform = _checked_frames(frames), _checked_waveform(waveform)
    if frames is not None and suffix.video_codec is None:
        raise ValueError(f"write_media: frames must be None for {path.suffix}, got {len(frames)}. Use .mp4 or .mkv.")
    clock = None if frames is None else _Clock.of(fps, times, start, len(frames), path.suffix.lower())

    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{threading.get_ident()}{path.suffix}")
    if frames is not None:
        _check_codec_size(video_codec or suffix.video_codec, frames)
    try:
        _encode_file(
            temporary,
            None if frames is None else (frames, clock, video_codec or suffix.video_codec, dict(options or {})),
            None if waveform is None else (waveform, audio_codec or suffix.audio_codec, dict(audio_options or {})),
            sample_rate,
            start,
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_pictures(
    path: Path, pictures: Iterable[Tensor], *, fps: float, codec: str, options: Mapping[str, str]
) -> int:
    """Encodes pictures [H, W, 3] as they come, shown at i / fps, into a file without sound; returns height and width.

    A packet is written as soon as it is made; avi, which stores no times, needs an encoder without B-frames for that.
    """
    import av

    pictures, rate = iter(pictures), Fraction(fps).limit_denominator(1001)
    first = next(pictures)
    height, width = first.shape[:2]
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        stream = _video_stream(container, codec, rate, 1 / rate, height, width, dict(options))
        timed = zip(chain([first], pictures), count(), repeat(1))
        for frame in chain(_video_frames(timed, 1 / rate, stream.pix_fmt), [None]):
            container.mux(stream.encode(frame))
    return height, width


def write_sound(path: Path, blocks: Iterable[Tensor], *, sample_rate: int, codec: str) -> int:
    """Encodes blocks of mono samples [L] as they come, from second 0 on; returns the number of samples."""
    import av

    num_samples = 0
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        stream = _audio_stream(container, codec, sample_rate, 1, {})
        for block in blocks:
            for frame in _audio_frames(block[:, None], sample_rate, num_samples):
                container.mux(stream.encode(frame))
            num_samples += len(block)
        container.mux(stream.encode(None))
    return num_samples


class _Clock(NamedTuple):
    """When each frame is shown: `ticks[i] * time_base` seconds."""

    rate: Fraction  # nominal frames per second, which rate control plans with
    time_base: Fraction
    ticks: list[int]

    @classmethod
    def of(cls, fps, times, start: float, num_frames: int, suffix: str) -> _Clock:
        if (fps is None) == (times is None):
            raise ValueError(f"write_media: fps or times must be given, not both, got fps={fps}, times={times}.")
        if fps is not None:
            if not (math.isfinite(fps) and 0 < fps <= 1000):
                raise ValueError(f"write_media: fps must be above 0 and at most 1000, got {fps}.")
            rate = Fraction(fps).limit_denominator(1001)
            if start == 0:
                return cls(rate, 1 / rate, list(range(num_frames)))
            seconds = [i / rate for i in range(num_frames)]
        else:
            if not _SUFFIXES[suffix].can_vary:
                raise ValueError(
                    f"write_media: times must be None for {suffix}, whose frame rate is constant. Give fps."
                )
            seconds = [Fraction(float(t)) if math.isfinite(t) else None for t in times]
            if len(seconds) != num_frames or None in seconds or any(t < 0 for t in seconds):
                raise ValueError(f"write_media: times must be {num_frames} finite seconds >= 0, got {list(times)}.")
            span = seconds[-1] - seconds[0] if seconds else 0
            rate = Fraction((num_frames - 1) / span).limit_denominator(1001) if span > 0 else Fraction(25)
        time_base = Fraction(1, 1000 if suffix in (".mkv", ".webm") else _TICKS)
        ticks = [round((t + Fraction(start)) / time_base) for t in seconds]
        if any(b <= a for a, b in pairwise(ticks)):
            raise ValueError(f"write_media: times must increase by at least {time_base} s, got {list(times)}.")
        return cls(max(rate, Fraction(1, 10)), time_base, ticks)


def _suffix_of(path: Path, start: float) -> _Suffix:
    suffix = _SUFFIXES.get(path.suffix.lower())
    if suffix is None:
        raise ValueError(f"write_media: path must end in one of {' '.join(_SUFFIXES)}, got '{path.name}'.")
    if not path.parent.is_dir():
        raise ValueError(f"write_media: path must be in an existing folder, got '{path}'. Make the folder first.")
    if not math.isfinite(start) or start < 0 or (start > 0 and not suffix.can_start):
        expectation = f"be 0 s for {path.suffix}, or at least 0 for .mp4 or .mkv"
        raise ValueError(f"write_media: start must {expectation}, got {start}.")
    return suffix


def _checked_frames(frames) -> Tensor | None:
    if frames is None:
        return None
    frames = torch.as_tensor(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or 0 in frames.shape:
        got = f"{list(frames.shape)} of {frames.dtype}"
        raise ValueError(f"write_media: frames must be [T, H, W, 3] uint8 with T >= 1, got {got}.")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        size = f"{frames.shape[1]} x {frames.shape[2]}"
        raise ValueError(f"write_media: frames must have an even height and width, got {size}. Crop or pad by one.")
    return frames


def _check_codec_size(codec: str, frames: Tensor) -> None:
    """PyAV 18's x265 was seen to corrupt its heap, and so to end the process, at 48 x 32."""
    if codec == "libx265" and min(frames.shape[1:3]) < 64:
        size = f"{frames.shape[1]} x {frames.shape[2]}"
        raise ValueError(f"write_media: frames must be at least 64 x 64 for libx265, got {size}. Use libx264.")


def _checked_waveform(waveform) -> Tensor | None:
    if waveform is None:
        return None
    waveform = torch.as_tensor(waveform)
    waveform = waveform[:, None] if waveform.ndim == 1 else waveform
    wrong_shape = waveform.ndim != 2 or waveform.shape[-1] not in _LAYOUTS or len(waveform) == 0
    if wrong_shape or waveform.dtype != torch.float32 or not waveform.isfinite().all():
        got = f"{list(waveform.shape)} of {waveform.dtype}"
        raise ValueError(f"write_media: waveform must be finite float32 [L] or [L, 1 | 2 | 6] with L >= 1, got {got}.")
    return waveform.clamp(-1, 1)


def _encode_file(path: Path, video, audio, sample_rate: int, start: float) -> None:
    """Encodes both tracks, then writes their packets in the order of their times, so that readers need not seek."""
    import av

    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:  # no date, no random ids
        tracks = []
        if video is not None:
            frames, clock, codec, options = video
            if path.suffix.lower() == ".avi":
                options.setdefault("bf", "0")  # avi stores no times, so frames must be stored in the order of showing
            stream = _video_stream(container, codec, clock.rate, clock.time_base, *frames.shape[1:3], options)
            gaps = [b - a for a, b in pairwise(clock.ticks)]
            gaps.append(gaps[-1] if gaps else round(1 / clock.rate / clock.time_base))
            timed = zip(frames, clock.ticks, gaps)
            tracks.append((stream, _video_frames(timed, clock.time_base, stream.pix_fmt)))
        if audio is not None:
            waveform, codec, options = audio
            stream = _audio_stream(container, codec, sample_rate, waveform.shape[1], options)
            tracks.append((stream, _audio_frames(waveform, sample_rate, round(start * sample_rate))))
        try:
            packets = [p for stream, source in tracks for p in _packets(stream, source)]
            for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
                container.mux(packet)
        except av.FFmpegError as error:
            names = " and ".join(stream.codec.name for stream, _ in tracks)
            hint = f"FFmpeg says: {error.strerror}."
            raise ValueError(f"write_media: the codecs must fit {path.suffix}, got {names}. {hint}") from error


def _video_stream(container, codec: str, rate: Fraction, time_base: Fraction, height: int, width: int, options: dict):
    stream = _add_stream(container, codec, "video_codec", rate, options)
    stream.height, stream.width = height, width
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream.codec_context.time_base = stream.time_base = time_base
    return stream


def _audio_stream(container, codec: str, sample_rate: int, channels: int, options: dict):
    rates = _rates_of(codec)
    if sample_rate <= 0 or (rates and sample_rate not in rates):
        raise ValueError(f"write_media: sample_rate must be one of {rates} for {codec}, got {sample_rate}.")
    stream = _add_stream(container, codec, "audio_codec", sample_rate, options)
    stream.layout = _LAYOUTS[channels]
    return stream


def _add_stream(container, codec: str, argument: str, rate, options: dict):
    import av

    try:
        return container.add_stream(codec, rate=rate, options=options)
    except (ValueError, av.FFmpegError) as error:
        expectation = f"be an encoder for {container.format.name} that this FFmpeg has"
        raise ValueError(f"write_media: {argument} must {expectation}, got '{codec}'. {error}") from error


def _rates_of(codec: str) -> list[int]:
    import av

    with suppress(av.FFmpegError, ValueError):  # an unknown codec: add_stream says so
        return sorted(av.Codec(codec, "w").audio_rates or ())
    return []


def _packets(stream, source):
    packets = [packet for frame in source for packet in stream.encode(frame)] + stream.encode(None)
    early = min(packets[0].dts, 0) if stream.container.format.name == "avi" else 0
    for packet in packets:  # avi has no time below zero: what the codec needs to warm up delays the track
        packet.pts, packet.dts = packet.pts - early, packet.dts - early
    return packets


def _video_frames(timed: Iterable[tuple[Tensor, int, int]], time_base: Fraction, pix_fmt: str) -> Iterator:
    """Frames of (picture, tick, ticks until the next)."""
    import av

    converter = av.video.reformatter.VideoReformatter()  # one for all frames: setting up costs more than converting
    for image, tick, gap in timed:
        frame = av.VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24")
        frame = converter.reformat(frame, format=pix_fmt, threads=1)
        frame.pts, frame.time_base, frame.duration = tick, time_base, gap
        yield frame


def _audio_frames(waveform: Tensor, sample_rate: int, offset: int) -> Iterator:
    """Frames of a waveform [L, C] whose first sample is number `offset`."""
    import av

    for begin in range(0, len(waveform), sample_rate):  # a second at a time bounds the encoder's buffers
        block = waveform[begin : begin + sample_rate].T.contiguous().numpy()
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=_LAYOUTS[waveform.shape[1]])
        frame.sample_rate, frame.time_base = sample_rate, Fraction(1, sample_rate)
        frame.pts = offset + begin
        yield frame
