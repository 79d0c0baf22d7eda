"""Shards against the files they were made from, and `prepare` against kills, crashes and hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from hashlib import sha256

import pytest
import torch
from media_files import numbered, numbers_of, write_media

from vatt_engine.data import transcode
from vatt_engine.data.manifest import Caption, ManifestError, Sample, read_manifest, sample_id
from vatt_engine.data.media import open_media, probe
from vatt_engine.data.prepare import PrepareConfig, prepare
from vatt_engine.data.shards import merge_shards, read_index, read_shards
from vatt_engine.data.transcode import CODECS

RATE = 48_000
SMALL = PrepareConfig(short_side=64, workers=2, shard_mib=1)


def on_screen(times, seconds):
    """Number of the last frame whose time is not later than each of `seconds` (and 1 ms)."""
    return [max(i for i, time in enumerate(times) if time <= t + 1e-3 or i == 0) for t in seconds]


def noise(seconds, seed=0):
    return torch.rand(round(seconds * RATE), generator=torch.Generator().manual_seed(seed)) - 0.5


def click(seconds, at):
    wave = torch.zeros(round(seconds * RATE))
    wave[at] = 0.9
    return wave


VFR = [0.0, 0.04, 0.31, 0.33, 0.62, 0.7, 0.99, 1.0, 1.35, 1.4, 1.41, 1.9]
FLAC = {"audio_codec": "flac"}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A manifest of files of every kind, good and bad."""
    folder = tmp_path_factory.mktemp("media, é: %d")
    write_media(folder / "cfr.mkv", numbered(63), fps=25, waveform=click(2.52, 12_345), **FLAC)
    write_media(folder / "vfr.mkv", numbered(12), times=VFR, waveform=click(1.0, 30_001), **FLAC)
    write_media(
        folder / "late.mp4", numbered(50), fps=30, waveform=0.5 * torch.sin(torch.arange(76_800) * 0.05), start=1.5
    )
    write_media(folder / "picture.webm", numbered(20), fps=12)
    write_media(folder / "sound.wav", None, waveform=noise(4.0), sample_rate=RATE)
    write_media(folder / "one.mp4", numbered(1), fps=25)
    whole = (folder / "late.mp4").read_bytes()
    write_media(folder / "cut.webm", numbered(100), fps=25)
    os.truncate(folder / "cut.webm", (folder / "cut.webm").stat().st_size // 2)
    (folder / "junk.mp4").write_bytes(whole[::-1])
    (folder / "empty.mp4").touch()
    captions = [{"text": "eins", "start": 0.2, "end": 0.9}, {"text": "zwei, 二", "start": 1, "end": 99}]
    names = [
        "cfr.mkv",
        "vfr.mkv",
        "cut.webm",
        "late.mp4",
        "junk.mp4",
        "sound.wav",
        "picture.webm",
        "one.mp4",
        "empty.mp4",
    ]
    rows = [{"path": name, "captions": captions, "label": i} for i, name in enumerate([*names, "nowhere.mp4"])]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def shards(media):
    prepare(media / "all.jsonl", media / "shards", SMALL)
    return media / "shards"


@pytest.fixture(scope="module")
def samples(shards):
    ids = {sample.id: sample for sample in read_shards(shards)}
    names = ["cfr.mkv", "vfr.mkv", "late.mp4", "picture.webm", "sound.wav", "one.mp4"]
    return {name: ids[sample_id(name)] for name in names}


def read(sample, start=0.0, seconds=1.0, fps=10.0):
    size = {"num_frames": round(seconds * fps), "num_samples": round(seconds * RATE)}
    return open_media(sample).read(start, fps=fps, sample_rate=RATE, short_side=64, **size)


def rows_of(index, kind):
    return [row.values for row in read_index(index) if row.values.get("kind") == kind]


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("cfr.mkv", [i / 25 for i in range(63)]),
        ("vfr.mkv", VFR),
        ("late.mp4", [i / 30 for i in range(50)]),
        ("picture.webm", [i / 12 for i in range(20)]),
        ("one.mp4", [0.0]),
    ],
)
def test_frame_i_is_what_is_on_screen_at_i_over_fps(media, samples, name, times):
    sample = samples[name]
    zero = 0.023 if name == "late.mp4" else 0.0  # aac warms up before the picture begins: second 0 is the sound's
    assert sample.duration == probe(media / name).duration
    count = max(1, round(sample.duration * 10))
    clip = open_media(sample).read_all(fps=10, sample_rate=RATE)
    assert clip.num_frames == count
    assert numbers_of(clip.video) == on_screen(times, [i / 10 - zero for i in range(count)])
    middle = read(sample, sample.duration / 2, seconds=0.2)
    assert middle.start == pytest.approx(int((sample.duration / 2 + 1e-3) * 10) / 10)  # a clip begins at a frame
    assert numbers_of(middle.video)[0] == on_screen(times, [middle.start - zero])[0]


