"""What a number was measured on: the machine, its versions, the state of the sources, and its measured ceilings."""

from __future__ import annotations

import datetime
import functools
import hashlib
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Stopwatch
from vatt_engine.cpus import usable_cpus
from vatt_engine.testing import randn

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("vatt_engine", "kernels", "csrc", "benchmarks")  # what decides a measurement
SUFFIXES = {".py", ".json", ".h", ".cpp", ".cu", ".cuh"}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # far beyond any cache
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
CEILING_ROUNDS = 10
# Dense bfloat16 rates by the vendor's data sheets, FLOP/s: the usual denominator of MFU. The first name that fits.
DATASHEET = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def device_name() -> str:
    """The GPU's name where there is one, else the CPU's and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {num_cores()} cores"


def slug() -> str:
    """`device_name` as a folder's name."""
    plain = re.sub(r"\((r|tm)\)", "", device_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def num_cores() -> int:
    return usable_cpus()


@functools.cache
def stamp(commit: str | None = None) -> dict[str, Any]:
    """What stands beside every row. `commit` names it where the sources come without their repository."""
    found: dict[str, Any] = {"machine": device_name(), "cpu": cpu_name(), "cores": num_cores()}
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        found |= {"sms": properties.multi_processor_count, "memory": properties.total_memory, "driver": _driver()}
    found |= {"cuda": torch.version.cuda, "torch": str(torch.__version__), "triton": _version("triton")}
    found |= {"python": platform.python_version()} | _git_state() | ({"commit": commit} if commit else {})
    return found | {"sources": sources_digest(), "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True)
    return run.stdout.split("\n")[0].strip() or None if run.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any]:
    def git(*words: str) -> str | None:
        run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return {"commit": None, "dirty": None}
    # Results do not decide a measurement, and the run itself writes them.
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": None if changes is None else bool(changes)}


@functools.cache
def sources_digest(*more: str) -> str:
    """A digest of the files that decide a measurement: it tells versions apart also where there is no git.

    `more` are further folders, such as "tests" for what decides a test's outcome.
    """
    digest = hashlib.sha256()
    files = {
        path.resolve() for name in (*SOURCES, *more) for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES
    }
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@functools.cache
def bytes_per_second(device: str) -> float:
    """The memory's rate in a large copy, bytes read plus bytes written."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(7)
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source), device)


@functools.cache
def flops_per_second(device: str, dtype: torch.dtype) -> float:
    """The library's rate in a large square product of random values."""
    size = MATMUL_SIZE[device]
    a, b = (randn(size, size, seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    return 2 * size**3 / _fastest(lambda: a @ b, device)


def _fastest(call: Any, device: str) -> float:
    """A ceiling is what was reached once, not what is usual."""
    stopwatch = Stopwatch(device)
    stopwatch.warm_up(call)
    return min(stopwatch.seconds(call) for _ in range(CEILING_ROUNDS))


def datasheet_rate(dtype: torch.dtype) -> float | None:
    """The matrix rate that the GPU's vendor states, FLOP/s, where this file knows it."""
    name = device_name() if dtype == torch.bfloat16 else ""
    return next((rate for chip, rate in DATASHEET.items() if chip in name), None)
