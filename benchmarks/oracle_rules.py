"""Why a window may differ from ffmpeg's output: named rules, each a row of "What a window is" in docs/data.md.

A rule excuses nothing in general. It says what the right value is instead: it changes ffmpeg's output to that (another
clock, for example), and the window must then agree to the last picture. Rules look at properties of a file, never at
its name. Those about refused files say which refusals are right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.oracle_ffmpeg import Truth, decoding_times


@dataclass(frozen=True)
class Rule:
    """`applies` looks at the file; `right` is what ffmpeg's output becomes by the rule."""

    name: str
    row: str  # of the table in docs/data.md
    applies: Callable[[Truth], bool]
    right: Callable[[Truth], Truth]


@dataclass(frozen=True)
class Refusal:
    """`applies` looks at the file and at the reader's reason."""

    name: str
    row: str
    applies: Callable[[Truth, str], bool]


def _is_bare(file: Truth) -> bool:
    return file.pictures is not None and file.container in ("h264", "hevc", "m4v", "mpegvideo", "mjpeg")


def _in_order_of_output(file: Truth) -> Truth:
    """Picture i of the decoder's output at i / rate: ffmpeg adds the decoder's delay."""
    rate = fraction(file.streams["video"].get("r_frame_rate", "0/0"))
    times = torch.arange(len(file.pictures.times), dtype=torch.float64) / (rate or 25.0)
    return replace(file, pictures=file.pictures._replace(times=times))


def _stores_decoding_times(file: Truth) -> bool:
    return file.pictures is not None and file.container in ("avi", "asf", "matroska,webm")


def _at_decoding_times(file: Truth) -> Truth:
    """Picture i of the decoder's output at the time of packet i: ffmpeg adds the decoder's delay."""
    stored, count = sorted(decoding_times(file.path)), len(file.pictures.times)
    if len(stored) < count:
        stored += [stored[-1] + file.pictures.step * (i + 1) for i in range(count - len(stored))] if stored else []
    times = torch.tensor(stored[:count], dtype=torch.float64)
    return replace(file, pictures=file.pictures._replace(times=times)) if stored else file


def _lacks_what_it_promises(file: Truth, reason: str) -> bool:
    ends = [track.end for track in (file.pictures, file.sound) if track]
    return "as promised" in reason and file.promised is not None and min(ends) < file.promised - 0.1


RULES = (
    Rule("a bare stream has no times", "B-frames", _is_bare, _in_order_of_output),
    Rule("only decoding times are stored", "B-frames", _stores_decoding_times, _at_decoding_times),
)
REFUSALS = (
    Refusal("ffmpeg reports errors too", "damage", lambda file, _: bool(file.complaints)),
    Refusal("ffmpeg too gives less than promised", "damage", _lacks_what_it_promises),
)


def fraction(text: str) -> float:
    """The value of ffprobe's "30000/1001"; 0 where it has none."""
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1) if float(bottom or 1) else 0.0
