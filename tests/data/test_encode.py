"""data.encode and the tests' own writer: what was written is read back at its time, in its codec, with its values."""

import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from media_files import write_media

from vatt_engine.data import encode

av = pytest.importorskip("av")

FLASH = 12  # the only white frame of 30
RATE = 48_000


def flash_frames(num_frames=30, height=64, width=96):
    frames = torch.zeros(num_frames, height, width, 3, dtype=torch.uint8)
    frames[FLASH] = 255
    return frames


def click_wave(at, seconds=3.0, rate=RATE):
    wave, n = torch.zeros(int(seconds * rate)), torch.arange(rate // 33)
    begin = round(at * rate)
    wave[begin : begin + len(n)] = 0.8 * torch.sin(2 * torch.pi * 1000 * n / rate)
    return wave


def read_video(path):
    """Seconds, and RGB, of each frame."""
    with av.open(str(path)) as container:
        frames = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return [t for t, _ in frames], np.stack([image for _, image in frames])


def read_audio(path):
    """First second, the samples [L, C], the rate."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("fltp")
        frames = [out for frame in container.decode(audio=0) for out in resampler.resample(frame)]
    wave = np.concatenate([f.to_ndarray() for f in frames], axis=1).T
    return float(frames[0].pts * frames[0].time_base), wave, frames[0].sample_rate


def click_time(path):
    start, wave, rate = read_audio(path)
    return start + np.argmax(np.abs(wave[:, 0]) > 0.2) / rate


def scheduling():
    return os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None


CODECS = [
    (".mp4", "libx264", "aac", "h264", "aac"),
    (".mp4", "libx265", "libmp3lame", "hevc", "mp3float"),
    (".mp4", "libsvtav1", "libopus", "av1", "opus"),
    (".mov", "mjpeg", "pcm_s16le", "mjpeg", "pcm_s16le"),
    (".webm", "libvpx-vp9", "libopus", "vp9", "opus"),
    (".mkv", "mpeg4", "flac", "mpeg4", "flac"),
]
TIMINGS = {
    "10fps": {"fps": 10},
    "ntsc": {"fps": Fraction(30000, 1001)},
    "vfr": {"times": (torch.arange(30) * 0.07 + 0.02 * torch.sin(torch.arange(30.0))).tolist()},
    "start": {"fps": 25, "start": 1.5},
}


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("case", CODECS, ids=lambda case: f"{case[1]}-{case[2]}{case[0]}")
def test_flash_and_click_are_read_back_together(case, timing, tmp_path):
    suffix, video_codec, audio_codec, read_as, heard_as = case
    how = TIMINGS[timing]
    start = how.get("start", 0.0)
    times = np.array(how["times"]) if timing == "vfr" else np.arange(30) / float(how["fps"])
    path = tmp_path / f"clip{suffix}"
    codecs = {"video_codec": video_codec, "audio_codec": audio_codec}
    before = scheduling()
    write_media(path, flash_frames(), waveform=click_wave(times[FLASH]), **codecs, **how)
    assert scheduling() == before  # libsvtav1 makes threads of root real-time ones
    with av.open(str(path)) as container:
        names = [stream.codec_context.name for stream in container.streams]
    assert read_as in names[0].replace("libdav1d", "av1")
    assert names[1] == heard_as
    seen, frames = read_video(path)
    tick = 1e-3 if suffix in (".mkv", ".webm") else 1 / 60_000
    np.testing.assert_allclose(seen, start + times, atol=0.51 * tick + 1e-9)
    assert frames.mean((1, 2, 3)).argmax() == FLASH
    assert click_time(path) == pytest.approx(start + times[FLASH], abs=1e-3 + tick)


def test_pixels_and_samples_survive(tmp_path):
    colours = torch.tensor([[200, 30, 30], [30, 160, 60], [40, 60, 200], [220, 210, 40]], dtype=torch.uint8)
    frames = colours[:, None, None].expand(4, 64, 64, 3)
    n = torch.arange(RATE)
    wave = torch.stack([0.5 * torch.sin(2 * torch.pi * f * n / RATE) for f in (440, 1000)], dim=1)
    path = tmp_path / "clip.mkv"
    write_media(path, frames.numpy(), fps=4, waveform=wave.numpy(), audio_codec="flac", options={"crf": "12"})
    _, seen = read_video(path)
    assert np.abs(seen.astype(int) - frames.numpy()).mean() < 4
    start, heard, rate = read_audio(path)
    assert (start, rate, heard.shape) == (0.0, RATE, (RATE, 2))
    np.testing.assert_allclose(heard, wave.numpy(), atol=1e-4)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".m4a", ".mp3"])
def test_audio_alone(suffix, tmp_path):
    path = tmp_path / f"clip{suffix}"
    write_media(path, None, waveform=click_wave(0.5, 1.0))
    _, wave, rate = read_audio(path)
    assert rate == RATE
    assert np.argmax(np.abs(wave[:, 0]) > 0.2) / rate == pytest.approx(
        0.5, abs=1e-3
    )  # mp3: its first time is the delay
    assert len(wave) == pytest.approx(RATE, abs=1024)


def test_video_alone_and_avi(tmp_path):
    path = tmp_path / "clip.avi"
    write_media(path, flash_frames(), fps=10)
    seen, frames = read_video(path)
    np.testing.assert_allclose(seen, np.arange(30) / 10)
    assert frames.mean((1, 2, 3)).argmax() == FLASH
    with av.open(str(path)) as container:
        assert not container.streams.audio


SOUND = {"waveform": click_wave(1.2), "sample_rate": RATE, "options": {}, "audio_options": {}}


@pytest.mark.parametrize(("suffix", "codecs"), [(".mp4", ["h264", "aac"]), (".webm", ["vp9", "opus"])])
def test_same_input_same_bytes(suffix, codecs, tmp_path):
    for name in ("a", "b"):
        encode.write_media(tmp_path / f"{name}{suffix}", flash_frames(), fps=10, **SOUND)
    path = tmp_path / f"a{suffix}"
    assert path.read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams] == codecs
    seen, frames = read_video(path)
    np.testing.assert_allclose(seen, np.arange(30) / 10, atol=1e-3)
    assert frames.mean((1, 2, 3)).argmax() == FLASH
    assert click_time(path) == pytest.approx(1.2, abs=2e-3)


def test_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    monkeypatch.setitem(encode.CODECS, ".mp4", ("no_such_codec", "aac"))
    with pytest.raises(ValueError, match="write_media: codec must be one that this FFmpeg encodes, got no no_such"):
        encode.write_media(path, flash_frames(), fps=10, **SOUND)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
