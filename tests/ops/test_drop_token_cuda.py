"""The CUDA kernels of drop_token and sample_keep in the emulator: numbers, strides, traps, the order of warps."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from cuda_emulator import CSRC, Guarded, build
from torch.utils.dlpack import to_dlpack

from vatt_engine import ops
from vatt_engine.dispatch import use_impl
from vatt_engine.ops.drop_token import _bwd, _fwd, _sample

ORDERS = (0, 1, 7)  # of the warps: ascending, descending, shuffled


@pytest.fixture(scope="module")
def native():
    return build(CSRC / "drop_token.cpp", CSRC / "drop_token.cu")


def on_gpu(tensor):
    """A capsule that says its tensor lies on a GPU, so that the emulated module launches its kernels on it."""
    capsule = to_dlpack(tensor)
    ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
    ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = ctypes.pythonapi.PyCapsule_GetPointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(address + ctypes.sizeof(ctypes.c_void_p)).value = 2  # kDLCUDA, behind the data pointer
    return SimpleNamespace(capsule=capsule, keeps=tensor)


def move(native, rows, keep, shape, *, scatter, offset=0, order=0):
    native.set_order(order)
    given, kept, out = Guarded(rows, offset), Guarded(keep), Guarded(rows.new_zeros(shape))
    native.drop_token(*(on_gpu(t.tensor).capsule for t in (given, kept, out)), scatter, 1, 0)
    for buffer in (given, kept, out):
        buffer.check()
    return out.tensor


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("width", [1, 40, 256, 261])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_go_where_they_belong(native, dtype, width, offset, order):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 77, width, generator=generator).to(dtype)
    for keep in (torch.randperm(77, generator=generator)[:50], torch.randint(77, (2, 90), generator=generator)):
        kept = keep.shape[-1]
        y = move(native, x, keep, (2, kept, width), scatter=False, offset=offset, order=order)
        grad = torch.randn(2, kept, width, generator=generator).to(dtype)
        dx = move(native, grad, keep, x.shape, scatter=True, offset=offset, order=order)
        with use_impl(drop_token="cpp"):  # the same sums in the same order
            assert torch.equal(y, _fwd(x, keep))
            assert torch.equal(dx, _bwd(grad, keep, 77))


def test_strided_rows(native):
    wide = torch.randn(3, 20, 3 * 16)
    keep = torch.tensor([[19, 0, 4, 0, 19], [1, 1, 1, 1, 1], [7, 3, 0, 2, 9]])[:, ::2]
    for x in (wide[:, :, 16:32], wide[:, :, 1:18], wide[:, :, ::3][:, :, :1]):
        y = move(native, x, keep, (3, 3, x.shape[2]), scatter=False)
        assert torch.equal(y, _fwd(x, keep))
        dx = move(native, x[:, :6:2], keep, (3, 20, x.shape[2]), scatter=True)
        assert torch.equal(dx, _bwd(x[:, :6:2], keep, 20))


@pytest.mark.parametrize("position", [-1, 6, 2**40])
@pytest.mark.parametrize("scatter", [False, True])
def test_a_position_outside_the_tokens_traps(native, scatter, position):
    keep = torch.tensor([0, position, 1])
    with pytest.raises(RuntimeError, match="trap"):
        move(native, torch.zeros(1, 3 if scatter else 6, 4), keep, (1, 6 if scatter else 3, 4), scatter=scatter)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 1), (64, 64), (100, 50), (1568, 784)])
def test_the_sample_is_everybodys(native, size, order):
    native.set_order(order)
    seed, ids = Guarded(torch.tensor(2**63 - 3)), Guarded(torch.tensor([5, -1]))
    for sample_id in (None, ids):
        expected = _sample(seed.tensor, None if sample_id is None else ids.tensor, *size)
        out = Guarded(torch.zeros_like(expected))
        given = None if sample_id is None else on_gpu(ids.tensor).capsule
        native.sample_keep(on_gpu(seed.tensor).capsule, given, size[0], on_gpu(out.tensor).capsule, 1, 0)
        out.check()
        assert torch.equal(out.tensor, expected)


def test_more_tokens_than_shared_memory_holds_are_refused(native):
    seed, out = torch.tensor(0), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_tokens must be at most 8192 on cuda, got 8193"):
        native.sample_keep(on_gpu(seed).capsule, None, 8193, on_gpu(out).capsule, 1, 0)
    assert ops.sample_keep(8193, 4, seed=0).shape == (4,)
