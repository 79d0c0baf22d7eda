"""Decoding processes: what kills or hangs one costs its sample, by name; what kills one by chance costs nothing."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from media_files import write_media

from vatt_engine.data import workers
from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.config import DataConfig
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import Caption, Member, Sample, sample_id, write_manifest
from vatt_engine.data.words import Vocabulary

WORDS = Vocabulary(["<pad>", "<unk>", "clip"])
SMALL = DataConfig(
    batch_size=4,
    num_frames=3,
    fps=5.0,
    frame_size=15,  # an odd number of bytes before the sound
    num_samples=800,
    sample_rate=8_000,
    num_candidates=2,
    max_words=4,
    num_threads=2,
    max_decode_seconds=30.0,
    max_bad_fraction=1.0,
    augment=AugmentConfig(crop="none", color_jitter=0.0),
)
TWO = replace(SMALL, num_workers=2)

# What a worker runs here: the name of a file says what happens when it is decoded.
FAULTY = """
import ctypes, os, signal, sys
from vatt_engine.data import workers
from vatt_engine.data.clips import ClipReader

def faulty(self, sample, epoch, views=(0,), decode=ClipReader.decode):
    kind = sample.path.stem.partition("-")[0]
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "abort":
        os.abort()
    if kind == "exit":
        os._exit(3)
    if kind == "hang":
        ctypes.PyDLL(None).pause()  # with the interpreter's lock held
    if kind == "once":
        try:
            sample.path.with_suffix(".died").touch(exist_ok=False)
        except FileExistsError:
            return decode(self, sample, epoch, views)
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(self, sample, epoch, views)

ClipReader.decode = faulty
sys.addaudithook(lambda event, _: os._exit(4) if event.startswith("pickle") else None)
workers.serve()
"""


def made(folder, names):
    """A small film of each name, grey by its place."""
    samples = []
    for index, name in enumerate(names):
        path = folder / f"{name}.avi"
        frames = torch.full((6, 16, 24, 3), 20 * index + 10, dtype=torch.uint8)
        tone = torch.sin(torch.arange(9_600) * (0.1 + 0.05 * index))
        write_media(path, frames, fps=5, waveform=tone, sample_rate=8_000, audio_codec="pcm_s16le")
        samples.append(Sample(index, sample_id(name), path, (Caption("clip", 0.0, 1.0),), index, index + 1))
    return samples


@pytest.fixture
def good(tmp_path):
    return made(tmp_path, [f"good-{index}" for index in range(8)])


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.tensors().keys() == b.tensors().keys()
        assert [name for name, tensor in a.tensors().items() if not torch.equal(tensor, b.tensors()[name])] == []


def take(loader, count):
    with loader:
        return list(islice(loader, count))


def reasons(loader):
    return {entry["path"].rpartition("/")[2]: entry["reason"] for entry in loader.quarantine.entries}


@pytest.mark.slow
def test_processes_change_nothing(good):
    assert_same(take(Loader(good, TWO, WORDS, seed=3), 5), take(Loader(good, SMALL, WORDS, seed=3), 5))
    silent = replace(TWO, num_samples=0, num_windows=3, num_crops=2)
    dark = replace(TWO, num_frames=0, num_crops=2)
    for config in (silent, dark):
        loaders = [Loader(good, replace(config, num_workers=n), WORDS, train=False) for n in (1, 0)]
        assert_same(*(take(loader, 99) for loader in loaders))


def test_each_fault_costs_its_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PROGRAM", FAULTY)
    samples = made(tmp_path, ["good-0", "segfault", "good-1", "abort", "exit", "good-2", "gone", "good-3"])
    samples[6].path.unlink()
    loader = Loader(samples, TWO, WORDS, train=False)
    assert [i for batch in take(loader, 9) for i in batch.label.tolist()] == [0, 2, 5, 7]
    assert reasons(loader) == {
        "segfault.avi": "decoding must not end its process, got SIGSEGV twice.",
        "abort.avi": "decoding must not end its process, got SIGABRT twice.",
        "exit.avi": "decoding must not end its process, got exit code 3 twice.",
        "gone.avi": "the path must name a file, got no such file.",
    }
    assert all(entry["skipped"] for entry in loader.quarantine.entries)


def test_a_hang_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PROGRAM", FAULTY)
    samples = made(tmp_path, ["good-0", "hang", "good-1", "good-2"])
    loader = Loader(samples, replace(TWO, max_decode_seconds=4.0), WORDS, train=False)
    assert [i for batch in take(loader, 9) for i in batch.label.tolist()] == [0, 2, 3]
    assert reasons(loader) == {"hang.avi": "decoding must take at most 4 s, got more."}


def test_a_crash_is_replaced_like_any_bad_file(tmp_path, monkeypatch):
    """The same batches as where the file cannot be read: the substitute is a function of the place alone."""
    samples = made(tmp_path, ["good-0", "segfault", "good-1", "good-2", "abort", "good-3"])
    unreadable = [replace(one, path=tmp_path / f"{one.path.stem}-gone.avi") for one in samples]
    unreadable = [b if a.path.stem in ("segfault", "abort") else a for a, b in zip(samples, unreadable)]
    truth = take(Loader(unreadable, SMALL, WORDS, seed=2), 5)
    monkeypatch.setattr(workers, "PROGRAM", FAULTY)
    loader = Loader(samples, TWO, WORDS, seed=2)
    assert_same(take(loader, 5), truth)
    assert set(reasons(loader)) == {"segfault.avi", "abort.avi"}
    assert loader.quarantine.num_bad >= 4


def test_a_worker_killed_in_the_middle_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PROGRAM", FAULTY)
    samples = made(tmp_path, ["once-0", "good-1", "once-2", "good-3", "once-4", "once-5"])
    truth = take(Loader(samples, SMALL, WORDS, seed=4), 4)
    loader = Loader(samples, TWO, WORDS, seed=4)
    assert_same(take(loader, 4), truth)
    died = {one.path.name for one in samples if one.path.with_suffix(".died").exists()}
    assert len(died) >= 3
    assert reasons(loader) == dict.fromkeys(died, "decoding must not end its process, got SIGKILL once.")
    assert (len(loader.quarantine), loader.quarantine.num_noted) == (0, len(died))


@pytest.mark.slow
def test_killing_processes_from_outside_loses_nothing(good):
    """SIGKILL to a worker, to all, or to the process that starts them, before every batch."""
    truth = take(Loader(good, SMALL, WORDS, seed=6), 12)
    with Loader(good, TWO, WORDS, seed=6) as loader:
        batches = iter(loader)
        for number, expected in enumerate(truth):
            assert_same([next(batches)], [expected])
            while loader._executor._work_queue.qsize() or loader._workers._idle.qsize() < 2:
                os.sched_yield()  # a sample that two kills meet is rightly a bad one
            pids = loader._workers.pids
            nursery = loader._workers._nursery.process.pid
            for pid in (pids[:1], pids, [nursery], [*pids, nursery])[number % 4]:
                os.kill(pid, signal.SIGKILL)
    assert loader.quarantine.num_bad == 0


def ended(pids):
    """Wait for processes that are not our children; the test's own time limit is the deadline."""
    waiting = select.poll()
    files = []
    for pid in pids:
        try:
            files.append(os.pidfd_open(pid))
        except ProcessLookupError:
            continue
        waiting.register(files[-1], select.POLLIN)
    while files:
        for file, _ in waiting.poll():
            waiting.unregister(file)
            files.remove(file)
            os.close(file)


