"""Frames and sound into media files: both at once for the demo world, one track as it comes for prepared shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import chain, count, repeat
from pathlib import Path

from torch import Tensor

CODECS = {".mp4": ("libx264", "aac"), ".webm": ("libvpx-vp9", "libopus")}  # of write_media
EXACT = {"fflags": "+bitexact"}  # no date, no random ids


# libswscale's flags "bicubic", "full_chroma_inp" and "accurate_rnd". Without them white becomes (253, 255, 253) in the
# full range of MJPEG, and a grey has colours of 127 instead of 128.
SCALER = 0x4 | 0x4000 | 0x40000


def has_codec(name: str, mode: str = "w") -> bool:
    """Whether this FFmpeg encodes ("w") or decodes ("r") it."""
    import av
    from av.codec.codec import UnknownCodecError

    try:
        av.Codec(name, mode)
    except UnknownCodecError:
        return False
    return True


def check_encoders(where: str, names: Iterable[str]) -> None:
    """Refuse, in words for users, what this FFmpeg cannot encode."""
    for name in names:
        if not has_codec(name):
            raise ValueError(f"{where}: codec must be one that this FFmpeg encodes, got no {name}.")


def write_media(
    path: Path,
    frames: Tensor,
    *,
    fps: float,
    waveform: Tensor,
    sample_rate: int,
    options: Mapping[str, str],
    audio_options: Mapping[str, str],
) -> None:
    """Encodes frames and a waveform into one media file, whole or not at all (a temporary file, then a rename).

    Frame i is shown at i / fps, audio sample n is heard at n / sample_rate. The same input makes the same bytes.

    Args:
        path: .mp4 (H.264 and AAC) or .webm (VP9 and Opus).
        frames: [T, H, W, 3], uint8 RGB; height and width even.
        fps: frames per second.
        waveform: [L], float32 in [-1, 1].
        sample_rate: samples per second; the codec must have it (Opus: 8, 12, 16, 24, 48 kHz).
        options: of the video encoder, such as {"preset": "ultrafast", "crf": "28", "g": "10"}.
        audio_options: of the audio encoder, such as {"b": "48000"}.

    Raises:
        ValueError: this FFmpeg lacks an encoder.
    """
    import av

    check_encoders("write_media", CODECS[path.suffix])
    codec, audio_codec = CODECS[path.suffix]
    rate = Fraction(fps).limit_denominator(1001)
    temporary = path.with_name(f".{path.name}-{os.getpid()}{path.suffix}")
    try:
        with av.open(str(temporary), "w", container_options=EXACT) as container:
            video = video_stream(container, codec, rate, 1 / rate, *frames.shape[1:3], options)
            audio = audio_stream(container, audio_codec, sample_rate, audio_options)
            pictures = video_frames(zip(frames, count(), repeat(1)), 1 / rate, video.pix_fmt)
            packets = [packet for frame in chain(pictures, [None]) for packet in video.encode(frame)]
            sound = audio_frames(waveform, sample_rate)
            packets += [packet for frame in chain(sound, [None]) for packet in audio.encode(frame)]
            for packet in sorted(packets, key=lambda p: p.dts * p.time_base):  # so that readers need not seek
                container.mux(packet)
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
    with av.open(str(path), "w", container_options=EXACT) as container:
        stream = video_stream(container, codec, rate, 1 / rate, height, width, options)
        timed = zip(chain([first], pictures), count(), repeat(1))
        for frame in chain(video_frames(timed, 1 / rate, stream.pix_fmt), [None]):
            container.mux(stream.encode(frame))
    return height, width


def write_sound(path: Path, blocks: Iterable[Tensor], *, sample_rate: int, codec: str) -> int:
    """Encodes blocks of mono samples [L] as they come, from second 0 on; returns the number of samples."""
    import av

    num_samples = 0
    with av.open(str(path), "w", container_options=EXACT) as container:
        stream = audio_stream(container, codec, sample_rate, {})
        for block in blocks:
            for frame in audio_frames(block, sample_rate, num_samples):
                container.mux(stream.encode(frame))
            num_samples += len(block)
        container.mux(stream.encode(None))
    return num_samples


def video_stream(
    container, codec: str, rate: Fraction, time_base: Fraction, height: int, width: int, options: Mapping[str, str]
):
    stream = container.add_stream(codec, rate=rate, options=dict(options))
    stream.height, stream.width = height, width
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream.codec_context.time_base = stream.time_base = time_base
    return stream


def audio_stream(container, codec: str, sample_rate: int, options: Mapping[str, str]):
    stream = container.add_stream(codec, rate=sample_rate, options=dict(options))
    stream.layout = "mono"
    return stream


def video_frames(timed: Iterable[tuple[Tensor, int, int]], time_base: Fraction, pix_fmt: str) -> Iterator:
    """Frames of (picture, tick, ticks until the next)."""
    import av

    converter = av.video.reformatter.VideoReformatter()  # one for all frames: setting up costs more than converting
    for image, tick, gap in timed:
        frame = av.VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24")
        frame = converter.reformat(frame, format=pix_fmt, interpolation=SCALER, threads=1)
        frame.pts, frame.time_base, frame.duration = tick, time_base, gap
        yield frame


def audio_frames(waveform: Tensor, sample_rate: int, offset: int = 0) -> Iterator:
    """Frames of mono samples [L], the first of which is number `offset`."""
    import av

    for begin in range(0, len(waveform), sample_rate):  # a second at a time bounds the encoder's buffers
        block = waveform[None, begin : begin + sample_rate].contiguous().numpy()
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = sample_rate, Fraction(1, sample_rate)
        frame.pts = offset + begin
        yield frame
