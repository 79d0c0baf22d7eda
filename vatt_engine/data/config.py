"""DataConfig: what a clip is, and how clips are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.order import whole_shares
from vatt_engine.data.streams import MediaLimits
from vatt_engine.schema import PathText


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a clip is, and how clips are loaded.

    Args:
        train: the training set: a manifest (.jsonl, .csv), a folder of prepared shards, or its tars `{00..99}.tar`; or
            several of them.
        weights: share of each of several sets in the batches, up to a common factor; none: all files alike.
        batch_size: clips per batch, over all ranks.
        num_frames: frames per clip, T; 0 loads no picture, and takes files that have sound alone. An image is repeated.
        fps: frames per second of the clip, whatever the file has.
        frame_size: height and width of the frames a model gets, in pixels.
        num_samples: audio samples per clip, L; 0 loads no sound.
        sample_rate: samples per second, whatever the file has.
        num_candidates: captions per clip, P, the nearest in time; 0 loads no text.
        max_words: words per caption, W; longer ones are cut.
        num_windows: evaluation only: clips per file, evenly spaced; 1 takes the centre.
        num_crops: evaluation only: squares per clip, evenly spaced along its long side, each a row of a batch; 1 takes
            the centre.
        num_classes: of a set whose samples have several classes each, C: the labels are then 0 or 1 per class; 0: one
            class number per sample.
        pixel_aspect: "stored" takes the pixels of a file as square, whatever it says, as the official pipeline does;
            "square" stretches frames of other pixels until theirs are.
        decode_size: short side that larger frames are scaled down to before cropping; None: 8/7 of frame_size.
        cache: "memory" decodes each file once, whole, and cuts windows at its frames; for sets that fit.
        cache_gib: largest size of that cache in GiB.
        num_threads: files decoded at the same time; 0: as many as CPUs. It never changes a batch.
        num_workers: processes that decode; 0: threads of this process, where a file that crashes FFmpeg ends the run
            and one that hangs it stops it. It never changes a batch.
        max_decode_seconds: of one sample in such a process, which is then killed.
        loader: what decodes: "pyav"; "dali", prepared shards alone, in threads of this process; "auto": DALI where
            those meet a GPU that it can use, else PyAV.
        prefetch: batches made ahead.
        max_bad_fraction: share of unusable samples, of at least 100, above which training stops.
        limits: what one file may ask for.
        augment: training only.

    Raises:
        ValueError: a value out of range.

    Source: paper section 4.1.1 and 4.1.2 (32 frames at 10 fps, 153,600 samples at 48 kHz, 5 x 16 words).

    >>> DataConfig().clip_seconds
    3.2
    """

    train: PathText | tuple[PathText, ...] = ""
    weights: tuple[float, ...] = ()
    batch_size: int = 64
    num_frames: int = 32
    fps: float = 10.0
    frame_size: int = 224
    num_samples: int = 153_600
    sample_rate: int = 48_000
    num_candidates: int = 5
    max_words: int = 16
    num_windows: int = 1
    num_crops: int = 1
    num_classes: int = 0
    pixel_aspect: Literal["stored", "square"] = "stored"
    decode_size: int | None = None
    cache: Literal["none", "memory"] = "none"
    cache_gib: float = 8.0
    num_threads: int = 0
    num_workers: int = 0
    max_decode_seconds: float = 60.0
    loader: Literal["auto", "pyav", "dali"] = "auto"
    prefetch: int = 2
    max_bad_fraction: float = 0.05
    limits: MediaLimits = field(default_factory=MediaLimits)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        zeros = ("num_frames", "num_samples", "num_candidates", "num_threads", "num_workers", "num_classes")
        ones = ("batch_size", "frame_size", "sample_rate", "max_words", "num_windows", "num_crops", "prefetch")
        for name, least in (dict.fromkeys(zeros, 0) | dict.fromkeys(ones, 1)).items():
            if getattr(self, name) < least:
                raise ValueError(f"DataConfig: {name} must be at least {least}, got {getattr(self, name)}.")
        if not self.num_frames and not self.num_samples:
            raise ValueError("DataConfig: num_samples must be at least 1 where num_frames is 0, got 0.")
        for name in ("fps", "cache_gib"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"DataConfig: {name} must be above 0, got {getattr(self, name)}.")
        if not self.sources:
            raise ValueError("DataConfig: train must be a manifest or several, got none.")
        if self.weights and len(self.weights) != len(self.sources):
            text = f"be one per manifest of train, got {len(self.weights)} for {len(self.sources)}"
            raise ValueError(f"DataConfig: weights must {text}.")
        whole_shares(self.weights)
        if not 0 < self.max_decode_seconds <= 86_400:
            raise ValueError(f"DataConfig: max_decode_seconds must be in (0, 86400], got {self.max_decode_seconds}.")
        if self.cache == "memory" and self.num_workers:
            hint = "Each process would hold the whole set."
            raise ValueError(
                f"DataConfig: num_workers must be 0 where cache is 'memory', got {self.num_workers}. {hint}"
            )
        if self.cache not in ("none", "memory"):
            raise ValueError(f"DataConfig: cache must be 'none' or 'memory', got {self.cache!r}.")
        if self.loader not in ("auto", "pyav", "dali"):
            raise ValueError(f"DataConfig: loader must be auto, pyav or dali, got {self.loader!r}.")
        if self.pixel_aspect not in ("stored", "square"):
            raise ValueError(f"DataConfig: pixel_aspect must be stored or square, got {self.pixel_aspect!r}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"DataConfig: max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}.")
        if self.decode_size is not None and self.decode_size < self.frame_size:
            hint = f"Frames of {self.frame_size} would be enlarged."
            raise ValueError(f"DataConfig: decode_size must be at least frame_size, got {self.decode_size}. {hint}")

    @property
    def sources(self) -> tuple[str, ...]:
        """The manifests of the training set."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def clip_seconds(self) -> float:
        """Length of a clip: the longer of picture and sound."""
        return max(self.num_frames / self.fps, self.num_samples / self.sample_rate)

    @property
    def num_views(self) -> int:
        """Rows per sample of an evaluation: windows x crops."""
        return self.num_windows * self.num_crops

    @property
    def short_side(self) -> int:
        """Short side in pixels that files are decoded to."""
        return self.decode_size or round(self.frame_size * 8 / 7)
