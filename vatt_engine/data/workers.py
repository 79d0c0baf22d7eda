"""Decoding in processes that may be killed: a file that crashes or hangs FFmpeg costs its sample and no more.

A fresh interpreter imports everything once, stays without threads, and forks the workers: one starts in milliseconds
and shares the memory of its imports. A worker has a socket, on which every message is one JSON object, and a piece of
anonymous shared memory for picture and sound, which the system frees with the last process that has it, whatever that
died of. Python's and torch's own workers were no choice: both pickle what they send.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vatt_engine.cpus import openmp_settings
from vatt_engine.data.clips import ClipReader, Decoded
from vatt_engine.data.config import DataConfig
from vatt_engine.data.manifest import Member, Sample
from vatt_engine.data.media import MediaError
from vatt_engine.schema import from_dict, to_dict

PROGRAM = "from vatt_engine.data.workers import serve; serve()"
START_SECONDS = 300  # for the interpreter and its imports, on a machine with much else to do
MAX_BYTES = 1 << 16  # of a message
MAX_TRACEBACK = 1 << 13  # characters, of which JSON makes at most six bytes each


class Workers:
    """ClipReader in `config.num_workers` processes, for as many threads.

    A worker that dies is replaced and its sample tried once more, so that what kills a worker by chance (the kernel
    short of memory, an operator) loses no sample; a second death is the file's fault. A worker that needs more than
    `config.max_decode_seconds` is killed, and that is the file's fault at once.

    Args:
        config: see DataConfig.
        train: see ClipReader.

    >>> Workers(DataConfig(num_workers=2), train=False).decode(sample, seed=0, epoch=0, views=[0])  # doctest: +SKIP
    """

    def __init__(self, config: DataConfig, *, train: bool):
        self._nursery = _Nursery(config, train)
        self._all = [_Worker(config, self._nursery) for _ in range(config.num_workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)

    @property
    def pids(self) -> list[int]:
        """The processes that are running."""
        return [worker.pid for worker in self._all if worker.pid is not None]

    def decode(self, sample: Sample, *, seed: int, epoch: int, views: Sequence[int]) -> Decoded:
        """See ClipReader.decode.

        Raises:
            MediaError: the file cannot be used, or took too long, or killed two workers.
            RuntimeError: the code of a worker is wrong; the message has its traceback.
            ChildProcessError: no process can be started, or `close` was called meanwhile.
        """
        with self._borrowed() as worker:
            reply, note = worker.ask(sample, {"seed": seed, "epoch": epoch, "views": views})
            places = [None] * len(views) if worker.pictures is None else worker.pictures[: len(views)]
            pictures = [None if place is None else place.clone() for place in places]
            audio = None if worker.audio is None else worker.audio.clone()
            reply["note"] = " ".join(filter(None, (reply["note"], note)))
            return Decoded(pictures, audio, **reply)

    def check(self, sample: Sample, start: float, seconds: float) -> tuple[float | None, str, str]:
        """See ClipReader.check; errors as `decode`, whose limit of time holds for each part."""
        with self._borrowed() as worker:
            reply, note = worker.ask(sample, {"start": start, "seconds": seconds})
            return reply["next"], " ".join(filter(None, (reply["note"], note))), reply["set_note"]

    def close(self) -> None:
        """Kill the processes."""
        self._nursery.close(self.pids)

    @contextmanager
    def _borrowed(self) -> Iterator[_Worker]:
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)


class _Worker:
    """One process at a time, forked when it is first asked."""

    def __init__(self, config: DataConfig, nursery: _Nursery):
        self.config, self.nursery = config, nursery
        self.pid: int | None = None

    def ask(self, sample: Sample, task: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The answer, and what was odd about getting it."""
        message, note = task | {"sample": _fields(sample)}, ""
        for _ in range(2):
            if self.pid is None:
                self._start()
            try:
                reply = _exchange(self.socket, message)
            except TimeoutError:
                self._end(kill=True)
                text = f"decoding must take at most {self.config.max_decode_seconds:g} s, got more."
                raise MediaError(sample.path, text) from None
            if reply is None:
                note = f"decoding must not end its process, got {self._end(kill=False)}"
            elif "error" in reply:
                raise MediaError(sample.path, reply["error"])
            elif "fault" in reply:
                text = f"loader: decoding {sample.path} must not fail in the loader's own code, got"
                raise RuntimeError(f"{text}:\n{reply['fault']}")
            else:
                return reply, note and f"{note} once."
        raise MediaError(sample.path, f"{note} twice.")

    def _start(self) -> None:
        self.socket, theirs = _sockets()
        self.socket.settimeout(self.config.max_decode_seconds)
        memory = os.memfd_create("vatt-worker")
        self.pictures, self.audio = _tensors(memory, self.config)
        with theirs, open(memory, "rb"):
            self.pid = self.nursery.ask({}, theirs.fileno(), memory)["pid"]

    def _end(self, *, kill: bool) -> str:
        """What the process died of, which has closed its socket or is to be killed."""
        self.socket.close()
        pid, self.pid = self.pid, None
        code = self.nursery.ask({"end": pid, "kill": kill})["code"]
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class _Nursery:
    """The process that forks the workers, and knows what they died of."""

    def __init__(self, config: DataConfig, train: bool):
        self.hello = {"config": to_dict(config), "train": train}
        self.process: subprocess.Popen | None = None
        self.lock, self.closed = Lock(), False

    def ask(self, message: dict[str, Any], *files: int) -> dict[str, Any]:
        with self.lock:
            for _ in range(2):  # it too may be killed
                if self.closed:
                    raise ChildProcessError("loader: the loader was closed while it decoded.")
                if self.process is None:
                    self._start()
                reply = _exchange(self.socket, message, *files)
                if reply is not None:
                    return reply
                self._end()
        raise ChildProcessError("loader: the process that starts the decoding ones must live, got its end, twice.")

    def close(self, pids: list[int]) -> None:
        with self.lock:
            self.closed = True
            if self.process is not None:
                for pid in pids:
                    _exchange(self.socket, {"end": pid, "kill": True})
                self.process.kill()
                self._end()

    def _start(self) -> None:
        self.socket, theirs = _sockets()
        self.socket.settimeout(START_SECONDS)
        with theirs:
            command = [sys.executable, "-c", PROGRAM, str(theirs.fileno())]
            env = os.environ | openmp_settings(os.environ)
            env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            nothing = subprocess.DEVNULL
            shared = (theirs.fileno(),)
            self.process = subprocess.Popen(command, env=env, pass_fds=shared, stdin=nothing, stdout=nothing)
        if _exchange(self.socket, self.hello) is None:
            raise ChildProcessError(f"loader: a decoding process must start, got exit code {self._end()}.")

    def _end(self) -> int:
        self.socket.close()
        process, self.process = self.process, None
        return process.wait()


