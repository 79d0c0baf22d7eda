"""Batches from media files and from shards, by PyAV and by DALI, against random tensors of the same shapes."""

import importlib.util
import tempfile
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import Bench, Checked, cases, one_pass
from benchmarks.shapes import SHAPES
from vatt_engine import Batch
from vatt_engine.data import DataConfig, Sample, build_loader, read_shards, write_manifest
from vatt_engine.data.dali import dali_missing
from vatt_engine.data.prepare import PrepareConfig, prepare
from vatt_engine.data.transcode import CODECS

MISSING = None if importlib.util.find_spec("av") else "the package av, which decodes media, is not installed"


def scene(height, width):
    """A wide picture with as much detail at every scale as photographs have, and pale colours."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(3, height, width)
    for octave in range(2, 9):
        step = 2**octave
        coarse = torch.rand(1, 3, height // step + 2, width // step + 2, generator=generator) - 0.5
        coarse = 0.8 * coarse.mean(1, keepdim=True) + 0.2 * coarse
        total += step**0.75 * F.interpolate(coarse, scale_factor=step, mode="bilinear")[0, :, :height, :width]
    total = 118 + 52 * (total - total.mean()) / total.std()
    return total.clamp(0, 255).byte().permute(1, 2, 0).contiguous()


def media(shape, folder):
    """Files of a scene that the camera pans over, from another place in each, with a tone."""
    from vatt_engine.data.encode import write_media

    fps, (height, width) = shape.file_fps or shape.fps, shape.source
    count = int(shape.seconds * fps)
    wide = scene(height, width + 2 * count + 16 * shape.files)
    tone = torch.sin(torch.arange(int(shape.seconds * shape.sample_rate)) * 0.05)
    for index in range(shape.files):
        path = folder / f"{index}.mp4"
        frames = wide[:, 16 * index :].as_strided((count, height, width, 3), (6, wide.stride(0), 3, 1))
        write_media(path, frames, fps=fps, waveform=tone, sample_rate=shape.sample_rate)
        yield Sample(index=index, id=index, path=path)


def inputs(shape, _dtype, _device):
    folder = tempfile.TemporaryDirectory(prefix="vatt-bench-")
    raw = list(media(shape, Path(folder.name)))
    return {"folder": folder, "samples": {"raw": raw} | prepared(shape, Path(folder.name), raw)}


def prepared(shape, folder, raw):
    """The same files as shards of each codec."""
    write_manifest(folder / "raw.jsonl", raw)
    configs = {codec: PrepareConfig(codec=codec, fps=shape.fps) for codec in shape.codecs}
    return {codec: read_shards(prepare(folder / "raw.jsonl", folder / codec, configs[codec])) for codec in configs}


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


def loader(shape, folder, samples, kind="raw", by="pyav"):
    """One epoch of training batches, from the first file opened to the last batch made."""
    with build_loader(samples[kind], replace(config_of(shape), loader=by)) as batches:
        return list(islice(batches, len(batches)))


def synthetic(shape, folder, samples):
    """As many batches of random bytes and noise, made anew."""
    size = (shape.batch, shape.frames, shape.size, shape.size, 3)
    return [
        Batch(
            video=torch.randint(0, 256, size, dtype=torch.uint8),
            audio=torch.rand(shape.batch, shape.samples) * 2 - 1,
        )
        for _ in range(shape.files // shape.batch)
    ]


def check(_bench, case, given):
    """Both give the same number of batches, of the same shapes and dtypes; no file was refused and no clip is blank."""
    shape = SHAPES[case.op][case.device][case.shape]
    refused = {name: "not prepared at this shape" for name, codec in OF_CODEC.items() if codec not in shape.codecs}
    refused |= {name: reason for name in OF_CODEC if "dali" in name and (reason := dali_missing("cpu"))}
    rivals = {name: function for name, function in RIVALS.items() if name not in refused}
    calls = {name: one_pass(function, shape, given, case.passes) for name, function in rivals.items()}
    made = {name: call()[0] for name, call in calls.items()}
    failed = {}
    for name, batches in made.items():
        kinds = [(b.video.shape, b.video.dtype, b.audio.shape, b.audio.dtype) for b in batches]
        if kinds != [(b.video.shape, b.video.dtype, b.audio.shape, b.audio.dtype) for b in made["synthetic"]]:
            failed[name] = f"batches {kinds}"
        elif any(clip.min() == clip.max() for batch in batches for clip in batch.video):
            failed[name] = "a blank clip"
    return Checked({name: call for name, call in calls.items() if name not in failed}, failed, refused)


def bytes_moved(shape, _dtype, _passes):
    """The batches, written; what decoding itself needs depends on the codec."""
    clip = shape.frames * shape.size**2 * 3 + 4 * shape.samples
    return shape.files // shape.batch * shape.batch * clip


def metrics(shape, _dtype, seconds):
    clips = shape.files // shape.batch * shape.batch
    return {"clips/s": clips / seconds, "frames/s": clips * shape.frames / seconds}


RIVALS = {"synthetic": synthetic, "loader": loader}
RIVALS |= {f"shards-{codec}": partial(loader, kind=codec) for codec in CODECS}
RIVALS |= {f"dali-{codec}": partial(loader, kind=codec, by="dali") for codec in ("vp9", "mjpeg")}
OF_CODEC = {name: name.partition("-")[2] for name in RIVALS if "-" in name}
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
