"""One file through the oracle: the windows that are read, what they are compared with, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.oracle_compare import Found, compare_pictures, compare_sound
from benchmarks.oracle_ffmpeg import RATE, FFmpegError, Truth, cells_of, fingerprint, truth
from benchmarks.oracle_rules import DAMAGES, REFUSALS, RULES, fraction
from vatt_engine.data.media import Media, MediaError

AGREES, BY_RULE, DIFFERS = "agrees", "by rule", "DIFFERS"
NEITHER, ONLY_OURS = "neither reads it", "only ours reads it"
SECONDS_WITHOUT_PICTURE = 1.0  # of a window of a file of sound alone


@dataclass
class Row:
    """What became of one file."""

    path: str
    verdict: str = ""
    detail: str = ""
    container: str = ""
    video: str = ""
    audio: str = ""
    properties: list[str] = field(default_factory=list)
    frames: int = 0  # compared
    told_apart: int = 0  # of them, those that no other picture of the file looks like
    lag_ms: float = 0.0  # the largest
    snr: float | None = None  # the least, in dB


class Window(NamedTuple):
    """A window to read: seconds on the file's common clock, pictures per second, and how many."""

    start: float
    fps: float
    count: int


class Seen(NamedTuple):
    """What the reader gave for a window, pictures as fingerprints; or why it refused."""

    window: Window
    first: Tensor | None = None
    prints: Tensor | None = None
    audio: Tensor | None = None
    num_real_samples: int = 0
    refused: str = ""


def check(path: Path, name: str = "", reader: Callable[[Path], Any] = Media) -> Row:
    """Compare the reader's windows of a file with ffmpeg's output.

    Args:
        path: the file.
        name: what the row calls it.
        reader: opens the file, as vatt_engine.data.media.Media; tests plant mistakes here.
    """
    row = Row(name or path.name)
    try:
        media, refused = reader(path), ""
    except MediaError as error:
        media, refused = None, error.reason
    try:
        right = truth(path, _streams(path))
    except FFmpegError as error:
        reads = media is not None and not _seen(media, Window(0.0, 25.0, 25)).refused
        row.verdict, row.detail = (ONLY_OURS if reads else NEITHER), str(error)
        return row
    _describe(row, right)
    if media is None:
        return _refused(row, right, refused)
    seen = [_seen(media, window) for window in windows(right, media.info.duration)]
    reasons = [f"at {item.window.start:.3f} s: {item.refused}" for item in seen if item.refused]
    if reasons:
        return _refused(row, right, reasons[0])
    _judge(row, right, media.info.duration, seen)
    return row


def _streams(path: Path) -> dict[str, int]:
    """Which streams are meant, counted within their kind: of several, FFmpeg's best (av_find_best_stream).

    The cover of a song is no video. A file that PyAV cannot open is asked for the first of each kind.
    """
    import av
    from av.stream import Disposition

    found = {}
    try:
        with av.open(f"file:{path}", metadata_errors="ignore") as container:
            for kind in ("video", "audio"):
                stream = container.streams.best(kind)
                if stream is not None and not stream.disposition & Disposition.attached_pic:
                    found[kind] = list(getattr(container.streams, kind)).index(stream)
    except av.FFmpegError:
        found = {"video": 0, "audio": 0}
    return found


