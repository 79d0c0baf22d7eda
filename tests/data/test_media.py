"""Flash and click: one white frame and one tone burst at the same time of the file must come back at that time."""

import resource
import struct
import zlib
from fractions import Fraction

import av
import pytest
import torch
from media_files import write_media

from vatt_engine.data.manifest import Caption
from vatt_engine.data.media import Media, MediaError, MediaLimits, decode, decode_clip, probe
from vatt_engine.data.windows import even_windows, nearest_captions, random_window

RATE = 48_000
MP3_DELAY = 1105  # samples that an mp3 decoder is late by; avi cannot say so, other containers do


def flash_and_click(path, *, fps=25, sample_rate=RATE, seconds=3.0, at=1.7, vfr=False, **options):
    """Write the clip; the time of flash and click."""
    if vfr:
        gaps = 0.01 + 0.08 * torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        times = [t for t in [0.0, *gaps.cumsum(0).tolist()] if t < seconds - 0.1]
    else:
        times = [i / float(fps) for i in range(round(seconds * fps))]
    flash = min(range(len(times)), key=lambda i: abs(times[i] - at))
    frames = torch.zeros(len(times), 64, 96, 3, dtype=torch.uint8)  # x265 overruns its memory below 64 x 64
    frames[flash] = 255
    wave = torch.zeros(round(seconds * sample_rate))
    click = round(times[flash] * sample_rate)
    length = sample_rate // 250
    wave[click : click + length] = 0.9 * torch.sin(torch.arange(length) * (2 * torch.pi * 3000 / sample_rate))
    timing = {"times": times} if vfr else {"fps": fps}
    write_media(path, frames, waveform=wave, sample_rate=sample_rate, options={"g": "12"}, **timing, **options)
    return times[flash]


def onset(wave):
    """Seconds until a quarter of the loudest sample is reached."""
    loud = wave.abs()
    return int((loud >= loud.max() / 4).nonzero()[0]) / RATE


def flash_of(clip, fps):
    bright = clip.video.float().mean((1, 2, 3)) > 128
    assert bright.any(), "no flash in the clip"
    return clip.start + int(bright.nonzero()[0]) / fps


def check_times(path, truth, fps, starts, late=0.0):
    """Frame i shows what is on screen at start + i / fps, sample j sounds at start + j / rate: to 1 ms."""
    zero = Media(path)._source.zero
    for start in starts:
        clip = decode_clip(path, start, num_frames=round(1.2 * fps), fps=fps, num_samples=round(1.2 * RATE))
        assert clip.num_real_frames == round(1.2 * fps)
        late_by = flash_of(clip, fps) - (truth - zero)
        assert -1e-3 <= late_by < 1 / fps + 1e-3, f"flash late by {late_by:.4f} s from {start}"
        assert abs(start + onset(clip.audio) - late - (truth - zero)) < 1e-3, f"click off from {start}"


CODECS = {
    "h264-aac": ("c.mp4", {}),
    "h264-aac-16k": ("c.mp4", {"sample_rate": 16_000}),
    "h264-aac-22k": ("c.mp4", {"sample_rate": 22_050}),
    "h264-aac-44k": ("c.mp4", {"sample_rate": 44_100}),
    "h264-opus": ("c.mkv", {"audio_codec": "libopus"}),
    "h264-mp3-44k": ("c.mkv", {"audio_codec": "libmp3lame", "sample_rate": 44_100}),
    "hevc-flac-44k": ("c.mkv", {"video_codec": "libx265", "audio_codec": "flac", "sample_rate": 44_100}),
    "vp9-opus": ("c.webm", {}),
    "av1-aac": ("c.mp4", {"video_codec": "libsvtav1"}),
    "mpeg4-mp3": ("c.mkv", {"video_codec": "mpeg4", "audio_codec": "libmp3lame"}),
    "mpeg4-pcm": ("c.avi", {"audio_codec": "pcm_s16le", "sample_rate": 16_000}),
    "mjpeg-pcm": ("c.mkv", {"video_codec": "mjpeg", "audio_codec": "pcm_s16le", "sample_rate": 22_050}),
}