def test_sound_is_aligned_to_the_sample_and_ends_where_it_did(media, samples):
    for name, at, length in (("cfr.mkv", 12_345, 120_960), ("vfr.mkv", 30_001, 48_000)):
        sound = open_media(samples[name]).read_all(fps=10, sample_rate=RATE)
        assert int(sound.audio.abs().argmax()) == at
        assert sound.audio[at] == pytest.approx(0.9, abs=1 / 32768)
        tracks = {row["path"]: row["audio"] for row in rows_of(media / "shards" / "index.jsonl", "sample")}
        assert tracks[name]["samples"] == length
    late = read(samples["cfr.mkv"], start=0.2, seconds=0.1)
    assert int(late.audio.abs().argmax()) == 12_345 - 9_600


@pytest.mark.parametrize("name", ["late.mp4", "sound.wav"])
def test_sound_is_that_of_the_file(media, samples, name):
    raw = Sample(0, 0, media / name)
    for start in (0.0, 0.7):
        ours, theirs = read(samples[name], start, 0.8), read(raw, start, 0.8)
        assert ours.num_real_samples == theirs.num_real_samples
        torch.testing.assert_close(ours.audio, theirs.audio, atol=2 / 32768, rtol=0)  # 16 bits


def test_a_missing_track_stays_missing(samples):
    assert (samples["picture.webm"].audio, samples["sound.wav"].video) == (None, None)
    assert not open_media(samples["picture.webm"]).info.has_audio
    assert read(samples["sound.wav"]).video is None


