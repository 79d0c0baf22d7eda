"""Seconds and bytes of a call: CUDA events behind a backlog on a GPU, the wall clock and the resident set on a CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

WARM_UP = 3  # calls before the first that counts
MIN_ROUNDS, MAX_ROUNDS = 7, 200
FLUSH_BYTES = 256 << 20  # at least; twice the L2 of a larger one
MAX_BACKLOG = 0.02  # seconds a GPU waits, at most, so that the host can enqueue a call ahead of it
CYCLES_PER_SECOND = 2e9  # of a GPU, about: a wait that is a little too long or short changes nothing

Call = Callable[[], Any]


class Spread(NamedTuple):
    """Seconds: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def spread(seconds: Sequence[float]) -> Spread:
    """Median and percentiles of at least one time, linear between neighbours."""
    if len(seconds) == 1:
        return Spread(*seconds * 3)
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Spread(statistics.median(seconds), tenths[1], tenths[7])


class Stopwatch:
    """Times one call at a time on a device.

    On a GPU each call starts with a flushed L2, and behind a wait that lasts until the host has enqueued all of it:
    what is measured is the device's time from its first kernel to its last, not the gaps that the host leaves.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.backlog: dict[Call, float] = {}  # seconds the host takes to enqueue the call
        if self.cuda:
            l2 = torch.cuda.get_device_properties().L2_cache_size
            self.flush = torch.empty(max(FLUSH_BYTES, 2 * l2), dtype=torch.uint8, device="cuda")

    def warm_up(self, call: Call) -> float:
        """Run the call until nothing is left to compile, load or allocate; seconds of the last one."""
        for _ in range(WARM_UP - 1):
            call()
        if not self.cuda:
            return self.seconds(call)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        self.backlog[call] = time.perf_counter() - begin
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def seconds(self, call: Call) -> float:
        """What one call takes; freeing what it returns is not counted."""
        if not self.cuda:
            begin = time.perf_counter()
            kept = call()
            end = time.perf_counter()
            del kept
            return end - begin
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self.flush.zero_()
        wait = min(2 * self.backlog.get(call, MAX_BACKLOG), MAX_BACKLOG)
        torch.cuda._sleep(int(wait * CYCLES_PER_SECOND))
        begin.record()
        kept = call()
        end.record()
        torch.cuda.synchronize()
        del kept
        return begin.elapsed_time(end) / 1e3


def num_rounds(seconds_per_round: float, budget: float) -> int:
    """Rounds that fit into `budget` seconds, within the bounds that a median needs and a reader waits for."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / max(seconds_per_round, 1e-9))))


def one_round(
    stopwatch: Stopwatch, calls: dict[str, Call], index: int, choose: Callable[[str], AbstractContextManager[None]]
) -> dict[str, float]:
    """Seconds of every call, each once inside its `choose(name)`; every round begins with another one."""
    names, seconds = list(calls), {}
    first = index % len(names)
    for name in names[first:] + names[:first]:
        with choose(name):
            seconds[name] = stopwatch.seconds(calls[name])
    return seconds


def peak_extra_bytes(call: Call, device: str) -> int | None:
    """Memory that one call takes on top of what is held before it, at its highest; None where nothing can tell.

    On a GPU what torch's allocator gave out. On Linux the resident set of the process (the kernel's high-water mark),
    the least of three calls: what one takes beyond that are holes which earlier calls have left in the heap.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    if _reset_high_water_mark() is None:
        return None
    return min(_resident_growth(call) for _ in range(3))


def _resident_growth(call: Call) -> int:
    trim = _malloc_trim()
    if trim is not None:
        trim(0)  # what the C library holds back would hide the same amount of what the call takes
    before = _reset_high_water_mark()
    kept = call()
    peak = _status_bytes("VmHWM")
    del kept
    return peak - before


def _reset_high_water_mark() -> int | None:
    """Set the process's VmHWM to its VmRSS; bytes of it, or None where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS") if _status_bytes("VmHWM") else None
    except (OSError, KeyError):
        return None


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) << 10


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
