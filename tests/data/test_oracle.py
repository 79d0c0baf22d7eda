"""The oracle of benchmarks/oracle.py: it sees planted mistakes, and our reader agrees with ffmpeg on what ffmpeg makes.

The tests marked `oracle` need the programs ffmpeg and ffprobe, which nothing else needs: `pytest tests/data -m oracle`.
"""

import subprocess

import pytest
import torch

from benchmarks import oracle
from benchmarks.oracle_check import DIFFERS, check, prints_of
from benchmarks.oracle_compare import compare_pictures, compare_sound
from benchmarks.oracle_ffmpeg import RATE, Pictures, Piece, Sound, pieces_of
from vatt_engine.data.media import Media


def film(num_frames=40, fps=25.0):
    """Pictures that all differ, and what the oracle would know of them."""
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (num_frames, 6, 8, 3), generator=random, dtype=torch.uint8)
    frames = frames.repeat_interleave(8, 1).repeat_interleave(8, 2)
    prints = prints_of(frames).half()
    times = torch.arange(num_frames, dtype=torch.float64) / fps
    return frames, Pictures(times, prints, [(48, 64)] * num_frames, False)


def pictures_found(frames, right, fps=25.0, start=0.0):
    times = [start + i / fps for i in range(len(frames))]
    return compare_pictures(frames[0], prints_of(frames), times, right)


def test_right_pictures_agree():
    frames, right = film()
    found = pictures_found(frames[5:25], right, start=0.2)
    assert found.differences == []
    assert (found.frames, found.told_apart) == (20, 20)


def test_pictures_that_cannot_be_told_apart_are_right_either_way():
    frames, right = film()
    frames[7] = frames[8]
    right.prints[7] = right.prints[8]
    assert pictures_found(frames[[5, 6, 8, 7, 9]], right, start=0.2).differences == []


def test_a_picture_left_out_is_seen():
    frames, right = film()
    found = pictures_found(frames[[5, 6, 8, 9, 10]], right, start=0.2)
    assert found.differences == ["3 of 5 pictures are others: got 5 6 8 9 10, right 5 6 7 8 9"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.flip(2), "the picture is as it is, mirrored"),
        (lambda f: f.flip(1), "the picture is upside down, mirrored"),
        (lambda f: f.flip(1, 2), "the picture is upside down"),
        (lambda f: f // 2, "colours differ by"),
    ],
)
def test_a_mirrored_or_discoloured_picture_is_seen(change, words):
    frames, right = film()
    (difference,) = pictures_found(change(frames[5:10]), right, start=0.2).differences
    assert words in difference


def test_a_turned_picture_is_seen_also_by_its_size():
    frames, right = film()
    size, turned = pictures_found(torch.rot90(frames[:5], 1, (1, 2)), right).differences
    assert size == "the picture is 64x48, right 48x64"
    assert turned == "the picture is turned left"


def noise(seconds, seed=0):
    return torch.rand(round(seconds * RATE), generator=torch.Generator().manual_seed(seed)) - 0.5


def test_right_sound_agrees_within_a_fraction_of_a_sample():
    wave = torch.sin(torch.arange(2 * RATE) * 0.05) * noise(0.01).repeat(200)[: 2 * RATE]
    right = Sound(wave, [Piece(10.0, 0, len(wave))], [])
    found = compare_sound(wave[4800:52800], 48_000, 10.1, right, 1e-3)
    assert found.differences == []
    assert abs(found.lag_ms) < 0.01
    assert found.snr > 60


@pytest.mark.parametrize("late", [480, -480, 100])
def test_late_sound_is_seen_with_its_lag(late):
    wave = noise(2.0)
    right = Sound(wave, [Piece(0.0, 0, len(wave))], [])
    found = compare_sound(wave[9600 - late : 57600 - late], 48_000, 0.2, right, 1e-3)
    (difference,) = found.differences
    assert difference.startswith(f"the sound is {1e3 * late / RATE:+.2f} ms late")


def test_a_dropout_is_seen():
    wave = noise(2.0)
    ours = wave[:48000].clone()
    ours[20000:20480] = 0
    (difference,) = compare_sound(ours, 48_000, 0.0, Sound(wave, [Piece(0.0, 0, len(wave))], []), 1e-3).differences
    assert difference.startswith("the sound has 20 dB, in its worst 20 ms 5 dB")


def test_sound_before_the_first_and_after_the_last_sample():
    wave = noise(1.0)
    right = Sound(wave, [Piece(5.0, 0, len(wave))], [])
    assert compare_sound(torch.zeros(4800), 0, 1.0, right, 1e-3).differences == []
    assert compare_sound(torch.zeros(4800), 4800, 1.0, right, 1e-3).differences == [
        "4800 samples are called real, right 0"
    ]
    (short,) = compare_sound(torch.zeros(48000), 0, 5.5, right, 1e-3).differences
    assert short == "the sound ends after 0.000 s of the window, right 0.500 s"


def test_a_gap_that_stays_is_a_hole_where_the_rule_says_so():
    frames = [(number * 1000 + 330 * (number >= 3), 48_000, 1000) for number in range(80)]
    assert pieces_of(frames, 80_000) == [Piece(0.0, 0, 80_000)]
    assert pieces_of(frames, 80_000, patience=1.0) == [Piece(0.0, 0, 3000), Piece(3330 / 48_000, 3000, 80_000)]
    trembling = [(number * 1000 + 330 * (number % 2), 48_000, 1000) for number in range(80)]
    assert pieces_of(trembling, 80_000, patience=1.0) == [Piece(0.0, 0, 80_000)]


