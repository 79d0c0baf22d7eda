import json
import threading
from dataclasses import replace
from itertools import islice

import pytest
import torch
from media_files import write_media

from vatt_engine.data.augment import AugmentConfig, center_crop
from vatt_engine.data.loader import DataConfig, Loader, Quarantine, QuarantineError
from vatt_engine.data.manifest import Caption, Sample, sample_id
from vatt_engine.data.media import decode, decode_clip
from vatt_engine.data.words import Vocabulary

WORDS = Vocabulary(["<pad>", "<unk>", "clip", "zero", "one", "two", "three", "four", "five", "six", "early", "late"])
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
SMALL = DataConfig(
    batch_size=2,
    num_frames=4,
    fps=5.0,
    frame_size=32,
    num_samples=3_200,
    sample_rate=8_000,
    num_candidates=3,
    max_words=4,
    num_threads=2,
    augment=AugmentConfig(crop="vgg"),
)


def sample(path, index, captions=None, label=None):
    captions = (Caption(f"clip {NUMBERS[index]}", 0.0, 2.0),) if captions is None else captions
    return Sample(index, sample_id(path.name), path, captions, label, index + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven clips of 2 s; the level of grey and the pitch are their index."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(7):
        frames = torch.full((20, 36, 48, 3), 30 * index + 20, dtype=torch.uint8)
        frames[torch.arange(20), :, torch.arange(20) * 2] = 255  # a bar that moves
        wave = 0.5 * torch.sin(torch.arange(16_000) * (0.1 + 0.05 * index))
        write_media(folder / f"{index}.mp4", frames, fps=10, waveform=wave, sample_rate=8_000, options={"g": "5"})
    return folder


@pytest.fixture
def samples(folder):
    return [sample(folder / f"{index}.mp4", index, label=index * 10) for index in range(7)]


def take(loader, count):
    with loader:
        return list(islice(loader, count))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.tensors().keys() == b.tensors().keys()
        for name, tensor in a.tensors().items():
            assert torch.equal(tensor, b.tensors()[name]), name


def test_a_training_batch(samples):
    batch = take(Loader(samples, SMALL, WORDS, seed=3), 1)[0]
    assert batch.video.dtype == torch.uint8
    assert tuple(batch.video.shape) == (2, 4, 32, 32, 3)
    assert tuple(batch.audio.shape) == (2, 3_200)
    assert batch.audio_mask.tolist() == batch.text_mask.tolist() == [True, True]
    for row, label in enumerate(batch.label.tolist()):
        assert batch.sample_id[row] == samples[label // 10].id
        assert batch.text[row].tolist() == [[2, 3 + label // 10, 0, 0]] * 3


def test_an_epoch_is_a_permutation(samples):
    batches = take(Loader(samples, SMALL, seed=1), 6)
    epochs = [[i for batch in batches[k : k + 3] for i in batch.label.tolist()] for k in (0, 3)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)  # 3 batches of 2 of the 7; the rest is dropped
    assert epochs[0] != epochs[1]
    assert batches[0].text is None
    other = take(Loader(samples, SMALL, seed=2), 3)
    assert [i for batch in other for i in batch.label.tolist()] != epochs[0]
    assert len(Loader(samples, SMALL)) == 3


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_threads_change_nothing(samples, cache):
    config = replace(SMALL, cache=cache)
    one = take(Loader(samples, replace(config, num_threads=1, prefetch=1), WORDS, seed=5), 7)
    assert_same(one, take(Loader(samples, replace(config, num_threads=4, prefetch=3), WORDS, seed=5), 7))
    assert_same(one, take(Loader(samples, config, WORDS, seed=5), 7))


def test_augmentation_is_of_seed_epoch_and_sample_alone(samples):
    def by_sample(batches):
        return {int(i): batch.video[row] for batch in batches for row, i in enumerate(batch.sample_id)}

    first = by_sample(take(Loader(samples, SMALL, seed=5), 3))
    fewer = by_sample(take(Loader(samples, SMALL, seed=5, batch_size=3), 2))
    both = first.keys() & fewer.keys()
    assert len(both) >= 5
    assert all(torch.equal(first[i], fewer[i]) for i in both)
    later = by_sample(take(Loader(samples, SMALL, seed=5), 6)[3:])
    assert any(not torch.equal(first[i], later[i]) for i in first.keys() & later.keys())


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_resume_at_every_place(samples, cache):
    config = replace(SMALL, cache=cache, prefetch=3)
    truth = take(Loader(samples, config, WORDS, seed=7), 8)
    with Loader(samples, config, WORDS, seed=7) as loader:
        batches = iter(loader)
        for taken in range(6):
            state = json.loads(json.dumps(loader.state_dict()))
            resumed = Loader(samples, config, WORDS, seed=0)
            resumed.load_state_dict(state)
            assert_same(take(resumed, 2), truth[taken : taken + 2])
            assert_same([next(batches)], truth[taken : taken + 1])


def test_a_state_of_other_files_is_refused(samples):
    state = Loader(samples, SMALL).state_dict()
    assert {key: state[key] for key in ("seed", "epoch", "position")} == {"seed": 0, "epoch": 0, "position": 0}
    with pytest.raises(ValueError, match="the manifest must be the one the state was saved with"):
        Loader(samples[:6], SMALL).load_state_dict(state)


def test_evaluation_is_plain(samples):
    batches = take(Loader(samples, SMALL, WORDS, train=False), 100)
    assert [batch.label.tolist() for batch in batches] == [[0, 10], [20, 30], [40, 50], [60]]
    clip = decode_clip(
        samples[2].path, 0.6, num_frames=4, fps=5.0, num_samples=3_200, sample_rate=8_000, short_side=SMALL.short_side
    )
    assert torch.equal(batches[1].video[0], center_crop(clip.video, 32))
    assert torch.equal(batches[1].audio[0], clip.audio)
    loader = Loader(samples, SMALL, train=False, batch_size=7)
    assert len(loader) == 1
    assert_same(take(loader, 9), take(loader, 9))


def test_evaluation_windows_are_rows(samples):
    batches = take(Loader(samples[:2], replace(SMALL, num_windows=3), WORDS, train=False, batch_size=4), 9)
    assert [batch.label.tolist() for batch in batches] == [[0, 0, 0, 10], [10, 10]]
    clip = decode_clip(
        samples[1].path, 1.2, num_frames=4, fps=5.0, num_samples=3_200, sample_rate=8_000, short_side=SMALL.short_side
    )
    assert torch.equal(batches[1].video[1], center_crop(clip.video, 32))


def test_the_cache_cuts_the_decoded_file(samples):
    """Its definition: decode once at the clip's rates, cut from the frame nearest to the window's start."""
    config = replace(SMALL, cache="memory")
    batch = take(Loader(samples, config, train=False, batch_size=7), 1)[0]
    for row, one in enumerate(samples):
        track = decode(one.path, fps=5.0, sample_rate=8_000, short_side=config.short_side)
        clip = track.cut((track.duration - config.clip_seconds) / 2, num_frames=4, num_samples=3_200)
        assert torch.equal(batch.video[row], center_crop(clip.video, 32))
        assert torch.equal(batch.audio[row], clip.audio)


def test_the_cache_decodes_once(samples, monkeypatch):
    from vatt_engine.data import clips

    opened = []
    open_media = clips.open_media

    def counted(sample, limits, **form):
        opened.append(sample.path)
        return open_media(sample, limits, **form)

    monkeypatch.setattr(clips, "open_media", counted)
    take(Loader(samples, replace(SMALL, cache="memory", num_windows=3), train=False), 99)
    assert sorted(opened) == sorted(one.path for one in samples)


def test_a_full_cache_is_an_error(samples):
    config = replace(SMALL, cache="memory", cache_gib=1e-4)
    with pytest.raises(ValueError, match=r"cache_gib must hold the whole set where cache is 'memory', got 0\.0001 GiB"):
        take(Loader(samples, config), 3)


def with_faults(folder, tmp_path):
    """Seven samples: four good, one of them silent and without captions, and three that cannot be used."""
    write_media(tmp_path / "silent.mp4", torch.zeros(20, 36, 48, 3, dtype=torch.uint8), fps=10)
    write_media(tmp_path / "sound.mp3", None, waveform=torch.zeros(20_000), sample_rate=16_000)
    (tmp_path / "text.mp4").write_text("no film")
    paths = [folder / "0.mp4", tmp_path / "gone.mp4", folder / "1.mp4", tmp_path / "text.mp4"]
    paths += [tmp_path / "silent.mp4", tmp_path / "sound.mp3", folder / "2.mp4"]
    return [sample(path, index, captions=() if index == 4 else None, label=index) for index, path in enumerate(paths)]


REASONS = {
    "gone.mp4": "the path must name a file, got no such file.",
    "text.mp4": "the file must be media that FFmpeg can decode, got InvalidDataError",
    "sound.mp3": "the file must have a video track, got none.",
}


def test_bad_samples_are_replaced_and_named(folder, tmp_path):
    samples = with_faults(folder, tmp_path)
    config = replace(SMALL, batch_size=7, max_bad_fraction=0.9)
    loader = Loader(samples, config, WORDS, seed=1, quarantine=tmp_path / "run" / "quarantine.jsonl")
    batches = take(loader, 4)
    for batch in batches:
        assert tuple(batch.video.shape) == (7, 4, 32, 32, 3)
        labels = batch.label.tolist()
        assert set(labels) == {0, 2, 4, 6}
        for row, label in enumerate(labels):
            assert bool(batch.audio_mask[row]) == bool(batch.text_mask[row]) == (label != 4)
            if label == 4:
                assert not batch.audio[row].any()
                assert not batch.text[row].any()
    assert_same(batches, take(Loader(samples, replace(config, num_threads=1), WORDS, seed=1), 4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == sorted(str(tmp_path / name) for name in REASONS)
    for line in lines:
        assert line["reason"].startswith(REASONS[line["path"].rpartition("/")[2]])
        assert (line["epoch"], line["skipped"]) == (0, True)
        assert str(samples[line["line"] - 1].path) == line["path"]
    assert len(loader.quarantine) == 3
    assert loader.quarantine.num_bad >= 12
    again = Loader(samples, config, WORDS, seed=1, quarantine=tmp_path / "run" / "quarantine.jsonl")
    take(again, 1)
    assert len(again.quarantine) == 3
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 3


def test_quarantine_survives_a_cut_line(tmp_path):
    path, one = tmp_path / "quarantine.jsonl", sample(tmp_path / "a\u2028b.mp4", 0)
    Quarantine(path).add(one, "reason one", 0)
    path.write_text(path.read_text() + '{"path": "a.m', encoding="utf-8")
    again = Quarantine(path)
    again.add(one, "reason one", 3)
    again.add(one, "reason two", 3)
    assert [entry["reason"] for entry in Quarantine(path).entries] == ["reason one", "reason two"]
    assert len(again) == 1


def test_evaluation_skips_bad_samples(folder, tmp_path):
    loader = Loader(with_faults(folder, tmp_path), SMALL, WORDS, train=False)
    assert [batch.label.tolist() for batch in take(loader, 9)] == [[0], [2], [4], [6]]
    assert len(loader.quarantine) == 3
    with pytest.raises(QuarantineError, match=r"a file of the set must be usable, got none. The first: .*gone\.mp4"):
        take(Loader(with_faults(folder, tmp_path)[1:2], SMALL, train=False), 9)


def test_too_many_bad_samples_stop_training(folder, tmp_path):
    samples = with_faults(folder, tmp_path)
    with pytest.raises(QuarantineError, match=r"at most 20\.0% of the samples must be bad, got \d+ of 10\d.*gone"):
        take(Loader(samples, replace(SMALL, batch_size=7, max_bad_fraction=0.2)), 100)
    with pytest.raises(QuarantineError, match=r"one of 20 samples in a row must be usable, got none"):
        take(Loader([samples[1], samples[3]], replace(SMALL, max_bad_fraction=1.0)), 1)


def test_captions_beyond_the_file_are_noted(folder, tmp_path):
    late = Caption("late", 50.0, 60.0)
    samples = [
        sample(folder / "0.mp4", 0, captions=(late, Caption("early", 0.0, 1.0))),
        sample(folder / "1.mp4", 1, captions=(Caption("at the end", 2.0, 3.0),)),
        sample(folder / "2.mp4", 2, captions=(Caption("...", 0.0, 2.0), Caption("early", 1.9, 2.0))),
        sample(folder / "3.mp4", 3, captions=(Caption("?!", 0.0, 2.0),)),
    ]
    loader = Loader(samples, SMALL, WORDS, train=False, batch_size=4)
    batch = take(loader, 1)[0]
    assert batch.text_mask.tolist() == [True, False, True, False]
    assert batch.text[:, :, 0].tolist() == [[10, 10, 10], [0, 0, 0], [10, 10, 10], [0, 0, 0]]
    assert [(entry["line"], entry["skipped"]) for entry in loader.quarantine.entries] == [(1, False), (2, False)]
    assert loader.quarantine.entries[0]["reason"] == "captions must begin within the 2.000 s of the file, got 1 later."
    assert len(loader.quarantine) == 0


def test_threads_end(samples):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("vatt-loader")]

    loader = Loader(samples, SMALL)
    batches, torch_threads = iter(loader), torch.get_num_threads()
    next(batches)
    assert threads()
    assert torch.get_num_threads() == torch_threads  # one for each loader thread, but not for training
    loader.close()
    assert not threads()


def test_small_sets_and_text_names(samples):
    with pytest.raises(ValueError, match=r"samples must fill a batch of 8, got 7. Set a smaller data\.batch_size"):
        Loader(samples, SMALL, batch_size=8)
    with pytest.raises(ValueError, match="samples must hold a file, got 0"):
        Loader([], SMALL, train=False)
    named = [replace(one, label="cat") for one in samples]
    assert take(Loader(named, SMALL), 1)[0].label is None
    silent = take(Loader(samples, replace(SMALL, num_samples=0)), 1)[0]
    assert silent.audio is None
    assert silent.audio_mask is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_samples": -1}, "num_samples must be at least 0, got -1"),
        ({"fps": 0.0}, r"fps must be above 0, got 0\.0"),
        ({"fps": float("nan")}, "fps must be above 0, got nan"),
        ({"cache": "disk"}, "cache must be 'none' or 'memory', got 'disk'"),
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction must be in \[0, 1\], got 1.5"),
        ({"decode_size": 100}, r"decode_size must be at least frame_size, got 100\. Frames of 224"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=f"DataConfig: {message}"):
        DataConfig(**changes)
