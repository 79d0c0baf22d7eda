"""The emulator can fail: each kind of fault is found, and kernels without one give the right numbers."""

import pytest
import torch

from cuda_emulator import HERE, Guarded, build
from vatt_engine.testing import Sum, assert_same_sums

ORDERS = (0, 1, 7)  # of the warps: ascending, descending, shuffled


@pytest.fixture(scope="module")
def faults():
    return build(HERE / "faults.cu")


def run(faults, name, given, order, size=None):
    source, out = Guarded(given), Guarded(torch.zeros(size or given.shape))
    faults.set_order(order)
    faults.run(name, source.tensor.data_ptr(), out.tensor.data_ptr())
    source.check()
    out.check()
    return out.tensor


@pytest.mark.parametrize("order", ORDERS)
def test_right_kernels_are_right(faults, order):
    values = torch.arange(96.0)
    assert torch.equal(run(faults, "reverse", values, order), values.flip(0))
    rows = torch.arange(4 * 384.0).view(4, 384)
    assert torch.equal(run(faults, "pipeline", rows, order), rows.flip(1))
    assert run(faults, "sum", values, order, 3).tolist() == values.view(3, 32).sum(1).tolist()


@pytest.mark.parametrize("name", ["reverse without a barrier", "pipeline without a barrier before"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows(faults, name, order):
    values = torch.arange(96.0 if name.startswith("reverse") else 4 * 384.0).view(-1, 96)
    assert run(faults, name, values, order).isnan().any()


@pytest.mark.parametrize("name", ["pipeline without a wait", "pipeline without a barrier after"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_buffer_used_too_early_or_too_long_shows(faults, name, order):
    assert run(faults, name, torch.arange(4 * 384.0), order).isnan().any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deadlock", r"deadlock in block .*: 64 threads from 0 on .* __syncthreads; 32 threads from 64 on .* ended"),
        ("diverge", "threads diverged: one is in .*, another in"),
        ("trap", r"trap in block \(0, 0, 0\), thread 40"),
        ("read beyond", "outside a buffer.* thread 95"),
        ("write beyond", "outside a buffer.* thread 95"),
        ("shared beyond", "write outside shared memory"),
        ("misaligned", "misaligned.* thread 0"),
    ],
)
def test_faults_are_errors(faults, name, message):
    for order in ORDERS:
        with pytest.raises(RuntimeError, match=message):
            run(faults, name, torch.arange(96.0), order)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_instructions_multiply(faults, transposed):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    out, stored = torch.empty(16, 8), (a.T if transposed else a).contiguous()
    faults.take_counts()
    faults.multiply(stored.data_ptr(), b.data_ptr(), out.data_ptr(), transposed)
    assert faults.take_counts() == {"ldmatrix bank conflicts": 4}  # rows 32 bytes apart: two of eight in each bank
    assert_same_sums(out, a.float() @ b.float(), Sum(16))


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("offset", [0, 3])
def test_guards(faults, offset, front):
    tensor = torch.arange(24.0).view(2, 3, 4)[:, :2, 1:3]
    guarded = Guarded(tensor, offset, 64, front=front)
    assert torch.equal(guarded.tensor, tensor)
    assert guarded.tensor.stride() == tensor.stride()
    assert guarded.tensor.data_ptr() % 64 == offset * 4
    guarded.check()
    first = guarded.tensor.storage_offset()
    before = () if front and not offset else (-1,)
    for position in (*before, 0, 1, 2, 4):  # 2: between two rows
        number = guarded.tensor.as_strided((1,), (1,), first + position)
        value = number.clone()
        number.fill_(7)
        if position in (0, 1, 4):
            guarded.check()
        else:
            with pytest.raises(AssertionError, match="4 bytes outside"):
                guarded.check()
        number.copy_(value)


def test_the_front_is_guarded_too(faults):
    values, out = Guarded(torch.arange(97.0), front=True), Guarded(torch.zeros(96))
    run_at = values.tensor.data_ptr()
    faults.run("read beyond", run_at, out.tensor.data_ptr())
    with pytest.raises(RuntimeError, match=r"outside a buffer.* thread 0"):
        faults.run("read beyond", run_at - 8, out.tensor.data_ptr())