def test_close_ends_the_processes(good):
    with Loader(good, TWO, WORDS) as loader:
        batches = iter(loader)
        next(batches)
        pids = [*loader._workers.pids, loader._workers._nursery.process.pid]
    assert len(pids) == 3
    ended(pids)
    assert_same([next(iter(loader))], take(Loader(good, SMALL, WORDS), 2)[1:])  # iterating again starts new ones
    loader.close()


def test_processes_end_with_their_parent(good, tmp_path):
    write_manifest(tmp_path / "good.jsonl", good)
    code = f"""
import signal
from vatt_engine.data import DataConfig, Loader, read_manifest
config = DataConfig(batch_size=4, num_frames=3, fps=5.0, frame_size=16, num_samples=0, num_candidates=0, num_workers=2)
loader = Loader(read_manifest({str(tmp_path / "good.jsonl")!r}), config)
next(iter(loader))
print(*loader._workers.pids, loader._workers._nursery.process.pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pids = list(map(int, parent.stdout.readline().split()))
        parent.kill()
    assert len(pids) == 3
    ended(pids)


def test_a_worker_that_cannot_start_says_so(good, monkeypatch):
    monkeypatch.setattr(workers, "PROGRAM", "import sys; sys.exit(7)")
    with pytest.raises(ChildProcessError, match=r"loader: a decoding process must start, got exit code 7\."):
        take(Loader(good, TWO, WORDS), 1)


def test_nothing_is_pickled(good, monkeypatch):
    """Nor in the workers: there a pickle would end the process, and its sample."""
    events, watching = [], True
    sys.addaudithook(lambda event, _: events.append(event) if watching and event.startswith("pickle") else None)
    monkeypatch.setattr(workers, "PROGRAM", FAULTY)
    loader = Loader(good, TWO, WORDS)
    take(loader, 2)
    watching = False
    assert events == []
    assert loader.quarantine.entries == []


def test_a_sample_goes_through_json(tmp_path):
    member = Member(tmp_path / "0.tar", 512, 99, ".mp4", "0" * 64, 13, 10.0)
    one = Sample(3, 7, tmp_path / "a\udcff.mp4", (), None, 4, 1.25, 2.5, member, None, 1.3)
    assert workers._sample(json.loads(json.dumps(workers._fields(one)))) == one


def test_bad_configs():
    with pytest.raises(ValueError, match="DataConfig: num_workers must be 0 where cache is 'memory', got 2"):
        DataConfig(cache="memory", num_workers=2)
    with pytest.raises(ValueError, match=r"DataConfig: max_decode_seconds must be in \(0, 86400\], got 0"):
        DataConfig(max_decode_seconds=0)
    with pytest.raises(ValueError, match="DataConfig: num_workers must be at least 0, got -1"):
        DataConfig(num_workers=-1)
