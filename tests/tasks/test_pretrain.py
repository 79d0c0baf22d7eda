"""The main job on a small real world: what it leaves, how it resumes, how it stops, what it refuses."""

from __future__ import annotations

import errno
import functools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vatt_engine.data.demo import make_world
from vatt_engine.data.loader import Loader, join_sources
from vatt_engine.data.manifest import read_manifest
from vatt_engine.data.quarantine import QuarantineError
from vatt_engine.data.words import Vocabulary
from vatt_engine.engine.checkpoint import CheckpointError, load_latest
from vatt_engine.engine.engine import Engine
from vatt_engine.engine.faults import SpikeGuard
from vatt_engine.models import from_pretrained
from vatt_engine.schema import ConfigError, dump_yaml, replace, to_dict
from vatt_engine.tasks.config import PretrainConfig, load_config
from vatt_engine.tasks.pretrain import main, pretrain

SMALL = {
    "data.batch_size": 8,
    "engine.steps": 6,
    "engine.save_every": 2,
    "engine.log_every": 2,
    "engine.device": "cpu",
    "engine.keep_checkpoints": 9,
    "schedule.warmup_steps": 2,
    "schedule.total_steps": 6,
    "model.text.embedding_dim": 16,
} | {
    f"model.{modality}.transformer.{name}": value
    for modality in ("video", "audio", "text")
    for name, value in (
        ("num_layers", 1),
        ("dim", 32),
        ("ff_dim", 64),
        ("num_heads", 2),
        ("head_dim", 16),
        ("dropout", 0.1),
    )
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_train=20, num_heldout=2, num_threads=2)


@pytest.fixture
def config(world, tmp_path) -> PretrainConfig:
    return replace(load_config("demo"), SMALL | {"data.train": str(world.train), "out": str(tmp_path / "run")})


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_leaves_a_run_folder(config, monkeypatch, capsys):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert pretrain(config) == 0
    run = Path(config.out)
    names = {"checkpoints", "config.yaml", "env.json", "metrics.jsonl", "model", "plots", "tokenizer.json"}
    assert {path.name for path in run.iterdir()} == names
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [f"step-{n:08d}" for n in (2, 4, 6)]
    assert load_config(str(run / "config.yaml")) == config
    trained, exported = load_latest(run).tensors["model"], from_pretrained(run / "model").state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in trained.items())
    assert Vocabulary.load(run / "model" / "tokenizer.json").words == Vocabulary.load(run / "tokenizer.json").words
    assert "hunter2" not in (run / "env.json").read_text()
    found = records(config.out)
    assert [record["step"] for record in found] == [2, 4, 6]
    assert set(found[0]) == {
        *("step", "total", "video_audio", "video_text", "grad_norm", "lr", "data_seconds"),
        *("skipped", "quarantined", "noted", "clips_per_second", "eta_seconds", "seconds", "rss_mb", "temperature"),
        *(f"{e}_{k}" for e in ("video_audio", "audio_video", "video_text", "text_video") for k in ("std", "rank")),
    }
    assert [record["lr"] for record in found] == pytest.approx(
        [5e-4, 1e-3 * 0.85502, 1e-5 + 9.9e-4 * 0.146447], rel=1e-3
    )
    for record in found:
        assert record["total"] == pytest.approx((record["video_audio"] + record["video_text"]) / 2)
    assert "step 6/6  total " in capsys.readouterr().out


@pytest.mark.parametrize(("accumulate", "stops"), [(1, (1, 3)), (2, (2,))])
def test_resumes_bit_for_bit(config, tmp_path, accumulate, stops):
    config = replace(config, {"engine.accumulate": accumulate, "engine.steps": 5})  # more than one epoch of 20 clips
    pretrain(config)
    straight = load_latest(config.out)
    for stop in stops:
        part = replace(config, {"out": str(tmp_path / f"{stop}"), "engine.steps": stop})
        pretrain(part)
        torch.manual_seed(1234)
        pretrain(replace(part, {"engine.steps": 5}), resume=True)
        resumed = load_latest(part.out)
        assert resumed.state == straight.state
        for group, tensors in straight.tensors.items():
            assert [name for name in tensors if not torch.equal(tensors[name], resumed.tensors[group][name])] == []
    assert straight.state["extra"]["loader"]["epoch"] >= 2


