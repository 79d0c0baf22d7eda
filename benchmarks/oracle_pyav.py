"""The sound of a file as PyAV decodes it in one go from the beginning: a second opinion of a newer FFmpeg.

Debian's ffmpeg may be years older than the FFmpeg in PyAV's package, and some codecs were mended in between. Nothing of
the reader takes part here either: no seek, no window, no time but those of the frames.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.oracle_ffmpeg import RATE, Sound, pieces_of


def sound_of_pyav(path: Path) -> Sound | None:
    """Mono float32 at RATE, or None where PyAV has none of it or it changes its form."""
    import av

    frames, parts, form = [], [], None
    try:
        with av.open(f"file:{path}", metadata_errors="ignore") as container:
            stream = container.streams.best("audio")
            resampler = av.AudioResampler("flt", "mono", RATE, options={"rematrix_maxval": "1.0"})
            for frame in container.decode(stream):
                form = form or (frame.format.name, frame.layout.name, frame.sample_rate)
                if form != (frame.format.name, frame.layout.name, frame.sample_rate):
                    return None
                stamp = None if frame.pts is None else round(frame.pts * frame.time_base * frame.sample_rate)
                frames.append((stamp, frame.sample_rate, frame.samples))
                frame.pts = None
                parts += resampler.resample(frame)
            parts += resampler.resample(None)
    except av.FFmpegError:
        return None
    if not parts:
        return None
    samples = torch.cat([torch.from_numpy(part.to_ndarray()[0]) for part in parts])
    return Sound(samples.nan_to_num().clamp(-1, 1), pieces_of(frames, len(samples)), frames)
