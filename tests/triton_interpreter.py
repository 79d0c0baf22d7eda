"""The kernels a second time, run by Triton's interpreter on CPU tensors; vatt_engine.kernels itself stays compiled.

    kernels = triton_interpreter.load("tokenize")
    with triton_interpreter.running():
        kernels.tokenize_fwd(...)

While it runs, three things of the interpreter are mended, so that its numbers are the hardware's: it multiplies the
bit patterns of bfloat16 in tl.dot instead of the values, it truncates float32 to bfloat16 instead of rounding to the
nearest even, and it leaves out tl.device_assert, which the launchers ask for.
"""

from __future__ import annotations

import importlib
import itertools
import random
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.experimental.gluon  # what the first launch would import otherwise, and only while nothing is changed
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

PACKAGE = "interpreted_kernels"


def load(stem: str) -> types.ModuleType:
    """kernels/<stem>.py with every @triton.jit an interpreted function."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(Path(__file__).resolve().parents[1] / "kernels")]
        sys.modules[PACKAGE] = package
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    try:
        return importlib.import_module(f"{PACKAGE}.{stem}")
    finally:
        triton.knobs.runtime.interpret = before


@contextmanager
def running() -> Iterator[None]:
    """Lets the interpreted kernels run; what it changes in Triton is as before afterwards."""
    # Interpreted functions that call each other leave triton.language changed, and then nothing compiles any more.
    changed = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
    before = [dict(vars(owner)) for owner in changed]
    with pytest.MonkeyPatch.context() as patch:
        for module in (tl, tl.standard):  # tl.max, tl.sort and the like are kernels too
            for name, member in list(vars(module).items()):
                if isinstance(member, JITFunction):
                    patch.setattr(module, name, interpreter.InterpretedFunction(member.fn))
        _mend(patch)
        try:
            yield
        finally:
            for owner, members in zip(changed, before):
                for name in set(vars(owner)) - set(members):
                    delattr(owner, name)
                for name, member in members.items():
                    if vars(owner)[name] is not member:
                        setattr(owner, name, member)


def _mend(patch: pytest.MonkeyPatch) -> None:
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, *rest):
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self, source, to):
        if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return _widened(source)
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = np.where(np.isnan(source.data), 0x7FC0, nearest).astype(np.uint16)
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, to)

    patch.setattr(builder, "create_dot", create_dot)
    patch.setattr(builder, "cast_impl", cast_impl)
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", options)


def _widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """bfloat16, which the interpreter keeps as 16-bit patterns, as the same values in float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@contextmanager
def guard_bands(band: int = 256) -> Iterator[None]:
    """Every tensor that a launcher allocates lies between bands of `band` bytes, which must be as before at the end.

    What is never written is NaN as a float and far out of range as an integer.
    """
    allocate = torch.Tensor.new_empty
    buffers = []

    def new_empty(self, *size, dtype=None, **rest):
        out = allocate(self, *size, dtype=dtype, **rest)
        if out.numel() == 0:
            return out
        buffer = torch.full((out.nbytes + 2 * band,), 0xFF, dtype=torch.uint8)
        buffers.append(buffer)
        return buffer[band:-band].view(out.dtype).view(out.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield
    assert buffers, "no launcher allocated anything"
    for buffer in buffers:
        assert bool((buffer[:band] == 0xFF).all()), "written before the beginning"
        assert bool((buffer[-band:] == 0xFF).all()), "written beyond the end"


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations in which any two values of any two options meet at least once."""
    draw = random.Random(0)

    def enumerated(name: str) -> list[tuple[str, int]]:
        return [(name, i) for i in range(len(options[name]))]

    left = {
        pair
        for one, other in itertools.combinations(options, 2)
        for pair in itertools.product(enumerated(one), enumerated(other))
    }
    rows = []
    while left:
        seed = dict(draw.choice(sorted(left)))
        candidates = [{name: draw.randrange(len(values)) for name, values in options.items()} | seed for _ in range(50)]
        best = max(candidates, key=lambda row: sum(pair in left for pair in itertools.combinations(row.items(), 2)))
        left.difference_update(itertools.combinations(best.items(), 2))
        rows.append({name: options[name][i] for name, i in best.items()})
    return rows
