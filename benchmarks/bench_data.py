"""Batches from media files and from shards, by PyAV and by DALI, against random tensors of the same shapes."""

import importlib.util
import tempfile
from contextlib import ExitStack
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
from vatt_engine.cpus import usable_cpus
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
    """Files of a scene that the camera pans over, from another place in each, with a camera's noise and a tone."""
    from vatt_engine.data.encode import write_pictures, write_sound

    fps, (height, width) = shape.file_fps or shape.fps, shape.source
    count = int(shape.seconds * fps)
    wide = scene(height, width + 2 * count + 16 * shape.files).short()
    noise = torch.randn(height, width + 64, 3, generator=torch.Generator().manual_seed(1)).mul(4).short()
    tone = torch.sin(torch.arange(int(shape.seconds * shape.sample_rate)) * 0.05)
    write_sound(folder / "tone.mp4", [tone], sample_rate=shape.sample_rate, codec="aac")
    for index in range(shape.files):
        lefts = range(16 * index, 16 * index + 2 * count, 2)
        shifts = torch.randint(64, (count,), generator=torch.Generator().manual_seed(index)).tolist()
        pictures = (
            (wide[:, left : left + width] + noise[:, shift : shift + width]).clamp_(0, 255).byte()
            for left, shift in zip(lefts, shifts)
        )
        write_pictures(folder / "picture.mp4", pictures, fps=fps, codec="libx264", options={})
        join(folder / f"{index}.mp4", folder / "picture.mp4", folder / "tone.mp4")
        yield Sample(index=index, id=index, path=folder / f"{index}.mp4")


def join(path, *tracks):
    """One file of the tracks of several, as they are coded."""
    import av

    with ExitStack() as stack:
        out = stack.enter_context(av.open(str(path), "w"))
        sources = [stack.enter_context(av.open(str(track))) for track in tracks]
        streams = [out.add_stream_from_template(source.streams[0]) for source in sources]
        packets = [(p, stream) for source, stream in zip(sources, streams) for p in source.demux() if p.size]
        for packet, stream in sorted(packets, key=lambda pair: pair[0].dts * pair[0].time_base):
            packet.stream = stream
            out.mux(packet)


def inputs(shape, _dtype, _device):
    folder = tempfile.TemporaryDirectory(prefix="vatt-bench-")
    raw = list(media(shape, Path(folder.name)))
    return {"folder": folder, "samples": {"raw": raw} | prepared(shape, Path(folder.name), raw), "loaders": {}}


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


def loader(shape, folder, samples, loaders, kind="raw", by="pyav"):
    """Some epochs of training batches, by processes (DALI: threads) that an earlier call has started."""
    batches = loaders.get((kind, by))
    if batches is None:
        config = replace(config_of(shape), loader=by, num_workers=usable_cpus(), prefetch=1)
        batches = loaders[kind, by] = build_loader(samples[kind], config)
    return list(islice(batches, shape.epochs * len(batches)))


def synthetic(shape, folder, samples, loaders):
    """As many batches of random bytes and noise, made anew."""
    size = (shape.batch, shape.frames, shape.size, shape.size, 3)
    return [
        Batch(
            video=torch.randint(0, 256, size, dtype=torch.uint8),
            audio=torch.rand(shape.batch, shape.samples) * 2 - 1,
        )
        for _ in range(shape.epochs * (shape.files // shape.batch))
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
    return shape.epochs * (shape.files // shape.batch) * shape.batch * clip


def metrics(shape, _dtype, seconds):
    clips = shape.epochs * (shape.files // shape.batch) * shape.batch
    return {"clips/s": clips / seconds, "frames/s": clips * shape.frames / seconds}


# Clips that a loader has begun when its turn ends go on: those of raw files, which take long, beside synthetic.
RIVALS = {"loader": loader, "synthetic": synthetic}
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


@pytest.mark.timeout(1800)
@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
@cases(BENCH)
def test_data(measure, case):
    measure(BENCH, case)
