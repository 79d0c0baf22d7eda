"""Rows of samples that are a part of their file: the window, its captions and its sound stay within the part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from media_files import write_media

from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.clips import ClipReader
from vatt_engine.data.config import DataConfig
from vatt_engine.data.manifest import Caption, Sample, sample_id
from vatt_engine.data.media import MediaError, MediaLimits, probe
from vatt_engine.data.words import Vocabulary

WORDS = Vocabulary(["<pad>", "<unk>", "zero", "one", "two", "three", "four"])
CONFIG = DataConfig(
    num_frames=5,
    fps=10.0,
    frame_size=16,
    num_samples=4_000,
    sample_rate=8_000,
    num_candidates=2,
    max_words=2,
    augment=AugmentConfig(crop="none", flip=0.0, color_jitter=0.0, audio_noise=0.0),
)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Five seconds at 10 fps: frame i is grey 4 i + 20, a sample at t is (t - 2.5) / 3; a caption each second."""
    path = tmp_path_factory.mktemp("clips") / "film.mkv"
    grey = (4 * torch.arange(50) + 20).to(torch.uint8)
    wave = (torch.arange(40_000) / 8_000 - 2.5) / 3
    frames = grey[:, None, None, None].expand(50, 16, 24, 3)
    codecs = {"video_codec": "mjpeg", "audio_codec": "pcm_s16le", "options": {"q:v": "1"}}
    write_media(path, frames, fps=10, waveform=wave, sample_rate=8_000, **codecs)
    captions = tuple(Caption(word, i + 0.1, i + 0.9) for i, word in enumerate(WORDS.words[2:]))
    return Sample(0, sample_id("film"), path, captions)


def times(row):
    """Seconds of the file that the frames and the samples of a row are from."""
    pictures = ((row.video.float().mean((1, 2, 3)) - 20) / 4).round() / 10
    return pictures.tolist(), row.audio * 3 + 2.5


def part(film, start, end):
    return replace(film, start=start, end=end)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_windows_lie_within_the_part(film, cache):
    reader, starts = ClipReader(replace(CONFIG, cache=cache), WORDS, seed=0, train=True), set()
    for epoch in range(40):
        row = reader.rows(part(film, 1.2, 3.1), epoch)[0]
        pictures, sounds = times(row)
        assert pictures[0] >= 1.1  # on screen at 1.2 s; the cache's frames are half a frame off
        assert pictures[-1] <= 3.1
        assert float(sounds.min()) > 1.14
        assert float(sounds.max()) < 3.16
        starts.add(round(pictures[0], 1))
        assert set(row.text[:, 0].tolist()) <= {3, 4, 5}  # one, two, three
    assert min(starts) <= 1.3
    assert max(starts) >= 2.5


def test_a_short_part_repeats(film):
    row = ClipReader(CONFIG, WORDS, seed=0, train=True).rows(part(film, 2.0, 2.3), 0)[0]
    pictures, sounds = times(row)
    assert pictures == pytest.approx([2.0, 2.1, 2.2, 2.0, 2.1])
    assert torch.allclose(sounds[:1_600], sounds[2_400:], atol=1e-6)
    assert float(sounds.min()) > 1.99
    assert float(sounds.max()) < 2.31
    assert row.text[:, 0].tolist() == [4, 4]


def test_evaluation_spreads_windows_over_the_part(film):
    config = replace(CONFIG, num_windows=3)
    reader = ClipReader(config, WORDS, seed=0, train=False)
    starts = [times(reader.rows(part(film, 1.0, 3.0), 0, [window])[0])[0][0] for window in range(3)]
    assert starts == pytest.approx([1.0, 1.7, 2.5], abs=0.06)


def test_a_part_beyond_the_file(film):
    reader = ClipReader(CONFIG, WORDS, seed=0, train=True)
    for epoch in range(10):
        pictures, _ = times(reader.rows(part(film, 4.2, 99.0), epoch)[0])
        assert pictures[0] >= 4.19
    with pytest.raises(MediaError, match=r"the sample must begin within the 5\.000 s of the file, got 7\.000 s\."):
        reader.rows(part(film, 7.0, 9.0), 0)
    open_ended = reader.rows(replace(film, start=4.0), 3)[0]
    assert times(open_ended)[0][0] >= 3.99


def test_parts_of_a_file_are_cached_once(film, monkeypatch):
    reader = ClipReader(replace(CONFIG, cache="memory"), WORDS, seed=0, train=True)
    reader.rows(part(film, 1.0, 2.0), 0)
    monkeypatch.setattr("vatt_engine.data.clips.open_media", None)
    reader.rows(replace(part(film, 2.0, 3.0), index=1), 0)


def test_captions_outside_the_part_are_noted(film):
    inside = replace(part(film, 1.0, 2.0), captions=film.captions[1:2])
    reader = ClipReader(CONFIG, WORDS, seed=0, train=False)
    assert reader.rows(inside, 0)[0].note == ""
    note = "captions must lie within the sample's 1.000 to 2.000 s, got 4 outside."
    assert reader.rows(part(film, 1.0, 2.0), 0)[0].note == note


def test_the_size_of_a_file_is_limited(film):
    size = film.path.stat().st_size
    assert probe(film.path, MediaLimits(max_bytes=size)).has_video
    with pytest.raises(MediaError, match=rf"the file must have at most {size - 1} bytes, got {size}\."):
        probe(film.path, MediaLimits(max_bytes=size - 1))
    with pytest.raises(ValueError, match="MediaLimits: max_bytes must be above 0, got 0"):
        MediaLimits(max_bytes=0)


def test_odd_files_are_noted(tmp_path):
    """What may be damage, and may be meant: a hole, a picture that ends early, a Matroska file that begins late."""
    frames = torch.zeros(20, 16, 24, 3, dtype=torch.uint8)
    sound, reader = torch.full((16_000,), 0.1), ClipReader(replace(CONFIG, num_frames=20), None, seed=0, train=False)
    late = [i / 10 if i < 8 else i / 10 + 0.7 for i in range(20)]
    pcm = {"waveform": sound, "sample_rate": 8_000, "audio_codec": "pcm_s16le"}
    write_media(tmp_path / "hole.mkv", frames, times=late, **pcm)
    write_media(tmp_path / "early.mkv", frames[:10], fps=10, **pcm)
    write_media(tmp_path / "start.mkv", frames, fps=10, start=1.5, **pcm)
    write_media(tmp_path / "plain.mkv", frames, fps=10, **pcm)
    notes = {
        name: reader.rows(Sample(0, 0, tmp_path / f"{name}.mkv"), 0)[0].note
        for name in ("hole", "early", "start", "plain")
    }
    assert notes == {
        "hole": "the video must be whole, got a hole in it.",
        "early": "the video must last as long as the file, 2.000 s, got 1.000 s.",
        "start": "the file must begin at second 0, got its first frame at 1.500 s.",
        "plain": "",
    }


def test_a_cut_wav_or_avi_is_refused(tmp_path):
    """FFmpeg takes it for a shorter one."""
    write_media(tmp_path / "a.wav", None, waveform=torch.zeros(8_000), sample_rate=8_000)
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:9_000])
    with pytest.raises(MediaError, match=rf"the file must have the {len(content)} bytes that it promises, got 9000\."):
        probe(tmp_path / "a.wav")
    piped = content[:4] + b"\xff\xff\xff\xff" + content[8:9_000]
    (tmp_path / "a.wav").write_bytes(piped)
    assert probe(tmp_path / "a.wav").has_audio
