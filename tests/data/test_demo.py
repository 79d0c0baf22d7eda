"""data.demo: files hold what the rules say, train and held-out share nothing, one seed gives one world."""

import json
import re
from itertools import product
from random import Random

import numpy as np
import pytest
import torch

from vatt_engine.data.demo import ANY, MAX_HELDOUT, make_world, plan_world
from vatt_engine.data.demo_scene import COLOURS, MOTIONS, SCENES, SHAPES, Combination, Take, draw_frames, draw_waveform
from vatt_engine.data.demo_words import COLOUR_WORDS, MOTION_WORDS, SCENE_WORDS, SHAPE_WORDS

av = pytest.importorskip("av")

SETTINGS = {"num_train": 48, "num_heldout": 32, "seed": 3}
WORDS = {"shape": SHAPE_WORDS, "colour": COLOUR_WORDS, "motion": MOTION_WORDS, "scene": SCENE_WORDS}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "demo"
    make_world(root, **SETTINGS)
    return root


def rows_of(root, split):
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]


def factors_of(root):
    return {path: Combination(**c) for path, c in json.loads((root / "world.json").read_text())["clips"].items()}


def decode(path):
    """Frames [T, H, W, 3], the waveform [L], its rate, and the codecs."""
    with av.open(str(path)) as container:
        codecs = tuple(stream.codec_context.name for stream in container.streams)
        resampler, frames, wave = av.AudioResampler("flt", "mono"), [], []
        for packet in container.demux():
            for frame in packet.decode():
                if isinstance(frame, av.VideoFrame):
                    frames.append(frame.to_ndarray(format="rgb24"))
                else:
                    wave += [out.to_ndarray()[0] for out in resampler.resample(frame)]
        return np.stack(frames), np.concatenate(wave), container.streams.audio[0].rate, codecs


def loudest_pitch(wave, rate):
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 1 << 17))
    hz = np.fft.rfftfreq(1 << 17, 1 / rate)
    return hz[np.argmax(np.where((hz > 150) & (hz < 3000), spectrum, 0))]  # between the hums of bricks and grass


def seen_colour(frames):
    """The colour of COLOURS that most vivid pixels are nearest to, whatever their brightness."""
    pixels = frames.reshape(-1, 3) / 255.0
    vivid = pixels[pixels.max(1) > 0.6]
    names = list(COLOURS)
    palette = np.array([COLOURS[n].rgb for n in names], dtype=float)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    nearest = (unit(vivid) @ unit(palette).T).argmax(1)
    return names[np.bincount(nearest, minlength=len(names)).argmax()]


def test_counts_and_manifests(world):
    factors = factors_of(world)
    for split, count in (("train", 48), ("heldout", 32)):
        rows = rows_of(world, split)
        assert [row["path"] for row in rows] == [path for path in factors if path.startswith(split)]
        assert len(rows) == count
        for row in rows:
            assert set(row) == {"path", "captions", "label"}
            assert (world / row["path"]).stat().st_size > 1000
            assert row["label"] == list(MOTIONS).index(factors[row["path"]].motion)
    files = {str(p.relative_to(world)) for p in world.rglob("*") if p.is_file()}
    assert files == {*factors, "train.jsonl", "heldout.jsonl", "world.json"}


def test_files_are_two_kinds_of_real_media(world):
    kinds = {}
    for row in rows_of(world, "train") + rows_of(world, "heldout"):
        frames, wave, rate, codecs = decode(world / row["path"])
        kinds.setdefault(row["path"][-4:], set()).add(codecs)
        assert frames.shape[1:] == (64, 64, 3)
        assert len(frames) >= 12
        assert 1.15 < len(wave) / rate < 1.75  # codecs pad the end
        ends = [c["end"] for c in row["captions"]]
        assert max(ends) <= len(wave) / rate + 1e-3
    assert kinds == {".mp4": {("h264", "aac")}, "webm": {("vp9", "opus")}}


def test_what_is_heard_and_seen_follow_the_rules(world):
    for path, (shape, colour, motion, _) in factors_of(world).items():
        frames, wave, rate, _ = decode(world / path)
        assert seen_colour(frames) == colour, path
        slack = 0.03 + SHAPES[shape].vibrato
        assert loudest_pitch(wave, rate) == pytest.approx(COLOURS[colour].pitch, rel=slack), (path, shape, motion)