@pytest.mark.parametrize("codec", CODECS)
def test_pictures_are_near_those_of_the_file(tmp_path, codec):
    x, y, t = torch.arange(160.0), torch.arange(96.0), torch.arange(30.0)
    wave = torch.sin(x / 9 + t[:, None, None] / 3) + torch.cos(y[:, None] / 7 - x / 23 + t[:, None, None] / 5)
    frames = (128 + 50 * wave)[..., None] + torch.tensor([10.0, 0.0, -10.0])
    write_media(tmp_path / "a.mp4", frames.byte(), fps=10, options={"crf": "10"})
    (tmp_path / "m.jsonl").write_text('{"path": "a.mp4"}')
    config = PrepareConfig(short_side=64, codec=codec, workers=1)
    index = prepare(tmp_path / "m.jsonl", tmp_path / "out", config)
    (sample,) = read_shards(index)
    ours, theirs = read(sample, seconds=3.0), read(Sample(0, 0, tmp_path / "a.mp4"), seconds=3.0)
    assert (sample.video.path.name, ours.video.shape[1:3]) == ("000000.tar", (64, 106))
    same_size = torch.nn.functional.interpolate(theirs.video.permute(0, 3, 1, 2).float(), (64, 106), mode="area")
    error = (ours.video.permute(0, 3, 1, 2).float() - same_size)[..., 2:-2].square().mean((1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).min() > 32  # the first and the last frame as well


def test_parts_of_files_are_cut_and_their_captions_moved(media, tmp_path):
    captions = [("before", 0.1, 0.4), ("into", 0.3, 0.7), ("within", 0.8, 9.0)]
    captions = [{"text": text, "start": start, "end": end} for text, start, end in captions]
    spans = [{"start": 0.5, "end": 1.25}, {"start": 1.0}, {"start": 2.0, "end": 7.0}, {"start": 3.0, "end": 4.0}]
    rows = [{"path": str(media / "cfr.mkv"), "captions": captions} | span for span in spans]
    (tmp_path / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = prepare(tmp_path / "parts.jsonl", tmp_path / "out", SMALL)
    first, second, third = read_shards(index)
    times = [i / 25 for i in range(63)]
    for sample, start, end in ((first, 0.5, 1.25), (second, 1.0, 2.52), (third, 2.0, 2.52)):
        assert sample.duration == pytest.approx(end - start)
        video = read(sample, seconds=round(end - start, 1)).video
        assert numbers_of(video) == on_screen(times, [start + i / 10 for i in range(len(video))])
    assert open_media(first).read_all(fps=10, sample_rate=RATE).num_real_samples == 36_000
    assert [(c.text, c.start, c.end) for c in first.captions] == [
        ("into", 0.0, pytest.approx(0.2)),
        ("within", pytest.approx(0.3), 0.75),
    ]
    (rejected,) = rows_of(index, "rejected")
    assert (rejected["start"], rejected["line"]) == (3.0, 4)
    assert "the part must begin within the 2.520 s of the file, got 3.0" in rejected["reason"]


def test_bad_files_are_rejected_with_reasons_and_counted(shards):
    header = next(read_index(shards / "index.jsonl")).values
    rejected = {row["path"]: row for row in rows_of(shards / "index.jsonl", "rejected")}
    assert {path: row["line"] for path, row in rejected.items()} == {
        "cut.webm": 3,
        "junk.mp4": 5,
        "empty.mp4": 9,
        "nowhere.mp4": 10,
    }
    for path, reason in (
        ("cut.webm", "must last 4.000 s as promised, got decoded"),
        ("junk.mp4", "FFmpeg"),
        ("empty.mp4", "empty"),
        ("nowhere.mp4", "no such"),
    ):
        assert reason in rejected[path]["reason"]
    assert (header["samples"], header["rejected"], header["rows"]) == (6, 4, 10)


def test_the_index_tells_the_truth_about_the_tars(shards, samples):
    tars = {row["name"]: row for row in rows_of(shards / "index.jsonl", "shard")}
    for name, row in tars.items():
        content = (shards / name).read_bytes()
        assert (row["size"], row["sha256"]) == (len(content), sha256(content).hexdigest())
    for row in rows_of(shards / "index.jsonl", "sample"):
        with tarfile.open(shards / row["shard"]) as tar:
            for kind in ("video", "audio", "json"):
                if row[kind]:
                    info = tar.getmember(row[kind]["name"])
                    content = tar.extractfile(info).read()
                    assert (info.offset_data, info.size) == (row[kind]["offset"], row[kind]["size"])
                    assert sha256(content).hexdigest() == row[kind]["sha256"]
            assert json.loads(content)["captions"] == row["captions"]
    assert [sample.label for sample in samples.values()] == [0, 1, 3, 6, 5, 7]
    assert samples["cfr.mkv"].captions == (Caption("eins", 0.2, 0.9), Caption("zwei, 二", 1.0, 99.0))


# ------------------------------------------------ kills, crashes, parts


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Eight files whose shards are several, and one that cannot be used."""
    folder = tmp_path_factory.mktemp("sounds")
    names = [f"{i}.flac" for i in range(8)]
    for i, name in enumerate(names):
        write_media(folder / name, None, waveform=noise(5.0, seed=i), sample_rate=RATE)
    names.insert(2, "none.flac")
    (folder / "all.jsonl").write_text("".join(f'{{"path": "{name}"}}\n' for name in names))
    return folder


@pytest.fixture(scope="module")
def undisturbed(sounds):
    return contents(prepare(sounds / "all.jsonl", sounds / "whole", SMALL).parent)


def contents(folder):
    """Every file of a folder, which has no folder in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare_until(manifest, out, count, after):
    """Runs in a process of its own: dies before or after the count-th time that a file gets its name."""
    replace, seen = os.replace, 0

    def counted(source, target):
        nonlocal seen
        seen += 1
        if seen == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    prepare(manifest, out, SMALL)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_killed_at_any_moment_it_goes_on_and_makes_the_same_bytes(sounds, undisturbed, tmp_path, monkeypatch):
    """Names are given to: the settings, then, per tar, the tar and its lines, last the index."""
    assert len([name for name in undisturbed if name.endswith(".tar")]) == 3
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    for count, after in ((2, False), (1, True), (2, True), (3, False)):
        process = fork.Process(target=prepare_until, args=(sounds / "all.jsonl", out, count, after))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(ManifestError):
            read_shards(out)
    done = {path.stem for path in (out / ".work").glob("*.json")}
    begun = []
    ask = transcode._Worker.ask
    monkeypatch.setattr(transcode._Worker, "ask", lambda self, sample: (begun.append(sample), ask(self, sample))[1])
    prepare(sounds / "all.jsonl", out, SMALL)
    assert contents(out) == undisturbed
    assert not done & {f"{sample.id:016x}" for sample in begun}
    assert len(begun) < 9


def test_a_finished_set_is_left_alone_and_other_settings_are_refused(sounds, undisturbed):
    assert prepare(sounds / "all.jsonl", sounds / "whole", SMALL) == sounds / "whole" / "index.jsonl"
    with pytest.raises(ValueError, match=r"fps must be that of .*, 10.0, got 5.0"):
        prepare(sounds / "all.jsonl", sounds / "whole", PrepareConfig(short_side=64, shard_mib=1, fps=5.0))
    with pytest.raises(ValueError, match=r"part must be i/n with 0 <= i < n, got '2/2'"):
        PrepareConfig(part="2/2")


MISCHIEF = """
import os, signal, threading
from vatt_engine.data import transcode
good = transcode.transcode
def bad(job, *rest):
    if job["path"].endswith("1.flac"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if job["path"].endswith("3.flac"):
        threading.Event().wait()
    return good(job, *rest)
transcode.transcode = bad
transcode.main()
"""


def test_a_file_that_crashes_or_hangs_ffmpeg_is_rejected_and_the_others_go_on(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(transcode, "PROGRAM", MISCHIEF)
    config = PrepareConfig(workers=2, time_limit=5.0)
    index = prepare(sounds / "all.jsonl", tmp_path / "out", config)
    reasons = {row["path"]: row["reason"] for row in rows_of(index, "rejected")}
    assert reasons["1.flac"] == "FFmpeg must survive the file, got SIGSEGV."
    assert reasons["3.flac"] == "FFmpeg must go on within 5 s, got no sign of life."
    assert len(read_shards(index)) == 6


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import os; os.kill(os.getpid(), 15)"])
def test_a_worker_that_cannot_work_stops_the_run(sounds, tmp_path, monkeypatch, code):
    monkeypatch.setattr(transcode, "PROGRAM", code)
    with pytest.raises(ChildProcessError, match=r"a worker must go on until the last file, got (exit code 3|SIGTERM)"):
        prepare(sounds / "all.jsonl", tmp_path / "out", SMALL)


def test_parts_joined_are_the_whole(sounds, undisturbed, tmp_path):
    for part in ("0/2", "1/2"):
        prepare(sounds / "all.jsonl", tmp_path, PrepareConfig(short_side=64, workers=1, shard_mib=1, part=part))
        if part == "0/2":
            with pytest.raises(ValueError, match=r"part 1/2 must be there once, got none"):
                merge_shards(tmp_path)
    index = merge_shards(tmp_path)

    def told(index):
        keep = ("key", "path", "line", "captions", "label", "duration", "reason")
        tracks = [row.values.get(kind) or {} for row in read_index(index) for kind in ("video", "audio")]
        rows = [{name: row.values.get(name) for name in keep} for row in read_index(index) if "path" in row.values]
        return rows, [track.get("sha256") for track in tracks if track]

    assert told(index) == told(sounds / "whole" / "index.jsonl")
    assert next(read_index(index)).values["samples"] == 8
    assert [sample.id for sample in read_shards(index)] == [
        s.id for s in read_manifest(sounds / "all.jsonl") if "none" not in s.path.name
    ]
    assert len(read_shards(tmp_path / "0001-{000000..000001}.tar")) == 5
    check_refusals_of_merge(tmp_path)


def check_refusals_of_merge(folder):
    """Differing settings, a sample in two parts, a part that is there twice."""
    first, second = folder / "index-0-of-2.jsonl", folder / "index-1-of-2.jsonl"
    whole = second.read_text()
    second.write_text(whole.replace('"fps": 10.0', '"fps": 12.0', 1))
    with pytest.raises(ManifestError, match=r"index-1-of-2.jsonl:1: fps must be 10.0 as in .*, got 12.0"):
        merge_shards(folder)
    line = next(line for line in first.read_text().splitlines() if '"sample"' in line)
    second.write_text(f"{whole}{line}\n")
    with pytest.raises(ManifestError, match=r"key must be in one part, got .*index-0-of-2.jsonl:2 too"):
        merge_shards(folder)
    second.write_text(whole)
    (folder / "more").mkdir()
    shutil.copy(second, folder / "more")
    with pytest.raises(ValueError, match=r"part 1/2 must be there once, got .* and .*more"):
        merge_shards(folder, [folder, folder / "more"])
