"""Signals ask, in every phase; a loss that jumps is found."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys

import pytest

from vatt_engine.engine import faults
from vatt_engine.engine.faults import SpikeGuard, StopRequested, StopSignals, TrainingStopped

CHILD = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("faults", {faults.__file__!r})  # without torch, which takes seconds
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)
with faults.StopSignals() as stop:
    stop.begin()
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, name))
        print(name, stop.received, flush=True)
"""


def signalled(*names: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", CHILD, *names], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_a_second_ctrl_c_exits_at_once():
    result = signalled("SIGINT", "SIGINT")
    assert (result.returncode, result.stdout) == (130, "SIGINT 2\n")
    assert "SIGINT: finishing the step, then saving; once more exits at once." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("names", "env"),
    [
        (("SIGTERM", "SIGTERM"), {}),
        (("SIGUSR1", "SIGTERM"), {}),  # a scheduler's warning, then its limit
        (("SIGINT", "SIGTERM"), {}),  # deepspeed's launcher passes Ctrl-C on as SIGTERM
        (("SIGINT", "SIGINT"), {"TORCHELASTIC_RUN_ID": "none"}),  # torchrun sends what the terminal sent already
    ],
)
def test_other_second_signals_change_nothing(names, env):
    result = signalled(*names, **env)
    number = getattr(signal, names[0]).value
    assert (result.returncode, result.stdout) == (0, f"{names[0]} {number}\n{names[1]} {number}\n")
    assert result.stderr.count("finishing the step, then saving") == 1


def test_the_handlers_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        stop.begin()
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_before_there_is_something_to_save_a_signal_ends_what_runs(number):
    with StopSignals() as stop:
        with pytest.raises(StopRequested, match=number.name):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # the way out is not cut short
        assert (stop.received, stop.begun) == (number, False)


def test_a_wait_is_cut_short_and_what_follows_is_finished():
    with StopSignals() as stop:
        stop.begin()
        with pytest.raises(StopRequested, match="SIGTERM"), stop.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StopRequested, match="SIGTERM"), stop.interruptible():
            raise AssertionError("the next wait must not begin")


def test_a_jump_is_found_and_not_remembered():
    guard = SpikeGuard(3.0, window=10)
    assert not any(guard.jumps(loss) for loss in (1.0, 100.0, 1.2, 1.1))  # too early to tell
    guard = SpikeGuard(3.0, window=10)
    assert not any(guard.jumps(1.0 + 0.1 * i) for i in range(8))
    assert [guard.jumps(loss) for loss in (4.2, 50.0, math.inf, math.nan, 1.3)] == [True, True, False, False, False]
    assert not any(SpikeGuard(0.0, window=2).jumps(10.0**i) for i in range(9))


def test_going_back_without_end_stops():
    guard = SpikeGuard(3.0)
    for step in (10, 10, 20, 20):
        guard.count(step)
    with pytest.raises(TrainingStopped, match=r"engine\.spike_factor: .* got 3 jumps in a row after step 20"):
        guard.count(20)