@pytest.mark.parametrize("codec", CODECS)
def test_flash_and_click_agree_in_every_codec(tmp_path, codec):
    name, options = CODECS[codec]
    truth = flash_and_click(tmp_path / name, **options)
    check_times(tmp_path / name, truth, 25.0, (0.8, 1.213, 1.64))


@pytest.mark.parametrize("fps", [10, 24, 25, Fraction(30_000, 1001), 60])
@pytest.mark.parametrize("name", ["c.mp4", "c.webm"])
def test_flash_and_click_agree_at_every_rate(tmp_path, name, fps):
    truth = flash_and_click(tmp_path / name, fps=fps)
    check_times(tmp_path / name, truth, float(fps), (0.99,))


@pytest.mark.parametrize("start", [0.0, 0.7])
@pytest.mark.parametrize("name", ["c.mp4", "c.webm", "c.mkv"])
def test_flash_and_click_agree_at_variable_rate_and_offset(tmp_path, name, start):
    truth = flash_and_click(tmp_path / name, vfr=True, start=start) + start
    check_times(tmp_path / name, truth, 90.0, (0.8, 1.3))


def test_mp3_in_avi_is_late_by_its_decoder(tmp_path):
    truth = flash_and_click(tmp_path / "c.avi")
    check_times(tmp_path / "c.avi", truth, 25.0, (1.0,), late=MP3_DELAY / RATE)


def remux(source, target, **options):
    """The packets of a file in another container."""
    with av.open(str(source)) as old, av.open(str(target), "w", container_options=options) as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                new.mux(packet)


@pytest.mark.parametrize("case", ["ts", "fragmented mp4", "mp4 without edit list", "live webm"])
def test_flash_and_click_agree_in_odd_containers(tmp_path, case):
    """A transport stream begins at 1.4 s; a live recording has no length and no index."""
    source, options = tmp_path / "c.mp4", {}
    if case == "ts":
        target = tmp_path / "t.ts"
    elif case == "live webm":
        source, target, options = tmp_path / "c.webm", tmp_path / "t.webm", {"live": "1"}
    else:
        target = tmp_path / "t.mp4"
        options = {"movflags": "empty_moov+frag_keyframe"} if case.startswith("frag") else {"use_editlist": "0"}
    truth = flash_and_click(source)
    remux(source, target, **options)
    assert probe(target).duration == pytest.approx(3.0, abs=0.1)
    clip = decode_clip(target, 1.0, num_frames=150, fps=125.0, num_samples=round(1.2 * RATE))
    flash, click = flash_of(clip, 125.0), clip.start + onset(clip.audio)
    assert -1e-3 <= flash - click < 1 / 125 + 1e-3
    assert click == pytest.approx(truth, abs=0.09)  # some containers cannot begin at 0 with B-frames


def ramp(path, *, seconds=4.0, fps=20, sound=True, **options):
    """Frame i is grey 16 + 3 i; the sound rises from -0.9 to 0.9."""
    count = round(seconds * fps)
    grey = (torch.arange(count) * 3 + 16).to(torch.uint8)
    frames = grey[:, None, None, None].expand(count, 36, 48, 3)
    wave = torch.linspace(-0.9, 0.9, round(seconds * RATE)) if sound else None
    write_media(path, frames, fps=fps, waveform=wave, **options)
    return path


def greys(clip):
    return ((clip.video.float().mean((1, 2, 3)) - 15) / 3).round().int().tolist()


PCM = {"audio_codec": "pcm_s16le", "video_codec": "mjpeg", "options": {"q:v": "1"}}


def test_frames_are_those_on_screen(tmp_path):
    path = ramp(tmp_path / "c.mkv", **PCM)
    clip = decode_clip(path, 0.52, num_frames=8, fps=10.0, num_samples=0)
    assert clip.audio is None
    assert clip.video.dtype == torch.uint8
    assert tuple(clip.video.shape) == (8, 36, 48, 3)
    assert greys(clip) == [10, 12, 14, 16, 18, 20, 22, 24]  # at 20 fps: the frame of 0.50 s is on screen at 0.52 s
    assert greys(decode_clip(path, 0.0, num_frames=6, fps=40.0, num_samples=0)) == [0, 0, 1, 1, 2, 2]


