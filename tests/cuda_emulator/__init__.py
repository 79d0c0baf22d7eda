"""CUDA kernels run on the CPU, so that tests prove their numbers without a GPU.

build(...) compiles .cu files of csrc/ with g++ against stand-ins of the CUDA headers (cuda_runtime.h, emulated_ptx.h)
into a Python module; emulator.h says how the threads run and what is caught. guarded(...) puts a tensor between pages
that nobody may touch.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import mmap
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pybind11
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda-emulator"
# Undefined behaviour ends in a trap, which the emulator reports. No alias analysis: kernels read bytes as words.
FLAGS = [
    *(
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
        "-U_FORTIFY_SOURCE",
    ),
    *("-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"),
    *("-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", "-DVATT_EMULATE", "-DVATT_HAS_CUDA=1"),
]
BINDING_FLAGS = ["-O0", "-fno-sanitize=all"]  # of the file that only hands functions to Python: quick to compile


@functools.cache
def build(*sources: Path) -> ModuleType:
    """The module of these .cu and .cpp files, with what their vatt::bind_<name>(module) add to it; objects are cached.

    Beside that it has set_order(seed), the order in which warps run (0 ascending, 1 descending, others shuffled), and
    take_counts(), the events counted since the last call ("ldmatrix bank conflicts").
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "the native module was built by some C++ compiler"
    includes = [CSRC, HERE, pybind11.get_include(), sysconfig.get_path("include")]
    common = [compiler, *FLAGS, *(f"-I{path}" for path in includes)]
    objects = [_object(common, source) for source in [*sorted(sources), HERE / "emulator.cpp"]]
    objects.append(_object([*common, *BINDING_FLAGS], HERE / "module.cpp"))
    library = CACHE / f"emulated-{_digest(objects, [])}.so"
    _make(library, [compiler, "-shared", *objects])
    # pybind11 gives back what it has loaded under a name before, whatever the file: each library gets its own.
    spec = importlib.util.spec_from_file_location(f"{library.stem}.emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _object(command: Sequence[object], source: Path) -> Path:
    """The object of a source, compiled unless the cache has one of the same flags, source and headers."""
    headers = sorted(p for folder in (CSRC, HERE) for p in folder.iterdir() if p.suffix in (".h", ".cuh"))
    out = CACHE / f"{source.stem}-{_digest(command, [source, *headers])}.o"
    _make(out, [*command, "-x", "c++", "-c", source])
    return out


def _digest(arguments: Sequence[object], files: Sequence[Path]) -> str:
    text = hashlib.sha256(" ".join([sys.version, *map(str, arguments)]).encode())
    for file in files:
        text.update(file.read_bytes())
    return text.hexdigest()[:16]


def _make(out: Path, command: Sequence[object]) -> None:
    """Run a compiler unless `out` is there already; a test process that wants what another compiles waits for it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists():
            return
        part = out.with_suffix(f".part{out.suffix}")
        run = subprocess.run([*map(str, command), "-o", str(part)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        part.replace(out)


class Guarded:
    """A copy of a tensor, of the same strides, between two pages that nobody may touch.

    It ends where the second begins, up to its alignment, or (front) begins where the first ends. Accesses to the pages
    fault; writes to what lies between them and the tensor, and to the gaps of its strides, are found by check().
    """

    def __init__(self, tensor: Tensor, offset: int = 0, alignment: int = 16, *, front: bool = False):
        """Puts the first element `offset` elements behind a multiple of `alignment` bytes."""
        size, page = tensor.element_size(), mmap.PAGESIZE
        count = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        span = (-(-count * size // page) + 1) * page
        start = offset * size if front else (span - (count + offset) * size) // alignment * alignment + offset * size
        memory = mmap.mmap(-1, span + 2 * page)
        memory[:] = b"\xff" * len(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (address, address + page + span):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8, count=span, offset=page)
        cover = torch.zeros(count, dtype=torch.bool)
        if count:
            cover.as_strided(tensor.shape, tensor.stride()).fill_(True)
            inside = self._bytes[start : start + count * size].view(tensor.dtype)
            self.tensor = inside.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        else:
            self.tensor = tensor.clone()
        self._outside = torch.ones(span, dtype=torch.bool)
        self._outside[start : start + count * size] = ~cover.repeat_interleave(size)

    def check(self) -> None:
        """Raises AssertionError if a byte outside the tensor has changed."""
        changed = (self._bytes[self._outside] != 255).sum()
        assert changed == 0, f"{changed} bytes outside the tensor were written"
