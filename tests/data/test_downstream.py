"""What downstream sets need of the loader: sound alone, several classes per sample, images, and crops."""

from __future__ import annotations

from dataclasses import replace

import av
import pytest
import torch
from media_files import write_media

from vatt_engine.data.augment import AugmentConfig, side_crop
from vatt_engine.data.config import DataConfig
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import Sample, sample_id
from vatt_engine.data.media import Media

SOUND = DataConfig(batch_size=2, num_frames=0, num_samples=4_000, sample_rate=8_000, num_candidates=0, num_threads=1)
PLAIN = AugmentConfig(crop="none", flip=0.0, color_jitter=0.0, audio_noise=0.0)


def samples_of(*paths, labels=()):
    labels = labels or range(len(paths))
    return [Sample(i, sample_id(str(path)), path, label=label) for i, (path, label) in enumerate(zip(paths, labels))]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Two wav files of 2 s, each of one value."""
    folder = tmp_path_factory.mktemp("sounds")
    for number in (1, 2):
        wave = torch.full((16_000,), number / 4)
        write_media(folder / f"{number}.wav", None, waveform=wave, sample_rate=8_000)
    return [folder / "1.wav", folder / "2.wav"]


@pytest.mark.parametrize("how", [{}, {"cache": "memory"}, {"num_workers": 1}], ids=str)
def test_sound_alone(sounds, how):
    for train in (True, False):
        with Loader(samples_of(*sounds), replace(SOUND, augment=PLAIN, **how), train=train) as loader:
            batch = next(iter(loader))
        assert batch.video is None
        assert batch.audio_mask.tolist() == [True, True]
        rows = sorted(batch.audio.tolist())
        torch.testing.assert_close(torch.tensor(rows), torch.tensor([[0.25], [0.5]]).expand(2, 4_000))


def test_sound_of_films_and_films_without(sounds, tmp_path):
    frames = torch.zeros(10, 16, 16, 3, dtype=torch.uint8)
    write_media(tmp_path / "film.mkv", frames, fps=10, waveform=torch.full((8_000,), 0.5), sample_rate=8_000,
                video_codec="mjpeg", audio_codec="pcm_s16le")  # fmt: skip
    write_media(tmp_path / "mute.mkv", frames, fps=10, video_codec="mjpeg")
    samples = samples_of(tmp_path / "film.mkv", tmp_path / "mute.mkv", *sounds)
    with Loader(samples, replace(SOUND, cache="memory"), train=False) as loader:
        batches = list(loader)
    assert [len(batch) for batch in batches] == [1, 2]
    torch.testing.assert_close(batches[0].audio, torch.full((1, 4_000), 0.5), atol=1e-3, rtol=0)
    assert [entry["reason"] for entry in loader.quarantine.entries] == ["the file must have an audio track, got none."]
    with (
        Loader(samples[2:], DataConfig(frame_size=16), train=False) as loader,
        pytest.raises(ValueError, match="video"),
    ):
        list(loader)


def test_several_classes_per_sample(sounds):
    config = replace(SOUND, num_classes=4)
    with Loader(samples_of(*sounds, labels=[(0, 3), 2]), config, train=False) as loader:
        (batch,) = loader
    assert batch.label.tolist() == [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
    assert batch.split(2)[1].label.tolist() == [[0.0, 0.0, 1.0, 0.0]]
    for label in ((4,), -1, "dog", None):
        with pytest.raises(ValueError, match=r"2\.wav: label must be class numbers in 0\.\.3 where data\.num_classes"):
            Loader(samples_of(*sounds, labels=[(0,), label]), config)
    with Loader(samples_of(*sounds, labels=[7, 2]), SOUND, train=False) as loader:
        assert next(iter(loader)).label.tolist() == [7, 2]


def test_an_image_is_a_clip(tmp_path):
    frame = torch.arange(32, dtype=torch.uint8)[:, None].expand(32, 32)[..., None].expand(32, 32, 3).contiguous()
    with av.open(str(tmp_path / "image.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")), *stream.encode()])
    config = DataConfig(num_frames=4, fps=25.0, frame_size=32, num_samples=0, num_candidates=0, batch_size=1)
    for train in (True, False):
        with Loader(samples_of(tmp_path / "image.png"), replace(config, augment=PLAIN), train=train) as loader:
            batch = next(iter(loader))
        assert torch.equal(batch.video, frame.expand(1, 4, 32, 32, 3))
        assert batch.audio is None


def test_crops_of_every_window(tmp_path, monkeypatch):
    """Column x of frame t is 4 x + t: views are the windows in order, and of each the start, middle and end.

    A window is decoded once for its crops, the second one twice, since they lie in two batches.
    """
    starts, read = [], Media.read
    monkeypatch.setattr(Media, "read", lambda self, start, **how: starts.append(start) or read(self, start, **how))
    frames = (4 * torch.arange(48)[None] + torch.arange(20)[:, None]).to(torch.uint8)
    frames = frames[:, None, :, None].expand(20, 16, 48, 3)
    write_media(tmp_path / "wide.mkv", frames.contiguous(), fps=10, video_codec="mjpeg", options={"q:v": "1"})
    config = DataConfig(num_frames=4, frame_size=16, num_samples=0, num_candidates=0, num_windows=2, num_crops=3)
    with Loader(samples_of(tmp_path / "wide.mkv"), config, train=False, batch_size=4) as loader:
        assert len(loader) == 2
        video = torch.cat([batch.video for batch in loader]).float()
    assert sorted(starts) == [0.0, 1.6, 1.6]
    expected = [4 * left + start for start in (0, 16) for left in (0, 16, 32)]
    found = video[:, 0, :, 4].mean((1, 2)) - 4 * 4
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=3.0, rtol=0)
    tall = torch.arange(48, dtype=torch.uint8)[:, None, None].expand(48, 16, 3)[None]
    with Loader(samples_of(tmp_path / "wide.mkv"), replace(config, num_crops=1), train=False) as loader:
        torch.testing.assert_close(next(iter(loader)).video[0].float(), video[1], atol=0, rtol=0)
    assert [side_crop(tall, 16, i, 3)[0, 0, 0, 0].item() for i in range(3)] == [0, 16, 32]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1 where num_frames is 0, got 0"),
        ({"num_crops": 0}, "num_crops must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"num_frames": -1}, "num_frames must be at least 0, got -1"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SOUND, **changes)
