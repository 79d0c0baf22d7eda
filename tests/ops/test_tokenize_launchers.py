"""The launchers of tokenize's CUDA kernels over the emulator: from the op's arguments to its results, by every path."""

import pytest
import torch
import vatt_engine._C  # so that it can be replaced
from cuda_emulator import CSRC, build
from pairwise import pairwise

import vatt_engine
from vatt_engine.ops import tokenize_native
from vatt_engine.ops.tokenize_reference import tokenize_bwd_reference, tokenize_reference
from vatt_engine.testing import Sum, assert_within_budget, randn

SOURCES = ("tokenize.cu", "tokenize_sm90.cu", "tokenize_device.cpp")
PATHS = [("mma", torch.float32), ("mma", torch.bfloat16), ("wgmma", torch.bfloat16), ("wgmma", torch.float16)]


@pytest.fixture
def _emulated(monkeypatch):
    monkeypatch.setattr(vatt_engine, "_C", build(*(CSRC / name for name in SOURCES)))


def arguments(options, dtype):
    """The op's arguments up to `dtype`; `options` are letters: bias, pos, agg, keep (K or B), window, strided."""
    generator = torch.Generator().manual_seed(0)
    frame, size = ((11, 15), (8, 12)) if "w" in options else ((8, 12),) * 2
    video = torch.randint(0, 256, (2, 6, *frame, 3), generator=generator, dtype=torch.uint8)
    video = video[:, ::2] if "s" in options else video[:, :3]
    weight = randn(10, 48, seed=1, dtype=dtype) / 48**0.5
    weight = weight.T.contiguous().T if "s" in options else weight
    terms = [randn(*shape, seed=i) if o in options else None for i, (o, shape) in enumerate(SHAPES.items())]
    keep = {"K": torch.tensor([3, 17, 0]), "B": torch.tensor([[4, 1, 1, 9], [17, 3, 16, 0]])}
    where = [next((value for name, value in keep.items() if name in options), None), None, None]
    if "w" in options:
        where[1:] = torch.tensor([[3, 0], [1, 2]]), torch.tensor([True, False])
    return video, weight, *terms, *where, list(size), [1, 4, 4]


SHAPES = {"b": (10,), "p": (18, 10), "a": (10,)}
OPTIONS = ["bpaK", "bpaB", "paw", "bKw", "bas", "Bs", ""]


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_forward(path, dtype, options):
    given = arguments(options, dtype)
    actual = getattr(tokenize_native, f"fwd_{path}")(*given, dtype)
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]
    low, exact = tokenize_reference(*given, dtype), tokenize_reference(*exact, torch.float64)
    assert_within_budget(actual, low, exact, Sum(48 + 2))  # a patch, bias and position


NEEDS = [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0)]  # dweight, dbias, dpos, dagg


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("case", pairwise({"path": PATHS, "needs": NEEDS, "options": OPTIONS}), ids=str)
def test_backward(case):
    (path, dtype), needs, options = case.values()
    video, _, _, _, agg, *where = arguments(options, dtype)
    kept = 18 if where[0] is None else where[0].shape[-1]
    grad = randn(2, kept + (agg is not None), 10, seed=5, dtype=torch.float32 if "p" in options else dtype)
    needs = [bool(need) and (i < 3 or agg is not None) for i, need in enumerate(needs)]
    given = (video, *where, agg is not None)
    actual = getattr(tokenize_native, f"bwd_{path}")(grad, *given, dtype, torch.float32, needs)
    reference = tokenize_bwd_reference(grad, *given, dtype, torch.float32, needs)
    exact = tokenize_bwd_reference(grad.double(), *given, torch.float64, torch.float64, needs)
    for name, need, *values in zip(("dweight", "dbias", "dpos", "dagg"), needs, actual, reference, exact):
        assert values[0].shape == values[1].shape
        if need:
            assert_within_budget(*values, Sum(2 * kept + 2), name=name)  # rows
