"""When the decoded frames of a track are shown or heard, whatever the container tells about it.

Most containers store for each packet when its frame is shown, and the decoder hands that on. What they store is not
always enough:

- AVI, Windows Media, and old Matroska files that were made from AVI, store when a picture is decoded. A decoder keeps
  pictures back until those before them have come, so its output is in the order of showing, one picture out for one
  packet in. The picture that comes out is therefore shown at the decoding time of the packet that many places back:
  the first picture of the file at its first time, and so on. What FFmpeg (5.1 to 8) puts into the packets as times of
  showing is a guess: one frame late for MPEG-4, and wrong where H.264 has B-frames; PyAV's `frame.pts` has it too.
- Bare streams (.h264, .hevc, .m4v) store no times: their pictures follow each other at the stream's rate.
- A packet with several frames of sound has one time, that of the first; in some RealMedia files all have the same.
- The times of bare sound (.ac3, .eac3, .dts) are sums of lengths that FFmpeg has rounded to 1/90000 s each.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import closing
from typing import Any

DEFAULT_RATE = 25.0  # pictures per second of a bare stream that does not tell; FFmpeg's too
ROUNDED_LENGTHS = ("ac3", "eac3", "dts")
STORE_DECODING = ("avi", "asf")  # what FFmpeg says of showing there is a guess
PARTLY_TIMED = ("mpeg", "mpegts")  # a PES packet may hold several pictures and then has the time of the first


class PresentationTimes:
    """Times of frames in a container that stores when each is shown.

    Args:
        zero: the file's second 0, in seconds of the stream.
        step: seconds from one picture to the next, for those without a time.
    """

    def __init__(self, zero: float, step: float):
        self.zero, self.step = zero, step
        self.next = -math.inf  # time of the next frame, should it have none of its own
        self.stamp: int | None = None  # of the frame before
        self.of_packet: float | None = None

    def feed(self, packet: Any) -> None:
        """A packet that is decoded next."""
        self.of_packet = None if packet.pts is None else float(packet.pts * packet.time_base) - self.zero

    def of(self, frame: Any) -> float | None:
        """Seconds; None for a frame without a time before any that has one."""
        if frame.pts is None and self.next == -math.inf:  # Windows Media: the packet alone has a time
            if self.of_packet is None:
                return None
            time = self.of_packet
        else:
            time = self.next if frame.pts in (None, self.stamp) else self._seconds(frame) - self.zero
        self.stamp = frame.pts
        self.next = time + self._length(frame)
        return time

    def _seconds(self, frame: Any) -> float:
        return float(frame.pts * frame.time_base)

    def _length(self, frame: Any) -> float:
        if hasattr(frame, "samples"):  # frame.duration may be that of the whole packet
            return frame.samples / frame.sample_rate
        return float((frame.duration or 0) * frame.time_base) or self.step


class CountedTimes(PresentationTimes):
    """Times of bare sound, whose frames are all of one length."""

    def _seconds(self, frame: Any) -> float:
        return frame.pts / frame.duration * self._length(frame) if frame.duration else super()._seconds(frame)


class DecodingTimes:
    """Times of pictures in a container that stores when each is decoded, or nothing.

    Args:
        zero: the file's second 0, in seconds of the stream.
        step: seconds from one picture to the next.
        decoder: its `reorder_depth` is the number of pictures that it keeps back.
        stored: whether the container stores times at all.
    """

    def __init__(self, zero: float, step: float, decoder: Any, *, stored: bool):
        self.zero, self.step, self.decoder, self.stored = zero, step, decoder, stored
        self.waiting: deque[float] = deque()  # times of packets for which no picture has come out
        self.fed = 0.0
        self.last = -step

    def feed(self, packet: Any) -> None:
        if self.stored:
            self.fed = float(packet.dts * packet.time_base) - self.zero if packet.dts is not None else self.fed
        self.waiting.append(self.fed)
        if not self.stored or packet.dts is None:
            self.fed += seconds_of(packet, self.step)

    def of(self, frame: Any) -> float | None:
        # More than the decoder keeps back: pictures that it dropped because, after a seek, they lack a reference.
        while len(self.waiting) > self.decoder.reorder_depth + 1:
            self.waiting.popleft()
        self.last = self.waiting.popleft() if self.waiting else self.last + self.step
        return self.last


def times_of(packet: Any, container: Any, stream: Any, zero: float) -> PresentationTimes | DecodingTimes:
    """The rule for the frames of a stream whose first packet this is."""
    if stream.type != "video":
        rule = CountedTimes if container.format.name in ROUNDED_LENGTHS else PresentationTimes
        return rule(zero, 0.0)
    step = step_of(container, stream)
    if is_bare(container):
        return DecodingTimes(0.0, step, stream.codec_context, stored=False)
    is_untimed = packet.pts is None and container.format.name not in PARTLY_TIMED
    if _stores_decoding(container, stream) or is_untimed:
        return DecodingTimes(zero, step, stream.codec_context, stored=True)
    return PresentationTimes(zero, step)


def _stores_decoding(container: Any, stream: Any) -> bool:
    if stream.type != "video" or "matroska" not in container.format.name:
        return stream.type == "video" and container.format.name in STORE_DECODING
    try:
        return stream.codec_context.codec_tag.strip("\0") != ""  # a name of AVI's for the codec
    except UnicodeDecodeError:  # PyAV expects letters
        return True


def rate_of(container: Any, stream: Any) -> float:
    """Pictures per second, on average; 0 where a container does not tell."""
    average = stream.average_rate
    if is_bare(container) or container.format.name == "dv":  # it is FFmpeg's default there, or the unit of time
        average = None
    return float(average or stream.guessed_rate or 0)


def step_of(container: Any, stream: Any) -> float:
    """Seconds from one picture to the next, on average."""
    return 1 / (rate_of(container, stream) or DEFAULT_RATE)


def is_bare(container: Any) -> bool:
    """Whether a file is the stream of a video codec without a container: no times, no length, no index."""
    from av.format import Flags

    return bool(container.format.flags & Flags.no_timestamps.value) and bool(container.streams.video)


def first_second(container: Any, stream: Any) -> float | None:
    """The first time of a stream, which FFmpeg may not know or have wrong; reads a packet then."""
    codec, of_decoding = stream.codec_context, _stores_decoding(container, stream)
    is_opus = codec.name in ("opus", "libopus") and "matroska" in container.format.name
    if stream.start_time is not None and not of_decoding and not (is_opus and stream.start_time):
        return float(stream.start_time * stream.time_base)
    with closing(container.demux(stream)) as packets:
        for packet in packets:
            if is_opus:  # FFmpeg 8 counts what Opus leaves out at the rate of the file, which means nothing to Opus
                frames = packet.decode()
                if frames and frames[0].pts is not None:
                    return float(frames[0].pts * frames[0].time_base)
                continue
            stamp = packet.dts if of_decoding or packet.pts is None else packet.pts
            if packet.size and stamp is not None:
                return float(stamp * packet.time_base)
    return None


def seconds_of(packet: Any, step: float) -> float:
    """How long the picture of a packet of a bare stream lasts."""
    return float((packet.duration or 0) * packet.time_base) or step
