"""Retrieval: the right pairs, windows averaged before normalising, skipped clips named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from media_files import write_media
from torch import nn
from torch.nn import functional as F

from vatt_engine.batch import Embeddings
from vatt_engine.cli import main
from vatt_engine.data.config import DataConfig
from vatt_engine.data.demo import make_world
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import read_manifest
from vatt_engine.data.words import Vocabulary
from vatt_engine.models import create_model, from_pretrained, save_pretrained
from vatt_engine.schema import ConfigError, replace
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.pretrain import pretrain
from vatt_engine.tasks.retrieve import RetrieveConfig, embed_captions, embed_clips, pair, retrieve

OFFICIAL = Path(__file__).parents[1] / "interop" / "tf_checkpoints"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_train=8, num_heldout=12, num_threads=2)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("run") / "run")
    changes = {
        "data.train": str(world.train),
        "out": out,
        "data.batch_size": 8,
        "engine.steps": 1,
        "engine.device": "cpu",
    }
    layers = {f"model.{modality}.transformer.num_layers": 1 for modality in ("video", "audio", "text")}
    assert pretrain(replace(load_config("demo"), changes | layers)) == 0
    return out


class Means(nn.Module):
    """Embeddings that can be computed by hand: mean colour, mean and spread of the sound, first word ids."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        if batch.video is None:
            return Embeddings(text_video=batch.text[..., :3].float())
        colour = batch.video.float().mean((1, 2, 3))
        sound = torch.stack([batch.audio.mean(1), batch.audio.std(1)], 1)
        return Embeddings(video_audio=colour[:, :2], audio_video=sound, video_text=colour)


def test_windows_are_averaged_before_they_are_normalised(world):
    samples = read_manifest(world.heldout)[:3]
    config = DataConfig(num_frames=4, frame_size=32, num_samples=4000, sample_rate=8000, num_windows=3, num_threads=1)
    rows = {sample.id: [] for sample in samples}
    with Loader(samples, config, train=False, batch_size=2) as loader:
        for batch in loader:
            for sample_id, video in zip(batch.sample_id.tolist(), batch.video):
                rows[sample_id].append(video.float().mean((0, 1, 2)))
        found = embed_clips(Means(), loader, samples)
    assert list(found["video_text"]) == [sample.id for sample in samples]
    for sample in samples:
        assert len(rows[sample.id]) == 3
        expected = F.normalize(torch.stack(rows[sample.id]).mean(0), dim=0)
        torch.testing.assert_close(found["video_text"][sample.id], expected)
        assert found["audio"][sample.id].norm().item() == pytest.approx(1.0)


def test_the_text_of_a_clip_is_its_first_caption(world):
    samples = read_manifest(world.heldout)[:4]
    vocabulary = Vocabulary.train([caption.text for sample in samples for caption in sample.captions])
    found = embed_captions(Means(), vocabulary, samples, max_words=16, batch_size=3)
    for sample in samples:
        ids = torch.tensor(vocabulary.encode(sample.captions[0].text)[:3]).float()
        torch.testing.assert_close(found[sample.id], F.normalize(ids, dim=0))


def test_pairs_skip_what_the_other_side_lacks():
    row = torch.ones(2)
    ids, targets = pair({1: row, 2: row, 3: row}, {3: row, 9: row, 1: row})
    assert (ids, targets.tolist()) == ([1, 3], [2, 0])


def test_prints_and_writes_every_direction(run, world, capsys):
    assert main(["retrieve", run, "--data", str(world.heldout), "--num_windows", "2"]) == 0
    out = capsys.readouterr().out
    result = json.loads((Path(run) / "retrieval.json").read_text())
    assert list(result["tasks"]) == ["text -> video", "video -> text", "audio -> video", "video -> audio"]
    for task, metrics in result["tasks"].items():
        assert task in out
        assert (metrics["queries"], metrics["candidates"]) == (12, 12)
        assert metrics["chance R@10"] == pytest.approx(1000 / 12)
        assert 0 <= metrics["R@1"] <= metrics["R@5"] <= metrics["R@10"] <= 100
        assert 1 <= metrics["MedR"] <= 12
    assert (result["step"], result["num_windows"], result["skipped"]) == (1, 2, [])
    for query in ("text", "audio"):
        assert (Path(run) / "plots" / f"similarity-{query}-video.png").stat().st_size > 1000


