"""Damaged media files: none crashes or hangs the loader, none is shorter than it should be without being named.

CI decodes a tenth of the mutations, `pytest -m soak` all; the seeds of the tenth are among those of all.
"""

from __future__ import annotations

import gc
import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import pytest
import torch

from tests.media_files import write_media
from vatt_engine.data import workers
from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.config import DataConfig
from vatt_engine.data.loader import Loader, QuarantineError
from vatt_engine.data.manifest import Sample, sample_id
from vatt_engine.data.media import MediaError, decode
from vatt_engine.data.workers import Workers

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("mp4", "webm", "avi", "wav", "flac")
KINDS = ("truncated", "flipped", "zeros", "junk", "empty", "suffix")
CONFIG = DataConfig(
    batch_size=8,
    num_frames=4,
    fps=5.0,
    frame_size=32,
    num_samples=6_400,
    sample_rate=8_000,
    num_candidates=0,
    num_workers=2,
    max_bad_fraction=1.0,
    augment=AugmentConfig(color_jitter=0.0),
)

# A worker whose `check` decodes a whole file and tells what there was of it, counted apart from the reader.
COUNTING = """
from vatt_engine.data import workers
from vatt_engine.data.clips import ClipReader
from vatt_engine.data.decoding import decoded
from vatt_engine.data.media import Media

def counted(self, sample, start, seconds):
    media = Media(sample.path)
    track = media.read_all(fps=10, sample_rate=8000)
    source, info = media._source, media.info
    pictures = sum(1 for _ in decoded(source, "video", 0.0)) if info.has_video else 0
    sound = sum(f.samples / f.sample_rate for _, f in decoded(source, "audio", 0.0)) if info.has_audio else 0.0
    return (track.duration, pictures, sound), track.note, ""

ClipReader.check = counted
workers.serve()
"""


