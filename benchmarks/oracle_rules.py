"""Why a window may differ from ffmpeg's output: named rules, each a row of "What a window is" in docs/data.md.

A rule excuses nothing in general. It says what the right value is instead: it changes ffmpeg's output to that (another
clock, for example), and the window must then agree to the last picture. Rules look at properties of a file, never at
its name. Those about refused files say which refusals are right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from benchmarks.oracle_ffmpeg import HOLE, RATE, Truth, decoding_times, pieces_of, stored_times
from benchmarks.oracle_pyav import sound_of_pyav


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


def _goes_back(file: Truth, _: str) -> bool:
    """The times that are stored run against the order of the samples or of the decoder's pictures."""
    pieces = file.sound.pieces if file.sound else []
    ends = [piece.time + (piece.last - piece.first) / RATE for piece in pieces]
    stored = stored_times(file.path) if file.pictures and not _is_bare(file) else []
    back = any(later < earlier for earlier, later in pairwise(stored))
    return back or any(end > piece.time + HOLE for end, piece in zip(ends, pieces[1:]))


def _has_sound(file: Truth) -> bool:
    return file.sound is not None


def _with_small_gaps(file: Truth) -> Truth:
    """Gaps below 0.1 s that stay are kept, where ffmpeg joins what is on their sides."""
    sound = file.sound
    return replace(file, sound=sound._replace(pieces=pieces_of(sound.frames, len(sound.samples), patience=0.5)))


def _stores_its_beginning(file: Truth) -> bool:
    return any("start_time" in stream for stream in file.streams.values())


def _from_the_stored_beginning(file: Truth) -> Truth:
    """The first time that the container stores, even where the decoder gives nothing for it; lengths count from it."""
    starts = [float(stream["start_time"]) for stream in file.streams.values() if "start_time" in stream]
    return replace(file, second_0=min(starts), any_length=file.zero > min(starts) + 0.1)


def _is_partly_noise(file: Truth) -> bool:
    return file.sound is not None and file.streams["audio"].get("codec_name") in NOISY


def _with_other_noise(file: Truth) -> Truth:
    return replace(file, noise=15.0)


def _with_drift(file: Truth) -> Truth:
    """A window lies where the stored times near it say, which ffmpeg reads at the beginning of a stretch alone."""
    off, expected = [0.0], None
    for stamp, rate, count in file.sound.frames:
        if stamp is not None and (expected is None or abs(stamp / rate - expected) > HOLE):
            expected = stamp / rate
        if expected is not None:
            off.append(abs(stamp / rate - expected) if stamp is not None else 0.0)
            expected += count / rate
    return replace(file, drift=max(off))


def _has_no_length(file: Truth) -> bool:
    return file.container in BARE_SOUND or _is_bare(file)


def _of_any_length(file: Truth) -> Truth:
    return replace(file, any_length=True)


def _by_newer_ffmpeg(file: Truth) -> Truth:
    """The sound as PyAV's FFmpeg decodes it in one go from the beginning, where the program is older."""
    sound = sound_of_pyav(file.path)
    return replace(file, sound=sound) if sound else file


BARE_SOUND = ("aac", "ac3", "amr", "amrnb", "amrwb", "dts", "eac3", "mp3")  # FFmpeg guesses a length from the bit rate
# Decoders that draw random numbers for what the codec leaves out; that of IMA in QuickTime keeps the last 7 bits.
NOISY = ("aac", "ac3", "adpcm_ima_qt", "amr_wb", "eac3", "wmapro")
RULES = (
    Rule("a bare stream has no times", "no times at all", _is_bare, _in_order_of_output),
    Rule("only decoding times are stored", "delay of the video codec", _stores_decoding_times, _at_decoding_times),
    Rule("second 0 is the first stored time", "second 0", _stores_its_beginning, _from_the_stored_beginning),
    Rule("the decoder draws noise, or keeps some of what came before", "seeking", _is_partly_noise, _with_other_noise),
    Rule("a gap that stays is kept", "gaps in the sound", _has_sound, _with_small_gaps),
    Rule("the stored times drift from the samples", "sample j", _has_sound, _with_drift),
    Rule("a bare stream has no length", "end of the file", _has_no_length, _of_any_length),
    Rule("newer FFmpeg, in one go", "sample j", _has_sound, _by_newer_ffmpeg),
)
DAMAGED = Refusal("ffmpeg reports errors too", "damage that FFmpeg reports", lambda file, _: bool(file.complaints))
BACK = Refusal("the stored times go back", "damage", _goes_back)
SHORT = Refusal("ffmpeg too gives less than promised", "fewer than promised", _lacks_what_it_promises)
REFUSALS = (DAMAGED, SHORT)  # why a file may be refused
DAMAGES = (DAMAGED, BACK)  # why a file that is read may differ in a way that no rule tells


def fraction(text: str) -> float:
    """The value of ffprobe's "30000/1001"; 0 where it has none."""
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1) if float(bottom or 1) else 0.0