def test_a_damaged_newest_checkpoint_falls_back(config, capsys):
    pretrain(config)
    straight = load_latest(config.out)
    path = straight.path / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["--resume", config.out]) == 0
    captured = capsys.readouterr()
    assert "step-00000006: skipped, optimizer.safetensors does not have the SHA-256 of its COMMIT." in captured.err
    assert "resuming after step 4" in captured.err
    again = load_latest(config.out)
    assert (again.step, again.skipped) == (6, ())
    assert all(torch.equal(again.tensors["model"][name], value) for name, value in straight.tensors["model"].items())
    assert [record["step"] for record in records(config.out)] == [2, 4, 6]
    for folder in (Path(config.out) / "checkpoints").iterdir():
        (folder / "COMMIT").unlink()
    with pytest.raises(CheckpointError, match="at least one valid checkpoint"):
        main(["--resume", config.out])


def test_another_seed_is_another_run(config, tmp_path):
    pretrain(replace(config, {"engine.steps": 1}))
    pretrain(replace(config, {"engine.steps": 1, "engine.seed": 1, "out": str(tmp_path / "b")}))
    pretrain(replace(config, {"engine.steps": 1, "out": str(tmp_path / "c")}))
    a, b, c = (records(out)[0]["total"] for out in (config.out, tmp_path / "b", tmp_path / "c"))
    assert a == c != b


COMMAND = "import sys; from vatt_engine.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_signals_save_and_say_how_to_go_on(config):
    Path(config.out).mkdir()
    path = Path(config.out) / "start.yaml"
    path.write_text(dump_yaml(to_dict(replace(config, {"engine.steps": 100_000, "schedule.total_steps": 100_000}))))
    last = 0
    for number, argv in ((signal.SIGINT, [str(path)]), (signal.SIGTERM, ["--resume", config.out])):
        child = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "pretrain", *argv, "--engine.log_every", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not child.stdout.readline().startswith("step "):
            assert child.poll() is None, child.stderr.read()
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
        assert child.returncode == 128 + number, err
        assert "Traceback" not in err
        assert "finishing the step, then saving" in err
        found = load_latest(config.out)
        assert found.step > last
        assert f"stopped after step {found.step}; continue with: vatt pretrain --resume {config.out}" in out
        assert records(config.out)[-1]["step"] == found.step
        last = found.step


def test_a_run_that_diverges_stops_with_a_message(config, capsys):
    flags = {"optim.lr": 1e38, "schedule.warmup_steps": 0, "engine.steps": 30, "schedule.total_steps": 30}
    path = Path(config.out).with_suffix(".yaml")
    path.write_text(dump_yaml(to_dict(replace(config, flags | {"engine.max_skipped": 3}))))
    assert main([str(path)]) == 1
    assert "loss and gradients must be finite, got 3 steps in a row that are not" in capsys.readouterr().err