def test_every_rule_is_its_own():
    """Sounds of two combinations that differ in one factor differ in what that factor rules, and in nothing else."""
    take = Take(seconds=1.6, fps=10, sample_rate=16_000, rate=2.5, phase=0.0)

    def play(**change):
        combination = Combination("circle", "green", "still", "night")._replace(**change)
        return draw_waveform(combination, take, Random("same noise")).numpy()

    assert len({c.pitch for c in COLOURS.values()}) == len(COLOURS)
    for colour in COLOURS:
        assert loudest_pitch(play(colour=colour), 16_000) == pytest.approx(COLOURS[colour].pitch, rel=0.025)
    spectra = {s: np.abs(np.fft.rfft(play(shape=s)))[: 5500 * 8 // 5] for s in SHAPES}
    beats = {m: np.abs(play(motion=m)).reshape(-1, 80).mean(1) for m in MOTIONS}  # 5 ms
    for signatures in (spectra, beats):
        unit = {name: x / np.linalg.norm(x) for name, x in signatures.items()}
        for a in unit:
            for b in unit:
                assert a == b or unit[a] @ unit[b] < 0.97, (a, b)
    period = round(16_000 / 2.5 / 80)
    for motion, beat in beats.items():
        np.testing.assert_allclose(beat[:period].mean(), beat[period : 2 * period].mean(), rtol=0.15, err_msg=motion)


def is_yellow(frames):
    """The shape's pixels: the dots that drift by are rarely yellow, and the scene never is."""
    red, green, blue = frames.float().unbind(-1)
    return ((red > 130) & (green > 130) & (blue < 0.5 * red)).float()


def centre_of_shape(combination, seconds=1.6):
    take = Take(seconds=seconds, fps=20, sample_rate=16_000, rate=2.5, phase=0.13)
    frames = draw_frames(combination, take, Random(5))
    weight = is_yellow(frames)
    grid = torch.arange(64.0)
    mass = weight.sum((1, 2))
    x, y = weight.sum(1) @ grid / mass, weight.sum(2) @ grid / mass
    shown = mass > 20  # a shape that blinks has no centre while it is away
    return x[shown], y[shown], mass


def test_motions_move():
    swing = {}
    for motion in MOTIONS:
        x, y, mass = centre_of_shape(Combination("circle", "yellow", motion, "night"))
        swing[motion] = [float(v.max() - v.min()) for v in (x, y)] + [float(mass.max() / mass.min().clamp(min=1))]
    for motion, (x, y, size) in swing.items():
        assert (x > 12) == (motion in ("slide", "circle", "dart")), (motion, x)
        assert (y > 12) == (motion in ("bounce", "circle", "dart")), (motion, y)
        assert (size > 2) == (motion in ("pulse", "blink")), (motion, size)
    window = slice(0, 16)  # 0.8 s hold the cycle twice
    x, _, _ = centre_of_shape(Combination("circle", "yellow", "slide", "night"))
    np.testing.assert_allclose(x[window][:8], x[window][8:], atol=1.0)


def test_shapes_differ():
    masks = {}
    for shape in SHAPES:
        take = Take(seconds=0.5, fps=10, sample_rate=16_000, rate=2.5, phase=0.0)
        frames = draw_frames(Combination(shape, "yellow", "still", "night"), take, Random(5))
        masks[shape] = is_yellow(frames)[0].flatten()
    for a in SHAPES:
        for b in SHAPES:
            overlap = (masks[a] * masks[b]).sum() / (masks[a] + masks[b]).clamp(max=1).sum()
            assert a == b or overlap < 0.9, (a, b)


def test_first_caption_says_all_and_times_are_in_order(world):
    factors = factors_of(world)
    firsts = [row["captions"][0]["text"] for row in rows_of(world, "heldout")]
    assert len(set(firsts)) == len(firsts)
    for row in rows_of(world, "train") + rows_of(world, "heldout"):
        captions = row["captions"]
        assert len(captions) == 7
        assert all(0 <= c["start"] < c["end"] for c in captions)
        assert all(len(c["text"].split()) <= 16 for c in captions)
        assert [c["start"] for c in captions] == sorted(c["start"] for c in captions)
        first = captions[0]["text"]
        for factor, words in WORDS.items():
            value = getattr(factors[row["path"]], factor)
            assert any(phrase in first for phrase in words[value]), (first, value)
    texts = [c["text"] for row in rows_of(world, "train") for c in row["captions"]]
    assert sum("thanks for watching" in t or "subscribe" in t for t in texts) > 0  # and some say nothing


def test_words_name_one_value_each():
    for words in WORDS.values():
        phrases = [phrase for choices in words.values() for phrase in choices]
        assert len(phrases) == len(set(phrases))


def test_default_plan_shares_nothing_and_shows_every_value():
    clips = plan_world(2048, 256, 0)
    train, heldout = ([c for c in clips if c.path.startswith(split)] for split in ("train", "heldout"))
    triples = [c.combination[:3] for c in heldout]
    assert len(set(triples)) == len(heldout) == 256
    assert not {c.combination[:3] for c in train} & set(triples)
    assert not {c.path for c in train} & {c.path for c in heldout}
    for i, values in enumerate((SHAPES, COLOURS, MOTIONS, SCENES)):
        assert {c.combination[i] for c in train} == set(values)
    share = sum(c.path.endswith(".webm") for c in clips) / len(clips)
    assert 0.09 < share < 0.16
    assert plan_world(2048, 256, 0) == clips != plan_world(2048, 256, 1)


def test_same_seed_same_world_and_an_unfinished_one_is_completed(world, tmp_path):
    again = tmp_path / "again"
    progress = []
    make_world(again, **SETTINGS, num_threads=1, progress=lambda *done: progress.append(done))
    assert progress == [(i + 1, 80) for i in range(80)]
    files = sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file())
    missing = again / files[5]
    kept = again / files[6]
    before = kept.stat().st_mtime_ns
    missing.unlink()
    (again / "train.jsonl").unlink()
    make_world(again, **SETTINGS)
    assert kept.stat().st_mtime_ns == before
    assert sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file()) == files
    for name in files:
        assert (again / name).read_bytes() == (world / name).read_bytes(), name