def serve() -> None:
    """The program of the nursery: forks and buries workers until its socket is closed."""
    import av  # noqa: F401  once for all workers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started us
    torch.set_num_threads(1)
    killed: list[int] = []
    with socket.socket(fileno=int(sys.argv[1])) as control:
        hello = json.loads(control.recv(MAX_BYTES))
        reader = ClipReader(from_dict(DataConfig, hello["config"]), None, seed=0, train=hello["train"])
        reply: dict[str, Any] = {}
        while True:
            control.send(json.dumps(reply).encode())
            content, files, _, _ = socket.recv_fds(control, MAX_BYTES, 2)
            if not content:
                return
            message = json.loads(content)
            killed = [pid for pid in killed if os.waitpid(pid, os.WNOHANG)[0] == 0]
            if "end" in message:
                reply = {"code": _buried(message["end"], message["kill"], killed)}
                continue
            reply = {"pid": os.fork()}
            if reply["pid"] == 0:
                control.close()
                return _work(reader, *files)
            for file in files:
                os.close(file)


def _buried(pid: int, kill: bool, killed: list[int]) -> int:
    """The exit code of a worker; one to be killed is not waited for: the disk may hold it where no signal reaches."""
    try:
        if not kill:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
    except (ChildProcessError, ProcessLookupError):  # a worker of an earlier nursery, which was killed
        pass
    return -signal.SIGKILL


def _work(reader: ClipReader, channel: int, memory: int) -> None:
    """A worker: answers until its socket is closed."""
    tensors = _tensors(memory, reader.config)
    with socket.socket(fileno=channel) as ours:
        while content := ours.recv(MAX_BYTES):
            signal.setitimer(signal.ITIMER_REAL, reader.config.max_decode_seconds + 60)  # should the parent be gone
            try:
                reply = _answer(reader, json.loads(content), tensors)
            except Exception:  # no fault of the file, which ends the run over there
                reply = {"fault": traceback.format_exc()[-MAX_TRACEBACK:]}
            signal.setitimer(signal.ITIMER_REAL, 0)
            ours.send(json.dumps(reply).encode())


def _answer(reader: ClipReader, task: dict[str, Any], tensors: tuple[Tensor | None, Tensor | None]) -> dict[str, Any]:
    sample = _sample(task["sample"])
    try:
        if "start" in task:
            return dict(zip(("next", "note", "set_note"), reader.check(sample, task["start"], task["seconds"])))
        reader.seed = task["seed"]
        decoded = reader.decode(sample, task["epoch"], task["views"])
    except MediaError as error:
        return {"error": error.reason}
    pictures, audio = tensors
    for place, picture in zip([] if pictures is None else pictures, decoded.pictures):
        place.copy_(picture)
    if audio is not None:
        audio.copy_(decoded.audio)
    return {name: getattr(decoded, name) for name in ("audio_mask", "start", "end", "note", "set_note")}


def _sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends that keep messages apart and tell each other when one is gone."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _exchange(channel: socket.socket, message: dict[str, Any], *files: int) -> dict[str, Any] | None:
    """The answer, or None where the other side ended instead."""
    try:
        socket.send_fds(channel, [json.dumps(message).encode()], files)
        content = channel.recv(MAX_BYTES)
    except ConnectionError:
        return None
    return json.loads(content) if content else None


def _tensors(memory: int, config: DataConfig) -> tuple[Tensor | None, Tensor | None]:
    """Pictures [num_crops, T, S, S, 3] and sound of one window in shared memory."""
    size, count = (config.num_crops, config.num_frames, config.frame_size, config.frame_size, 3), config.num_samples
    num_bytes = torch.Size(size).numel()
    begin = -(-num_bytes // 4) * 4
    os.ftruncate(memory, begin + 4 * count)
    pages = mmap.mmap(memory, begin + 4 * count)
    pictures = torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes).view(size) if num_bytes else None
    return pictures, torch.frombuffer(pages, dtype=torch.float32, count=count, offset=begin) if count else None


def _fields(sample: Sample) -> dict[str, Any]:
    """What decoding needs of a sample, as JSON values."""
    return to_dict(dataclasses.replace(sample, captions=(), label=None))


def _sample(fields: dict[str, Any]) -> Sample:
    members = {name: _member(part) for name in ("video", "audio") if (part := fields[name])}
    return Sample(**fields | {"path": Path(fields["path"]), "captions": ()} | members)


def _member(values: list[Any]) -> Member:
    member = Member(Path(values[0]), *values[1:])
    return member._replace(heard=None if member.heard is None else tuple(map(tuple, member.heard)))
