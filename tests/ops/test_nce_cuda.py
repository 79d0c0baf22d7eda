"""nce's CUDA kernels, run on the CPU by the emulator: their numbers, their bounds, their synchronisation."""

import functools
from typing import NamedTuple

import pytest
import torch
from cuda_emulator import CSRC, Guarded, build
from torch.utils.dlpack import to_dlpack

from vatt_engine.ops import nce_chunked
from vatt_engine.ops.nce import nce_stats_reference
from vatt_engine.testing import Sum, assert_within_budget, randn

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    rows: int
    samples: int
    candidates: int
    dim: int
    first_sample: int = 0
    masked: bool = False
    temperature: float = 0.07
    offset: int = 0  # elements from an address that suits vector copies


CASES = [
    Case(1, 1, 1, 1),
    Case(130, 140, 1, 64, first_sample=5),
    Case(3, 130, 3, 72, first_sample=-1, masked=True),
    Case(129, 90, 3, 33, first_sample=40, masked=True, offset=1, temperature=0.02),
    Case(37, 300, 1, 16, first_sample=270),
]
PATHS = [("mma", F32), ("mma", BF16), ("mma", F16), ("wgmma", BF16), ("wgmma", F16)]


@pytest.fixture(scope="module")
def kernels():
    return build(*(CSRC / name for name in ("nce.cu", "nce_sm90.cu", "nce_device.cpp")))


def arguments(case, dtype):
    a = randn(case.rows, case.dim, seed=1, dtype=dtype)
    b = randn(case.samples, case.candidates, case.dim, seed=2, dtype=dtype)
    scales = 1 / (a.float().norm(dim=1) * case.temperature), 1 / b.float().norm(dim=2)
    mask = torch.arange(case.samples) % 3 != 1 if case.masked else None
    return a, b, *scales, mask, case.first_sample


def run(kernels, path, arguments, offset, address=0, order=0):
    """The statistics, from tensors between pages that nobody may touch."""
    guards = [Guarded(x, address if i < 2 else 0) for i, x in enumerate(arguments[:4])]
    kernels.set_order(order)
    strip = functools.partial(nce_chunked.cuda_strip, kernels, path)
    block = nce_chunked.CUDA_BLOCK[path]
    statistics = nce_chunked.fused_stats(strip, block, *(guard.tensor for guard in guards), *arguments[4:], offset)
    for guard in guards:
        guard.check()
    return statistics


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics(kernels, case, path, dtype, online, monkeypatch):
    monkeypatch.setattr(nce_chunked, "STRIP", 128)
    args = arguments(case, dtype)
    exact = nce_stats_reference(
        *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args), None
    )
    reference = nce_stats_reference(*args, None)
    kernels.take_counts()
    actual = run(
        kernels, path, args, None if online or 2 / case.temperature > 80 else 1 / case.temperature, case.offset
    )
    assert kernels.take_counts().get("ldmatrix bank conflicts", 0) == 0
    for name, got, low, want in zip(("row", "column", "positive"), actual, reference, exact):
        there = want > -torch.inf
        assert torch.equal(got > -torch.inf, there), name
        got, low = got.float(), low.float()  # which is what the sums of a tile are
        added = Sum(case.dim, 1 / case.temperature), Sum(case.samples * case.candidates + case.rows, 1.0)
        assert_within_budget(got[there], low[there], want[there], *added, name=name)


@pytest.mark.parametrize(("path", "dtype"), [("mma", F32), ("mma", BF16), ("wgmma", BF16)], ids=str)
def test_the_order_of_warps_changes_nothing(kernels, path, dtype):
    """A missing barrier or wait would: one warp would run ahead of another's reads or writes."""
    args = arguments(CASES[1], dtype)
    runs = [run(kernels, path, args, 1 / 0.07, order=order) for order in (0, 1, 5)]
    assert all(torch.equal(x, y) for other in runs[1:] for x, y in zip(runs[0], other))


@pytest.mark.parametrize("offset", [None, 1 / 0.07])
@pytest.mark.parametrize("path", ["mma", "wgmma"])
def test_what_is_no_number_stays_none(kernels, path, offset):
    args = arguments(Case(3, 4, 2, 16), BF16)
    args[0][1, 3] = float("nan")
    row, column, positive = run(kernels, path, args, offset)
    assert row.isnan().tolist() == positive.isnan().tolist() == [False, True, False]
    assert column.isnan().all()


GIVEN = {
    "path": "mma",
    "a": torch.zeros(5, 4),
    "b": torch.zeros(3, 2, 4),
    "row_scale": torch.ones(5),
    "column_scale": torch.ones(3, 2),
    "mask": None,
    "first_sample": 0,
    "offset": None,
    "row_part": torch.zeros(1, 5),
    "column_part": torch.zeros(1, 6),
    "positive": torch.zeros(5, 2),
    "stream": 0,
}


def call(kernels, **changes):
    given = {name: to_dlpack(x) if isinstance(x, torch.Tensor) else x for name, x in (GIVEN | changes).items()}
    kernels.nce_stats_cuda(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "mmx"}, "path must be one of this module's, got mmx"),
        ({"path": "wgmma"}, r"a must be a matrix of floats that wgmma multiplies, got shape \[5, 4\]"),
        ({"a": torch.zeros(5, 4).double()}, "a must be a matrix of floats that mma multiplies"),
        ({"a": torch.zeros(4, 5).T}, r"a must be contiguous \[5, 4\]"),
        ({"b": torch.zeros(3, 2, 4).half()}, r"b must be contiguous \[3, 2, 4\] of its dtype"),
        ({"b": torch.zeros(0, 2, 4)}, r"b must have rows, got shape \[0, 2, 4\]"),
        ({"mask": torch.ones(3)}, r"mask must be contiguous \[3\] of its dtype"),
        ({"row_part": torch.zeros(2, 5)}, r"row_part must be contiguous \[1, 5\] of its dtype, got shape \[2, 5\]"),
        ({"column_part": torch.zeros(1, 5)}, r"column_part must be contiguous \[1, 6\]"),
        ({"positive": torch.zeros(5, 1)}, r"positive must be contiguous \[5, 2\]"),
    ],
)
def test_refuses_with_the_value(kernels, changes, message):
    call(kernels)
    with pytest.raises(ValueError, match=message):
        call(kernels, **changes)
