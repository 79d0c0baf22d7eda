"""A folder has one process at work; what a dead one left is taken over, and what nobody can know a person decides."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vatt_engine import lock
from vatt_engine.lock import NAME, Holder, Lock, LockedError

ROOT = Path(__file__).parents[1]
HOLD = """
import sys
from vatt_engine.lock import Lock
with Lock(sys.argv[1], "vatt pretrain"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that is at work in the folder until its input ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def left(folder: Path, **changes) -> Holder:
    """A lock file that a process of this host and boot has left, unless something is changed."""
    holder = dataclasses.replace(Holder.this_process("vatt pretrain"), **changes)
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_a_second_process_is_refused_with_the_first_ones_name(tmp_path, other):
    written = (tmp_path / "run" / NAME).read_bytes()
    for attempt in (Lock(tmp_path / "run", "vatt finetune").check, Lock(tmp_path / "run", "vatt finetune").__enter__):
        with pytest.raises(LockedError) as refusal:
            attempt()
        since = json.loads(written)["since"]
        text = (
            f"got `vatt pretrain`, process {other.pid} on {socket.gethostname()}, since {since}. Wait for it or stop it"
        )
        assert text in str(refusal.value)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
        assert (tmp_path / "run" / NAME).read_bytes() == written


def test_two_threads_of_one_process_are_two(tmp_path):
    with Lock(tmp_path, "vatt pretrain"), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        Lock(tmp_path, "vatt pretrain").__enter__()
    with Lock(tmp_path, "vatt pretrain"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_taken_over_and_told(tmp_path, other, capsys):
    other.send_signal(signal.SIGKILL)
    other.wait()
    Lock(tmp_path / "run", "vatt pretrain").check()
    with Lock(tmp_path / "run", "vatt pretrain"):
        assert json.loads((tmp_path / "run" / NAME).read_text())["pid"] == os.getpid()
    told = capsys.readouterr().err
    assert f"taking over the lock of `vatt pretrain`, process {other.pid} on {socket.gethostname()}" in told
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"ticks": 1},  # a process of the same number that started at another time
        {"boot": "of yesterday"},
        {"namespace": "of a container"},  # on this kernel, whose lock we then have
    ],
    ids=str,
)
def test_taken_over(tmp_path, capsys, changes):
    left(tmp_path, **changes)
    Lock(tmp_path, "vatt pretrain").check()
    with Lock(tmp_path, "vatt pretrain"):
        assert "taking over" in capsys.readouterr().err


def test_another_host_cannot_be_asked(tmp_path):
    left(tmp_path, host="node7", boot="of node7")
    for attempt in (Lock(tmp_path, "vatt pretrain").check, Lock(tmp_path, "vatt pretrain").__enter__):
        with pytest.raises(LockedError, match=rf"on node7, since .* if it has ended, remove {tmp_path / NAME}"):
            attempt()
    (tmp_path / NAME).unlink()
    with Lock(tmp_path, "vatt pretrain"):
        pass


@pytest.mark.parametrize(
    ("before", "now", "taken"),
    [
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),  # requeued
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),  # two tasks of one job
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8"}, False),
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "a"}, True),  # torchrun starts its ranks again elsewhere
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, False),
    ],
)
def test_a_job_that_is_started_again_takes_over_from_another_host(tmp_path, monkeypatch, before, now, taken):
    for name in (one for pair in lock.JOBS.items() for one in pair if one):
        monkeypatch.delenv(name, raising=False)
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    left(tmp_path, host="node7", boot="of node7", jobs=before)
    if taken:
        with Lock(tmp_path, "vatt pretrain"):
            return
    with pytest.raises(LockedError) as refusal:
        Lock(tmp_path, "vatt pretrain").check()
    assert ("tasks of Slurm's job 7: as ranks of one" in str(refusal.value)) == (now.get("SLURM_JOB_ID") == "7")


def test_without_locks_of_the_file_system_the_words_decide(tmp_path, monkeypatch, other, capsys):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.raises(LockedError, match=f"process {other.pid} on"):
        Lock(tmp_path / "run", "vatt pretrain").__enter__()
    other.send_signal(signal.SIGKILL)
    other.wait()
    with Lock(tmp_path / "run", "vatt pretrain"), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        Lock(tmp_path / "run", "vatt pretrain").__enter__()
    left(tmp_path, namespace="of a container")
    with pytest.raises(LockedError):  # nobody can tell
        Lock(tmp_path, "vatt pretrain").__enter__()


def test_a_lock_that_its_holder_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    flock, calls = lock.fcntl.flock, []

    def late(file, operation):
        calls.append(operation)
        if len(calls) == 1:  # between our opening the file and having the lock
            (tmp_path / NAME).unlink()
        return flock(file, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with Lock(tmp_path, "vatt pretrain"):
        assert (tmp_path / NAME).exists()
    assert len(calls) == 2


@pytest.mark.parametrize("text", ["something of the user's", '{"pid": 3}', '{"what": 3}', "[]"])
def test_a_file_that_is_no_lock_is_kept(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(LockedError, match="the file must be a lock of vatt's, got other text"):
        Lock(tmp_path, "vatt pretrain").__enter__()
    assert (tmp_path / NAME).read_text() == text


def test_an_empty_lock_was_killed_while_it_began(tmp_path):
    (tmp_path / NAME).touch()
    with Lock(tmp_path, "vatt pretrain"):
        pass


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        Lock(tmp_path, "vatt pretrain").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_removed_meanwhile(tmp_path):
    with Lock(tmp_path / "run", "vatt pretrain"):
        (tmp_path / "run" / NAME).unlink()
        (tmp_path / "run").rmdir()
