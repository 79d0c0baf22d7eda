"""A signal in each phase of a run: what was trained is on the disk, the exit code says which signal it was."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from tasks.test_pretrain import config, records, world  # noqa: F401  (fixtures)

from vatt_engine.data.loader import Loader
from vatt_engine.engine import checkpoint
from vatt_engine.engine.checkpoint import has_checkpoint, load_latest
from vatt_engine.engine.engine import Engine
from vatt_engine.tasks import pretrain as task
from vatt_engine.tasks.pretrain import pretrain

CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}


def before(target, name, monkeypatch, number, call=1):
    """Send the signal just before the given call of `target.name`."""
    original, calls = getattr(target, name), []

    def signalled(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, signalled)


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("phase", ["check_run", "load_vocabulary", "build_model", "opened_run", "step"])
def test_before_the_first_step_is_done_a_run_just_ends(config, monkeypatch, capsys, phase, number):  # noqa: F811
    before(Engine if phase == "step" else task, phase, monkeypatch, number)
    assert pretrain(config) == CODES[number]
    assert not has_checkpoint(config.out)
    assert "no step of this start was finished, nothing had to be saved." in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_step_is_finished_and_saved(config, monkeypatch, number):  # noqa: F811
    before(Engine, "step", monkeypatch, number, call=3)
    assert pretrain(config) == CODES[number]
    assert load_latest(config.out).step == 3
    assert records(config.out)[-1]["step"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("batches", [0, 3])
def test_a_wait_for_data_is_cut_short(config, monkeypatch, number, batches):  # noqa: F811
    original = Loader.__iter__

    def stalled(self):
        for count, batch in enumerate(original(self)):
            if count == batches:
                os.kill(os.getpid(), number)
                threading.Event().wait()  # for ever
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "__iter__", stalled)
        assert pretrain(config) == CODES[number]
    if batches:
        assert load_latest(config.out).step == batches
    assert pretrain(config, resume=True) == 0  # and the batch that was waited for is not lost
    loader = load_latest(config.out).state["extra"]["loader"]
    assert (loader["epoch"], loader["position"]) == (2, 16)  # 6 batches of 8, two an epoch of 20 clips


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_save_is_finished(config, monkeypatch, number, call):  # noqa: F811
    before(checkpoint, "save", monkeypatch, number, call=call)
    code = pretrain(config)
    found = load_latest(config.out)
    assert found.skipped == ()
    if call == 3:  # the last one: nothing was left to do
        assert (code, found.step) == (0, 6)
    else:
        assert code == CODES[number]
        assert found.step >= 2 * call


def test_more_signals_while_saving_change_nothing(config, monkeypatch):  # noqa: F811
    before(Engine, "step", monkeypatch, signal.SIGUSR1, call=2)
    for name in ("_write", "_commit", "_sha256"):
        before(checkpoint, name, monkeypatch, signal.SIGTERM)
    assert pretrain(config) == 138
    assert load_latest(config.out).step == 2


def test_a_stop_goes_on_bit_for_bit(config, monkeypatch, tmp_path):  # noqa: F811
    with monkeypatch.context() as patch:
        before(Engine, "step", patch, signal.SIGTERM, call=3)
        pretrain(config)
    pretrain(config, resume=True)
    stopped = load_latest(config.out)
    straight = task.replace(config, {"out": str(tmp_path / "straight")})
    pretrain(straight)
    assert load_latest(straight.out).state == stopped.state
    for group, tensors in load_latest(straight.out).tensors.items():
        assert [n for n, t in tensors.items() if not t.equal(stopped.tensors[group][n])] == []


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGUSR1])
def test_a_slow_disk_stops_nothing_until_the_next_save_waits(config, monkeypatch, capsys, number):  # noqa: F811
    """No fsync returns before somebody waits for the thread that calls it, like the save after step 4 or at the end."""
    gate, fsync, join = threading.Event(), os.fsync, threading.Thread.join
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: (gate.wait(60), fsync(descriptor))[1])
    monkeypatch.setattr(threading.Thread, "join", lambda *args, **kwargs: (gate.set(), join(*args, **kwargs))[1])
    steps, committed = [], config.out + "/checkpoints/step-00000002/COMMIT"
    original = Engine.step

    def step(self, batch):
        steps.append((self.finished, os.path.exists(committed)))
        if number is not None and len(steps) == 3:
            os.kill(os.getpid(), number)
        return original(self, batch)

    monkeypatch.setattr(Engine, "step", step)
    assert pretrain(config) == CODES.get(number, 0)
    assert steps[:3] == [(0, False), (1, False), (2, False)]
    last = 6 if number is None else 3
    assert ("step 4: training waited" in capsys.readouterr().out) == (last == 6)
    assert steps[3:4] == [(3, False)] * (last == 6)
    assert os.path.exists(committed)
    assert (load_latest(config.out).step, load_latest(config.out).skipped) == (last, ())
