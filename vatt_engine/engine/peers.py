"""What ranks tell each other beside the collectives, through torch's store: who is alive, whose files are written.

A collective cannot be given up once begun, and a background thread must not begin one: it would meet the main thread's.
The store, which `init_process_group` made anyway, is safe to use from any thread through a clone of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from vatt_engine.collectives import all_reduce_max, rank, world_size
from vatt_engine.engine.faults import TrainingStopped

_SILENCE = 20.0  # seconds without a sign of life after which a rank counts as dead
_BEAT = 1.0
_WRITE_LIMIT = 1800.0  # seconds that a rank may write at its part of a checkpoint after another has finished


def shared_store() -> tuple[str, dist.Store] | None:
    """A name that is new, and the process group's store for one more thread under it; None where there is one process.

    All ranks call it in the same order. torchrun's store outlives a restart of its ranks, and so do the keys in it.
    """
    if world_size() == 1:
        return None
    number = torch.tensor(secrets.randbits(48) if rank() == 0 else 0)
    number = all_reduce_max(number.cuda() if dist.get_backend() == "nccl" else number)
    name = f"{int(number):012x}"
    return name, dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())


class Meeting:
    """The ranks' agreement that all files of one checkpoint are written; one after the other, numbered by `next`.

    Args:
        store: of this thread's own; every rank's reaches the same one.
        rank, size: of this process, and how many there are.
        name: the same on all ranks, another for each meeting and each start of the program.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, name: str, *, limit: float = _WRITE_LIMIT):
        self.store, self.rank, self.size, self.name, self.limit = store, rank, size, name, limit

    @classmethod
    def series(cls) -> Callable[[], Meeting | None]:
        """Gives one meeting after another; None where there is one process. All ranks call it in the same order."""
        shared, numbers = shared_store(), itertools.count()
        if shared is None:
            return lambda: None
        name, store = shared
        return lambda: cls(store, rank(), world_size(), f"{name}-{next(numbers)}")

    def conclude(self, files: dict[str, Any], commit: Callable[[dict[str, Any]], None]) -> None:
        """Say that this rank's `files` are written; when all are, rank 0 commits them together.

        Raises:
            OSError: some rank failed or said nothing in time; on every rank.
        """
        self._set(self.rank, files)
        if self.rank:
            self._get("verdict")
            return
        commit({name: entry for number in range(self.size) for name, entry in self._get(number).items()})
        self._set("verdict", {})

    def fail(self, reason: str) -> None:
        """Say that this rank could not do its part, or, on rank 0, that there is no checkpoint."""
        self._set(self.rank if self.rank else "verdict", {"error": reason})

    def _set(self, key: int | str, value: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # without a store no rank hears anything, and all say so in _get
            self.store.set(f"{self.name}/{key}", json.dumps(value))

    def _get(self, key: int | str) -> dict[str, Any]:
        try:
            self.store.wait([f"{self.name}/{key}"], timedelta(seconds=self.limit))
            answer = json.loads(self.store.get(f"{self.name}/{key}"))
        except RuntimeError as error:  # torch's DistStoreError and DistNetworkError
            who = f"rank {key if isinstance(key, int) else 0}"
            raise OSError(f"{who} must write its part within {self.limit:.0f} s, got no word of it.") from error
        if "error" in answer:
            raise OSError(answer["error"])
        return answer


class Peers:
    """While entered, a rank that dies ends this process within 30 seconds, with a message that names it.

    Each rank says once a second in the store that it lives, and listens to the next one; who hears nothing tells all.
    A collective that fails meanwhile (gloo's do, when a connection breaks) waits for that name; one that hangs (NCCL's)
    is left by ending the process with exit code 1. One process alone has no peers, and nothing happens.

    Args:
        silence: seconds without a sign of life after which a rank counts as dead.

    Raises:
        TrainingStopped: on leaving with an error while another rank has died; it names the rank.

    >>> with Peers():
    ...     pass
    """

    def __init__(self, *, silence: float = _SILENCE):
        self.silence, shared = silence, shared_store()
        self.store = None if shared is None else shared[1]
        self.dead: str | None = None
        self.found, self.left = threading.Event(), threading.Event()

    def __enter__(self) -> Peers:
        if self.store is not None:
            self.thread = threading.Thread(target=self._watch, name="vatt-peers", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.store is None:
            return
        own = "" if error is None else " ".join(f"{kind.__name__}: {error}".split())[:300]
        broken = isinstance(error, RuntimeError) and not isinstance(error, TrainingStopped)
        if broken:  # most likely a collective, by another's death
            self.found.wait(self.silence + 5 * _BEAT)
        self.left.set()
        self.thread.join()
        if broken and self.dead is not None:
            raise TrainingStopped(self.dead) from error
        with contextlib.suppress(RuntimeError):  # the store may have gone with the rank that held it
            self.store.set(f"left/{rank()}", own)

    def _watch(self) -> None:
        me, watched = rank(), (rank() + 1) % world_size()
        now = heard = time.monotonic()
        beat = b""
        for count in itertools.count():
            last, now = now, time.monotonic()
            if now - last > 5 * _BEAT:  # this process was stopped for a while, and so perhaps were all
                heard = now
            try:
                self.store.set(f"beat/{me}", str(count))
                if self.store.check(["dead"]):
                    return self._stop(self.store.get("dead").decode())
                if self.store.check([f"left/{watched}"]):
                    if reason := self.store.get(f"left/{watched}").decode():
                        return self._tell(f"rank {watched} has stopped: {reason}")
                elif self.store.check([f"beat/{watched}"]):
                    beat, before = self.store.get(f"beat/{watched}"), beat
                    heard = now if beat != before else heard
                    if now - heard > self.silence:
                        return self._tell(f"rank {watched} has died: no sign of life for {self.silence:.0f} s.")
            except RuntimeError:
                return self._stop("rank 0, or the launcher that held the ranks' store, has died.")
            if self.left.wait(_BEAT):
                return None

    def _tell(self, reason: str) -> None:
        self.store.set("dead", reason)
        self._stop(reason)

    def _stop(self, reason: str) -> None:
        """Let the main thread leave with the reason, or leave in its place if it hangs in a collective."""
        self.dead = f"rank {rank()}: training cannot go on without all ranks: {reason}"
        self.found.set()
        if not self.left.wait(5 * _BEAT):
            os.write(2, f"\n{self.dead}\n".encode())
            os._exit(1)
