"""The picture on screen at a given second: which frame of a track that is, upright, in RGB and at the wanted size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vatt_engine.data.decoding import decoded
from vatt_engine.data.streams import ROUNDING, Reach, Source

# libswscale's flags "area", "full_chroma_int" and "accurate_rnd". Without the last two the colours of an unscaled
# frame, one per 2 x 2 pixels, are repeated instead of interpolated: 30 dB from DALI's where colours are strong, 45 dB
# where pale, and further from the source. They cost 0.3 ms of a frame of 256 x 336.
SCALER = 0x20 | 0x2000 | 0x40000


@dataclass(frozen=True, kw_only=True)
class PictureForm:
    """What pictures shall look like.

    Args:
        short_side: frames whose short side is longer are scaled down to this; None keeps the size.
        multiple: of which both sides are made.
        aspect: width of a stored pixel by its height; a frame is stretched by it. 1 takes the pixels as they are.
    """

    short_side: int | None = None
    multiple: int = 1
    aspect: float = 1.0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the picture of a frame."""
        return scaled_size(max(round(width * self.aspect), 1), height, self.short_side, self.multiple)


def scaled_size(width: int, height: int, short_side: int | None, multiple: int = 1) -> tuple[int, int]:
    """Width and height scaled down until the short side is at most `short_side`, each to a multiple."""
    scale = min(1.0, (short_side or math.inf) / max(min(width, height), 1)) / multiple
    return max(round(width * scale), 1) * multiple, max(round(height * scale), 1) * multiple


def stacked_pictures(source: Source, times: list[float], fps: float, form: PictureForm) -> tuple[Tensor, Reach]:
    """The picture on screen at each of `times` (increasing), [N, H, W, 3]."""
    video, reached = torch.empty(0), {}
    for count, picture in enumerate(pictures(source, times, fps, form, reached)):
        if count == 0:
            video = torch.empty(len(times), *picture.shape, dtype=torch.uint8)
        video[count] = picture
    return video, reached["video"]


def pictures(
    source: Source, times: list[float], fps: float, form: PictureForm, reached: dict[str, Reach]
) -> Iterator[Tensor]:
    """The picture on screen at each of `times` (increasing), [H, W, 3], one by one; then fills `reached`."""
    rgb = _Rgb(form, source)
    count, shown = 0, None
    begin, length, gap = -math.inf, 0.0, 1 / fps if fps else 0.0
    holed, longest = False, 0.02 + 2.5 / fps if fps else math.inf
    with closing(decoded(source, "video", times[0])) as frames:
        for time, frame in frames:
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
        raise source.error(f"the video must give frames, decoded 0 of {len(times)} from {times[0]:.3f} s.")
    for _ in times[count:]:
        yield rgb(shown)
    step = max(length, gap)
    num_got = sum(time < begin + step for time in times)
    slack = 0.02 + 1.5 * step
    reached["video"] = Reach(begin + step, slack, times[-1], num_got, len(times), "frames", holed)


class _Rgb:
    """Decoded frames as upright RGB [H, W, 3], all of the size of the first; the same frame twice costs once."""

    def __init__(self, form: PictureForm, source: Source):
        from av.video.reformatter import VideoReformatter

        self.form, self.source = form, source
        self.reformatter, self.scaler = VideoReformatter(), VideoReformatter()  # each remembers its last set-up
        self.size, self.last, self.picture = None, None, torch.empty(0)

    def __call__(self, frame: Any) -> Tensor:
        if frame is not self.last:
            self.last, self.picture = frame, self._rgb(frame)
        return self.picture

    def _rgb(self, frame: Any) -> Tensor:
        if frame.is_corrupt:
            raise self.source.error("the video must be undamaged, got a frame that FFmpeg marks as corrupt.")
        self.size = self.size or self.form.size(frame.width, frame.height)
        whole = _whole_colours(frame)
        if whole is frame:
            rgb = self._converted(self.reformatter, frame, *self.size)
        else:
            rgb = self._converted(self.reformatter, whole, whole.width, whole.height)
            rgb = rgb[: frame.height, : frame.width]
            if self.size != (frame.width, frame.height):
                import av

                cut = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
                rgb = self._converted(self.scaler, cut, *self.size)
        return upright(torch.from_numpy(rgb), display_matrix(frame))

    @staticmethod
    def _converted(reformatter: Any, frame: Any, width: int, height: int) -> np.ndarray:
        rgb = reformatter.reformat(frame, width, height, format="rgb24", interpolation=SCALER, threads=1)
        return rgb.to_ndarray()


def _whole_colours(frame: Any) -> Any:
    """The frame, or one with a column and a row more, where its last colours belong to half a block of pixels.

    libswscale stretches 81 colours over 161 pixels as if there were no half one, and so moves them; over 162 pixels it
    has them in place. What the added pixels hold does not matter: they are cut away again.
    """
    import av

    form = frame.format
    across, down = (8 // max(length, 1) for length in (form.chroma_width(8), form.chroma_height(8)))
    width, height = (-(-length // step) * step for length, step in ((frame.width, across), (frame.height, down)))
    if (width, height) == (frame.width, frame.height):
        return frame
    whole = av.VideoFrame(width, height, form.name)
    for old, new in zip(frame.planes, whole.planes):
        length = min(old.line_size, new.line_size)
        rows, copies = (np.frombuffer(plane, np.uint8).reshape(plane.height, -1) for plane in (old, new))
        copies[: old.height, :length] = rows[:, :length]
    whole.colorspace, whole.color_range = frame.colorspace, frame.color_range
    return whole


def display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """a, b, c, d of the frame's display matrix, in 1 / 65,536: the pixel (x, y) is shown at (a x + c y, b x + d y).

    It comes from the header of mp4 and mov, or from the EXIF data of a JPEG image.
    """
    try:
        side_data = frame.side_data
    except ValueError:  # PyAV 18 refuses all of it where it does not know one kind: EXIF data, of FFmpeg 8
        side_data = _with_known_side_data(frame).side_data
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1 << 16, 0, 0, 1 << 16
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return a, b, c, d


def _with_known_side_data(frame: Any) -> Any:
    """The frame without side data of kinds that came after those that PyAV knows."""
    from av.filter import Graph
    from av.sidedata.sidedata import Type

    newest = max(kind.value for kind in Type)
    graph = Graph()
    filters = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)]
    for kind in range(newest + 1, newest + 9):
        filters.append(graph.add("sidedata", f"mode=delete:type={kind}"))
    graph.link_nodes(*filters, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def upright(picture: Tensor, matrix: tuple[int, int, int, int]) -> Tensor:
    """A picture [H, W, 3] turned and mirrored as its display matrix says, to the nearest quarter of a turn.

    >>> upright(torch.tensor([[[1], [2]]]), (-65536, 0, 0, 65536)).flatten().tolist()
    [2, 1]
    """
    a, b, c, d = matrix
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, across, down = picture.transpose(0, 1), c, b
    mirrored = [axis for axis, sign in ((1, across), (0, down)) if sign < 0]
    return picture.flip(mirrored) if mirrored else picture