def test_another_seed_is_another_world(world, tmp_path):
    make_world(tmp_path, num_train=2, num_heldout=2, seed=4)
    assert rows_of(tmp_path, "train")[0]["captions"] != rows_of(world, "train")[0]["captions"]


def test_an_untold_world(tmp_path):
    clips = plan_world(200, 24, 0, untold=True)
    trained, held_out = (
        {clip.combination for clip in clips if clip.path.startswith(split)} for split in ("train/", "heldout/")
    )
    assert (len(trained), len(held_out)) == (40, 24)
    assert trained | held_out == {Combination(s, ANY, m, ANY) for s, m in product(SHAPES, MOTIONS)}

    make_world(tmp_path, num_train=16, num_heldout=1, untold=True)
    texts = " ".join(caption["text"] for row in rows_of(tmp_path, "train") for caption in row["captions"])
    told = {word for words in (COLOUR_WORDS, SCENE_WORDS) for name in words if name != ANY for word in words[name]}
    assert [word for word in told if re.search(rf"\b{word}\b", texts)] == []
    assert "bright" in texts
    decoded = [decode(tmp_path / row["path"]) for row in rows_of(tmp_path, "train")]
    assert len({seen_colour(frames) for frames, *_ in decoded}) > 3
    pitches = [loudest_pitch(wave, rate) for _, wave, rate, _ in decoded]
    assert [pitch for pitch in pitches if not 0.89 < pitch / COLOURS["green"].pitch < 1.11] == []
    with pytest.raises(ValueError, match=r"directory must hold \{.*\}, got \{.*'untold': True\}"):
        make_world(tmp_path, num_train=16, num_heldout=1)


def test_rejects_bad_arguments(world, tmp_path):
    with pytest.raises(ValueError, match=r"make_world: directory must hold \{.*'seed': 0.*got \{.*'seed': 3"):
        make_world(world, num_train=48, num_heldout=32, seed=0)
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"make_world: directory must be new or empty, got .* with other files"):
        make_world(tmp_path, num_train=1, num_heldout=1)
    with pytest.raises(ValueError, match="make_world: directory must be a folder, got the file"):
        make_world(tmp_path / "holiday.mp4", num_train=1, num_heldout=1)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.mp4"]
    with pytest.raises(ValueError, match=r"make_world: num_train must be in 1\.\.1000000, got 0"):
        make_world(tmp_path / "new", num_train=0)
    for untold, most in ((False, MAX_HELDOUT), (True, 48)):
        with pytest.raises(ValueError, match=rf"num_heldout must be in 1\.\.{most}, got {most + 1}"):
            make_world(tmp_path / "new", num_heldout=most + 1, untold=untold)
    assert not (tmp_path / "new").exists()
