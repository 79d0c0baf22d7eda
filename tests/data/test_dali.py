"""DALI's loader against PyAV's: the same order, windows, words, pictures and sound, and the same bad samples."""

import hashlib
import os
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch
from media_files import write_media

from vatt_engine.data import dali
from vatt_engine.data.clips import ClipReader
from vatt_engine.data.dali import DaliLoader, DaliReader, build_loader, dali_missing
from vatt_engine.data.loader import DataConfig, Loader
from vatt_engine.data.manifest import Sample
from vatt_engine.data.media import MediaError
from vatt_engine.data.shards import FORMAT, INDEX, ShardWriter, json_line, read_shards
from vatt_engine.data.words import Vocabulary

WORDS = Vocabulary(["<pad>", "<unk>", "clip", "zero", "one", "two", "three", "four", "five"])
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
SIZE = (64, 80)  # of the frames in the shards
SMALL = DataConfig(
    batch_size=3,
    num_frames=8,
    fps=10.0,
    frame_size=56,  # decoded to a short side of 64, as it is
    num_samples=38_400,
    sample_rate=48_000,
    num_candidates=2,
    max_words=4,
    num_threads=2,
)
CODECS = {
    "vp9": (".webm", "libvpx-vp9", {"g": "10", "crf": "20", "b": "0", "deadline": "realtime", "cpu-used": "8"}),
    "mjpeg": (".avi", "mjpeg", {"qmin": "3", "qmax": "3"}),
    "h264": (".mp4", "libx264", {"g": "10", "bf": "0"}),
}


def pictures(count, seed):
    """Coloured noise, smooth over 8 pixels, that moves."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, SIZE[0] // 8 + 1, SIZE[1] // 8 + count // 4 + 1, generator=generator)
    scene = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 1)[0]
    scene = scene.mul(255).byte().permute(1, 2, 0)
    return torch.stack([scene[i % 8 : i % 8 + SIZE[0], 2 * i : 2 * i + SIZE[1]] for i in range(count)])


def write_shard(folder, codec, num_samples=6):
    """A tar of clips of 1.6 to 2.6 s, the fifth without sound, and its index."""
    suffix, encoder, options = CODECS[codec]
    folder.mkdir()
    rows = []
    with closing(ShardWriter(folder / "000000.tar")) as shard:
        for number in range(num_samples):
            key, count = f"{number + 1:016x}", 16 + 2 * number
            video, sound = folder / f"{key}{suffix}", folder / f"{key}.flac"
            write_media(video, pictures(count, number), fps=10, video_codec=encoder, options=options)
            row = {"kind": "sample", "key": key, "shard": "000000.tar", "duration": count / 10, "label": number}
            row["video"] = shard.add(video.name, video) | {"frames": count, "width": SIZE[1], "height": SIZE[0]}
            if number != 4:
                generator = torch.Generator().manual_seed(number)
                wave = 0.1 * torch.randn(count * 4800, generator=generator)  # all frequencies
                write_media(sound, None, waveform=wave, sample_rate=48_000)
                row["audio"] = shard.add(sound.name, sound) | {"samples": len(wave)}
            rows.append(row | {"captions": [{"text": f"clip {NUMBERS[number]}", "start": 0.0, "end": 1.0}]})
    header = {"format": FORMAT, "fps": 10.0, "sample_rate": 48_000, "samples": num_samples}
    (folder / INDEX).write_text("".join(map(json_line, [header, *rows])))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("shards")
    for codec in CODECS:
        write_shard(parent / codec, codec)
    return parent


@pytest.fixture(params=["vp9", "mjpeg"])
def samples(folders, request):
    return read_shards(folders / request.param)


def take(loader, count):
    with loader:
        return list(islice(loader, count))


def take_both(samples, config, count, device="cpu", **options):
    """Batches of DALI and of PyAV, and the samples that each refused."""
    loaders = [
        DaliLoader(samples, config, WORDS, device=device, **options),
        Loader(samples, config, WORDS, **options),
    ]
    batches = [take(loader, count) for loader in loaders]
    return *batches, *({entry["line"] for entry in loader.quarantine.entries} for loader in loaders)


def psnr(ours, theirs):
    return float(10 * torch.log10(255**2 / (ours.double() - theirs.double()).square().mean()))


def assert_alike(ours, theirs, least):
    """The same batches; each clip's picture within `least` dB, all else to the bit."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.tensors().keys() == b.tensors().keys()
        assert (a.video.shape, a.video.dtype) == (b.video.shape, b.video.dtype)
        assert min(map(psnr, a.video.cpu(), b.video)) >= least
        for name in a.tensors().keys() - {"video"}:
            assert torch.equal(a.tensors()[name].cpu(), b.tensors()[name]), name