# ----------------------------------------------------------------------------------------------------------------------

PICTURES = "testsrc2=size=160x120:rate={rate}:duration=3"
SOUND = "aevalsrc='0.3*sin(2*PI*t*(200+150*t))+0.2*random(0)':s=44100:d=3"
VIDEOS = {  # name: options of ffmpeg
    "h264": "-c:v libx264 -bf 2 -g 20 -pix_fmt yuv420p",
    "hevc": "-c:v libx265 -x265-params log-level=none -pix_fmt yuv420p",
    "mpeg4": "-c:v mpeg4 -bf 2 -q:v 3",
    "packed": "-c:v libxvid -bf 2 -q:v 3",
    "mpeg2": "-c:v mpeg2video -bf 2 -q:v 3",
    "mpeg1": "-c:v mpeg1video -q:v 3",
    "vp8": "-c:v libvpx -b:v 1M -deadline realtime",
    "vp9": "-c:v libvpx-vp9 -b:v 1M -deadline realtime -cpu-used 8",
    "theora": "-c:v libtheora -q:v 7",
    "wmv2": "-c:v wmv2 -q:v 3",
    "flv1": "-c:v flv1 -q:v 3",
    "mjpeg": "-c:v mjpeg -q:v 3 -pix_fmt yuvj420p",
    "prores": "-c:v prores_ks",
    "h263": "-c:v h263 -s 176x144 -q:v 3",
}
SOUNDS = {
    "aac": "-c:a aac",
    "mp3": "-c:a libmp3lame",
    "mp2": "-c:a mp2",
    "ac3": "-c:a ac3",
    "opus": "-c:a libopus -ar 48000",
    "vorbis": "-c:a libvorbis",
    "flac": "-c:a flac",
    "pcm": "-c:a pcm_s16le",
    "wma": "-c:a wmav2",
    "ima": "-c:a adpcm_ima_wav",
    "ms": "-c:a adpcm_ms",
    "amr": "-c:a libopencore_amrnb -ar 8000 -ac 1",
    "none": "-an",
}
COMBINATIONS = """
h264/aac.mp4 h264/mp3.mp4 hevc/aac.mp4 vp9/opus.mp4 mpeg4/aac.mp4 h264/none.mp4
h264/aac.mov prores/pcm.mov mjpeg/pcm.mov
h264/aac.mkv vp9/opus.mkv mpeg2/ac3.mkv h264/flac.mkv hevc/vorbis.mkv
vp8/vorbis.webm vp9/opus.webm
mpeg4/mp3.avi packed/mp3.avi h264/mp3.avi mjpeg/pcm.avi h264/none.avi
mpeg1/mp2.mpg mpeg2/mp2.mpg mpeg2/ac3.vob mpeg2/mp2.ts h264/aac.ts h264/aac.flv flv1/mp3.flv
wmv2/wma.wmv theora/vorbis.ogv h263/amr.3gp h264/none.h264 hevc/none.hevc
none/aac.m4a none/mp3.mp3 none/flac.flac none/opus.ogg none/vorbis.ogg none/pcm.wav none/ima.wav none/ms.wav
none/wma.wma
"""


def make(folder, combination):
    video, sound = combination.partition(".")[0].split("/")
    path = folder / combination.replace("/", "-")
    rate = "30000/1001" if path.suffix in (".mpg", ".vob") else "25"
    inputs = ["-f", "lavfi", "-i", PICTURES.format(rate=rate), "-f", "lavfi", "-i", SOUND]
    options = [*(VIDEOS[video].split() if video in VIDEOS else ["-vn"]), *SOUNDS[sound].split()]
    subprocess.run(["ffmpeg", "-v", "error", "-y", *inputs, *options, "-shortest", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for combination in COMBINATIONS.split():
        make(folder, combination)
    return folder


@pytest.mark.oracle
def test_windows_are_those_of_ffmpeg(made, capsys):
    assert oracle.main([str(made)]) == 0, capsys.readouterr().out


@pytest.mark.oracle
def test_prepared_shards_are_the_raw_reading(made, capsys):
    assert oracle.main([str(made), "--prepared"]) == 0, capsys.readouterr().out


class Planted:
    """A reader with a mistake in what it reads."""

    def __init__(self, path, change):
        self.media, self.change = Media(path), change
        self.info = self.media.info

    def read(self, start, **window):
        return self.change(self.media.read(start, **window))


def drops_a_frame(clip):
    kept = [i for i in range(len(clip.video)) if i != 4] + [len(clip.video) - 1]
    return clip._replace(video=clip.video[kept])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda clip: clip, ""),
        (drops_a_frame, "pictures are others"),
        (lambda clip: clip._replace(audio=clip.audio.roll(480)), "the sound is +10.00 ms late"),
        (lambda clip: clip._replace(video=clip.video.flip(2)), "the picture is as it is, mirrored"),
        (lambda clip: clip._replace(video=clip.video.transpose(1, 2)), "the picture is turned"),
    ],
    ids=["right", "frame", "sound", "mirror", "turned"],
)
def test_a_planted_mistake_in_the_reader_is_seen(tmp_path, change, words):
    path = make(tmp_path, "h264/aac.mp4")
    row = check(path, reader=lambda path: Planted(path, change))
    assert (row.verdict == DIFFERS) == bool(words), row  # AAC's noise may need its rule
    assert words in row.detail
