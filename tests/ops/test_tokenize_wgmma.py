"""tokenize's wgmma kernels for sm_90a: their numbers in the emulator, and what nvcc and ptxas make of them."""

import re
from dataclasses import dataclass

import pytest
import torch
from cuda_emulator import CSRC, Guarded, build
from machine_code import dump, needs_machine_code
from torch.utils.dlpack import to_dlpack

from vatt_engine import _C
from vatt_engine.ops.tokenize_reference import tokenize_bwd_reference, tokenize_reference
from vatt_engine.testing import Sum, assert_within_budget, randn

HALVES = [torch.bfloat16, torch.float16]
ORDERS = (0, 1, 7)  # of the warps: ascending, descending, shuffled


@dataclass(frozen=True)
class Case:
    """A block has 128 rows or patch elements by 256 of D, in steps of 64 patch elements or rows."""

    name: str
    shape: tuple[int, int, int, int, int]  # B, T, H, W, C
    patch: tuple[int, int, int]
    dim: int
    kept: int | None = None  # tokens; None keeps all
    per_sample: bool = False
    size: tuple[int, int] | None = None  # of windows, with random crops
    flip: bool = False
    agg: bool = False
    pos: bool = True
    video_dtype: torch.dtype = torch.uint8
    offset: int = 0  # elements from an address that suits vector loads
    splits: int = 1

    def __str__(self):
        return self.name

    @property
    def window(self):
        return self.size or self.shape[2:4]

    @property
    def num_tokens(self):
        t, h, w = self.patch
        return (self.shape[1] // t) * (self.window[0] // h) * (self.window[1] // w)

    @property
    def volume(self):
        return self.patch[0] * self.patch[1] * self.patch[2] * self.shape[4]

    @property
    def num_kept(self):
        return self.num_tokens if self.kept is None else self.kept


CASES = [
    Case("one-block", (2, 4, 16, 64, 3), (2, 8, 8), 256, kept=13, agg=True),  # six steps: each stage used again
    Case("blocks-on-both-sides", (3, 2, 16, 48, 3), (1, 4, 4), 264, kept=46, per_sample=True, splits=2),
    Case("a-deep-sum-over-rows", (5, 2, 24, 128, 3), (1, 3, 16), 40, splits=3, agg=True, flip=True),
    Case("odd", (3, 5, 7, 11, 3), (2, 3, 5), 7, kept=5, per_sample=True, size=(6, 10), flip=True, splits=2),
    Case("cropped", (2, 2, 23, 53, 3), (2, 4, 16), 24, kept=7, size=(20, 48), flip=True, agg=True),
    Case("unaligned", (2, 2, 8, 32, 3), (2, 4, 16), 17, offset=1, agg=True),
    Case("one-of-one", (1, 1, 1, 1, 1), (1, 1, 1), 1, kept=1),
    Case("no-tokens", (2, 2, 4, 16, 3), (2, 4, 16), 3, kept=0, agg=True),
    Case("no-samples", (0, 2, 4, 16, 3), (2, 4, 16), 3, splits=2),
    Case("waveform", (2, 1, 1, 1000, 1), (1, 1, 128), 24, kept=4, video_dtype=torch.float32, pos=False),
    Case("floats", (2, 3, 9, 20, 3), (2, 3, 5), 6, size=(7, 16), flip=True, video_dtype=torch.float16),
]


@pytest.fixture(scope="module")
def kernels():
    names = ("tokenize_sm90.cu", "tokenize.cu", "tokenize_device.cpp")
    return build(*(CSRC / name for name in names))


def inputs(case):
    """video, then keep, crop, flip, size and patch as the reference takes them."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, case.shape, generator=generator, dtype=torch.uint8)
    if case.video_dtype != torch.uint8:
        video = (video / 128 - 1).to(case.video_dtype)
    batch, keep, crop, flip = case.shape[0], None, None, None
    if case.kept is not None:
        rows = case.per_sample and batch
        keep = torch.rand(rows or 1, case.num_tokens, generator=generator).argsort(1)[:, : case.kept]
        keep[:, 2::3] = keep[:, 1:2]  # some occur often
        keep = keep if rows else keep[0]
    if case.size is not None:
        room = torch.tensor(case.shape[2:4]) - torch.tensor(case.size)
        crop = (torch.rand(batch, 2, generator=generator) * (room + 1)).long()
        crop[0] = room
    if case.flip:
        flip = torch.arange(batch) % 2 == 0
    return video, keep, crop, flip, list(case.window), list(case.patch)


def capsules(*tensors):
    as_bytes = (t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in tensors)
    return [None if t is None else to_dlpack(t) for t in as_bytes]


def parameters(case, dtype):
    weight = randn(case.dim, case.volume, seed=2, dtype=dtype) / case.volume**0.5
    pos = randn(case.num_tokens, case.dim, seed=4) if case.pos else None
    return weight, randn(case.dim, seed=3), pos, randn(case.dim, seed=5) if case.agg else None


def forward(kernels, case, dtype, out_dtype, order):
    video, keep, crop, flip, size, patch = inputs(case)
    weight, bias, pos, agg = parameters(case, dtype)
    held = [Guarded(video, case.offset), Guarded(weight, case.offset)]
    out = Guarded(torch.zeros(case.shape[0], case.num_kept + case.agg, case.dim, dtype=out_dtype), case.offset)
    given = (held[0].tensor, held[1].tensor, bias, pos, agg, keep, crop, flip, out.tensor)
    kernels.set_order(order)
    kernels.tokenize_fwd_cuda("wgmma", *capsules(*given), size, patch, 0)
    out.check()
    return out.tensor


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(kernels, case, dtype):
    video, *where = inputs(case)
    weight, bias, pos, agg = parameters(case, dtype)
    out_dtype = torch.float32 if case.pos else dtype
    low = tokenize_reference(video, weight, bias, pos, agg, *where, dtype).to(out_dtype)
    doubles = (None if x is None else x.double() for x in (weight, bias, pos, agg))
    source = video if video.dtype == torch.uint8 else video.to(dtype)  # rounded as the product takes it
    exact = tokenize_reference(source, *doubles, *where, torch.float64)
    terms = case.volume + 2  # the patch, bias and position
    assert_within_budget(forward(kernels, case, dtype, out_dtype, order=0), low, exact, Sum(terms, 4.0), name="y")


def test_forward_rounds_once_to_halves(kernels):
    for dtype in HALVES:
        wide = forward(kernels, CASES[0], dtype, torch.float32, order=0)
        assert torch.equal(forward(kernels, CASES[0], dtype, dtype, order=0), wide.to(dtype))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_any_order_of_warps(kernels, case):
    results = [forward(kernels, case, torch.bfloat16, torch.float32, order) for order in ORDERS]
    results_bwd = [backward(kernels, case, torch.bfloat16, torch.float32, order)[0] for order in ORDERS]
    for some in (results, results_bwd):
        assert all(torch.equal(other, some[0]) for other in some[1:])


def backward(kernels, case, dtype, weight_dtype, order=0):
    video, keep, crop, flip, size, patch = inputs(case)
    grad = randn(case.shape[0], case.num_kept + case.agg, case.dim, seed=6, dtype=dtype)
    if case.agg:
        grad[:, 0] = float("inf")  # AGG rows are no part of the sum
    held = [Guarded(grad, case.offset), Guarded(video, case.offset)]
    dtypes = weight_dtype if case.splits == 1 else torch.float32
    out = Guarded(torch.full((case.splits, case.dim, case.volume), float("nan"), dtype=dtypes), case.offset)
    given = (held[0].tensor, held[1].tensor, keep, crop, flip, out.tensor)
    kernels.set_order(order)
    kernels.tokenize_bwd_weight_cuda("wgmma", *capsules(*given), case.agg, size, patch, 0)
    out.check()
    return out.tensor.sum(0, dtype=torch.float32).to(weight_dtype), grad


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(kernels, case, dtype):
    dweight, grad = backward(kernels, case, dtype, torch.float32)
    video, *where = inputs(case)
    needs = (True, False, False, False)
    low, *_ = tokenize_bwd_reference(grad, video, *where, case.agg, dtype, torch.float32, needs)
    source = video if video.dtype == torch.uint8 else video.to(dtype)
    exact, *_ = tokenize_bwd_reference(grad.double(), source, *where, case.agg, torch.float64, torch.float64, needs)
    rows = case.shape[0] * case.num_kept
    assert_within_budget(dweight, low, exact, Sum(rows, 2 * rows**0.5), name="dweight")
    assert torch.equal(backward(kernels, case, dtype, dtype)[0], dweight.to(dtype))  # rounded once


def test_float32_is_refused(kernels):
    with pytest.raises(ValueError, match="wgmma must multiply halves, got float32"):
        forward(kernels, CASES[0], torch.float32, torch.float32, order=0)


def test_a_token_outside_the_grid_traps(kernels):
    case = CASES[0]
    video, keep, *_, size, patch = inputs(case)
    keep[3] = case.num_tokens
    weight, bias, *_ = parameters(case, torch.float16)
    out = torch.zeros(case.shape[0], case.num_kept, case.dim)
    given = capsules(video, weight, bias, None, None, keep, None, None, out)
    with pytest.raises(RuntimeError, match="trap"):
        kernels.tokenize_fwd_cuda("wgmma", *given, size, patch, 0)


@needs_machine_code
def test_products_run_in_the_background():
    """HGMMA in the machine code; ptxas puts a wait behind each product where it could not follow the registers."""
    if "90a" not in _C.cuda_archs.split(","):
        pytest.skip("the native module was built without sm_90a")
    kernels = [kernel for kernel in dump("-sass", "-arch", "sm_90a").split("Function : ")[1:] if "_sm90_cu_" in kernel]
    assert len(kernels) == 8 + 4  # of tokenize and of nce
    for kernel in kernels:
        products = re.findall(r"HGMMA\.64x256x16\.F32[^;]*", kernel)
        assert len(products) == 4, kernel.splitlines()[0]
        across_rows = "bwd_weight" in kernel.splitlines()[0]
        assert all(("tnspA.tnspB" in product) == across_rows for product in products), products
        assert waits_only_at_the_end(kernel), kernel.splitlines()[0]


def waits_only_at_the_end(code):
    """All products begin before the kernel waits for any; the last one signs for them."""
    steps = re.findall(r"WARPGROUP\.\w+|HGMMA\.[^;]*", code)
    first = next(i for i, step in enumerate(steps) if step.startswith("HGMMA"))
    products, after = steps[first : first + 4], steps[first + 4 :]
    signed = [step.rstrip().endswith("gsb0") for step in products if step.startswith("HGMMA")]
    return signed == [False, False, False, True] and bool(after) and after[0] == "WARPGROUP.DEPBAR"


def test_a_wait_behind_each_product_is_found():
    product, signed, wait = (
        "HGMMA.64x256x16.F32 R24, R24 ;",
        "HGMMA.64x256x16.F32 R24, R24, gsb0 ;",
        "WARPGROUP.DEPBAR.LE ;",
    )
    assert waits_only_at_the_end("WARPGROUP.ARRIVE ;" + product * 3 + signed + wait)
    assert not waits_only_at_the_end((signed + wait) * 4)
    assert not waits_only_at_the_end(product + wait + product * 2 + signed + wait)
    assert not waits_only_at_the_end(product * 3 + signed)