def test_bad_clips_are_named_and_left_out(run, world, tmp_path):
    rows = [json.loads(line) for line in world.heldout.read_text().splitlines()]
    for row in rows:
        row["path"] = str(world.heldout.parent / row["path"])
    (tmp_path / "text.mp4").write_text("not a video")
    rows[0]["path"] = str(tmp_path / "text.mp4")
    rows[1]["captions"] = []
    rows[2]["captions"] = [{"text": "?!", "start": 0, "end": 1}]
    rows[3]["captions"][1:] = [{"text": "a star", "start": 100, "end": 101}]
    manifest = tmp_path / "heldout.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = retrieve(RetrieveConfig(run=run, data=str(manifest), num_windows=1, device="cpu"))
    assert [entry["path"] for entry in result["skipped"]] == [rows[0]["path"]]
    assert [entry["path"] for entry in result["noted"]] == [rows[3]["path"]]
    counts = {task: (metrics["queries"], metrics["candidates"]) for task, metrics in result["tasks"].items()}
    assert counts == {
        "text -> video": (9, 11),
        "video -> text": (9, 9),
        "audio -> video": (11, 11),
        "video -> audio": (11, 11),
    }


def test_evaluation_is_the_same_twice(run, world):
    config = RetrieveConfig(run=run, data=str(world.heldout), num_windows=1, device="cpu")
    assert retrieve(config) == retrieve(config)


def test_no_text_tasks_for_a_run_without_text(run, world):
    path = Path(run) / "config.yaml"
    kept = path.read_text()
    path.write_text(kept.replace("num_candidates: 5", "num_candidates: 0"))
    result = retrieve(RetrieveConfig(run=run, data=str(world.heldout), num_windows=1, device="cpu"))
    path.write_text(kept)
    assert list(result["tasks"]) == ["audio -> video", "video -> audio"]


