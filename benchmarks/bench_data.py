"""Batches of the loader from generated media files, against random tensors of the same shapes (the synthetic set)."""

import importlib.util
import tempfile
from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Bench, Checked, cases, one_pass
from benchmarks.shapes import SHAPES
from vatt_engine import Batch
from vatt_engine.data import DataConfig, Loader, Sample

MISSING = None if importlib.util.find_spec("av") else "the package av, which decodes media, is not installed"


def media(shape, folder):
    """Files of coarse noise that moves sideways, with a tone."""
    from vatt_engine.data.encode import write_media

    count, (height, width) = int(shape.seconds * shape.fps), shape.source
    coarse = torch.rand(3, height // 8, width // 8 + count, generator=torch.Generator().manual_seed(0))
    scene = coarse.mul(255).byte().repeat_interleave(8, 1).repeat_interleave(8, 2).permute(1, 2, 0)
    frames = torch.stack([scene[:, 8 * i : 8 * i + width] for i in range(count)])
    tone = torch.sin(torch.arange(int(shape.seconds * shape.sample_rate)) * 0.05)
    for index in range(shape.files):
        path = folder / f"{index}.mp4"
        write_media(path, frames.roll(index, 0), fps=shape.fps, waveform=tone, sample_rate=shape.sample_rate)
        yield Sample(index=index, id=index, path=path)


def inputs(shape, _dtype, _device):
    folder = tempfile.TemporaryDirectory(prefix="vatt-bench-")
    return {"folder": folder, "samples": list(media(shape, Path(folder.name)))}


def config_of(shape):
    return DataConfig(
        batch_size=shape.batch,
        num_frames=shape.frames,
        fps=shape.fps,
        frame_size=shape.size,
        num_samples=shape.samples,
        sample_rate=shape.sample_rate,
        num_candidates=0,
    )


def loader(shape, folder, samples):
    """One epoch of training batches, from the first file opened to the last batch made."""
    with Loader(samples, config_of(shape)) as batches:
        return list(islice(batches, len(batches)))


def synthetic(shape, folder, samples):
    """As many batches of random bytes and noise, made anew."""
    size = (shape.batch, shape.frames, shape.size, shape.size, 3)
    return [
        Batch(
            video=torch.randint(0, 256, size, dtype=torch.uint8),
            audio=torch.rand(shape.batch, shape.samples) * 2 - 1,
        )
        for _ in range(len(samples) // shape.batch)
    ]


def check(_bench, case, given):
    """Both give the same number of batches, of the same shapes and dtypes; no file was refused and no clip is blank."""
    shape = SHAPES[case.op][case.device][case.shape]
    calls = {name: one_pass(function, shape, given, case.passes) for name, function in RIVALS.items()}
    made = {name: call()[0] for name, call in calls.items()}
    failed = {}
    for name, batches in made.items():
        kinds = [(b.video.shape, b.video.dtype, b.audio.shape, b.audio.dtype) for b in batches]
        if kinds != [(b.video.shape, b.video.dtype, b.audio.shape, b.audio.dtype) for b in made["synthetic"]]:
            failed[name] = f"batches {kinds}"
        elif any(clip.min() == clip.max() for batch in batches for clip in batch.video):
            failed[name] = "a blank clip"
    return Checked({name: call for name, call in calls.items() if name not in failed}, failed, {})


def bytes_moved(shape, _dtype, _passes):
    """The batches, written; what decoding itself needs depends on the codec."""
    clip = shape.frames * shape.size**2 * 3 + 4 * shape.samples
    return shape.files // shape.batch * shape.batch * clip


def metrics(shape, _dtype, seconds):
    clips = shape.files // shape.batch * shape.batch
    return {"clips/s": clips / seconds, "frames/s": clips * shape.frames / seconds}


RIVALS = {"synthetic": synthetic, "loader": loader}
BENCH = Bench(
    name="data",
    rivals=RIVALS,
    inputs=inputs,
    check=check,
    bytes_moved=bytes_moved,
    flops=lambda *_: 0,
    passes=("epoch",),
    dtypes={"cpu": ("uint8",), "cuda": ()},
    metrics=metrics,
)


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
@cases(BENCH)
def test_data(measure, case):
    measure(BENCH, case)
