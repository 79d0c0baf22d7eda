"""Clips of prepared shards, decoded by NVIDIA DALI: on the GPU (NVDEC), or on the CPU for VP9 and MJPEG.

Order, windows, augmentation, words and quarantine are the PyAV loader's own code; DALI replaces what turns the bytes of
a sample into frames and samples. Its imperative mode is used, one sample per call and thread, and not a pipeline: there
an exception ends the pipeline and all samples in flight, here it belongs to one sample, which is quarantined like any
other, and each sample may have a window of its own. What a decoder does not notice, a flipped bit or a missing end, the
index does: the bytes must have its SHA-256 before DALI sees them, and the decoded frames and samples its counts.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vatt_engine.batch import Batch
from vatt_engine.data.clips import ClipReader, Decoded, Row
from vatt_engine.data.config import DataConfig
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import Sample
from vatt_engine.data.media import Clip, MediaError, aspect_note
from vatt_engine.data.pictures import PictureForm
from vatt_engine.data.resample import area_scaled, resampled
from vatt_engine.data.streams import ROUNDING, read_member
from vatt_engine.data.words import Vocabulary
from vatt_engine.faults import raise_if_of_code

CPU_SUFFIXES = (".webm", ".avi")  # VP9 and MJPEG; DALI's packages have no other decoder for the CPU


def build_loader(
    samples: Sequence[Sample],
    config: DataConfig,
    vocabulary: Vocabulary | None = None,
    *,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Loader:
    """The loader that `config.loader` asks for; the same batches from either, within the decoder's tolerance.

    Args:
        samples, config, vocabulary: see Loader.
        device: where the model is. "auto" takes DALI where that is a GPU and nothing is missing, else PyAV.
        options: see Loader.

    Raises:
        ValueError: DALI was asked for and cannot do it here; says why.

    >>> build_loader(read_samples("shards"), DataConfig(), device="cuda").decoder  # doctest: +SKIP
    'DALI on cuda'
    """
    device = torch.device(device)
    if config.loader == "dali" or (config.loader == "auto" and device.type == "cuda"):
        reason = dali_missing(device) or unfit(samples, config, device)
        if reason is None:
            return DaliLoader(samples, config, vocabulary, device=device, **options)
        if config.loader == "dali":
            raise ValueError(f"loader: data.loader must be auto or pyav here, got dali: {reason}")
    return Loader(samples, config, vocabulary, **options)


def dali_missing(device: torch.device | str) -> str | None:
    """Why DALI cannot decode on this device, or None.

    >>> dali_missing("cpu")  # doctest: +SKIP
    """
    if not (importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")):
        return "DALI is not installed. Run `pip install 'vatt-engine[dali]'`."
    if torch.device(device).type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU. `vatt doctor` says why."
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        hint = "A container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility,video."
        return f"the driver's video decoder, libnvcuvid.so.1, is missing. {hint}"
    return None


def unfit(samples: Sequence[Sample], config: DataConfig, device: torch.device) -> str | None:
    """Why DALI cannot decode these samples on this device, or None."""
    if not config.num_frames:
        return "data.num_frames must be at least 1, got 0."
    for sample in samples:
        if not sample.in_shard:
            return f"the set must be prepared shards, got the file {sample.path}. See `vatt prepare`."
        if device.type == "cpu" and sample.video and sample.video.suffix not in CPU_SUFFIXES:
            got = f"{sample.video.suffix} in {sample.path}"
            return f"on the CPU the video must be VP9 (.webm) or MJPEG (.avi), got {got}."
    return None if config.cache == "none" else f"data.cache must be none, got {config.cache}."


class DaliLoader(Loader):
    """Loader whose clips DALI decodes; on a GPU picture and sound of its batches are there already.

    Args:
        samples: from read_shards.
        device: "cuda" or "cpu"; on the CPU for VP9 and MJPEG alone.
        config, vocabulary, options: see Loader. `num_threads` decode, each one sample; `num_workers` is not used: what
            is decoded was decoded once before, when it was prepared, and is the same to the byte.

    >>> next(iter(DaliLoader(read_shards("shards"), DataConfig(), device="cpu"))).video.shape  # doctest: +SKIP
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        config: DataConfig,
        vocabulary: Vocabulary | None = None,
        *,
        device: torch.device | str,
        **options: Any,
    ):
        super().__init__(samples, replace(config, num_workers=0), vocabulary, **options)
        self.decoder = f"DALI on {device}"
        self._reader = DaliReader(self.config, vocabulary, seed=self.order.seed, train=self.train, device=device)

    def _collate(self, rows: list[Row]) -> Batch:
        batch = super()._collate(rows)
        for row in rows:
            for track in (row.video, row.audio):
                if track is not None and track.is_cuda:  # made on a thread's stream, read on this one
                    track.record_stream(torch.cuda.current_stream(track.device))
        return batch


