"""What a media file says about itself before anything is decoded: tracks, sizes, rates, and how long it promises to be.

Promises matter: damaged files often end early without an error, and only what was promised tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from vatt_engine.data.frame_times import is_bare, rate_of, seconds_of, step_of

ESTIMATED = {"mp3", "aac", "ac3", "eac3", "amr", "amrnb", "amrwb"}  # sound without a container: FFmpeg guesses a length
WHOLE_FILE = {"asf"}  # containers that tell how long the file is, which FFmpeg says of every track
FROM_ZERO = ("matroska,webm", "flv", "nut")  # their length counts from the clock's 0, not from the first frame
STILL = 0.04  # seconds that a picture without any time lasts


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
    pixel_aspect: Fraction = Fraction(1)  # width of a pixel by its height


def described(zero: float, container: Any, streams: dict[str, Any]) -> MediaInfo:
    """The info of an open file; a file without a length is read to its end, not decoded."""
    ends = {kind: _promised_end(zero, container, stream) for kind, stream in streams.items()}
    known = [end for end in ends.values() if end is not None]
    if container.format.name in WHOLE_FILE:  # not container.duration, which adds the latest begin
        known = [float(s.duration * s.time_base) - zero for s in streams.values() if s.duration is not None]
    elif len(known) < len(streams) and container.duration is not None and not is_bare(container):
        begin = 0 if container.format.name in FROM_ZERO else (container.start_time or 0)
        known.append((begin + container.duration) / 1e6 - zero)
        if container.format.name == "nut" and "audio" not in streams:  # it ends where its last frame begins
            known[-1] += step_of(container, streams["video"])
    video, audio = (streams[kind].codec_context if kind in streams else None for kind in ("video", "audio"))
    return MediaInfo(
        duration=max(known, default=0) or _scanned_end(zero, container, streams),
        has_video=video is not None,
        has_audio=audio is not None,
        width=video.width if video else 0,
        height=video.height if video else 0,
        fps=rate_of(container, streams["video"]) if video else 0.0,
        video_codec=video.codec.name if video else "",
        audio_codec=audio.codec.name if audio else "",
        sample_rate=audio.sample_rate if audio else 0,
        video_end=ends.get("video"),
        audio_end=ends.get("audio"),
        end=max(known, default=None) if container.format.name not in ESTIMATED else None,
        pixel_aspect=(streams["video"].sample_aspect_ratio if video else None) or Fraction(1),
    )


def _promised_end(zero: float, container: Any, stream: Any) -> float | None:
    """When the container says that a track ends, in seconds on the common clock."""
    if container.format.name in ESTIMATED | WHOLE_FILE or is_bare(container):
        return None
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - zero
    clock = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska's tag
    return clock and sum(float(clock[i]) * 60 ** (3 - i) for i in (1, 2, 3)) - zero


def _scanned_end(zero: float, container: Any, streams: dict[str, Any]) -> float:
    """The end of a file without a length (a live recording, a pipe, a bare stream), by its packets."""
    end, bare = 0.0, is_bare(container)
    for packet in container.demux(list(streams.values())):
        if bare and packet.size:
            end += seconds_of(packet, step_of(container, packet.stream))
        elif packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base) - zero)
    return end or STILL


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
