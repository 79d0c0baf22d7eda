"""Bars on a terminal, lines elsewhere."""

import io
from pathlib import Path

import pytest

from tests.data.known_datasets.genuine import lay_out
from vatt_engine.data.datasets import import_dataset
from vatt_engine.tasks import progress
from vatt_engine.tasks.progress import Progress, Reading


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_a_log(clock):
    stream = io.StringIO()
    reading = Reading(stream)
    for second in (0, 10, 40, 60):
        clock[0] = second
        reading(Path("a/caption.json"), 1_000_000, 10_000_000)
    assert stream.getvalue() == "caption.json: 3.00M/10.0MB, 75.0kB/s, 01:33 left\n"  # the first 30 s are silent
    clock[0] = 80
    reading(Path("media"), 200, None)
    clock[0] = 120
    reading(Path("media"), 400, None)
    assert stream.getvalue().splitlines()[1:] == ["media: 600 files, 15.0 files/s"]


def test_files_that_are_done(clock):
    stream = io.StringIO()
    say = Progress(stream)
    for done, second in ((5, 10), (6, 20), (9, 90)):
        clock[0] = second
        say(done, 1, 9)
    assert stream.getvalue().splitlines()[-1] == "9/9 files, 1 rejected, 0.1 files/s, 00:00 left"  # four were done


def test_a_bar_on_a_terminal():
    stream = Terminal()
    reading = Reading(stream)
    with reading:
        reading(Path("caption.json"), 500, 1000)
        reading._bar._bar.refresh()  # a bar waits half a second before it shows
        reading.say("done")
    text = stream.getvalue()
    assert "caption.json:  50%" in text
    assert "B/s" in text
    assert text.endswith("done\n")


def test_every_byte_of_the_annotations_is_told(tmp_path):
    annotations, media = lay_out(tmp_path, "howto100m")
    told = {}

    def watch(what, more, total):
        told.setdefault(what, [0, total])[0] += more

    list(import_dataset("howto100m", annotations=[annotations], media=media, out=tmp_path / "out", watch=watch))
    sizes = {path: path.stat().st_size for path in annotations.iterdir()}
    assert {path: done for path, (done, _) in told.items() if path in sizes} == sizes
    assert {path: total for path, (_, total) in told.items() if path in sizes} == sizes
    assert media in told
