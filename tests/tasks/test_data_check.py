"""`vatt data check`: what of a set can be used, written as a set of its own."""

from __future__ import annotations

import json
import re
from hashlib import sha256

import pytest
import torch
from media_files import write_media

from vatt_engine.cli import main
from vatt_engine.data.manifest import read_manifest
from vatt_engine.data.shards import read_index, read_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three good files, of 1.2 and 13 s, and one each that is cut, missing or sound alone."""
    folder = tmp_path_factory.mktemp("clips")
    for name, seconds in (("a", 1.2), ("long", 13.0), ("cut", 13.0), ("c", 1.2)):
        count = round(seconds * 10)
        frames = (torch.arange(count) % 200).to(torch.uint8)[:, None, None, None].expand(count, 16, 24, 3)
        sound = torch.sin(torch.arange(round(seconds * 8_000)) * 0.2)
        write_media(folder / f"{name}.webm", frames, fps=10, waveform=sound, sample_rate=8_000, options={"g": "5"})
    content = (folder / "cut.webm").read_bytes()
    (folder / "cut.webm").write_bytes(content[: len(content) * 9 // 10])  # its first ten seconds are whole
    write_media(folder / "sound.wav", None, waveform=torch.ones(8_000), sample_rate=8_000)
    rows = [
        {"path": "a.webm", "captions": [{"text": "grey", "start": 0, "end": 1}], "label": 3},
        {"path": "long.webm"},
        {"path": "gone.webm"},
        {"path": "cut.webm"},
        {"path": "cut.webm", "start": 1.0, "end": 9.0},  # and so is this part
        {"path": "sound.wav"},
        {"path": "c.webm"},
    ]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_manifest(folder, capsys):
    out = folder / "usable.jsonl"
    assert main(["data", "check", str(folder / "all.jsonl"), "--out", str(out), "--num-workers", "2"]) == 1
    said = capsys.readouterr().out
    assert f"unusable {folder / 'gone.webm'}: the path must name a file, got no such file." in said
    assert re.search(
        r"^unusable \S+/cut.webm: the (video|audio) must last 13\.\d+ s as promised, got decoded", said, re.M
    )
    assert f"unusable {folder / 'sound.wav'}: the file must have a video track, got none." in said
    assert f"{folder / 'all.jsonl'}: 4 of 7 samples can be used, 0 of them with a note" in said
    everything, usable = read_manifest(folder / "all.jsonl"), read_manifest(out)
    kept = [everything[i] for i in (0, 1, 4, 6)]
    assert [(s.id, s.path, s.captions, s.label, s.start, s.end) for s in usable] == [
        (s.id, s.path, s.captions, s.label, s.start, s.end) for s in kept
    ]
    lines = "".join(f"{s.id:016x} {s.path.stat().st_size}\n" for s in kept)
    assert f"{out}: the usable ones, content {sha256(lines.encode()).hexdigest()}" in said
    assert main(["data", "check", str(out), "--num-workers", "1"]) == 0
    assert "4 of 4 samples can be used" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Three sounds, of which one is cut, and as many videos, of which two have no sound; the manifest of each."""
    folder = tmp_path_factory.mktemp("sounds")
    for name in ("a", "b", "cut"):
        write_media(folder / f"{name}.wav", None, waveform=torch.sin(torch.arange(12_000) * 0.2), sample_rate=8_000)
    (folder / "cut.wav").write_bytes((folder / "cut.wav").read_bytes()[:9_000])
    frames = torch.full((12, 16, 24, 3), 90, dtype=torch.uint8)
    for name, sound in (("heard", torch.ones(9_600)), ("mute", None), ("mute2", None)):
        write_media(folder / f"{name}.mp4", frames, fps=10, waveform=sound, sample_rate=8_000)
    for name, files in (("wavs", ("a.wav", "b.wav", "cut.wav")), ("mp4s", ("heard.mp4", "mute.mp4", "mute2.mp4"))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"path": file}) + "\n" for file in files))
    return folder


@pytest.mark.parametrize(
    ("name", "modality", "usable", "reason"),
    [
        ("wavs", "auto", 2, "wav"),
        ("wavs", "audio", 2, "wav"),
        ("wavs", "both", 0, "the file must have a video track"),
        ("mp4s", "auto", 3, ""),
        ("mp4s", "video", 3, ""),
        ("mp4s", "audio", 1, "the file must have an audio track"),
    ],
)
def test_a_set_is_checked_for_what_it_will_be_used_for(sounds, capsys, name, modality, usable, reason):
    argv = ["data", "check", str(sounds / f"{name}.jsonl"), "--modality", modality, "--num-workers", "1"]
    assert main(argv) == (0 if usable == 3 else 1)
    said = capsys.readouterr().out
    assert f"{name}.jsonl: {usable} of 3 samples can be used" in said
    assert reason in said
    assert ("sound alone: none of the first 3 samples has a picture" in said) == ((name, modality) == ("wavs", "auto"))


def test_sounds_are_prepared_checked_and_no_matter_of_pre_training(sounds, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert main(["prepare", str(sounds / "wavs.jsonl"), str(shards), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert f"Next: vatt finetune CONFIG --data.train {shards} (sound alone: vatt pretrain needs pictures)" in said
    assert main(["data", "check", str(shards), "--num-workers", "1"]) == 0
    assert "2 of 2 samples can be used" in capsys.readouterr().out
    assert main(["pretrain", "demo", "--data.train", str(shards), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"vatt pretrain: data.train must hold pictures, got {shards}, which is sound alone.\n"
    )


def test_shards(folder, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert main(["prepare", str(folder / "usable.jsonl"), str(shards), "--workers", "1"]) == 0
    before = read_samples(shards)
    damaged = before[1].video
    with damaged.path.open("r+b") as file:
        file.seek(damaged.offset + damaged.size // 2)
        file.write(bytes(64))
    capsys.readouterr()
    out = shards / "usable.jsonl"
    assert main(["data", "check", str(shards), "--out", str(out), "--num-workers", "2"]) == 1
    said = capsys.readouterr().out
    assert f"{shards}: 3 of 4 samples can be used, 0 of them with a note" in said
    after = read_samples(out)
    assert [s.id for s in after] == [s.id for s in before if s is not before[1]]
    assert [(s.video, s.audio, s.captions) for s in after] == [
        (s.video, s.audio, s.captions) for s in before if s is not before[1]
    ]
    assert next(read_index(out)).values["samples"] == 3
    assert main(["data", "check", str(out), "--num-workers", "1"]) == 0
    assert main(["data", "check", str(shards), "--out", str(tmp_path / "usable.jsonl")]) == 2
    assert f"--out must lie in {shards}, beside the tars, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data", "check", "no.jsonl"], "no.jsonl: the manifest must be a file, got no such file."),
        (["data", "check", "a.jsonl", "--out", "b.csv"], "vatt data check: --out must end in .jsonl, got 'b.csv'."),
        (["data", "check", "a.jsonl", "--max-decode-seconds", "x"], "--max_decode_seconds must be a finite number"),
        (["data", "chekc"], "got 'chekc'. Did you mean 'check'?"),
        (["data", "check", "a.jsonl", "--modality", "sound"], "--modality must be one of 'auto', 'video', 'audio'"),
        (["data", "check", "no.jsonl", "--out", "no/b.jsonl"], "--out must lie in a folder that exists, got 'no/b."),
    ],
)
def test_messages(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert message in capsys.readouterr().err