def write_clean(path):
    """Three seconds of noise that moves, with a tone that swells."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (8, 12, 3), generator=generator, dtype=torch.uint8)
    scene = coarse.repeat_interleave(6, 0).repeat_interleave(6, 1)
    frames = (
        torch.stack([scene.roll(3 * i, 1) for i in range(30)]) if path.suffix in (".mp4", ".webm", ".avi") else None
    )
    noise = 0.05 * torch.randn(24_000, generator=generator)
    wave = (torch.sin(torch.arange(24_000) * 0.2) * torch.linspace(0.1, 0.9, 24_000) + noise).clamp(-1, 1)
    video = {"fps": 10, "options": {"g": "10"}} if frames is not None else {}
    write_media(path, frames, waveform=wave, sample_rate=8_000, **video)


def mutated(content: bytes, kind: str, rng: random.Random) -> bytes:
    data, size = bytearray(content), len(content)
    begin, length = rng.randrange(size), rng.choice([16, 256, 4096])
    part = len(data[begin : begin + length])
    if kind == "truncated":
        return content[: rng.randrange(1, size)]
    if kind == "flipped":
        for _ in range(rng.choice([1, 3, 10, 100])):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[begin : begin + length] = bytes(part)
    elif kind == "junk":
        data[begin : begin + rng.choice([0, part])] = rng.randbytes(part)  # in between, or instead
    return b"" if kind == "empty" else bytes(data)


def write_mutations(folder: Path, suffix: str, count: int) -> list[Sample]:
    """`count` mutations of one clean file; the name says the seed and the kind.

    The clean file is made by a process of its own: of noise FFmpeg's AAC encoder makes other bytes in a process whose
    heap has been used before, and a mutation is known by its bytes.
    """
    folder.mkdir(exist_ok=True)
    clean = folder / f"clean.{suffix}"
    program = (
        "import pathlib, sys; from tests.data.test_mutations import write_clean; write_clean(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, clean], cwd=ROOT, check=True)
    content, samples = clean.read_bytes(), []
    for seed in range(count):
        kind, rng = KINDS[seed % len(KINDS)], random.Random(f"{suffix} {seed}")
        ending = rng.choice([s for s in (*FORMATS, "txt", "jpg") if s != suffix]) if kind == "suffix" else suffix
        path = folder / f"{seed:04d}-{kind}.{ending}"
        path.write_bytes(mutated(content, kind, rng))
        samples.append(Sample(seed, sample_id(path.name), path))
    return samples


def fault_of(clean, found, note):
    """What became of the file: nothing, or somebody was told, or SHORT.

    A stretch without media is named from 2.5 frames, or 0.1 s of sound, on. Where all sound is gone the mask says so,
    and the loader takes no file without pictures.
    """
    (duration, pictures, sound), (full, all_pictures, all_sound) = found, clean
    if note:
        return "noted"
    if all_pictures and not pictures:
        return "error"
    if all_pictures and not sound and pictures >= all_pictures - 2:
        return "masked"
    if duration >= full - 0.1 and pictures >= all_pictures - 2 and sound >= all_sound - 0.1:
        return "whole"
    return "SHORT"


def check_every_mutation(folder, monkeypatch, suffix, count):
    """Counts by kind and outcome."""
    monkeypatch.setattr(workers, "PROGRAM", COUNTING)
    samples = write_mutations(folder, suffix, count)
    pool = Workers(CONFIG, train=False)
    clean, note, _ = pool.check(Sample(0, 0, folder / f"clean.{suffix}"), 0, 0)
    assert note == ""

    def outcome(sample):
        try:
            found, note, _ = pool.check(sample, 0, 0)
            return fault_of(clean, found, note)
        except MediaError as error:
            ended = error.reason.startswith("decoding must")
            return f"CRASH OR HANG: {error.reason}" if ended else "error"

    with ThreadPoolExecutor(CONFIG.num_workers) as threads:
        outcomes = list(threads.map(outcome, samples))
    pool.close()
    expected = ("error", "noted", "masked", "whole")
    assert [f"{s.path.name}: {o}" for s, o in zip(samples, outcomes) if o not in expected] == []
    found = Counter((s.path.stem.partition("-")[2], o) for s, o in zip(samples, outcomes))
    assert {outcome for kind, outcome in found if kind == "empty"} == {"error"}
    return found


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_short_decode_is_noticed(tmp_path, monkeypatch, suffix):
    found = check_every_mutation(tmp_path, monkeypatch, suffix, 100)
    assert found["truncated", "whole"] <= 2  # only an end that holds no media may go
    assert found["suffix", "whole"] >= 16  # the content decides, not the name


@pytest.mark.soak
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_short_decode_is_noticed_of_a_thousand(tmp_path, monkeypatch, suffix):
    found = check_every_mutation(tmp_path, monkeypatch, suffix, 1_000)
    print(suffix, {f"{kind} {outcome}": n for (kind, outcome), n in sorted(found.items())})


@pytest.mark.parametrize(
    ("suffix", "place", "new", "note"),
    [
        ("mp4", b"stts", 9 * 1024, "the 30 frames must last as long as the video, 3.000 s, got 27.000 s."),
        ("wav", b"WAVEfmt \x10\0\0\0", 24_384, "the sound must have the 128000 bits a second .* got 390144."),
    ],
)
def test_a_file_that_tells_of_another_one_is_noted(tmp_path, suffix, place, new, note):
    """The frames' duration in an mp4, the sample rate of a wav: FFmpeg believes them, and plays a tenth of the file."""
    path = tmp_path / f"clean.{suffix}"
    write_clean(path)
    content = bytearray(path.read_bytes())
    skipped, order = (12, "big") if suffix == "mp4" else (4, "little")  # bytes between the place and the number
    begin = content.index(place) + len(place) + skipped
    content[begin : begin + 4] = new.to_bytes(4, order)
    path.write_bytes(content)
    assert re.fullmatch(note, decode(path, fps=10, sample_rate=8_000).note.partition(" the video must be whole")[0])


def test_a_trimmed_film_is_not_noted(tmp_path):
    """Its edit list shows a half of its frames."""
    write_clean(tmp_path / "whole.mp4")
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(tmp_path / "trimmed.mp4"), "w") as trimmed:
        source = whole.streams.video[0]
        stream = trimmed.add_stream_from_template(source)
        for packet in whole.demux(source):
            if packet.dts is not None:
                packet.pts, packet.dts = (t - int(1.5 / source.time_base) for t in (packet.pts, packet.dts))
                packet.stream = stream
                trimmed.mux(packet)
    track = decode(tmp_path / "trimmed.mp4", fps=10, sample_rate=8_000)
    assert (track.num_frames, track.note) == (15, "")