def test_refuses_what_is_no_run(world, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml: the config file must exist"):
        retrieve(RetrieveConfig(run=str(tmp_path), data=str(world.heldout)))


YOUCOOK = {
    "database": {
        "film": {
            "subset": "validation",
            "annotations": [
                {"id": 0, "segment": [0, 2], "sentence": "cut the onion"},
                {"id": 1, "segment": [3, 5], "sentence": "stir"},
            ],
        },
        "other": {"subset": "validation", "annotations": [{"id": 0, "segment": [1, 4], "sentence": "the onion"}]},
    }
}
MSRVTT = {
    "videos": [
        {"video_id": name, "split": "test", "start time": 3.0, "end time": 8.0, "category": 0, "url": "", "id": i}
        for i, name in enumerate(("film", "other"))
    ],
    "sentences": [
        {"video_id": name, "caption": "someone cooks", "sen_id": i} for i, name in enumerate(("film", "other"))
    ],
}


@pytest.mark.parametrize(
    ("name", "split", "files", "clips"),
    [
        ("youcook2", "val", {"youcookii_annotations_trainval.json": json.dumps(YOUCOOK)}, 3),
        (
            "msrvtt",
            "test1k",
            {
                "MSRVTT_data.json": json.dumps(MSRVTT),
                "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\n"
                "ret0,msr0,film,cut the onion\nret1,msr1,other,stir\n",
            },
            2,
        ),
    ],
)
def test_imported_datasets_are_ranked(tmp_path, capsys, name, split, files, clips):
    """From the annotations as they are distributed to the table: parts of one film are clips of their own."""
    for number, stem in enumerate(("film", "other")):
        frames = torch.randint(256, (50, 48, 48, 3), dtype=torch.uint8)
        wave = 0.1 * torch.randn(60_000, generator=torch.Generator().manual_seed(number))
        write_media(tmp_path / f"{stem}.mp4", frames, fps=10, waveform=wave, sample_rate=12_000)
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    folders = ["--media", str(tmp_path), "--annotations", str(tmp_path), "--out", str(tmp_path / "sets")]
    assert main(["data", "import", name, *folders, "--split", split]) == 0
    words = Vocabulary(["<pad>", "<unk>", "cut", "the", "onion", "stir"])
    save_pretrained(create_model("vatt_tiny"), tmp_path / "model", vocabulary=words)
    manifest = str(tmp_path / "sets" / f"{split}.jsonl")
    assert main(["retrieve", str(tmp_path / "model"), "--data", manifest, "--fps", "12.5", "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "model" / "retrieval.json").read_text())
    found = result["tasks"]["text -> video"]
    assert (found["queries"], found["candidates"], result["num_windows"]) == (clips, clips, 4)
    assert {"R@1", "R@5", "R@10", "MedR"} <= found.keys()
    assert found["R@5"] == 100.0
    assert "MedR" in capsys.readouterr().out


def test_refuses_a_model_of_one_tower(tmp_path):
    save_pretrained(create_model("vit_base", **{"video.transformer.num_layers": 1}), tmp_path)
    with pytest.raises(ConfigError, match="the model must be a VATT, got vit_base, which has one tower alone"):
        retrieve(RetrieveConfig(run=str(tmp_path), data="x.jsonl"))


@pytest.mark.parametrize("average", ["embeddings", "similarities"])
@pytest.mark.parametrize("name", ["tx", "ut"])
def test_retrieval_with_a_converted_model(tmp_path, name, average):
    """Both official variants over four windows, against embeddings of the windows taken one by one."""
    words = tmp_path / "howto100m_en.txt"
    words.write_text("\n".join(["<pad>", "<bos>", "<eos>", "<unk>", *(f"word{n}" for n in range(36))]) + "\n")
    heads = ["--head-dim", *{"tx": ("6", "8"), "ut": ("6",)}[name]]
    folder = tmp_path / name
    assert main(["convert", str(OFFICIAL / name), str(folder), "--vocabulary", str(words), *heads]) == 0
    rows, generator = [], torch.Generator().manual_seed(0)
    for number in range(5):
        frames = torch.randint(0, 256, (20, 24, 24, 3), dtype=torch.uint8, generator=generator)
        write_media(tmp_path / f"{number}.mkv", frames, fps=10)
        caption = {"text": f"word{number} word{number + 7}", "start": 0, "end": 2}
        rows.append(json.dumps({"path": f"{number}.mkv", "captions": [caption]}) + "\n")
    (tmp_path / "clips.jsonl").write_text("".join(rows))
    settings = {"run": str(folder), "data": str(tmp_path / "clips.jsonl"), "device": "cpu", "average": average}
    found = retrieve(RetrieveConfig(out=str(tmp_path / "out"), **settings))["tasks"]["text -> video"]

    model, samples = from_pretrained(folder), read_manifest(tmp_path / "clips.jsonl")
    data = DataConfig(num_frames=6, frame_size=20, num_samples=0, num_candidates=0, num_windows=4)
    with Loader(samples, data, train=False, batch_size=1) as loader, torch.no_grad():
        windows = [(batch.sample_id.item(), model(batch).video_text[0]) for batch in loader]
    texts = embed_captions(model, Vocabulary.load(folder / "tokenizer.json"), samples, model.config.text.max_words, 5)
    scores = torch.zeros(5, 5)
    for column, sample in enumerate(samples):
        seen = torch.stack([row for one, row in windows if one == sample.id])
        seen = F.normalize(seen, dim=1) if average == "similarities" else F.normalize(seen.sum(0, keepdim=True), dim=1)
        scores[:, column] = torch.stack([(seen @ texts[text.id]).mean() for text in samples])
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    assert found["R@1"] == pytest.approx(100 * (ranks == 0).float().mean().item())
    assert found["MedR"] == pytest.approx(ranks.float().median().item() + 1)
