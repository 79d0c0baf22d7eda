"""The kernels a second time, run by Triton's interpreter on CPU tensors; vatt_engine.kernels itself stays compiled.

    kernels = triton_interpreter.load("tokenize")
    with triton_interpreter.running():
        kernels.tokenize_fwd(...)

While they run, an address outside the arguments of a kernel fails. And three things of the interpreter are mended, so
that its numbers are the hardware's: it multiplies the bit patterns of bfloat16 in tl.dot instead of the values, it
truncates float32 to bfloat16 instead of rounding to the nearest even, and it leaves out tl.device_assert, which the
launchers ask for.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        _change_once(patch)
        _watch(patch)
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
    methods = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):  # Triton 3.6 takes loop bounds from arrays as NumPy 2.4 no longer allows
        methods(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", options)


def _change_once(patch: pytest.MonkeyPatch) -> None:
    """A launch changes triton.language once; the interpreter would do it again whenever a kernel calls a function."""
    change, changed = interpreter._patch_lang, []

    def patch_lang(fn):
        wanted = [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]
        if wanted and all(lang in changed for lang in wanted):
            return interpreter._LangPatchScope()  # nothing to take back
        scope = change(fn)
        if not changed:  # the launch itself, which takes back its changes at its end
            take_back = scope.restore
            scope.restore = lambda: (changed.clear(), take_back())
        changed.extend(wanted)
        return scope

    patch.setattr(interpreter, "_patch_lang", patch_lang)


def _watch(patch: pytest.MonkeyPatch) -> None:
    """Reads and writes outside the arguments of a kernel fail."""
    spans = np.zeros((0, 2), dtype=np.uint64)  # of memory: first byte, and the one after the last
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def init_args(self, args, kwargs):
        nonlocal spans
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor) and arg.numel()]
        spans = np.array([_span(tensor) for tensor in tensors], dtype=np.uint64)
        return prepare(self, args, kwargs)

    def check(ptrs, mask):
        first = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)][:, None]
        after = first + np.uint64(ptrs.get_element_ty().primitive_bitwidth // 8)
        assert bool(((first >= spans[:, 0]) & (after <= spans[:, 1])).any(1).all()), "an address outside the arguments"

    def create_masked_load(self, ptrs, mask, *rest, **options):
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def create_masked_store(self, ptrs, value, mask, *rest, **options):
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **options)

    patch.setattr(executor, "_init_args_hst", init_args)
    patch.setattr(builder, "create_masked_load", create_masked_load)
    patch.setattr(builder, "create_masked_store", create_masked_store)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


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