def read_window(reader, sample, start):
    if isinstance(reader, DaliReader):
        with reader._context():
            return reader._clip(reader._media(sample), start, None)
    return reader._clip(reader._media(sample), start, None)


def readers(config, device="cpu"):
    form = {"seed": 0, "train": False}
    return DaliReader(config, None, device=device, **form), ClipReader(config, None, **form)


@pytest.mark.parametrize("fps", [10.0, 5.0, 12.0, 4.0, 7.0])
def test_windows_are_pyavs(samples, fps):
    """Frames neither scaled nor cropped: 40 dB are asked for; on the CPU they were equal to the bit."""
    for sample in samples:
        for start in (0.0, 0.537, sample.duration - 0.65, sample.duration - 0.35):
            ours, theirs = (read_window(r, sample, start) for r in readers(replace(SMALL, fps=fps)))
            assert ours._replace(video=0, audio=0) == theirs._replace(video=0, audio=0)
            assert ours.video.shape == (8, *SIZE, 3)
            assert psnr(ours.video, theirs.video) >= 40
            assert (ours.num_real_samples > 0) == (sample.audio is not None)
            if sample.audio is None:
                assert not ours.audio.any()
            else:
                assert torch.equal(ours.audio, theirs.audio)


def test_frames_are_those_that_were_written(samples):
    """Not only alike: the window at 0.7 s of the fifth clip begins with its frame 7."""
    clip = read_window(readers(SMALL)[0], samples[4], 0.75)
    levels = [psnr(clip.video[0], frame) for frame in pictures(24, 4)]
    assert levels.index(max(levels)) == 7
    assert clip.start == 0.7