def windows(right: Truth, duration: float) -> list[Window]:
    """From 0, from within, near the end; at the file's own rate and at others; all inside both lengths."""
    length = min(right.duration, duration)
    own = 1 / right.pictures.step if right.pictures and right.pictures.step > 1e-3 else 25.0
    many = 32 if right.pictures else round(SECONDS_WITHOUT_PICTURE * own)
    at_rest = 0.3 / own  # between two pictures, where rounding decides nothing
    wanted = [
        Window(0.0, own, many),
        Window(0.45 * length + at_rest, own, many),
        Window(max(length - many / own, 0.0) + at_rest, own, many),
        Window(0.21 * length, 12.5, many // 2),
        Window(0.7 * length, 10.0, many // 2),
        Window(0.0, 10.0, many // 2),
    ]
    late = (right.sound.start - right.zero) if right.sound and right.pictures else 0.0
    if late > 2 / own:
        wanted.append(Window(0.0, own, max(1, int(late * own / 2))))  # wholly before the first sound
    return [window for window in dict.fromkeys(wanted) if window.start < length]


def _seen(media: Any, window: Window) -> Seen:
    try:
        clip = media.read(
            window.start,
            num_frames=window.count,
            fps=window.fps,
            num_samples=round(window.count / window.fps * RATE),
            sample_rate=RATE,
        )
    except MediaError as error:
        return Seen(window, refused=error.reason)
    # Both tracks are repeated from the end of the file on, which is rounded to a whole number of pictures.
    left = max(1, round((media.info.duration - window.start) * window.fps))
    audio = None if clip.audio is None else clip.audio[: round(left / window.fps * RATE)]
    real = None if clip.video is None else clip.video[: clip.num_real_frames]
    prints = None if real is None else prints_of(real)
    return Seen(window, None if real is None else real[0].clone(), prints, audio, clip.num_real_samples)


def prints_of(pictures: Tensor) -> Tensor:
    """The fingerprints of pictures [N, H, W, 3] of one size."""
    cells = cells_of(*pictures.shape[1:3])
    return torch.stack([fingerprint(picture, cells) for picture in pictures])


def _refused(row: Row, right: Truth, reason: str) -> Row:
    rule = next((rule for rule in REFUSALS if rule.applies(right, reason)), None)
    row.verdict = BY_RULE if rule else DIFFERS
    row.detail = f"{rule.name}; " if rule else ""
    row.detail += f"refused: {reason}"
    return row


def _judge(row: Row, right: Truth, duration: float, seen: list[Seen]) -> None:
    """Fill in the verdict: agreement with ffmpeg's output, or with what one or all of the rules make of it."""
    found = _compared(right, duration, seen)
    row.verdict = AGREES
    if found.differences:
        row.verdict, row.detail = DIFFERS, "; ".join(dict.fromkeys(found.differences))
        rules = [rule for rule in RULES if rule.applies(right)]
        for chosen in [subset for size in (1, 2, 3) for subset in combinations(rules, size)]:
            changed = right
            for rule in chosen:
                changed = rule.right(changed)
            again = _compared(changed, duration, seen)
            if not again.differences:
                row.verdict, row.detail, found = BY_RULE, ", ".join(rule.name for rule in chosen), again
                break
        else:
            damage = next((rule for rule in DAMAGES if rule.applies(right, row.detail)), None)
            if damage:
                row.verdict, row.detail = BY_RULE, f"{damage.name}: {row.detail}"
    row.frames, row.told_apart, row.lag_ms = found.frames, found.told_apart, found.lag_ms
    row.snr = None if math.isinf(found.snr) else found.snr


def _compared(right: Truth, duration: float, seen: list[Seen]) -> Found:
    """All windows against one truth."""
    differences, frames, told, lag, snr = [], 0, 0, 0.0, math.inf
    step = right.pictures.step if right.pictures else 0.0
    if not right.any_length and abs(duration - right.duration) > 0.1 + 2 * step:
        differences.append(f"it lasts {duration:.3f} s, right {right.duration:.3f} s")
    for item in seen:
        where = f"from {item.window.start:.3f} s at {item.window.fps:.3f} fps"
        time, results = right.zero + item.window.start, []
        if (item.prints is None) != (right.pictures is None):
            results.append(Found([f"{'no' if item.prints is None else 'a'} picture"]))
        elif right.pictures:
            times = [time + i / item.window.fps for i in range(len(item.prints))]
            results.append(compare_pictures(item.first, item.prints, times, right.pictures))
        if (item.audio is None) != (right.sound is None):
            results.append(Found([f"{'no' if item.audio is None else 'a'} sound"]))
        elif right.sound:
            tick = fraction(right.streams["audio"].get("time_base", "0/1")) + right.drift
            results.append(compare_sound(item.audio, item.num_real_samples, time, right.sound, tick, right.noise))
        for result in results:
            differences += [f"{difference} {where}" for difference in result.differences]
            frames, told, snr = frames + result.frames, told + result.told_apart, min(snr, result.snr)
            lag = result.lag_ms if abs(result.lag_ms) > abs(lag) else lag
    return Found(differences, frames, told, lag, snr)


def _describe(row: Row, right: Truth) -> None:
    """Fill in what is worth knowing of a file."""
    video, audio = (right.streams.get(kind, {}) for kind in ("video", "audio"))
    row.container = right.container.partition(",")[0]
    row.video, row.audio = video.get("codec_name", ""), audio.get("codec_name", "")
    notes = []
    if right.pictures:
        height, width = right.pictures.sizes[0]
        steps = right.pictures.times.diff()
        irregular = len(steps) > 2 and float(steps.max()) > 1.6 * right.pictures.step + 2e-3
        notes += [f"{width}x{height}", f"{1 / right.pictures.step:.4g} fps" if right.pictures.step > 1e-3 else ""]
        notes += ["VFR" if irregular else "", "B-frames" if video.get("has_b_frames") else ""]
        notes += [video.get("pix_fmt", "") if video.get("pix_fmt") not in ("yuv420p", "yuvj420p") else ""]
        aspect = video.get("sample_aspect_ratio", "1:1")
        notes += [f"SAR {aspect}" if aspect not in ("1:1", "0:1", "N/A") else ""]
        notes += ["interlaced" if right.pictures.interlaced else ""]
        matrix = next((data for data in video.get("side_data_list", []) if "displaymatrix" in data), {})
        notes += [f"rotated by {matrix['rotation']}" if matrix.get("rotation") else ""]
    if right.sound:
        notes += [f"{int(audio.get('sample_rate', 0)) / 1000:g} kHz", f"{audio.get('channels')} ch"]
        late = right.sound.start - right.zero
        notes += [f"sound {late:+.3f} s" if late > 1e-3 else ""]
        notes += [f"{len(right.sound.pieces) - 1} holes" if len(right.sound.pieces) > 1 else ""]
    if right.pictures and float(right.pictures.times[0]) - right.zero > 1e-3:
        notes.append(f"picture {float(right.pictures.times[0]) - right.zero:+.3f} s")
    row.properties = [note for note in notes if note]
