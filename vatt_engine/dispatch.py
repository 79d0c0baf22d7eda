"""An op is a schema, a fake, and an ordered list of implementations; `use_impl(...)` forces one.

Two forms share one table:

- `define_op` registers a private `torch.ops.vatt.<name>` (opaque to torch.compile, no autograd of its own);
  the `autograd.Function` that joins a forward and a backward op stands in the op's door.
- `define_choice` selects among whole differentiable functions that torch.compile may trace through.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("vatt", "DEF")


def _always(*_args: Any, **_kwargs: Any) -> None:
    return None


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    Args:
        name: how `use_impl` and error messages call it.
        device: "cpu", "cuda" or "any".
        target: the function, or "module:function" imported on its first call.
        missing: () -> the reason it can never run on this machine ("not built"), or None.
        refuses: (*op arguments) -> the reason it cannot run on these, or None.
    """

    name: str
    device: str
    target: str | Callable[..., Any]
    missing: Callable[[], str | None] = _always
    refuses: Callable[..., str | None] = _always

    def unavailable(self, device: str) -> str | None:
        """The reason this implementation cannot run on `device` at all, or None."""
        if self.device not in ("any", device):
            return f"runs on {self.device}"
        return self.missing()


_IMPLS: dict[str, dict[str, list[Impl]]] = {}  # stem -> op -> implementations in order of preference
_FORCED: dict[str, str] = {}  # stem -> implementation
_WARNED: set[tuple[str, str]] = set()


@functools.cache
def native_missing(*, cuda: bool = False) -> str | None:
    """The reason the native module cannot be used, or None; `cuda` asks for its CUDA kernels too."""
    try:
        import vatt_engine._C as native  # a statement, which torch.compile can follow
    except ImportError as error:
        return f"the native module vatt_engine._C is not built ({error}); run `pip install -e .`"
    if cuda and not native.has_cuda:
        return "the native module was built without CUDA"
    return None


def triton_missing() -> str | None:
    """The reason no Triton kernel can run, or None."""
    return _triton_missing()


# As torch.compiler.assume_constant_result does it, which would import the whole compiler.
triton_missing._dynamo_marked_constant = True


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def amx_missing() -> str | None:
    """The reason bfloat16's products are slower than float32's on this CPU, or None."""
    return None if torch.cpu._is_amx_tile_supported() else "the CPU has no AMX"


amx_missing._dynamo_marked_constant = True


@functools.cache
def wgmma_missing() -> str | None:
    """The reason no kernel for sm_90a alone can run, or None."""
    if (reason := native_missing(cuda=True)) is not None:
        return reason
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "the device is not of compute capability 9.0"
    built = importlib.import_module("vatt_engine._C").cuda_archs
    return None if "90a" in built.split(",") else f"the native module was built for {built}, without 90a"


@functools.cache
def load(target: str) -> Callable[..., Any]:
    """The function of "module:function"; for kernels whose loops stand in the op's own files."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _first_tensor(args: Sequence[Any]) -> Tensor:
    return next(arg for arg in args if isinstance(arg, Tensor))


def _pick(stem: str, op: str, args: Sequence[Any]) -> Callable[..., Any]:
    device = _first_tensor(args).device.type
    forced = _FORCED.get(stem)
    reasons = []
    for impl in _IMPLS[stem][op]:
        if forced is not None and impl.name != forced:
            continue
        reason = impl.unavailable(device)
        if reason is not None and forced is None and impl.device == device:
            _warn_once(stem, impl.name, reason)
        reason = reason or impl.refuses(*args)
        if reason is None:
            return impl.target if callable(impl.target) else load(impl.target)
        reasons.append(f"{impl.name}: {reason}")
    wanted = f"implementation {forced!r}" if forced else "implementation"
    raise RuntimeError(f"{stem}: no {wanted} of {op} on {device} ({'; '.join(reasons) or 'it has none'}).")


def _warn_once(stem: str, name: str, reason: str) -> None:
    if not torch.compiler.is_compiling() and (stem, name) not in _WARNED:
        _WARNED.add((stem, name))
        warnings.warn(f"{stem}: {name} is not available, the next implementation is used: {reason}", stacklevel=4)


def define_op(
    stem: str, schema: str, *, fake: Callable[..., Any], impls: Sequence[Impl], flops: Callable[..., int]
) -> Callable[..., Any]:
    """Register `torch.ops.vatt.<name>` of `schema` and return its handle.

    Args:
        stem: the op's public name, the key of `use_impl`.
        schema: e.g. "nce_stats(Tensor a, Tensor b, float scale) -> (Tensor, Tensor)"; nothing is mutated.
        fake: shapes and dtypes of the outputs, run under torch.compile.
        impls: in order of preference; each takes the schema's arguments.
        flops: what torch.utils.flop_counter counts of a call: (the schema's arguments with a shape for every tensor,
            out_shape=shape of the output) -> 2 per multiplication and addition of its products, whoever computes them.
    """
    name = schema.partition("(")[0]
    _IMPLS.setdefault(stem, {})[name] = list(impls)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, lambda *args: _pick(stem, name, args)(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"vatt::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.vatt, name)
    register_flop_formula(packet)(flops)
    return packet.default


def no_flops(*_args: Any, **_kwargs: Any) -> int:
    """The formula of an op that multiplies nothing."""
    return 0


def define_choice(stem: str, impls: Sequence[Impl]) -> Callable[..., Any]:
    """A function that runs the first of `impls` able to take its arguments; each is differentiable by itself."""
    _IMPLS.setdefault(stem, {})[stem] = list(impls)

    def call(*args: Any) -> Any:
        return _pick(stem, stem, args)(*args)

    return call


def available_impls(stem: str, device: str) -> dict[str, str | None]:
    """Each implementation of `stem`, in order of preference, with the reason it cannot run on `device` (or None).

    >>> available_impls("attention", "cpu")["reference"] is None
    True
    """
    importlib.import_module("vatt_engine.ops")
    if stem not in _IMPLS:
        raise ValueError(f"dispatch: op must be one of {sorted(_IMPLS)}, got {stem!r}.")
    found: dict[str, str | None] = {}
    for impls in _IMPLS[stem].values():
        for impl in impls:
            found[impl.name] = found.get(impl.name) or impl.unavailable(device)
    return found


def list_ops() -> list[str]:
    """The stems of all ops."""
    importlib.import_module("vatt_engine.ops")
    return sorted(_IMPLS)


@contextmanager
def use_impl(**choice: str) -> Iterator[None]:
    """Force implementations by op for the duration of a block: `with use_impl(nce="reference"): ...`.

    A forced implementation that cannot run raises RuntimeError with the reason; nothing falls back.
    The choice is the process's, not the thread's, since autograd may run backward in threads of its own.

    Raises:
        ValueError: an op or an implementation of that name does not exist.
    """
    for stem, name in choice.items():
        known = available_impls(stem, "cpu")
        if name not in known:
            raise ValueError(f"use_impl: {stem} must be one of {sorted(known)}, got {name!r}.")
    before = dict(_FORCED)
    _FORCED.update(choice)
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)
