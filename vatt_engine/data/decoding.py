"""The decoded frames of one track from a given second on, each with its time.

Seeking goes to a key frame ahead of the wanted second, and what comes back is checked: an index may be wrong, a file
may have none, and not every place that a container calls a key frame is one at which decoding can begin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import dropwhile
from typing import Any

from vatt_engine.data.frame_times import PARTLY_TIMED, is_bare, times_of
from vatt_engine.data.streams import Source

PREROLL = {"video": (0.2, 10.0), "audio": (0.5, 10.0)}  # seconds to seek ahead of a window: first try, second try


def decoded(source: Source, kind: str, start: float) -> Iterator[tuple[float, Any]]:
    """(time, frame) of a track, in the order of showing, from a frame at or before `start` on, where there is one."""
    for attempt, preroll in enumerate((*PREROLL[kind], math.inf)):
        frames = _decoded_from(source, kind, start, preroll, refreshed=attempt > 0)
        first = next(frames, None)
        if start - preroll <= 0 or (first is not None and first[0] <= start):
            break
        frames.close()
    if first is not None:
        yield first
        yield from frames


def _decoded_from(
    source: Source, kind: str, start: float, preroll: float, *, refreshed: bool
) -> Iterator[tuple[float, Any]]:
    """The frames from a key frame on that lies `preroll` seconds before `start`, or from the beginning.

    A stream of H.264 or HEVC may have no picture that stands alone: its parts are renewed in turn (intra refresh). The
    decoder begins when all were, and is then nearly right; exact after some more turns. With `refreshed`, those are
    taken to have passed, else such a picture does not count as a key frame.
    """
    from av.stream import Discard

    with ExitStack() as stack:
        container, streams = stack.enter_context(source.opened())
        stream = streams[kind]
        for other in container.streams:
            other.discard = Discard.default if other is stream else Discard.all
        stream.codec_context.options = source.codec_options
        stream.codec_context.thread_count = 1  # the loader decodes many files at once
        sought = start > preroll and _seek(container, stream, start - preroll + source.zero)
        # Not `container.decode`: a demuxer that is let go, and not closed, keeps 300 bytes for ever (PyAV 18).
        packets = stack.enter_context(closing(container.demux(stream)))
        if sought and kind == "video" and not stream.codec_context.codec.intra_only:
            packets = dropwhile(lambda packet: not packet.is_keyframe, packets)  # some decoders make them grey pictures
        begun, last = kind == "audio" or not sought or refreshed, -math.inf
        for number, (time, frame) in enumerate(_timed(source, container, stream, packets, sought)):
            if number >= source.limits.max_frames:
                text = f"a window must need at most {source.limits.max_frames} decoded {kind} frames, got more."
                raise source.error(text)
            last = max(last, time)
            begun = begun or last > start or _stands_alone(frame)
            if begun:
                yield last, frame


def _stands_alone(frame: Any) -> bool:
    """Whether a picture needs no other."""
    from av.video.frame import PictureType

    return frame.key_frame or frame.pict_type not in (PictureType.P, PictureType.B, PictureType.S)


def _seek(container: Any, stream: Any, seconds: float) -> bool:
    """Go to a key frame at or before `seconds`; False, and at the beginning, where that is not possible."""
    import av

    if not _can_go_on_behind_a_seek(container, stream):
        return False
    try:
        container.seek(int(seconds / stream.time_base), stream=stream)
    except av.FFmpegError:  # no index
        return False
    return True


def _can_go_on_behind_a_seek(container: Any, stream: Any) -> bool:
    """Whether FFmpeg (5.1 to 8) knows all about what follows a seek; else reading begins at the beginning."""
    name, codec = container.format.name, stream.codec_context.name
    if stream.type == "video":  # the first packet alone has the palette
        return not is_bare(container) and stream.codec_context.pix_fmt != "pal8"
    if name in ("wav", "w64"):  # times are guessed from the bit rate, which is that of the packets for PCM alone
        return codec.startswith("pcm_")
    # Of other codecs in Ogg, the first packet gets the second that was asked for where that is in the last page.
    return name != "ogg" or "vorbis" in codec or "opus" in codec


def _timed(source: Source, container: Any, stream: Any, packets: Any, sought: bool) -> Iterator[tuple[float, Any]]:
    """(time, frame) of packets.

    What cannot be decoded, or has no time, is passed over while nothing has been decoded, where reading begins in the
    middle of a stream: after a seek the first packet of a program stream is often the rest of one.
    """
    import av

    times, begun = None, False
    joined = sought or container.format.name in PARTLY_TIMED  # these may be cut anywhere
    for packet in packets:
        if packet.size:
            times = times or times_of(packet, container, stream, source.zero)
            times.feed(packet)
        elif packet.dts is not None and not any(packet.iter_sidedata()):
            continue  # an empty chunk of AVI: the picture stays; to a decoder it would be the end
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if begun or not joined:
                raise
            continue
        for frame in frames:
            if not frame.time_base:
                raise source.error(f"the {stream.type} must have a unit of time, got a frame without one.")
            time = times.of(frame)
            if time is not None:
                begun = True
                yield time, frame
            elif not joined:
                text = f"the {stream.type} must have presentation times, got a first frame without one."
                raise source.error(text)
