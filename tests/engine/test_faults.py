"""Signals ask once and insist the second time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from vatt_engine.engine import faults
from vatt_engine.engine.faults import StopSignals

CHILD = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("faults", {faults.__file__!r})  # without torch, which takes seconds
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)
with faults.StopSignals() as stop:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    print("first", stop.received, flush=True)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    print("second", flush=True)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_second_signal_exits_at_once(name, code):
    result = subprocess.run([sys.executable, "-c", CHILD, name], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, f"first {getattr(signal, name).value}\n")
    assert f"{name}: finishing the step, then saving; once more exits at once." in result.stderr
    assert "Traceback" not in result.stderr


def test_the_handlers_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
