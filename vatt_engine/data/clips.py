"""One sample of a manifest to one row of a batch: choose the window, decode, augment, encode the words."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vatt_engine.data.augment import augment_audio, augment_video, center_crop
from vatt_engine.data.config import DataConfig
from vatt_engine.data.manifest import Caption, Sample
from vatt_engine.data.media import Clip, Media, MediaError, Track
from vatt_engine.data.order import generator_of
from vatt_engine.data.windows import captions_within, even_windows, nearest_captions, random_window
from vatt_engine.data.words import Vocabulary


class Row(NamedTuple):
    """One sample of a batch, in its final shape: video [T, S, S, 3] uint8, audio [L], text [P, W]."""

    video: Tensor
    audio: Tensor | None
    audio_mask: bool
    text: Tensor | None
    text_mask: bool
    sample: Sample
    note: str  # what is odd about the sample, which is used all the same


class ClipReader:
    """Rows of samples: window, crop, colours and noise are a function of (seed, epoch, sample id) alone.

    Args:
        config: see DataConfig.
        vocabulary: turns captions into ids; None: rows without text.
        seed: of window and augmentation.
        train: a random, augmented window; else evenly spaced ones, cropped at the centre.

    >>> ClipReader(DataConfig(), None, seed=0, train=False).row(sample, epoch=0).video.shape  # doctest: +SKIP
    """

    def __init__(self, config: DataConfig, vocabulary: Vocabulary | None, *, seed: int, train: bool):
        self.config, self.vocabulary, self.seed, self.train = config, vocabulary, seed, train
        self._tracks: dict[int, Future[Track | str]] = {}  # by sample.index; a str is why the file cannot be used
        self._cached_bytes, self._lock = 0, threading.Lock()

    def row(self, sample: Sample, epoch: int, window: int = 0) -> Row:
        """One sample, decoded, cut, augmented and encoded.

        Raises:
            MediaError: the file cannot be used.
        """
        config, generator = self.config, generator_of(self.seed, epoch, sample.id)
        source = self._track(sample) if config.cache == "memory" else self._media(sample)
        duration = source.duration if isinstance(source, Track) else source.info.duration
        if self.train:
            start = random_window(duration, config.clip_seconds, generator)
        else:
            start = even_windows(duration, config.clip_seconds, config.num_windows)[window]
        clip = self._clip(source, start)
        if self.train:
            video = augment_video(clip.video, config.frame_size, config.augment, generator)
        else:
            video = center_crop(clip.video, config.frame_size)
        audio = None
        if config.num_samples:
            audio = torch.zeros(config.num_samples) if clip.audio is None else clip.audio
            audio = augment_audio(audio, config.augment, generator) if self.train else audio
        captions = captions_within(sample.captions, duration)
        late = len(sample.captions) - len(captions)
        note = f"captions must begin within the {duration:.3f} s of the file, got {late} later." if late else ""
        text, text_mask = self._text(captions, clip.start)
        return Row(video, audio, clip.num_real_samples > 0, text, text_mask, sample, note)

    def _media(self, sample: Sample) -> Media:
        media = Media(sample.path, self.config.limits)
        if not media.info.has_video:
            raise MediaError(sample.path, "the file must have a video track, got none.")
        return media

    def _track(self, sample: Sample) -> Track:
        """The decoded file from the cache; a failure is remembered too, since it does not depend on the window."""
        with self._lock:
            made = self._tracks.get(sample.index)
            future = self._tracks.setdefault(sample.index, Future())
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
        form: dict[str, Any] = {"fps": config.fps, "sample_rate": config.sample_rate, "short_side": config.short_side}
        with self._lock:
            self._cached_bytes += media.track_bytes(**form)
            size = self._cached_bytes / 2**30
        if size > config.cache_gib:
            raise ValueError(
                f"loader: cache_gib must hold the whole set where cache is 'memory', got {config.cache_gib:g} GiB, full"
                f" after {len(self._tracks)} files. Raise data.cache_gib, or set data.cache to none."
            )
        return media.read_all(**form)

    def _clip(self, source: Track | Media, start: float) -> Clip:
        config = self.config
        if isinstance(source, Track):
            return source.cut(start, num_frames=config.num_frames, num_samples=config.num_samples)
        return source.read(
            start,
            num_frames=config.num_frames,
            fps=config.fps,
            num_samples=config.num_samples,
            sample_rate=config.sample_rate,
            short_side=config.short_side,
        )

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
