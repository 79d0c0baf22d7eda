"""`vatt prepare`'s shards against the raw reading of the same files: training must see the same from both.

All files are prepared in one set, with little loss and small pictures. Then windows of the shards are compared with the
whole raw file at the same rate: pictures by content and sound by correlation, as oracle_compare does it with ffmpeg.
What the raw reading refuses must be rejected, and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.oracle_check import AGREES, DIFFERS, NEITHER, Row, prints_of
from benchmarks.oracle_compare import Found, compare_pictures, compare_sound
from benchmarks.oracle_ffmpeg import RATE, Pictures, Piece, Sound
from vatt_engine.data.manifest import Sample, read_manifest
from vatt_engine.data.media import Media, MediaError, Track, open_media
from vatt_engine.data.prepare import PrepareConfig, prepare
from vatt_engine.data.shards import read_index, read_samples

FPS, SHORT_SIDE, MANY = 10.0, 96, 16


def check_prepared(folder: Path, paths: list[Path], out: Path, workers: int) -> Iterator[Row]:
    """Prepare the files into `out` and give the row of each, in order."""
    manifest = out / "manifest.jsonl"
    manifest.write_text("".join(json.dumps({"path": str(path.resolve())}) + "\n" for path in paths), encoding="utf-8")
    config = PrepareConfig(fps=FPS, short_side=SHORT_SIDE, crf=4, sample_rate=RATE, workers=workers)
    index = prepare(manifest, out / "shards", config)
    rejected = {row.values["line"]: row.values["reason"] for row in read_index(index) if "reason" in row.values}
    prepared = {sample.id: sample for sample in read_samples(index)} if len(rejected) < len(paths) else {}
    for path, sample in zip(paths, read_manifest(manifest)):
        row = Row(str(path.relative_to(folder)))
        _judge(row, path, prepared.get(sample.id), rejected.get(sample.line, ""))
        yield row


def _judge(row: Row, path: Path, sample: Sample | None, reason: str) -> None:
    try:
        media = Media(path)
        raw, refused = media.read_all(fps=FPS, sample_rate=RATE, short_side=SHORT_SIDE), ""
    except MediaError as error:
        media, raw, refused = None, None, error.reason
    if sample is None or raw is None:
        row.verdict = NEITHER if sample is None and raw is None else DIFFERS
        row.detail = f"prepare: {reason or 'takes it'}; raw: {refused or 'reads it'}"
        return
    try:
        found = _compared(raw, media.duration, sample)
    except MediaError as error:
        row.verdict, row.detail = DIFFERS, f"the shard is refused: {error.reason}"
        return
    row.verdict = DIFFERS if found.differences else AGREES
    row.detail = "; ".join(found.differences)
    row.frames, row.told_apart, row.lag_ms = found.frames, found.told_apart, found.lag_ms
    row.snr = None if math.isinf(found.snr) else found.snr


def _compared(raw: Track, duration: float, sample: Sample) -> Found:
    shard = open_media(sample)
    pictures = sound = None
    if raw.video is not None:
        prints = prints_of(raw.video)
        height, width = shard.info.height, shard.info.width  # both even, which the raw ones need not be
        times = torch.arange(len(prints), dtype=torch.float64) / FPS
        pictures = Pictures(times, prints, [(height, width)] * len(prints), False)
    if raw.audio is not None and raw.num_real_samples:
        sound = Sound(raw.audio[: raw.num_real_samples], [Piece(0.0, 0, raw.num_real_samples)], [])
    differences, frames, told, lag, snr = [], 0, 0, 0.0, math.inf
    if abs(shard.duration - duration) > 1e-3:
        differences.append(f"the shard lasts {shard.duration:.3f} s, right {duration:.3f} s")
    for start in dict.fromkeys((0.0, 0.45 * duration, max(duration - MANY / FPS, 0.0))):
        clip = shard.read(start, num_frames=MANY, fps=FPS, num_samples=round(MANY / FPS * RATE), sample_rate=RATE)
        results = []
        if (clip.video is None) != (pictures is None) or (clip.num_real_samples > 0 and sound is None):
            results.append(Found(["other tracks"]))
        if clip.video is not None and pictures:
            real = prints_of(clip.video[: clip.num_real_frames])
            times = [clip.start + i / FPS for i in range(len(real))]
            results.append(compare_pictures(clip.video[0], real, times, pictures))
        if sound:
            ours = torch.zeros(0) if clip.audio is None else clip.audio
            results.append(compare_sound(ours, clip.num_real_samples, clip.start, sound, 1 / RATE))
        for result in results:
            differences += [f"{difference} from {clip.start:.1f} s" for difference in result.differences]
            frames, told, snr = frames + result.frames, told + result.told_apart, min(snr, result.snr)
            lag = result.lag_ms if abs(result.lag_ms) > abs(lag) else lag
    return Found(differences, frames, told, lag, snr)