@pytest.mark.parametrize("rate", [12_000, 16_000])
def test_resampled_sound_is_pyavs(samples, rate):
    """50 dB, of white noise; only the first samples of a track differ, before which libswresample sees its mirror."""
    config = replace(SMALL, sample_rate=rate, num_samples=rate // 2)
    for start in (0.0, 0.3, 0.9):
        ours, theirs = (read_window(r, samples[3], start) for r in readers(config))
        assert ours.num_real_samples == theirs.num_real_samples
        ours, theirs = (clip.audio[0 if start else 32 :] for clip in (ours, theirs))
        assert 10 * torch.log10(theirs.square().mean() / (ours - theirs).square().mean()) > 50


@pytest.mark.parametrize("changes", [{}, {"frame_size": 40}, {"fps": 5.0}])
def test_training_batches_are_pyavs(samples, changes):
    """Two epochs: order, windows, crops, colours, noise, words, masks and ids; scaled frames within 35 dB."""
    ours, theirs, *_ = take_both(samples, replace(SMALL, **changes), 4, seed=3)
    assert_alike(ours, theirs, least=35)
    assert {int(i) for batch in ours for i in batch.sample_id} == {sample.id for sample in samples}
    assert not torch.equal(ours[0].video, take(DaliLoader(samples, SMALL, device="cpu", seed=4), 1)[0].video)


def test_evaluation_batches_are_pyavs(samples):
    ours, theirs, *_ = take_both(samples, replace(SMALL, num_windows=2), 9, train=False)
    assert_alike(ours, theirs, least=40)
    assert [len(batch) for batch in ours] == [3, 3, 3, 3]


def test_threads_ranks_and_resuming_change_nothing(samples):
    truth = take(DaliLoader(samples, replace(SMALL, batch_size=2), WORDS, device="cpu", seed=7), 5)
    form = {"device": "cpu", "seed": 7}
    parts = [
        take(DaliLoader(samples, replace(SMALL, batch_size=2, num_threads=1), WORDS, rank=r, world=2, **form), 5)
        for r in (0, 1)
    ]
    for whole, *rows in zip(truth, *parts):
        assert torch.equal(whole.video, torch.cat([row.video for row in rows]))
        assert torch.equal(whole.audio, torch.cat([row.audio for row in rows]))
    with DaliLoader(samples, replace(SMALL, batch_size=2, prefetch=3), WORDS, **form) as loader:
        list(islice(loader, 4))
        state = loader.state_dict()
    for other in (
        DaliLoader(samples, replace(SMALL, batch_size=2), WORDS, device="cpu"),
        Loader(samples, SMALL, WORDS),
    ):
        other.batch_size = 2
        other.load_state_dict(state)
        batch = take(other, 1)[0]
        assert torch.equal(batch.sample_id, truth[4].sample_id)
        assert min(map(psnr, batch.video, truth[4].video)) >= 40


def damaged(folder, samples, kinds):
    """Samples of a copy of their shard in which each of `kinds` has befallen one."""
    path = folder / "000000.tar"
    content, found = bytearray(samples[0].video.path.read_bytes()), []
    for sample in samples:
        members = {
            kind: getattr(sample, kind) and getattr(sample, kind)._replace(path=path) for kind in ("video", "audio")
        }
        found.append(replace(sample, **members))
    for index, (kind, damage) in kinds.items():
        member = getattr(found[index], kind)
        begin, end = member.offset, member.offset + member.size
        if damage == "flipped":
            content[begin + member.size // 2] ^= 1
        elif damage == "lost end":
            content[(begin + end) // 2 : end] = bytes(end - (begin + end) // 2)
        elif damage == "empty":
            member = member._replace(size=0, sha256=hashlib.sha256(b"").hexdigest())
        elif damage == "junk":  # as the index says, and yet no media
            content[begin:end] = torch.randint(0, 256, (member.size,), dtype=torch.uint8).numpy().tobytes()
            member = member._replace(sha256=hashlib.sha256(content[begin:end]).hexdigest())
        elif damage == "cut":  # of the last member: the tar ends in its middle
            del content[begin + member.size // 2 :]
        found[index] = replace(found[index], **{kind: member})
    path.write_bytes(content)
    return found


@pytest.mark.parametrize(
    "kinds",
    [
        {0: ("video", "flipped"), 1: ("video", "lost end"), 2: ("audio", "flipped"), 3: ("video", "empty")},
        {0: ("audio", "lost end"), 1: ("video", "junk"), 2: ("audio", "junk")},
        {3: ("audio", "empty"), 5: ("audio", "cut")},
    ],
    ids=lambda kinds: ", ".join(damage for _, damage in kinds.values()),
)
def test_bad_samples_are_pyavs(samples, tmp_path, kinds):
    """One bad sample costs itself alone: the others of its batch are there, and the next batch too."""
    bad = damaged(tmp_path, samples, kinds)
    config = replace(SMALL, max_bad_fraction=1.0)
    ours, theirs, refused, refused_by_pyav = take_both(bad, config, 6, seed=1)
    assert_alike(ours, theirs, least=40)
    assert refused == refused_by_pyav == {samples[index].line for index in kinds}
    assert {tuple(batch.video.shape) for batch in ours} == {(3, 8, 56, 56, 3)}


def test_short_tracks_are_noticed(samples):
    """DALI pads or shortens without an error what is not there; the index knows better."""
    one = samples[3]
    for changes, message in (
        ({"video": one.video._replace(count=42)}, r"the 42 frames of the index, got decoded 4 of 8 from frame 18"),
        ({"audio": one.audio._replace(count=7)}, r"the 7 samples of the index, got 105600"),
    ):
        longer = replace(one, duration=4.2, **changes)
        with pytest.raises(MediaError, match=message):
            read_window(readers(SMALL)[0], longer, 1.8)


def test_memory_stays(samples):
    """Of 40 batches the last 20 need no more memory, give or take 8 MB: their frames alone are 80 MB."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    with DaliLoader(samples, replace(SMALL, batch_size=6), device="cpu") as loader:
        batches = iter(loader)
        list(islice(batches, 20))
        before = resident()
        list(islice(batches, 20))
        assert resident() - before < 8


def test_the_choice(folders, monkeypatch):
    vp9, h264 = read_shards(folders / "vp9"), read_shards(folders / "h264")
    raw = [Sample(index, index, folders / f"{index}.mp4") for index in range(3)]

    def chosen(samples, loader, device="cpu", **changes):
        return build_loader(samples, replace(SMALL, loader=loader, **changes), device=device, seed=5).decoder

    assert chosen(vp9, "dali") == "DALI on cpu"
    assert [chosen(vp9, name) for name in ("auto", "pyav")] == ["PyAV", "PyAV"]
    monkeypatch.setattr(dali, "dali_missing", lambda device: None)  # as on a machine with a GPU
    assert chosen(h264, "auto", "cuda") == chosen(h264, "dali", "cuda") == "DALI on cuda"
    assert [chosen(set_, "auto", "cuda") for set_ in (raw, [*vp9, *raw])] == ["PyAV", "PyAV"]
    assert chosen(vp9, "auto", "cuda", cache="memory") == "PyAV"
    for samples, changes, message in (
        (h264, {}, r"on the CPU the video must be VP9 \(\.webm\) or MJPEG \(\.avi\), got \.mp4 in .*0+1"),
        (raw, {}, r"the set must be prepared shards, got the file .*0\.mp4"),
        (vp9, {"cache": "memory"}, r"data\.cache must be none, got memory"),
    ):
        with pytest.raises(ValueError, match=rf"^loader: data\.loader must be auto or pyav here, got dali: {message}"):
            chosen(samples, "dali", **changes)


def test_what_is_missing_is_said(monkeypatch):
    if not torch.cuda.is_available():
        assert dali_missing("cuda") in (dali_missing("cpu"), "torch finds no GPU. `vatt doctor` says why.")
    monkeypatch.setattr(dali.importlib.util, "find_spec", lambda name: None)
    assert dali_missing("cpu") == "DALI is not installed. Run `pip install 'vatt-engine[dali]'`."
    with pytest.raises(
        ValueError, match=r"got dali: DALI is not installed\. Run `pip install 'vatt-engine\[dali\]'`\.$"
    ):
        build_loader([], replace(SMALL, loader="dali"))


@pytest.mark.cuda
@pytest.mark.parametrize("codec", ["h264", "mjpeg"])  # NVDEC takes no VP9 below 128 pixels
def test_the_gpu_gives_pyavs_batches(folders, codec):
    samples = read_shards(folders / codec)
    ours, theirs, *_ = take_both(samples, SMALL, 4, device="cuda", seed=3)
    assert all(batch.video.is_cuda and batch.audio.is_cuda for batch in ours)
    assert_alike(ours, theirs, least=35)
    for sample in samples:
        on_gpu, on_cpu = (read_window(reader, sample, 0.537) for reader in readers(SMALL, "cuda"))
        assert psnr(on_gpu.video.cpu(), on_cpu.video) >= 40
