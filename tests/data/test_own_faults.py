"""A fault of our own code is no bad file: it ends the run with its place, however the file was read or written."""

from __future__ import annotations

import traceback

import av
import pytest
import torch
from media_files import write_media

from vatt_engine.data import pictures, transcode, workers
from vatt_engine.data.config import DataConfig
from vatt_engine.data.dali import DaliLoader
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import Sample, write_manifest
from vatt_engine.data.media import MediaError, probe
from vatt_engine.data.prepare import PrepareConfig, prepare
from vatt_engine.data.shards import read_shards
from vatt_engine.data.words import Vocabulary
from vatt_engine.faults import is_of_input, place_of

CONFIG = DataConfig(
    batch_size=1,
    num_frames=2,
    fps=5.0,
    frame_size=16,
    num_samples=800,
    sample_rate=8_000,
    num_candidates=0,
    num_threads=1,
)
# What is planted: a call with an argument that the library lacks, a name that it lacks, and a value it does not take.
PLANTS = {
    "TypeError": "lambda *_, **__: open(no_such_argument=1)",
    "AttributeError": "lambda *_, **__: open.no_such_name",
    "ValueError": "lambda *_, **__: int('no number')",
}
PLANT = """
from vatt_engine.data import pictures, {module}
pictures.scaled_size = {plant}
{module}.{entry}()
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = torch.arange(8).mul(30).to(torch.uint8)[:, None, None, None].expand(8, 32, 48, 3).contiguous()
    write_media(path, frames, fps=10, waveform=torch.zeros(38_400))
    return path


@pytest.fixture(scope="module")
def shards(clip):
    return prepare(manifest_of(clip), clip.parent / "shards", PrepareConfig(codec="mjpeg", workers=1))


def manifest_of(clip):
    write_manifest(clip.parent / "clips.jsonl", [Sample(0, 0, clip)])
    return clip.parent / "clips.jsonl"


def class_seen(plant):
    """`vatt` shows a ValueError as a message about bad input, so one of our own comes as another class."""
    return RuntimeError if plant == "ValueError" else {"TypeError": TypeError, "AttributeError": AttributeError}[plant]


def told(error):
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("plant", PLANTS)
def test_decoding_in_a_thread(clip, monkeypatch, plant):
    monkeypatch.setattr(pictures, "scaled_size", eval(PLANTS[plant]))
    with Loader([Sample(0, 0, clip)], CONFIG) as loader, pytest.raises(class_seen(plant)) as caught:
        next(iter(loader))
    assert f"reading {clip}" in told(caught.value)
    assert "pictures.py" in "".join(traceback.format_exception(caught.value))  # in a cause, too
    assert loader.quarantine.num_bad == 0


@pytest.mark.parametrize("plant", ["TypeError", "AttributeError"])
def test_decoding_in_a_process(clip, monkeypatch, plant):
    program = PLANT.format(module="workers", entry="serve", plant=PLANTS[plant])
    monkeypatch.setattr(workers, "PROGRAM", program)
    config = DataConfig(**vars(CONFIG) | {"num_workers": 1})
    with Loader([Sample(0, 0, clip)], config) as loader, pytest.raises(RuntimeError, match=plant) as caught:
        next(iter(loader))
    assert "pictures.py" in str(caught.value)
    assert str(clip) in str(caught.value)
    assert loader.quarantine.num_bad == 0


@pytest.mark.parametrize("plant", ["TypeError", "AttributeError"])
def test_transcoding(clip, tmp_path, monkeypatch, capfd, plant):
    program = PLANT.format(module="transcode", entry="main", plant=PLANTS[plant])
    monkeypatch.setattr(transcode, "PROGRAM", program)
    with pytest.raises(ChildProcessError, match="a worker must go on until the last file, got exit code 1"):
        prepare(manifest_of(clip), tmp_path / "out", PrepareConfig(workers=1))
    said = capfd.readouterr().err
    assert plant in said
    assert "pictures.py" in said
    assert not (tmp_path / "out/index.jsonl").exists()


def test_encoding(clip, tmp_path, monkeypatch, capfd):
    """A wrong value for the encoder, where the file was read without a fault."""
    plant = "ValueError"
    program = PLANT.format(module="transcode", entry="main", plant=PLANTS[plant])
    monkeypatch.setattr(transcode, "PROGRAM", program.replace("pictures.scaled_size", "transcode.write_pictures"))
    with pytest.raises(ChildProcessError, match="exit code 1"):
        prepare(manifest_of(clip), tmp_path / "out", PrepareConfig(workers=1))
    said = capfd.readouterr().err
    assert plant in said
    assert "transcode.py" in said


@pytest.mark.parametrize("plant", PLANTS)
def test_dali(shards, monkeypatch, plant):
    ndd = pytest.importorskip("nvidia.dali.experimental.dynamic")
    monkeypatch.setattr(ndd.decoders, "video", eval(PLANTS[plant]))
    with DaliLoader(read_shards(shards), CONFIG, device="cpu") as loader, pytest.raises(class_seen(plant)) as caught:
        next(iter(loader))
    assert any(entry.path.name == "dali.py" for entry in caught.traceback)
    assert loader.quarantine.num_bad == 0


def test_a_wrong_argument_of_dali(shards, monkeypatch):
    """What DALI itself says of an argument that it lacks."""
    ndd = pytest.importorskip("nvidia.dali.experimental.dynamic")
    video = ndd.decoders.video
    monkeypatch.setattr(ndd.decoders, "video", lambda *args, **options: video(*args, **options, no_such_argument=1))
    with (
        DaliLoader(read_shards(shards), CONFIG, device="cpu") as loader,
        pytest.raises(TypeError, match="no_such_argument"),
    ):
        next(iter(loader))


def test_a_wrong_argument_of_pyav(clip, monkeypatch):
    """What happened when PyAV 19 had lost one."""
    opened = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: opened(*args, **options, no_such_argument=1))
    with pytest.raises(TypeError, match="no_such_argument") as caught:
        probe(clip)
    assert place_of(caught.value).startswith("streams.py")


def test_a_package_that_is_missing_is_no_bad_file(clip, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError):
        probe(clip)


def test_what_ffmpeg_says_of_a_file_stays_a_media_error(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no film" * 100)
    with pytest.raises(MediaError, match="must be media that FFmpeg can decode"):
        probe(tmp_path / "clip.mp4")


def test_a_broken_vocabulary_file_is_refused_and_a_wrong_call_is_not(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vocabulary must be a tokenizer\.json"):
        Vocabulary.load(tmp_path / "tokenizer.json")
    Vocabulary(["<pad>", "<unk>", "a"]).save(tmp_path / "tokenizer.json")
    import tokenizers

    monkeypatch.delattr(tokenizers.Tokenizer, "from_str", raising=False)
    monkeypatch.setattr(tokenizers, "Tokenizer", object)
    with pytest.raises(AttributeError):
        Vocabulary.load(tmp_path / "tokenizer.json")


def test_classes_alone_do_not_tell():
    assert is_of_input(av.error.NotImplementedError(38, "Function not implemented"), "av")  # FFmpeg's ENOSYS
    assert not is_of_input(NotImplementedError())
    assert not is_of_input(ValueError("raised by nobody"), "av")
    with pytest.raises(ValueError, match="no layout") as caught:
        av.AudioFrame.from_ndarray(torch.zeros(1, 4).numpy(), format="fltp", layout="no layout")
    assert is_of_input(caught.value, "av")
    assert not is_of_input(caught.value, "nvidia")
