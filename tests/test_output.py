"""Output that cannot be encoded, read or written ends nothing."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vatt_engine.output import LogFile, is_terminal, put, say

ROOT = Path(__file__).parents[1]
TELL = "from vatt_engine.output import lasting_output; lasting_output(); "


def run(code: str, *, command: str = "{python} -c {code}", **environment: str) -> subprocess.CompletedProcess:
    """A program whose output a shell does something to."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "CODE": code} | environment
    line = command.format(python=sys.executable, code='"$CODE"')
    return subprocess.run(["bash", "-c", line], env=variables, capture_output=True)


@pytest.mark.parametrize("flags", ["", "-u"])
@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"caf? ?\n"), ("gbk", b"caf\xa8\xa6 ?\n")])
def test_characters_that_an_encoding_lacks_are_replaced(encoding, shown, flags):
    result = run(
        TELL + "print('caf\\xe9 \\U0001f600')", command=f"{{python}} {flags} -c {{code}}", PYTHONIOENCODING=encoding
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, shown, b"")


def test_a_name_that_is_no_text_is_replaced():
    result = run(TELL + "import os; print(os.fsdecode(b'\\xff.mp4'))")
    assert (result.returncode, result.stdout) == (0, b"?.mp4\n")


@pytest.mark.parametrize("flags", ["", "-u"])
def test_whoever_reads_may_leave(flags):
    code = TELL + "[print('x' * 4096) for _ in range(200)]; import sys; sys.stdout.flush(); sys.stderr.write('done')"
    result = run(code, command=f"{{python}} {flags} -c {{code}} | head -c 1; exit ${{{{PIPESTATUS[0]}}}}")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"x", b"done")


def test_a_full_disk_under_the_output_is_said_once():
    code = TELL + "[print('x' * 9999) for _ in range(20)]; import sys; sys.stdout.flush(); sys.stderr.write('done')"
    result = run(code, command="{python} -c {code} > /dev/full")
    assert result.returncode == 0
    assert result.stderr.decode().count("warning: the output must be written, got: No space left on device.") == 1
    assert result.stderr.endswith(b"done")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_output_that_is_closed_from_the_start(tmp_path, closed):
    done = tmp_path / "done"
    code = TELL + "import sys; print('x'); print('y', file=sys.stderr); sys.stdout.isatty()"
    result = run(code + f"; open({str(done)!r}, 'w')", command="{python} -c {code} " + closed)
    assert result.returncode == 0
    assert done.exists()


def test_lines_still_come_at_once_where_nothing_is_buffered():
    code = TELL + "import os; print('first'); os.write(1, b'second\\n')"
    assert run(code, command="{python} -u -c {code}").stdout == b"first\nsecond\n"
    assert run(code, PYTHONUNBUFFERED="").stdout == b"second\nfirst\n"  # with a buffer, as before


def test_put_replaces_and_survives(capsys):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert put(narrow, "caf\xe9\n")
    assert narrow.buffer.getvalue() == b"caf?\n"
    narrow.close()
    assert not put(narrow, "x")
    assert not put(None, "x")
    with open("/dev/full", "w", encoding="ascii") as full:
        assert not put(full, "x")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # or closing it would raise
    assert not is_terminal(None)
    assert not is_terminal(narrow)
    say("a line")
    assert capsys.readouterr().err == "a line\n"


def test_lines_that_a_full_disk_refuses_come_later(tmp_path, monkeypatch, capsys):
    path, full, opened = tmp_path / "new" / "log.jsonl", [False], Path.open

    class Disk(io.FileIO):
        """Takes three bytes more and is full then."""

        def write(self, content):
            if full[0]:
                if self.tell() >= 13:
                    raise OSError(errno.ENOSPC, "No space left on device")
                content = content[:3]
            return super().write(content)

    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *args, **kw: Disk(self, "ab") if mode == "ab" else opened(self)
    )
    log = LogFile(path)
    log.add("one")
    full[0] = True
    log.add("two, which is long")
    log.add("three")
    assert capsys.readouterr().err.count("log.jsonl must be written, got: No space left on device") == 1
    full[0] = False
    log.add("four")
    assert path.read_text() == "one\ntwo, which is long\nthree\nfour\n"
    full[0] = True
    log.add("five")
    assert "No space left" in capsys.readouterr().err  # it is said again when it fails again


def test_names_that_are_no_text_can_be_logged(tmp_path):
    LogFile(tmp_path / "log").add(os.fsdecode(b"\xff.mp4"))
    assert (tmp_path / "log").read_bytes() == b"\\udcff.mp4\n"
