"""nce in Triton, run by its interpreter: every option with every other, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from pairwise import pairwise

from vatt_engine.ops import nce_chunked
from vatt_engine.ops.nce import nce_grad_reference, nce_stats_reference
from vatt_engine.testing import Sum, assert_within_budget, randn

kernels = triton_interpreter.load("nce")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = {
    "dtype": [F32, BF16, F16],
    "rows": [1, 5, 70],
    "samples": [1, 3, 70],
    "candidates": [1, 3],
    "dim": [1, 32, 77],
    "temperature": [0.02, 0.07, 1.0],
    "offset": [True, False],
    "mask": [None, "some", "all"],
    "first_sample": [0, 2, -3],
    "strided": [False, True],
}
CASES = pairwise(OPTIONS)


@pytest.fixture(autouse=True)
def _products_on_a_cpu(monkeypatch):
    """torch.mm of halves into float32 is a GPU's."""
    monkeypatch.setattr(nce_chunked, "multiplies_halves", lambda x: x.dtype in (BF16, F16))
    monkeypatch.setattr(nce_chunked, "half_product", lambda x, y: x.float() @ y.float())


def statistics_of(*args):
    return nce_chunked.fused_stats(kernels.stats_strip, kernels.block_of(args[0]), *args)


def gradients_of(*args):
    return nce_chunked.fused_grad(kernels.gradient_tile, *args)


def label(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def arguments(case):
    """Those of nce_stats."""
    t, dtype = case["temperature"], case["dtype"]
    a = randn(case["dim"], case["rows"], seed=1, dtype=dtype).T
    b = randn(case["samples"], case["candidates"], case["dim"], seed=2, dtype=dtype)
    b[: min(len(a), len(b))] += a[: len(b), None]
    if case["strided"]:
        b = b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    else:
        a = a.contiguous()
    scales = 1 / (a.float().norm(dim=1).clamp_min(1e-6) * t), 1 / b.float().norm(dim=2).clamp_min(1e-6)
    mask = torch.arange(len(b)) % 3 != 1 if case["mask"] == "some" else None
    mask = torch.zeros(len(b)).bool() if case["mask"] == "all" else mask
    return a, b, *scales, mask, case["first_sample"], 1 / t if case["offset"] and 2 / t < 80 else None


def cotangents(statistics, strided=False):
    if strided:  # as a sum has them
        return [torch.full((1,), 1 / len(x)).expand(len(x)) for x in statistics]
    return [randn(len(x), seed=i, dtype=x.dtype) / len(x) for i, x in enumerate(statistics)]


def in_double(values):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


def check(case):
    args = arguments(case)
    a, b = args[:2]
    exact = nce_stats_reference(*in_double(args))
    reference = nce_stats_reference(*args)
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        actual = statistics_of(*args)
    for name, got, low, want in zip(("row", "column", "positive"), actual, reference, exact):
        there = want > -torch.inf
        assert torch.equal(got > -torch.inf, there), name
        got, low = got.float(), low.float()  # which is what the sums of a tile are
        added = Sum(case["dim"], 1 / case["temperature"]), Sum(b.shape[0] * b.shape[1] + len(a), 1.0)
        assert_within_budget(got[there], low[there], want[there], *added, name=name)
    statistics, d = exact, cotangents(exact, case["strided"])
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        actual = gradients_of(*args, *statistics, *d)
    exact = nce_grad_reference(*in_double([*args, *statistics, *d]))
    reference = nce_grad_reference(*args, *statistics, *d)
    for name, got, low, want in zip(("da", "db"), actual, reference, exact):
        dtype = case["dtype"]  # what the autograd.Function rounds it to
        largest = want.abs().max().item()
        added = Sum(case["dim"], largest / case["temperature"]), Sum(b.shape[0] * b.shape[1] + len(a))
        assert_within_budget(got.to(dtype), low.to(dtype), want, *added, name=name)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_statistics_and_gradients(case):
    check(case)


LARGE = {"rows": 150, "samples": 75, "candidates": 2, "dim": 40, "temperature": 0.07, "offset": True}
LARGE |= {"mask": "some", "first_sample": 1, "strided": False}


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("tiles", kernels.TILES, ids=str)
def test_every_row_of_the_table(tiles, offset, monkeypatch):
    """With more than one strip and more than one tile of G."""
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: tiles)
    monkeypatch.setattr(nce_chunked, "STRIP", 130)
    monkeypatch.setitem(nce_chunked.TILE, "cpu", (140, 140))
    check(LARGE | {"dtype": BF16 if tiles.half else F32, "offset": offset})


def test_repeats_bit_for_bit():
    args = arguments(LARGE | {"dtype": BF16})
    with triton_interpreter.running():
        runs = [statistics_of(*args) for _ in range(2)]
        d = cotangents(runs[0])
        gradients = [gradients_of(*args, *statistics, *d) for statistics in runs]
    assert all(torch.equal(x, y) for x, y in zip(*runs))
    assert all(torch.equal(x, y) for x, y in zip(*gradients))


def test_the_table_has_a_row_for_everything():
    for arch in (80, 90, 100):
        for dtype in (F32, BF16, F16):
            for rows in (1, 1024, 10**6):
                tiles = kernels.choose_tiles(kernels.TILES, arch, dtype, 1, rows)
                assert arch in tiles.archs
                assert tiles.half == (dtype != F32)