class DaliReader(ClipReader):
    """ClipReader of prepared shards with DALI's decoders; arguments as there, and the device."""

    def __init__(
        self, config: DataConfig, vocabulary: Vocabulary | None, *, device: torch.device | str, **options: Any
    ):
        super().__init__(config, vocabulary, **options)
        self.device = torch.device(device)
        self._thread = threading.local()

    def decode(self, sample: Sample, epoch: int, views: Sequence[int] = (0,)) -> Decoded:
        with self._context():
            return super().decode(sample, epoch, views)

    def _media(self, sample: Sample) -> DaliMedia:
        return DaliMedia(sample, self.device, square_pixels=self.config.pixel_aspect == "square")

    @contextmanager
    def _context(self) -> Iterator[None]:
        """DALI's state of this thread, and on a GPU its stream, on which everything is done when the context ends."""
        import nvidia.dali.experimental.dynamic as ndd

        thread, on_gpu = self._thread, self.device.type == "cuda"
        if not hasattr(thread, "context"):
            thread.stream = torch.cuda.Stream(self.device) if on_gpu else None
            gpu = {"device_id": thread.stream.device_index, "cuda_stream": thread.stream} if on_gpu else {}
            thread.context = ndd.EvalContext(num_threads=1, **gpu)
        try:
            with torch.cuda.stream(thread.stream), thread.context, ndd.EvalMode.sync_cpu:
                yield
        finally:
            if on_gpu:
                thread.stream.synchronize()


class DaliMedia:
    """The tracks of a shard's sample, read as Media reads them; in a thread's EvalContext.

    Args:
        sample: from read_shards.
        device: where frames and samples shall be.
        square_pixels: see Media.

    Raises:
        MediaError: the sample has no video.
    """

    def __init__(self, sample: Sample, device: torch.device, *, square_pixels: bool = False):
        if sample.video is None:
            raise MediaError(sample.path, "the file must have a video track, got none.")
        self.sample, self.device, self.duration = sample, device, sample.duration
        self.aspect = sample.video.aspect if square_pixels else 1.0
        self.set_note = "" if square_pixels else aspect_note(sample.video.aspect)

    def read(
        self,
        start: float,
        *,
        num_frames: int,
        fps: float,
        num_samples: int,
        sample_rate: int,
        short_side: int | None = None,
    ) -> Clip:
        """The window that begins with the frame on screen at `start`, as far as the sample goes; see Media.read.

        Raises:
            MediaError: the bytes are not those of the index, or DALI cannot decode them.
        """
        rate, count = self.sample.video.rate, self.sample.video.count
        start = min(math.floor((start + ROUNDING) * rate), count - 1) / rate
        period = max(1, round((self.duration - start) * fps))
        audio, num_real = self._sound(start, min(num_samples, round(period / fps * sample_rate)), sample_rate)
        times = (start + i / fps for i in range(min(num_frames, period)))
        video = self._frames([min(math.floor((time + ROUNDING) * rate), count - 1) for time in times])
        height, width = video.shape[1:3]
        form = PictureForm(short_side=short_side, aspect=self.aspect)
        video = area_scaled(video, *form.size(width, height))
        return Clip(video, audio, start, len(video), num_real, set_note=self.set_note)

    def _frames(self, wanted: list[int]) -> Tensor:
        """The frames of these rising numbers, [N, H, W, 3] uint8."""
        import nvidia.dali.experimental.dynamic as ndd

        first, last = wanted[0], wanted[-1]
        stride = math.gcd(*(number - first for number in wanted)) or 1
        count = (last - first) // stride + 1
        with self._faults("video"):
            decoded = ndd.decoders.video(
                self._content("video"),
                start_frame=first,
                sequence_length=count,
                stride=stride,
                pad_mode="none",  # written out here: DALI 2.4 takes text only as a constant in the source of the call
                affine=False,  # the threads of all contexts would be pinned to the same core
                device="gpu" if self.device.type == "cuda" else "cpu",
            )
            video = torch.from_dlpack(decoded)
        if len(video) < count:
            text = f"decoded {len(video)} of {count} from frame {first}"
            raise self._error(f"the video must have the {self.sample.video.count} frames of the index, got {text}.")
        places = [(number - first) // stride for number in wanted]
        return video if places == list(range(count)) else video[places]

    def _sound(self, start: float, num_samples: int, sample_rate: int) -> tuple[Tensor | None, int]:
        """Mono samples from `start` on, zeros where the track has none; and the number of real ones."""
        import nvidia.dali.experimental.dynamic as ndd

        member = self.sample.audio
        if member is None or not num_samples:
            return torch.zeros(num_samples, device=self.device) if num_samples else None, 0
        with self._faults("audio"):
            wave = torch.from_dlpack(ndd.decoders.audio(self._content("audio"), downmix=True)[0])
        if len(wave) != member.count:
            raise self._error(f"the audio must have the {member.count} samples of the index, got {len(wave)}.")
        first = round(start * sample_rate)
        wave = resampled(wave, int(member.rate), sample_rate, first, num_samples, self.device)
        num_real = len(wave)
        if member.heard is not None:
            num_real = max((end for _, end in member.heard_within(start, num_real, sample_rate)), default=0)
        wave = torch.nn.functional.pad(wave, (0, num_samples - len(wave)))
        return wave.nan_to_num_().clamp_(-1, 1), num_real

    def _content(self, kind: str) -> Any:
        import nvidia.dali.experimental.dynamic as ndd

        content = read_member(getattr(self.sample, kind), self.sample.path)
        return ndd.as_tensor(torch.frombuffer(content, dtype=torch.uint8))

    @contextmanager
    def _faults(self, kind: str) -> Iterator[None]:
        try:
            yield
        except MediaError:
            raise
        except Exception as error:  # of whatever class DALI raises for damaged data
            raise_if_of_code(error, "nvidia", doing=f"reading the {kind} of {self.sample.path}")
            text = str(error).strip().split("\n", 1)[0].removesuffix(".")
            text = f"got {type(error).__name__}: {text}"
            raise self._error(f"the {kind} must be media that DALI can decode, {text}.") from error

    def _error(self, reason: str) -> MediaError:
        return MediaError(self.sample.path, reason)