def test_a_long_picture_stays_on_screen(tmp_path):
    """Variable rate: nothing that comes later is shown before its time, and the last picture lasts."""
    frames = torch.tensor([0, 100, 200], dtype=torch.uint8)[:, None, None, None].expand(3, 32, 32, 3)
    write_media(tmp_path / "c.mp4", frames, times=[0.0, 1.0, 3.0], options={"bf": "0"})
    clip = decode_clip(tmp_path / "c.mp4", 0.0, num_frames=8, fps=2.0, num_samples=0)
    assert (clip.video.float().mean((1, 2, 3)) / 100).round().int().tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_samples_are_exact(tmp_path):
    path = ramp(tmp_path / "c.mkv", **PCM)
    truth = torch.linspace(-0.9, 0.9, 4 * RATE)
    for start in (0.0, 0.333, 2.5):
        clip = decode_clip(path, start, num_frames=1, num_samples=20_000)
        first = round(start * RATE)
        torch.testing.assert_close(clip.audio, truth[first : first + 20_000], atol=1e-4, rtol=0)
        assert clip.num_real_samples == 20_000
    half = decode_clip(path, 1.0, num_frames=1, num_samples=8_000, sample_rate=8_000)
    torch.testing.assert_close(half.audio[10:-10], truth[RATE : 2 * RATE : 6][10:-10], atol=1e-3, rtol=0)


def test_stereo_is_mixed_and_stays_in_range(tmp_path):
    wave = torch.stack([torch.full((RATE,), 0.5), torch.full((RATE,), -0.25)], dim=1)
    frames = torch.zeros(10, 32, 32, 3, dtype=torch.uint8)
    write_media(tmp_path / "c.mkv", frames, fps=10, waveform=wave, audio_codec="pcm_s16le")
    clip = decode_clip(tmp_path / "c.mkv", 0.0, num_frames=2, num_samples=RATE)
    torch.testing.assert_close(clip.audio, torch.full((RATE,), 0.125), atol=1e-3, rtol=0)
    loud = (torch.arange(2 * RATE) % 40 < 20).float() * 2 - 1  # a square wave overshoots in AAC
    write_media(tmp_path / "c.mp4", None, waveform=loud)
    assert decode_clip(tmp_path / "c.mp4", 0.5, num_samples=RATE).audio.abs().max() == 1.0


def test_a_short_file_repeats_in_step(tmp_path):
    path = ramp(tmp_path / "c.mkv", seconds=1.5, **PCM)
    clip = decode_clip(path, 0.5, num_frames=25, fps=10.0, num_samples=120_000)
    assert greys(clip) == ([10, 12, 14, 16, 18, 20, 22, 24, 26, 28] * 3)[:25]
    assert (clip.num_real_frames, clip.num_real_samples) == (10, 48_000)
    assert torch.equal(clip.audio[:48_000], clip.audio[48_000:96_000])
    assert torch.equal(clip.audio[:24_000], clip.audio[96_000:])


