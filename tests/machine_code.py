"""What nvcc made of csrc/*.cu, read from the native module itself: nothing is compiled a second time for the tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vatt_engine import _C

needs_machine_code = pytest.mark.skipif(not _C.has_cuda, reason="the native module was built without nvcc")


def dump(*options: str) -> str:
    """What cuobjdump prints about the native module."""
    run = subprocess.run([_cuobjdump(), *options, _C.__file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def _cuobjdump() -> str:
    """nvcc's own, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton", reason="needs cuobjdump, of the CUDA toolkit or Triton's")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def resources(text: str) -> dict[tuple[str, str, str], dict[str, int]]:
    """(stem of the source, architecture, kernel) -> registers and bytes of stack and local memory a thread takes."""
    found = {}
    for part in text.split("Fatbin elf code:")[1:]:
        arch = re.search(r"^arch = sm_(\w+)$", part, flags=re.MULTILINE)[1]
        source = Path(re.search(r"^identifier = (.*)$", part, flags=re.MULTILINE)[1]).stem
        kernels = re.findall(r"^ Function (\w+):\n +(.*)$", part, flags=re.MULTILINE)
        assert len(kernels) == part.count(" REG:"), part
        for kernel, line in kernels:
            numbers = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", line)
            found[source, arch, kernel] = {name: int(number) for name, number in numbers}
    return found
