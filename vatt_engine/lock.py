"""One process at a time in a folder that is written for hours: a lock file that says who is at work there.

The kernel's lock on the file (flock) ends with its process, whatever that died of, but is not told between the hosts of
every network file system. So the file also says who holds it: host, boot, process and its start. With both, the next
process knows whether the holder still lives, and takes over what a dead one has left. Only the holder on another host
cannot be asked; there a person has to decide.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from vatt_engine.output import say
from vatt_engine.schema import from_dict

NAME = "lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without flock answer
# A scheduler or launcher that starts a job again has ended its processes: the job's number, and how often it was
# started. torchrun's number alone is enough, as it starts a rank 0 only after the one before has ended.
JOBS = {"SLURM_JOB_ID": "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID": None}


class LockedError(ValueError):
    """Another process is at work in the folder, or may be; the message says which one and since when."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: one process of one boot of one host.

    Args:
        what: the command.
        host: its name.
        boot: of the kernel, another one after each start of the machine.
        namespace: of process numbers; a container has its own.
        pid: number of the process.
        ticks: when it started, in the kernel's clock ticks since the boot: numbers are used again, this pair is not.
        since: when it took the lock, in its local time.
        jobs: what schedulers and launchers have told it, see `JOBS`.
    """

    what: str
    host: str
    boot: str
    namespace: str
    pid: int
    ticks: int | None
    since: str
    jobs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def this_process(cls, what: str) -> Holder:
        names = [name for pair in JOBS.items() for name in pair if name]
        return cls(
            what=what,
            host=socket.gethostname(),
            boot=_text_of("/proc/sys/kernel/random/boot_id").strip(),
            namespace=_link_of("/proc/self/ns/pid"),
            pid=os.getpid(),
            ticks=_ticks(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            jobs={name: os.environ[name] for name in names if name in os.environ},
        )

    def __str__(self) -> str:
        return f"`{self.what}`, process {self.pid} on {self.host}, since {self.since}"

    def lives(self, asking: Holder) -> bool | None:
        """Whether that process goes on, or None where `asking` cannot know."""
        if self.boot == asking.boot:
            if self.namespace != asking.namespace:
                return None
            return _ticks(self.pid) == self.ticks or _is_hidden(self.pid)
        if self.host == asking.host or self._started_again(asking):
            return False
        return None

    def _started_again(self, asking: Holder) -> bool:
        for name, count in JOBS.items():
            job = self.jobs.get(name, "none")  # torchrun's number is "none" for jobs that were given none
            if job != "none" and job == asking.jobs.get(name):
                before, now = (int(one.jobs.get(count, 0)) for one in (self, asking))
                if count is None or before < now:
                    return True
        return False


class Lock:
    """While entered, this process alone works in a folder, which is made if it is missing.

    Args:
        folder: where the file `lock` lies while somebody works there.
        what: the command, for the message that others get.
        shown: the folder that messages name, where this one lies hidden in it.

    Raises:
        LockedError: on entering: another process is at work there, or may be, on another host.

    >>> with Lock("run", "vatt pretrain"):
    ...     Path("run/lock").exists()
    True
    >>> Path("run/lock").exists()
    False
    """

    def __init__(self, folder: str | Path, what: str, *, shown: Path | None = None):
        self.folder, self.what = Path(folder), what
        self.shown = shown or self.folder
        self.path = self.folder / NAME

    def __enter__(self) -> Lock:
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
            try:
                taken = _flock(file)
                if taken is False or _is_at(file, self.path):  # else its holder removed it just before we had it
                    self._claim(file, taken)
                    self.file = file
                    return self
            except BaseException:
                file.close()
                raise
            file.close()

    def __exit__(self, *_: object) -> None:
        with self.file:
            if _is_at(self.file, self.path):
                self.path.unlink()

    def check(self) -> None:
        """Refuse already now, before any work, what entering would most likely refuse; nothing is written.

        Raises:
            LockedError: as on entering.
        """
        try:
            holder = _holder(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return
        us = Holder.this_process(self.what)
        if holder is not None and (holder.lives(us) or (holder.lives(us) is None and holder.boot != us.boot)):
            raise self._refusal(holder, us)

    def _claim(self, file: TextIO, taken: bool | None) -> None:
        """Make the open file ours; `taken` is whether the kernel's lock is ours, None where there are no locks."""
        us, text = Holder.this_process(self.what), file.read()
        holder = _holder(text)
        if taken is False:
            raise self._refusal(holder, us)
        if text and holder is None:
            raise LockedError(f"{self.path}: the file must be a lock of vatt's, got other text. Remove it.")
        if holder is not None:
            # Of the same kernel and another container: the kernel's lock, which we have, says that it has ended.
            ended = taken is True and holder.boot == us.boot and holder.namespace != us.namespace
            if not ended and holder.lives(us) is not False:
                raise self._refusal(holder, us)
            say(f"{self.shown}: taking over the lock of {holder}, which has ended without giving it back.")
        file.seek(0)
        file.truncate()
        try:
            json.dump(dataclasses.asdict(us), file)
            file.flush()
        except OSError:
            self.path.unlink()
            raise

    def _refusal(self, holder: Holder | None, us: Holder) -> LockedError:
        """What a person needs to know to decide."""
        who = "one that has only just begun" if holder is None else str(holder)
        text = f"{self.shown}: the folder must be of no other process at work, got {who}."
        if holder is None or holder.boot == us.boot:
            hint = "Wait for it or stop it, or choose another folder."
        else:
            hint = f"It cannot be asked from {us.host}: if it has ended, remove {self.path}."
        job = "" if holder is None else holder.jobs.get("SLURM_JOB_ID", "")
        if job and job == us.jobs.get("SLURM_JOB_ID"):
            hint += f" Both are tasks of Slurm's job {job}: as ranks of one training they are started by torchrun."
        return LockedError(f"{text} {hint}")


def _flock(file: TextIO) -> bool | None:
    """Whether the kernel's lock of the file is ours now; None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return None
        raise
    return True


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the path still leads to this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(text: str) -> Holder | None:
    """Who a lock file says holds it, or None where it says nothing of that kind."""
    try:
        return from_dict(Holder, json.loads(text))
    except ValueError:
        return None


def _ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None where there is none of this number, or it is dead."""
    # The second field is the program's name in parentheses, which may hold any character: count from its end.
    fields = _text_of(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _is_hidden(pid: int) -> bool:
    """Whether it is another user's process, which /proc may not show (mounted with hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _link_of(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
