"""The held-out loss beside training: the formula it says, training does not notice, signals cut it short."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from tasks.test_pretrain import SMALL, config, records, world  # noqa: F401  (fixtures)
from tasks.test_signals import CODES, before

from vatt_engine.analysis.report import plot_losses, read_records
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import read_manifest
from vatt_engine.data.words import Vocabulary
from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.engine.engine import Engine
from vatt_engine.losses import VATTLoss
from vatt_engine.models import from_pretrained
from vatt_engine.schema import ConfigError, replace
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.pretrain import pretrain

STILL = {"crop": "none", "scale_jitter": 0.0, "flip": 0.0, "color_jitter": 0.0, "audio_noise": 0.0}


@pytest.fixture
def evaluated(config, world):  # noqa: F811
    """Every third step of six, on the 20 training clips, of which two batches of eight are taken."""
    return replace(config, {"heldout": str(world.train), "evaluate_every": 3})


def heldout(out: str) -> dict[int, float]:
    return {one["step"]: one["heldout_total"] for one in records(out) if "heldout_total" in one}


def assert_same_checkpoint(a: str, b: str) -> None:
    a, b = load_latest(a), load_latest(b)
    for one in (a, b):
        del one.state["extra"]["config_sha256"]
    assert (a.step, a.state) == (b.step, b.state)
    for group, tensors in a.tensors.items():
        assert [n for n, t in tensors.items() if not t.equal(b.tensors[group][n])] == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_does_not_notice(evaluated, tmp_path, accumulate):
    evaluated = replace(evaluated, {"engine.accumulate": accumulate})
    quiet = replace(evaluated, {"heldout": "", "out": str(tmp_path / "quiet")})
    assert (pretrain(evaluated), pretrain(quiet)) == (0, 0)
    assert_same_checkpoint(evaluated.out, quiet.out)
    assert sorted(heldout(evaluated.out)) == [0, 3, 6]
    assert heldout(quiet.out) == {}


def test_the_loss_is_that_of_the_model_without_dropout(evaluated):
    pretrain(evaluated)
    model = from_pretrained(Path(evaluated.out) / "model").eval()
    data = replace(evaluated.data, {f"augment.{name}": value for name, value in STILL.items()})
    words = Vocabulary.load(Path(evaluated.out) / "tokenizer.json")
    batches = Loader(read_manifest(evaluated.data.train), data, words, seed=evaluated.engine.seed)
    loss, totals = VATTLoss(evaluated.loss), []
    with torch.no_grad(), batches:
        for batch, _ in zip(batches, range(2)):
            totals.append(loss(model(batch), audio_mask=batch.audio_mask, text_mask=batch.text_mask).total)
    assert heldout(evaluated.out)[6] == pytest.approx(float(torch.stack(totals).mean()), rel=1e-5)
    assert heldout(evaluated.out)[6] != heldout(evaluated.out)[0]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):  # noqa: F811
    """The folder of a run that nothing interrupts."""
    out, changes = str(tmp_path_factory.mktemp("straight") / "run"), {"heldout": str(world.train), "evaluate_every": 3}
    pretrain(replace(load_config("demo"), SMALL | changes | {"data.train": str(world.train), "out": out}))
    return out


@pytest.mark.parametrize(
    ("number", "call", "step", "left"),
    [
        (signal.SIGTERM, 3, 3, True),
        (signal.SIGUSR1, 3, 3, True),
        (signal.SIGUSR1, 4, 3, False),
        (signal.SIGTERM, 5, 6, True),
        (signal.SIGUSR1, 6, 6, False),
    ],
)
def test_a_signal_in_it_saves_and_resumes_exactly(evaluated, straight, monkeypatch, number, call, step, left):
    """Two batches at steps 0, 3 and 6 each; an evaluation that was cut short is made after the resume."""
    with monkeypatch.context() as patch:
        before(Engine, "evaluate", patch, number, call=call)
        code = pretrain(evaluated)
    assert code == (0 if call == 6 else CODES[number])  # the last batch: nothing was left to do
    assert load_latest(evaluated.out).step == step
    assert (step not in heldout(evaluated.out)) == left
    assert (Path(evaluated.out) / "model").exists() == (call == 6)
    assert pretrain(evaluated, resume=True) == 0
    assert_same_checkpoint(evaluated.out, straight)
    assert heldout(evaluated.out) == heldout(straight)


def test_a_signal_before_the_first_step_ends_at_once(evaluated, monkeypatch, capsys):
    before(Engine, "evaluate", monkeypatch, signal.SIGTERM)
    assert pretrain(evaluated) == 143
    assert "nothing had to be saved." in capsys.readouterr().err


def test_a_wait_for_its_data_is_cut_short(evaluated, monkeypatch):
    original, starts = Loader.__iter__, []

    def stalled(self):
        starts.append(self)
        for count, batch in enumerate(original(self)):
            if len(starts) == 3 and self is starts[-1] and count == 1:  # after training's and that of step 0
                os.kill(os.getpid(), signal.SIGUSR1)
                threading.Event().wait()  # for ever
            yield batch

    monkeypatch.setattr(Loader, "__iter__", stalled)
    assert pretrain(evaluated) == 138
    assert load_latest(evaluated.out).step == 3
    assert sorted(heldout(evaluated.out)) == [0]


def test_files_that_cannot_be_used_have_others_in_their_place(evaluated, world, tmp_path):  # noqa: F811
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    for row in rows:
        row["path"] = str(world.train.parent / row["path"])
    for number in range(0, 20, 3):
        rows[number]["path"] = str(tmp_path / f"none{number}.mp4")
        (tmp_path / f"none{number}.mp4").write_bytes(b"no video")
    manifest = tmp_path / "heldout.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pretrain(replace(evaluated, {"heldout": str(manifest), "data.max_bad_fraction": 0.0})) == 0
    last = next(one for one in reversed(records(evaluated.out)) if "heldout_total" in one)
    assert 1 <= last["heldout_quarantined"] <= 7
    assert last["step"] == 6
    faults = (Path(evaluated.out) / "heldout.quarantine.jsonl").read_text().splitlines()
    assert len(faults) == last["heldout_quarantined"]


def test_records_of_a_step_are_one_and_drawn(evaluated):
    pretrain(evaluated)
    found = read_records(Path(evaluated.out) / "metrics.jsonl")
    assert [one["step"] for one in found] == [0, 2, 3, 4, 6]
    assert {"total", "heldout_total", "clips_per_second"} <= found[2].keys()
    assert plot_losses(evaluated.out).stat().st_size > 1000


def test_too_few_clips_are_refused(evaluated, world, tmp_path):  # noqa: F811
    row = json.loads(world.heldout.read_text().splitlines()[0])
    row["path"] = str(world.heldout.parent / row["path"])
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="heldout must hold at least 2 clips, got 1"):
        pretrain(replace(evaluated, {"heldout": str(tmp_path / "one.jsonl")}))
    with pytest.raises(ValueError, match="evaluate_every must be at least 1, got 0"):
        replace(evaluated, {"evaluate_every": 0})
