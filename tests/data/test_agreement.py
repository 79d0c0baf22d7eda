"""Training, `data check`, `prepare` and DALI read every file alike: also those of which others read something else."""

import json
import struct
from fractions import Fraction
from itertools import product

import av
import pytest
import torch
from media_files import busy, numbered, numbers_of, write_media

from vatt_engine.data.clips import ClipReader
from vatt_engine.data.config import DataConfig
from vatt_engine.data.dali import DaliReader
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import read_manifest
from vatt_engine.data.prepare import PrepareConfig, prepare
from vatt_engine.data.shards import read_index, read_shards
from vatt_engine.tasks import data_check

RATE, SECONDS = 48_000, 2.4
FORM = {
    "num_frames": 5,
    "fps": 10.0,
    "num_samples": RATE // 2,
    "sample_rate": RATE,
    "frame_size": 64,
    "decode_size": 128,
    "batch_size": 1,
}
STARTS = (0.0, 0.8, 1.8)


def tone(seconds=SECONDS):
    time = torch.arange(round(seconds * RATE), dtype=torch.float64) / RATE
    return 0.5 * torch.sin(2 * torch.pi * (300 * time + 200 * time.square())).float()


def mirror(path):
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    content[place : place + 36] = struct.pack(">9i", -(1 << 16), 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def write_anamorphic(path):
    """Pixels that are 4:3 times as wide as high."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for frame in numbered(24).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    b_frames = {"bf": "2", "g": "12"}
    frames = numbered(60)
    write_media(
        folder / "h264.avi",
        frames,
        fps=25,
        waveform=tone(),
        audio_codec="adpcm_ms",
        options=b_frames,
        video_codec="libx264",
    )
    write_media(folder / "mpeg4.avi", frames, fps=25, waveform=tone(), audio_codec="pcm_s16le", options=b_frames)
    write_media(folder / "bare.h264", frames, fps=25, options=b_frames)
    write_media(folder / "program.mpg", busy(60), fps=25, waveform=tone(), options=b_frames | {"b": "1000000"})
    write_media(folder / "late.mkv", frames, fps=25, waveform=tone(0.9), sound_start=1.5, audio_codec="flac")
    write_media(folder / "late.wmv", frames, fps=25, waveform=tone(0.9), sound_start=1.5)
    write_media(folder / "mirrored.mp4", frames, fps=25, waveform=tone())
    mirror(folder / "mirrored.mp4")
    write_anamorphic(folder / "anamorphic.mp4")
    names = [path.name for path in sorted(folder.iterdir())]
    (folder / "all.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in names))
    return folder


@pytest.fixture(scope="module")
def sets(folder):
    """Samples of the files and of shards, in the manifest's order."""
    prepare(folder / "all.jsonl", folder / "shards", PrepareConfig(short_side=128, codec="mjpeg", crf=2, workers=1))
    return read_manifest(folder / "all.jsonl"), read_shards(folder / "shards")


def readers(**changes):
    config, how = DataConfig(**FORM, **changes), {"seed": 0, "train": False}
    return ClipReader(config, None, **how), DaliReader(config, None, device="cpu", **how)


def window(reader, sample, start):
    if isinstance(reader, DaliReader):
        with reader._context():
            return reader._clip(reader._media(sample), start, None)
    return reader._clip(reader._media(sample), start, None)


def test_windows_are_the_same_from_files_shards_and_dali(sets):
    pyav, dali = readers()
    for (file, prepared), start in product(zip(*sets), STARTS):
        raw = window(pyav, file, start)
        numbers = numbers_of(raw.video[:, raw.video.shape[1] // 2 :])
        for clip in (window(pyav, prepared, start), window(dali, prepared, start)):
            where = f"{file.path.name} from {start}"
            assert clip.start == pytest.approx(start)
            assert numbers_of(clip.video[:, clip.video.shape[1] // 2 :]) == numbers, where
            assert (clip.num_real_samples > 0) == (raw.num_real_samples > 0), where
            assert clip.set_note == raw.set_note
            if raw.num_real_samples:
                error = (clip.audio - raw.audio).square().mean() / raw.audio.square().mean()
                assert error < 1e-3, where
        if file.path.name in ("h264.avi", "mpeg4.avi", "bare.h264"):
            assert numbers == [
                round((start + i / 10) * 25) if (start * 10 + i) % 2 == 0 else int((start + i / 10) * 25)
                for i in range(5)
            ]
        if file.path.name.startswith("late"):
            assert (raw.num_real_samples > 0) == (start == 1.8)


def test_mirrors_are_kept_by_a_shard(sets):
    names = [file.path.name for file in sets[0]]
    place = names.index("mirrored.mp4")
    for sample in (sets[0][place], sets[1][place]):
        video = window(readers()[0], sample, 0.8).video
        assert numbers_of(video.flip(2))[:3:2] == [20, 25]


def test_pixels_of_any_shape_are_the_same_from_files_shards_and_dali(sets, folder):
    place = [file.path.name for file in sets[0]].index("anamorphic.mp4")
    pyav, dali = readers(pixel_aspect="square")
    clips = [window(pyav, sets[0][place], 0.8), window(pyav, sets[1][place], 0.8), window(dali, sets[1][place], 0.8)]
    assert [tuple(clip.video.shape[1:3]) for clip in clips] == [(64, 171)] * 3
    assert {clip.set_note for clip in clips} == {""}
    for clip in clips[1:]:
        assert (clip.video.float() - clips[0].video.float()).abs().mean() < 3
    (folder / "one.jsonl").write_text('{"path": "anamorphic.mp4"}\n')
    index = prepare(
        folder / "one.jsonl", folder / "square", PrepareConfig(short_side=64, workers=1, pixel_aspect="square")
    )
    (sample,) = read_shards(index)
    assert sample.video.aspect == 1.0
    rows = [row.values for row in read_index(index)]
    assert (rows[1]["video"]["width"], rows[1]["video"]["height"]) == (172, 64)
    assert window(pyav, sample, 0.8).set_note == window(readers()[0], sample, 0.8).set_note == ""


def test_every_file_can_be_used_and_what_is_true_of_the_set_is_said_once(sets, folder, capsys):
    text = "the pixels must be square, got 1.333 times as wide as high, taken as stored. See data.pixel_aspect."
    for data in (str(folder / "all.jsonl"), str(folder / "shards")):
        assert data_check.main([data, "--num-workers", "1"]) == 0
        said = capsys.readouterr().out
        assert f"{len(sets[0])} of {len(sets[0])} samples can be used, 1 of them with a note" in said
        assert said.count(f"{text}\n") == 2  # where it was seen first, and how often at the end
    twice = sets[0] + sets[1]
    with Loader(twice, DataConfig(**FORM, num_threads=1), train=False) as loader:
        masks = {int(batch.sample_id): bool(batch.audio_mask) for batch in loader}
    assert len(masks) == len(sets[0])  # ids are those of the manifest
    assert [entry["reason"] for entry in loader.quarantine.entries] == [text]
