"""One sample of a manifest to one row of a batch: choose the window, decode, augment, encode the words."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vatt_engine.data.augment import augment_audio, augment_video, side_crop
from vatt_engine.data.config import DataConfig
from vatt_engine.data.manifest import Caption, Sample
from vatt_engine.data.media import Clip, Media, MediaError, Track, open_media
from vatt_engine.data.order import generator_of
from vatt_engine.data.windows import even_windows, nearest_captions, random_window
from vatt_engine.data.words import Vocabulary

NO_PICTURE = "the file must have a video track, got none."


class Decoded(NamedTuple):
    """A window: pictures [T, S, S, 3] uint8 of its views, and sound [L]; its start and the sample's end, seconds."""

    pictures: list[Tensor | None]
    audio: Tensor | None
    audio_mask: bool
    start: float
    end: float
    note: str = ""  # what was odd about decoding it
    set_note: str = ""  # what was odd and probably is so in all files of the set


class Row(NamedTuple):
    """One sample of a batch, in its final shape: video [T, S, S, 3] uint8, audio [L], text [P, W]."""

    video: Tensor | None
    audio: Tensor | None
    audio_mask: bool
    text: Tensor | None
    text_mask: bool
    sample: Sample
    note: str  # what is odd about the sample, which is used all the same
    set_note: str = ""  # what is odd and probably is so in all samples of the set