def vectors_file(tmp_path, words, dim=16) -> str:
    path = tmp_path / "vectors.txt"
    lines = [f"{len(words)} {dim}"] + [f"{word} " + " ".join([str(i + 0.5)] * dim) for i, word in enumerate(words)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_word_vectors_are_loaded_and_frozen(config, tmp_path, capsys):
    config = replace(config, {"text.vectors": vectors_file(tmp_path, ["the", "red", "unheard"]), "engine.steps": 2})
    pretrain(config)
    assert f"{config.text.vectors}: vectors of 2 words; the others keep" in capsys.readouterr().out
    words = json.loads((Path(config.out) / "tokenizer.json").read_text())["model"]["vocab"]
    table = load_latest(config.out).tensors["model"]["text.embedding.weight"]
    assert torch.equal(table[words["red"]], torch.full((16,), 1.5))
    assert "unheard" not in words
    thawed = replace(config, {"out": str(tmp_path / "b"), "model.text.freeze_embedding": False})
    pretrain(thawed)
    assert not torch.equal(
        load_latest(thawed.out).tensors["model"]["text.embedding.weight"][words["red"]], table[words["red"]]
    )


def test_refuses_word_vectors_that_do_not_fit(config, tmp_path):
    with pytest.raises(ConfigError, match=r"text\.vectors must be given where model\.text\.freeze_embedding is true"):
        pretrain(replace(config, {"model.text.freeze_embedding": True}))
    with pytest.raises(ConfigError, match="must be of words of the vocabulary, got none of its words"):
        pretrain(replace(config, {"text.vectors": vectors_file(tmp_path, ["qqq"])}))
    with pytest.raises(ConfigError, match=r"width model\.text\.embedding_dim 16, got 3"):
        pretrain(replace(config, {"text.vectors": vectors_file(tmp_path, ["red"], dim=3)}))
    (tmp_path / "words.txt").write_text("<pad>\n<bos>\n<eos>\n<unk>\na\nb\n")
    with pytest.raises(ConfigError, match=r"vocabulary must fit model\.text\.vocabulary_size 4, got 6 words"):
        pretrain(replace(config, {"text.vocabulary": str(tmp_path / "words.txt"), "model.text.vocabulary_size": 4}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.num_frames": 16}, r"data\.num_frames must equal model\.video\.num_frames 8, got 16"),
        ({"data.frame_size": 64}, r"data\.frame_size must equal model\.video\.frame_size \(48, 48\), got \(64, 64\)"),
        ({"data.num_samples": 4800}, r"data\.num_samples must equal model\.audio\.num_samples 9600, got 4800"),
        ({"data.train": ""}, "--data.train must be the path of a manifest, got none"),
        ({"data.batch_size": 21}, "samples must fill a batch of 21, got 20"),
        ({"engine.device": "cuda:7"}, r"engine: device must be a GPU of this machine, got 'cuda:7'"),
    ],
)
def test_refuses(config, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(replace(config, changes))


def test_refuses_a_folder_that_holds_a_run(config, world, tmp_path):
    pretrain(replace(config, {"engine.steps": 1}))
    with pytest.raises(ConfigError, match=f"holds a run. Continue it with `vatt pretrain --resume {config.out}`"):
        pretrain(config)
    other = tmp_path / "other.jsonl"
    lines = world.train.read_text().splitlines()
    other.write_text("\n".join(line.replace('"train/', f'"{world.train.parent}/train/') for line in lines))
    with pytest.raises(ValueError, match=r"got other files or weights .* Resume with the same data\.train"):
        pretrain(replace(config, {"data.train": str(other)}), resume=True)


def test_nothing_is_unpickled(config):
    events, watching = [], True
    sys.addaudithook(lambda event, args: events.append(event) if watching and event.startswith("pickle") else None)
    pretrain(replace(config, {"engine.steps": 1}))
    pretrain(replace(config, {"engine.steps": 2}), resume=True)
    watching = False
    assert events == []


def test_resume_without_a_checkpoint_starts(config, capsys):
    assert pretrain(replace(config, {"engine.steps": 1}), resume=True) == 0
    assert "no checkpoint yet, starting at step 0" in capsys.readouterr().err


def test_keeps_a_config_that_is_not_a_run(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: --out must be a folder, got a file"):
        pretrain(replace(config, {"out": str(tmp_path / "file")}))
    Path(config.out).mkdir()
    (Path(config.out) / "config.yaml").write_text("recipe: demo  # mine\n")
    with pytest.raises(
        ConfigError, match=r"--out must be a new run folder, got one with a config\.yaml, which is kept"
    ):
        pretrain(config)
    assert (Path(config.out) / "config.yaml").read_text() == "recipe: demo  # mine\n"


def rewritten(world, path: Path, **changes) -> str:
    """The training manifest with other values in every row."""
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    rows = [row | {"path": str(world.train.parent / row["path"])} | changes for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_without_captions_video_and_audio_alone(config, world, tmp_path):
    config = replace(config, {"data.train": rewritten(world, tmp_path / "mute.jsonl", captions=[]), "engine.steps": 2})
    with pytest.raises(ConfigError, match=r"mute\.jsonl: the manifest must have captions, got none\. .*candidates 0"):
        pretrain(config)
    assert pretrain(replace(config, {"data.num_candidates": 0})) == 0
    assert records(config.out)[0]["video_audio"] > 0 == records(config.out)[0]["video_text"]


def test_captions_after_the_end_are_noted_and_counted(config, world, tmp_path):
    late = [{"text": "red", "start": 100, "end": 101}]
    manifest = rewritten(world, tmp_path / "late.jsonl", captions=late)
    pretrain(replace(config, {"data.train": manifest, "engine.steps": 2}))
    noted = [json.loads(line) for line in (Path(config.out) / "quarantine.jsonl").read_text().splitlines()]
    assert (records(config.out)[0]["noted"], records(config.out)[0]["quarantined"]) == (len(noted), 0)
    assert "captions must begin within the" in noted[0]["reason"]


def test_resuming_a_finished_run_says_so(config, capsys):
    pretrain(replace(config, {"engine.steps": 1}))
    capsys.readouterr()
    assert pretrain(replace(config, {"engine.steps": 1}), resume=True) == 0
    assert "nothing to train: step 1 of 1 is done; raise --engine.steps to go on" in capsys.readouterr().out
    pretrain(replace(config, {"engine.steps": 2}), resume=True)
    assert "another config" not in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="which is no state of KerasSGD"):
        pretrain(replace(config, {"optim.name": "sgd"}), resume=True)
    pretrain(replace(config, {"engine.steps": 3, "optim.clip_norm": 1.0}), resume=True)
    assert "was saved under another config" in capsys.readouterr().err


def test_too_many_bad_files_stop_a_run_after_saving_it(config, world, tmp_path):
    (tmp_path / "bad.mp4").write_text("not a video")
    manifest = Path(rewritten(world, tmp_path / "bad.jsonl"))
    manifest.write_text(manifest.read_text() + json.dumps({"path": "bad.mp4"}) + "\n")
    config = replace(config, {"data.train": str(manifest), "data.max_bad_fraction": 0.01, "engine.steps": 30})
    config = replace(config, {"schedule.total_steps": 30, "engine.save_every": 100, "engine.accumulate": 2})
    with pytest.raises(QuarantineError, match=r"at most 1\.0% of the samples must be bad, got \d+ of 1\d\d"):
        pretrain(config)
    stopped = load_latest(config.out)
    assert 5 <= stopped.step < 30
    assert main(["--resume", config.out, "--data.max-bad-fraction", "1"]) == 0
    straight = replace(config, {"data.max_bad_fraction": 1.0, "out": str(tmp_path / "straight")})
    pretrain(straight)
    ends = [load_latest(out).tensors["model"] for out in (config.out, straight.out)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_mixture_of_two_sets(config, world, tmp_path, capsys):
    """The second set has no captions: its rows are masked, and half of every batch is of it."""
    plain = rewritten(world, tmp_path / "plain.jsonl", captions=[])
    flags = ["--data.train", config.data.train, plain, "--data.weights", "1", "1", "--data.num-workers", "1"]
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(to_dict(replace(config, {"engine.steps": 5, "data.cache": "none"}))))
    assert main([str(path), *flags]) == 0
    said = capsys.readouterr().out
    assert "vatt_tiny on cpu in fp32: 40 clips, " in said
    assert "an epoch is 5 batches of 8 and leaves out 0 clips" in said
    saved = load_config(str(Path(config.out) / "config.yaml")).data
    assert (saved.train, saved.weights) == ((config.data.train, plain), (1.0, 1.0))
    samples, sizes = join_sources([read_manifest(source) for source in saved.sources])
    with Loader(samples, saved, Vocabulary.load(Path(config.out) / "tokenizer.json"), sizes=sizes) as loader:
        masks = [next(batches).text_mask.sum().item() for batches in [iter(loader)] for _ in range(5)]
    assert masks == [4] * 5


def test_a_loss_that_jumps_sets_the_run_back_and_skips_the_data(config, monkeypatch, capsys):
    config = replace(config, {"engine.steps": 9, "schedule.total_steps": 9, "engine.spike_factor": 4.0})
    monkeypatch.setattr("vatt_engine.tasks.pretrain.SpikeGuard", functools.partial(SpikeGuard, window=4))
    step, seen = Engine.step, []

    def jumping(self, batch):
        out = step(self, batch)
        seen.append((out.step, batch.sample_id.tolist()))
        return out._replace(terms=out.terms | {"total": out.terms["total"] * (100 if len(seen) == 6 else 1)})

    monkeypatch.setattr(Engine, "step", jumping)
    assert pretrain(config) == 0
    steps, batches = zip(*seen)
    assert steps == (1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9)  # back from 6 to the checkpoint of 4
    assert len(set(map(tuple, batches))) == len(batches)  # with other data
    event = json.loads((Path(config.out) / "events.jsonl").read_text())
    assert (event["step"], event["to"]) == (6, 4)
    assert [record["step"] for record in records(config.out)] == [2, 4, 6, 8, 9]
    assert "step 6: the loss jumps: went back and skipped the data since then, to 4" in capsys.readouterr().out


def test_out_of_memory_is_a_message_with_what_helps(config, monkeypatch, capsys):
    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Engine, "step", full)
    path = Path(config.out).with_suffix(".yaml")
    path.write_text(dump_yaml(to_dict(config)))
    assert main([str(path)]) == 1
    message = capsys.readouterr().err
    assert all(name in message for name in ("--engine.accumulate", "--engine.precision bf16", "--data.batch-size"))


def test_an_end_that_cannot_be_saved_is_a_message(config, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = Path(config.out).with_suffix(".yaml")
    path.write_text(dump_yaml(to_dict(replace(config, {"engine.steps": 4}))))
    monkeypatch.setattr("vatt_engine.engine.checkpoint.os.fsync", full)
    assert main([str(path)]) == 1
    captured = capsys.readouterr()
    assert "warning: the checkpoint could not be written; older ones are intact, the next save tries" in captured.out
    assert f"the checkpoint of step 4 must fit on the disk, got: [Errno {errno.ENOSPC}]" in captured.err
    assert f"`vatt pretrain --resume {config.out}` goes on" in captured.err
