"""The CPUs that this process may use, and how OpenMP's threads wait on them.

A machine's number of CPUs says little about a process: `taskset` and job schedulers pin it to some of them, containers
and cgroups give it a share of their time. More threads than that only get in each other's way, so everything that
starts threads or processes by the number of CPUs asks `usable_cpus`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

# The threads of GNU's OpenMP, which torch's wheels carry, wait for each other by spinning, 300,000 times and so for
# milliseconds. Where another busy program holds one of the CPUs, that is time in which the thread that all wait for
# cannot run. 1,000 spins, some microseconds, are enough for threads that all run: on two idle CPUs the demo's step is
# as fast as by default, while threads that never spin (OMP_WAIT_POLICY=passive) lose a third of its speed.
WAITING = {"GOMP_SPINCOUNT": "1000"}
CHOICES_OF_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # by any of these a user has chosen


def usable_cpus() -> int:
    """How many CPUs' worth of time this process may use, at least 1.

    The least of: the CPUs it is pinned to, the time that its cgroups allow (rounded up), SLURM_CPUS_PER_TASK.

    >>> 1 <= usable_cpus() <= os.cpu_count()
    True
    """
    limits = [_pinned_cpus()]
    if (quota := cgroup_quota()) is not None:
        limits.append(math.ceil(quota))
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        limits.append(int(slurm))
    return max(1, min(limits))


def _pinned_cpus() -> int:
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; `-X cpu_count` changes it
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cgroup_quota(root: str | Path = "/") -> float | None:
    """CPUs' worth of time that the cgroups of this process allow (0.5 is half of one), or None without a limit.

    Version 2 keeps it in cpu.max, version 1 in cpu.cfs_quota_us and cpu.cfs_period_us. A group is limited by the groups
    above it too, so the least of all levels counts.

    Args:
        root: where the file system begins.

    Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst.
    """
    root = Path(root)
    quotas = [quota for folder in _cgroup_folders(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """The folders of this process's groups that may hold a limit of CPU time, with those above them."""
    groups = {}  # by controller; version 2 has one group for all, whose line names none
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        top, point = mount.split(" ")[3:5]
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller not in groups or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        folder = root / point.lstrip("/")
        yield folder
        # A container may see its own group as the top, and then the path is one of the host's that means nothing here.
        group = groups[controller]
        below = group.removeprefix(top.rstrip("/")) if group.startswith(top) else ""
        for name in filter(None, below.split("/")):
            folder /= name
            yield folder


def _quota_of(folder: Path) -> float | None:
    text = " ".join(_lines(folder / "cpu.max"))
    if not text:
        text = " ".join(line for name in ("quota", "period") for line in _lines(folder / f"cpu.cfs_{name}_us"))
    quota, _, period = text.partition(" ")
    if not (quota.isdecimal() and period.isdecimal() and int(period)):  # "max", "-1", or no file
        return None
    return int(quota) / int(period)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:  # no such file on this system, or none of ours to read: no limit that we could know
        return []


def openmp_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What a program of ours adds to its environment before torch, and with it OpenMP, is loaded: later is too late.

    Threads spin but shortly before they sleep (see `WAITING`), unless the user has chosen otherwise. Where a cgroup or
    the scheduler allows less time than there are CPUs, there are as many threads as that: torch counts CPUs alone.

    Args:
        environment: what the user has set.

    >>> openmp_settings({"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "2"})
    {}
    """
    settings = {} if any(name in environment for name in CHOICES_OF_WAITING) else dict(WAITING)
    if "OMP_NUM_THREADS" not in environment and usable_cpus() < _pinned_cpus():
        settings["OMP_NUM_THREADS"] = str(usable_cpus())
    return settings