class ClipReader:
    """Rows of samples: window, crop, colours and noise are a function of (seed, epoch, sample id) alone.

    Args:
        config: see DataConfig.
        vocabulary: turns captions into ids; None: rows without text.
        seed: of window and augmentation.
        train: a random, augmented window; else the evenly spaced ones, each with its crops.

    >>> ClipReader(DataConfig(), None, seed=0, train=False).rows(sample, 0)[0].video.shape  # doctest: +SKIP
    """

    def __init__(self, config: DataConfig, vocabulary: Vocabulary | None, *, seed: int, train: bool):
        self.config, self.vocabulary, self.seed, self.train = config, vocabulary, seed, train
        self._form = {"fps": config.fps, "sample_rate": config.sample_rate, "short_side": config.short_side}
        self._tracks: dict[Path, Future[Track | str]] = {}  # a str is why the file cannot be used
        self._cached_bytes, self._lock = 0, threading.Lock()

    def rows(self, sample: Sample, epoch: int, views: Sequence[int] = (0,)) -> list[Row]:
        """One sample, decoded, cut, augmented and encoded; an evaluation has a row for each view.

        Args:
            views: window x num_crops + crop, all of one window, which is decoded once.

        Raises:
            MediaError: the file cannot be used.
        """
        return self.worded(sample, self.decode(sample, epoch, views))

    def decode(self, sample: Sample, epoch: int, views: Sequence[int] = (0,)) -> Decoded:
        """The rows without their words; the window lies within the sample, which repeats where it is shorter."""
        config, generator = self.config, generator_of(self.seed, epoch, sample.id)
        window = views[0] // config.num_crops
        source = self._track(sample) if config.cache == "memory" else self._media(sample)
        end = self._end(sample, source)
        if self.train:
            start = random_window(end - sample.start, config.clip_seconds, generator)
        else:
            start = even_windows(end - sample.start, config.clip_seconds, config.num_windows)[window]
        clip = self._clip(source, sample.start + start, None if sample.end is None else end)
        pictures: list[Tensor | None] = [None] * len(views)
        if clip.video is not None and self.train:
            pictures = [augment_video(clip.video, config.frame_size, config.augment, generator)]
        elif clip.video is not None:
            crops = [view % config.num_crops for view in views]
            pictures = [side_crop(clip.video, config.frame_size, crop, config.num_crops) for crop in crops]
        audio = None
        if config.num_samples:
            audio = torch.zeros(config.num_samples) if clip.audio is None else clip.audio
            audio = augment_audio(audio, config.augment, generator) if self.train else audio
        return Decoded(pictures, audio, clip.num_real_samples > 0, clip.start, end, clip.note, clip.set_note)

    def worded(self, sample: Sample, decoded: Decoded) -> list[Row]:
        """The rows of a decoded window, with the captions of the sample nearest to it."""
        captions = [c for c in sample.captions if c.start < decoded.end and c.end >= sample.start]
        notes, left_out = [decoded.note] if decoded.note else [], len(sample.captions) - len(captions)
        if left_out and (sample.start, sample.end) == (0, None):
            notes.append(f"captions must begin within the {decoded.end:.3f} s of the file, got {left_out} later.")
        elif left_out:
            span = f"{sample.start:.3f} to {decoded.end:.3f} s"
            notes.append(f"captions must lie within the sample's {span}, got {left_out} outside.")
        text, text_mask = self._text(captions, decoded.start)
        rest = (decoded.audio, decoded.audio_mask, text, text_mask, sample, " ".join(notes), decoded.set_note)
        return [Row(video, *rest) for video in decoded.pictures]

    def check(self, sample: Sample, start: float, seconds: float) -> tuple[float | None, str, str]:
        """Decode the part of a sample that begins at `start`, and forget it.

        Returns:
            Where the next part begins, None behind the last; what was odd; what was odd and probably is so in the set.

        Raises:
            MediaError: the file cannot be used.
        """
        config, media = self.config, self._media(sample)
        end, start = self._end(sample, media), max(start, sample.start)
        part = min(seconds, end - start)
        num_frames = max(1, round(part * config.fps)) if config.num_frames else 0
        num_samples = round(part * config.sample_rate) if config.num_samples else 0
        clip = media.read(start, num_frames=num_frames, num_samples=num_samples, **self._form)
        following = start + seconds if start + seconds + 1 / config.fps < end else None
        return following, clip.note, clip.set_note

    def _end(self, sample: Sample, source: Track | Media) -> float:
        """The second of the file at which the sample ends, or the file, if that is sooner."""
        duration = source.duration
        if sample.start >= duration:
            text = f"the sample must begin within the {duration:.3f} s of the file, got {sample.start:.3f} s."
            raise MediaError(sample.path, text)
        return duration if sample.end is None else min(sample.end, duration)

    def _media(self, sample: Sample) -> Media:
        media = open_media(sample, self.config.limits, square_pixels=self.config.pixel_aspect == "square")
        if self.config.num_frames and not media.info.has_video:
            raise MediaError(sample.path, NO_PICTURE)
        if not self.config.num_frames and not media.info.has_audio:
            raise MediaError(sample.path, "the file must have an audio track, got none.")
        return media

    def _track(self, sample: Sample) -> Track:
        """The decoded file from the cache; a failure is remembered too, since it does not depend on the window."""
        with self._lock:
            made = self._tracks.get(sample.path)
            future = self._tracks.setdefault(sample.path, Future())
        if made is None:
            try:
                future.set_result(self._decoded(sample))
            except MediaError as error:
                future.set_result(error.reason)
            except BaseException as error:
                future.set_exception(error)
        track = future.result()
        if isinstance(track, str):
            raise MediaError(sample.path, track)
        return track

    def _decoded(self, sample: Sample) -> Track:
        config, media = self.config, self._media(sample)
        form = self._form | {"pictures": config.num_frames > 0}
        with self._lock:
            self._cached_bytes += media.track_bytes(**form)
            size = self._cached_bytes / 2**30
        if size > config.cache_gib:
            raise ValueError(
                f"loader: cache_gib must hold the whole set where cache is 'memory', got {config.cache_gib:g} GiB, full"
                f" after {len(self._tracks)} files. Raise data.cache_gib, or set data.cache to none."
            )
        return media.read_all(**form)

    def _clip(self, source: Track | Media, start: float, end: float | None) -> Clip:
        """The window from `start` on; what there is before `end` is repeated, as a file is where that ends."""
        config = self.config
        num_frames, num_samples = config.num_frames, config.num_samples
        if end is not None:
            period = max(1, round((end - start) * config.fps))
            num_frames = min(num_frames, period)
            num_samples = min(num_samples, round(period / config.fps * config.sample_rate))
        counts = {"num_frames": num_frames, "num_samples": num_samples}
        clip = source.cut(start, **counts) if isinstance(source, Track) else source.read(start, **counts, **self._form)
        video, audio = _repeated(clip.video, config.num_frames), _repeated(clip.audio, config.num_samples)
        return clip._replace(video=video, audio=audio)

    def _text(self, captions: Sequence[Caption], start: float) -> tuple[Tensor | None, bool]:
        """Word ids [P, W] of the nearest captions, and whether they hold a word."""
        config = self.config
        if self.vocabulary is None or not config.num_candidates:
            return None, False
        chosen = nearest_captions(captions, start, start + config.clip_seconds, config.num_candidates)
        if not chosen:
            return torch.zeros(config.num_candidates, config.max_words, dtype=torch.int64), False
        ids = self.vocabulary.encode_batch([caption.text for caption in chosen], config.max_words)
        worded = ids.any(dim=1)
        if worded.any():  # a caption of punctuation alone is no candidate
            ids[~worded] = ids[worded][0]
        return ids, bool(worded.any())


def _repeated(track: Tensor | None, count: int) -> Tensor | None:
    return track if track is None or len(track) == count else track[torch.arange(count) % len(track)]