def check_batches(folder, count):
    """Training, half on mutations of all formats, and evaluation on them: shapes constant, each fault with a reason."""
    samples = []
    for suffix in FORMATS:
        samples += write_mutations(folder / suffix, suffix, count)
    samples = [replace(one, index=index, id=index) for index, one in enumerate(samples)]
    clean = [replace(one, id=len(samples) + index, path=folder / "mp4/clean.mp4") for index, one in enumerate(samples)]
    with Loader(samples + clean, CONFIG) as loader:
        for batch in islice(loader, len(loader)):
            assert tuple(batch.video.shape) == (8, 4, 32, 32, 3)
            assert tuple(batch.audio.shape) == (8, 6_400)
            assert bool(batch.audio.isfinite().all())
            assert bool((batch.audio.abs().amax(1) > 0)[batch.audio_mask].all())
    with Loader(samples, CONFIG, train=False) as loader:
        kept = {i for batch in loader for i in batch.sample_id.tolist()}
        skipped = {entry["path"]: entry["reason"] for entry in loader.quarantine.entries if entry["skipped"]}
    assert kept | {one.id for one in samples if str(one.path) in skipped} == {one.id for one in samples}
    assert all(reason for reason in skipped.values())
    assert not [reason for reason in skipped.values() if reason.startswith("decoding must")]
    assert {one.id for one in samples if one.path.parent.name in ("wav", "flac")} & kept == set()


def test_batches_of_damaged_files(tmp_path):
    check_batches(tmp_path, 30)


@pytest.mark.soak
def test_batches_of_a_thousand_damaged_files_each(tmp_path):
    check_batches(tmp_path, 1_000)


@pytest.mark.parametrize("share", [0, 10, 20, 30])
def test_a_share_of_bad_files(tmp_path, share):
    """Up to its limit a run goes on, every rank as many steps; above it every rank stops and says why."""
    write_clean(tmp_path / "clean.avi")
    samples = []
    for index in range(40):
        path = tmp_path / f"{index}.avi"
        path.write_bytes(b"no film" if index < 40 * share // 100 else (tmp_path / "clean.avi").read_bytes())
        samples.append(Sample(index, index, path))
    config = replace(CONFIG, num_workers=0, num_threads=2)
    for rank in range(2):
        lenient = replace(config, max_bad_fraction=share / 100 + 0.1)
        with Loader(samples, lenient, rank=rank, world=2, seed=1) as loader:
            batches = list(islice(loader, 40))
        assert [len(batch) for batch in batches] == [4] * 40
        assert {i for batch in batches for i in batch.sample_id.tolist()} <= {i for i in range(40) if i >= 0.4 * share}
        assert loader.quarantine.num_bad / loader.quarantine.num_seen == pytest.approx(share / 100, abs=0.08)
        if share:
            strict = Loader(samples, replace(config, max_bad_fraction=0.05), rank=rank, world=2, seed=1)
            with (
                strict,
                pytest.raises(QuarantineError, match=r"at most 5\.0% of the samples must be bad, got \d+ of 1\d\d"),
            ):
                list(islice(strict, 40))


def rss_of(pids):
    """Resident bytes of processes."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)


def slope(values):
    """Least squares, MB per thousand steps."""
    x, y = torch.arange(len(values), dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum()) * 1000 / 1e6


@pytest.mark.soak
def test_damaged_files_leak_nothing(tmp_path):
    """2,000 corrupt decodes in this process, 200 files of all formats again and again, after a warm-up of 1,000.

    One thread: two share the heap in another way each round, and its peak creeps up without anything being kept.
    """
    samples = [s for suffix in FORMATS for s in write_mutations(tmp_path / suffix, suffix, 40)]
    rss = []
    with Loader(samples * 15, replace(CONFIG, num_workers=0, num_threads=1, batch_size=200), train=False) as loader:
        for _ in loader:
            gc.collect()
            rss.append(rss_of(["self"]))
    assert loader.quarantine.num_seen == 3_000
    per_thousand = slope(rss[5:]) / 200
    print(f"RSS {rss[0] / 1e6:.0f} to {rss[-1] / 1e6:.0f} MB, {per_thousand:+.2f} MB per 1,000 decodes")
    assert per_thousand < 1


@pytest.mark.soak
@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_stays_flat(tmp_path, num_workers):
    """Of this process and its workers, over 3,000 batches after a warm-up of 1,000."""
    write_clean(tmp_path / "clean.avi")
    samples = [Sample(index, index, tmp_path / "clean.avi") for index in range(40)]
    rss = []
    with Loader(samples, replace(CONFIG, num_workers=num_workers, num_threads=2, batch_size=2)) as loader:
        for _ in islice(loader, 4_000):
            rss.append(rss_of(["self", *(loader._workers.pids if num_workers else [])]))
    per_thousand = slope(rss[1_000:])
    print(f"RSS {rss[0] / 1e6:.0f} to {rss[-1] / 1e6:.0f} MB, {per_thousand:+.2f} MB per 1,000 batches")
    assert per_thousand < 1
