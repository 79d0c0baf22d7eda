"""Media files for the tests, of any container and codec, with the times and defects of rate that real ones have.

`vatt_engine.data.encode` writes what the package itself makes. This writes what users bring.
"""

from __future__ import annotations

import contextlib
import os
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import torch

from vatt_engine.data.encode import EXACT, audio_stream, video_frames, video_stream

CODECS = {  # by suffix: of the picture (None: the container takes none) and of the sound
    ".mp4": ("libx264", "aac"),
    ".mov": ("libx264", "aac"),
    ".mkv": ("libx264", "aac"),
    ".webm": ("libvpx-vp9", "libopus"),
    ".avi": ("mpeg4", "libmp3lame"),
    ".ts": ("libx264", "aac"),
    ".mpg": ("mpeg2video", "mp2"),
    ".wmv": ("wmv2", "wmav2"),
    ".flv": ("libx264", "aac"),
    ".nut": ("libx264", "aac"),
    ".h264": ("libx264", None),
    ".hevc": ("libx265", None),
    ".m4a": (None, "aac"),
    ".ogg": (None, "libopus"),
    ".mp3": (None, "libmp3lame"),
    ".flac": (None, "flac"),
    ".wav": (None, "pcm_s16le"),
}
TICKS = 60_000  # per second: below the 65,535 that MPEG-4 allows, a multiple of 24, 25, 30 fps
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


@contextlib.contextmanager
def own_scheduling():
    """Undo what libsvtav1 does to a thread of root that opens it: it gets the highest real-time priority.

    Processes inherit that, and two that wait busily for a third then never let it run.
    """
    if not hasattr(os, "sched_getscheduler"):  # macOS
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


@own_scheduling()
def write_media(
    path,
    frames,
    *,
    fps=None,
    times=None,
    waveform=None,
    sample_rate=48_000,
    video_codec=None,
    audio_codec=None,
    options=None,
    start=0.0,
    sound_start=0.0,
):
    """Encodes frames and a waveform into one media file.

    Frame i is shown at start + i / fps, or at start + times[i]; audio sample n is heard at start + n / sample_rate.
    A `start` above zero keeps these times; what a codec needs to warm up (AAC: 1,024 samples) may then be heard before.
    Avi stores neither times nor such delays: there, as in mp3, compressed audio is late by 23 ms, and H.264 by a frame.
    x265 needs 64 x 64 pixels: PyAV 18's was seen to corrupt its heap, and so to end the process, at 48 x 32.

    Args:
        path: .mp4 .mov .mkv .webm .avi .ts .mpg .wmv .flv .nut; audio alone: .m4a .ogg .mp3 .flac .wav; video alone,
            without a container: .h264 .hevc.
        frames: [T, H, W, 3], uint8 RGB, tensor or array; height and width even. None: no video track.
        fps: frames per second, constant; a Fraction such as 30000/1001 stays exact.
        times: [T] seconds, increasing, for a variable frame rate; stored on the container's clock (1/60000 s in mp4,
            1 ms in mkv and webm). Give this or `fps`.
        waveform: [L] or [L, C], float32 in [-1, 1]; 1, 2 or 6 channels. None: no audio track.
        video_codec, audio_codec: FFmpeg encoders; None: by suffix.
        options: of the video encoder.
        start: seconds at which both tracks begin.
        sound_start: seconds by which the sound begins later than the picture.
    """
    import av

    path = Path(path)
    codecs = CODECS[path.suffix]
    packets = []
    with av.open(str(path), "w", container_options=EXACT) as container:
        tracks = []
        if frames is not None:
            frames, options = torch.as_tensor(frames), dict(options or {})
            if path.suffix == ".avi":
                options.setdefault("bf", "0")  # avi stores no times, so frames must be stored in the order of showing
            rate, time_base, ticks = clock(fps, times, start, len(frames), path.suffix)
            codec = video_codec or codecs[0]
            stream = video_stream(container, codec, rate, time_base, *frames.shape[1:3], options)
            gaps = [b - a for a, b in pairwise(ticks)]
            gaps.append(gaps[-1] if gaps else round(1 / rate / time_base))
            tracks.append((stream, video_frames(zip(frames, ticks, gaps), time_base, stream.pix_fmt)))
        if waveform is not None:
            waveform = torch.as_tensor(waveform).clamp(-1, 1)
            waveform = waveform[:, None] if waveform.ndim == 1 else waveform
            rate_control = {"b": "64000"} if path.suffix == ".wmv" else {}  # its default is too much for mono
            stream = audio_stream(container, audio_codec or codecs[1], sample_rate, rate_control)
            stream.layout = LAYOUTS[waveform.shape[1]]
            tracks.append((stream, audio_frames(waveform, sample_rate, round((start + sound_start) * sample_rate))))
        for stream, source in tracks:
            own = [packet for frame in source for packet in stream.encode(frame)] + stream.encode(None)
            early = min(own[0].dts, 0) if path.suffix == ".avi" else 0
            for packet in own:  # avi has no time below zero: what the codec needs to warm up delays the track
                packet.pts, packet.dts = packet.pts - early, packet.dts - early
            packets += own
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            container.mux(packet)


def numbered(count, start=0, height=64):
    """Frames of 128 pixels that show their number: column k is white where bit k is set."""
    numbers = torch.arange(start, start + count)
    bits = (numbers[:, None] >> torch.arange(8)) & 1
    return bits.repeat_interleave(16, 1)[:, None, :, None].expand(count, height, 128, 3).mul(255).byte().contiguous()


def numbers_of(video):
    """What the frames of `numbered` show."""
    bits = video.float().mean((1, 3)).unflatten(1, (8, -1)).mean(2) > 128
    return (bits * 2 ** torch.arange(8)).sum(1).tolist()


def busy(count):
    """Numbered frames below noise: many bytes, as real pictures have, so that each has a packet with its own time."""
    frames = numbered(count, height=128)
    frames[:, :64] = torch.rand(count, 64, 128, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    return frames


def clock(fps, times, start, num_frames, suffix):
    """Nominal frames per second, which rate control plans with; the time base; and the tick of each frame."""
    if fps is not None:
        rate = Fraction(fps).limit_denominator(1001)
        if start == 0:
            return rate, 1 / rate, list(range(num_frames))
        seconds = [i / rate for i in range(num_frames)]
    else:
        seconds = [Fraction(float(time)) for time in times]
        rate = Fraction((num_frames - 1) / (seconds[-1] - seconds[0])).limit_denominator(1001)
    time_base = Fraction(1, 1000 if suffix in (".mkv", ".webm") else TICKS)
    return max(rate, Fraction(1, 10)), time_base, [round((t + Fraction(start)) / time_base) for t in seconds]


def audio_frames(waveform, sample_rate, offset):
    """Frames of a waveform [L, C] whose first sample is number `offset`."""
    import av

    for begin in range(0, len(waveform), sample_rate):  # a second at a time bounds the encoder's buffers
        block = waveform[begin : begin + sample_rate].T.contiguous().numpy()
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=LAYOUTS[waveform.shape[1]])
        frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), offset + begin
        yield frame