def test_sound_shorter_than_the_picture_ends_in_silence(tmp_path):
    frames = torch.zeros(30, 32, 32, 3, dtype=torch.uint8)
    write_media(tmp_path / "c.mp4", frames, fps=10, waveform=0.5 * torch.ones(RATE))
    clip = decode_clip(tmp_path / "c.mp4", 0.5, num_frames=20, num_samples=RATE)
    assert clip.num_real_samples == pytest.approx(RATE / 2, abs=1024)
    assert clip.audio[RATE // 2 + 1024 :].abs().max() == 0
    silent = decode_clip(tmp_path / "c.mp4", 1.5, num_frames=10, num_samples=RATE)
    assert silent.num_real_samples == 0
    assert silent.audio.abs().max() == 0


def test_files_with_one_track(tmp_path):
    clip = decode_clip(ramp(tmp_path / "v.mp4", sound=False), 0.0, num_frames=4, num_samples=100)
    assert clip.audio is None
    assert clip.num_real_samples == 0
    write_media(tmp_path / "a.flac", None, waveform=torch.linspace(-0.5, 0.5, RATE))
    clip = decode_clip(tmp_path / "a.flac", 0.25, num_samples=1000)
    assert clip.video is None
    torch.testing.assert_close(clip.audio, torch.linspace(-0.5, 0.5, RATE)[12_000:13_000], atol=1e-3, rtol=0)


def test_track_cuts_what_decode_clip_gives(tmp_path):
    path = ramp(tmp_path / "c.mkv", seconds=3.3, **PCM)
    track = decode(path, fps=10.0, sample_rate=RATE)
    assert track.duration == pytest.approx(3.3)
    for start, frames, samples in ((0.0, 8, 9_600), (1.2, 8, 40_000), (2.9, 8, 40_000), (0.0, 50, 200_000)):
        ours = track.cut(start + 0.04, num_frames=frames, num_samples=samples)
        clip = decode_clip(path, start, num_frames=frames, fps=10.0, num_samples=samples)
        assert ours.start == pytest.approx(start)
        assert torch.equal(ours.video, clip.video)
        torch.testing.assert_close(ours.audio, clip.audio, atol=1e-4, rtol=0)
        assert (ours.num_real_frames, ours.num_real_samples) == (clip.num_real_frames, clip.num_real_samples)


def test_size_and_rotation(tmp_path):
    frames = torch.zeros(5, 64, 96, 3, dtype=torch.uint8)
    frames[:, :32, :48] = 255  # the upper left quarter
    write_media(tmp_path / "c.mp4", frames, fps=10)
    small = decode_clip(tmp_path / "c.mp4", 0.0, num_frames=2, num_samples=0, short_side=16)
    assert tuple(small.video.shape) == (2, 16, 24, 3)
    large = decode_clip(tmp_path / "c.mp4", 0.0, num_frames=2, num_samples=0, short_side=500)
    assert tuple(large.video.shape) == (2, 64, 96, 3)
    with av.open(str(tmp_path / "r.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(90)
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    turned = decode_clip(tmp_path / "r.mp4", 0.0, num_frames=2, num_samples=0).video
    assert tuple(turned.shape) == (2, 96, 64, 3)
    assert turned[:, 60:80, 8:24].min() > 200  # counter-clockwise: now the lower left quarter
    assert turned[:, 8:40].max() < 50


def test_probe(tmp_path):
    info = probe(ramp(tmp_path / "c.mp4", seconds=2.0))
    assert info.duration == pytest.approx(2.0, abs=0.05)
    assert (info.width, info.height, info.fps, info.sample_rate) == (48, 36, 20.0, RATE)
    assert (info.video_codec, info.audio_codec, info.has_video, info.has_audio) == ("h264", "aac", True, True)


def damaged(tmp_path, case):
    good = ramp(tmp_path / "good.webm", fps=20)
    path = tmp_path / "bad.mp4"
    content = good.read_bytes()
    if case == "empty":
        path.write_bytes(b"")
    elif case == "text":
        path.write_text("this is no film\n" * 100)
    elif case == "folder":
        path.mkdir()
    elif case == "header":
        path.write_bytes(content[:300])
    elif case == "truncated webm":
        path.write_bytes(content[: len(content) // 2])
    elif case in ("truncated mp4", "truncated index first"):
        flags = {"movflags": "faststart"} if "index" in case else {}
        remux(ramp(tmp_path / "good.mp4"), tmp_path / "m.mp4", **flags)
        content = (tmp_path / "m.mp4").read_bytes()
        path.write_bytes(content[: len(content) * 6 // 10])
    return path


DAMAGED = {
    "missing": "the path must name a file, got no such file",
    "folder": "the path must name a file, got a folder",
    "empty": "the file must hold media, got an empty file",
    "text": "the file must be media that FFmpeg can decode, got InvalidDataError",
    "header": "must",
    "truncated webm": r"the (video|audio) must last 4\.\d+ s as promised, got decoded \d+ of \d+",
    "truncated mp4": "the file must be media that FFmpeg can decode",
    "truncated index first": "the (video|audio|file) must",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_media_errors(tmp_path, case):
    path = damaged(tmp_path, case)
    with pytest.raises(MediaError, match=DAMAGED[case]) as error:
        decode_clip(path, 1.0, num_frames=28, num_samples=130_000)
    assert error.value.path == path
    assert str(error.value) == f"{path}: {error.value.reason}"


def test_mutated_files_raise_nothing_else(tmp_path):
    sources = [ramp(tmp_path / name, seconds=1.0).read_bytes() for name in ("a.mp4", "b.webm", "c.avi")]
    generator = torch.Generator().manual_seed(0)
    failed = 0
    for number in range(90):
        content = bytearray(sources[number % 3])
        for place in torch.randint(len(content), (1 + number % 40,), generator=generator).tolist():
            content[place] ^= 1 << number % 8
        path = tmp_path / "mutated.mp4"
        path.write_bytes(content)
        try:
            clip = decode_clip(path, 0.1, num_frames=8, num_samples=30_000)
        except MediaError:
            failed += 1
        else:
            assert clip.video is None or len(clip.video) == 8
            assert clip.audio is None or (len(clip.audio) == 30_000 and clip.audio.abs().max() <= 1)
    assert 10 < failed < 90


def test_limits(tmp_path):
    path = ramp(tmp_path / "c.mp4")
    with pytest.raises(MediaError, match=r"a frame must have at most 1000 pixels, got 48 x 36"):
        probe(path, MediaLimits(max_pixels=1000))
    with pytest.raises(MediaError, match=r"the file must last at most 3 s, got 4"):
        probe(path, MediaLimits(max_seconds=3))
    with pytest.raises(MediaError, match=r"a window must need at most 10 decoded \w+ frames, got more"):
        decode_clip(path, 2.0, num_frames=8, limits=MediaLimits(max_frames=10))
    with pytest.raises(ValueError, match="MediaLimits: max_frames must be above 0, got 0"):
        MediaLimits(max_frames=0)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    """A PNG of 12,000 x 12,000 black pixels in 2 MB."""
    side = 12_000
    rows = zlib.compressobj(1)
    data = b"".join(rows.compress(bytes(1 + side * 3)) for _ in range(side)) + rows.flush()
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "c.mp4").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaError, match="a frame must have at most 67108864 pixels, got"):
        decode_clip(tmp_path / "c.mp4", 0.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB; the picture has 432 MB


def test_bad_windows(tmp_path):
    path = ramp(tmp_path / "c.mp4")
    for start in (-0.1, 4.5, float("nan")):
        with pytest.raises(MediaError, match=r"start must be in \[0, 4\.0"):
            decode_clip(path, start)
    with pytest.raises(ValueError, match="rates above 0, got 32 frames at 0 fps"):
        decode_clip(path, 0.0, fps=0)


def test_windows():
    starts = [random_window(10.0, 4.0, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert 0 <= min(starts) < 0.5
    assert 5.5 < max(starts) <= 6.0
    assert random_window(3.0, 4.0, torch.Generator()) == 0.0
    assert even_windows(10.0, 4.0) == [3.0]
    assert even_windows(10.0, 4.0, 4) == [0.0, 2.0, 4.0, 6.0]
    assert even_windows(1.0, 4.0, 2) == [0.0, 0.0]


def test_nearest_captions():
    captions = [
        Caption("far", 30, 31),
        Caption("before", 7, 8),
        Caption("inside", 11, 12),
        Caption("across", 9, 13),
        Caption("after", 14.5, 20),
    ]
    names = [c.text for c in nearest_captions(captions, 10.0, 14.0, 7)]
    assert names == ["across", "inside", "after", "before", "far", "across", "inside"]
    assert [c.text for c in nearest_captions(captions, 10.0, 14.0, 2)] == ["across", "inside"]
    assert nearest_captions([], 0.0, 1.0, 5) == []
