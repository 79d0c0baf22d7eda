"""tokenize's CUDA kernels, run on the CPU by the emulator: their numbers, their bounds, their synchronisation."""

from dataclasses import dataclass

import pytest
import torch
from cuda_emulator import CSRC, Guarded, build
from torch.utils.dlpack import to_dlpack

from vatt_engine.ops.tokenize_reference import tokenize_bwd_reference, tokenize_reference
from vatt_engine.testing import Sum, assert_within_budget, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int, int]  # B, T, H, W, C
    patch: tuple[int, int, int]
    dim: int
    kept: int | None = None  # tokens; None keeps all
    per_sample: bool = False
    size: tuple[int, int] | None = None  # of windows, with random crops
    flip: bool = False
    agg: bool = True
    video_dtype: torch.dtype = torch.uint8
    offset: int = 0  # elements from an address that suits vector loads
    splits: int | None = None

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


CASES = [
    Case("aligned", (2, 4, 32, 48, 3), (2, 16, 16), 136, kept=5),
    Case("all-of-more-than-a-tile", (3, 3, 16, 160, 3), (1, 2, 16), 20, per_sample=True, agg=False, splits=3),
    Case("cropped-and-flipped", (3, 2, 23, 53, 3), (2, 4, 16), 9, kept=7, size=(20, 48), flip=True, splits=2),
    Case("unaligned", (2, 2, 8, 32, 3), (2, 4, 16), 9, flip=True, offset=1, agg=False),
    Case("odd", (3, 5, 7, 11, 3), (2, 3, 5), 7, kept=5, per_sample=True, size=(6, 10), flip=True, splits=2),
    Case("one-of-one", (1, 1, 1, 1, 1), (1, 1, 1), 1, kept=1),
    Case("two-channels", (2, 2, 4, 24, 2), (1, 2, 8), 5, flip=True),
    Case("four-channels", (2, 1, 4, 16, 4), (1, 4, 8), 5, flip=True, offset=3),
    Case("five-channels", (1, 1, 2, 32, 5), (1, 2, 16), 5, flip=True),
    Case("no-tokens", (2, 2, 4, 16, 3), (2, 4, 16), 3, kept=0),
    Case("no-samples", (0, 2, 4, 16, 3), (2, 4, 16), 3),
    Case("waveform", (2, 1, 1, 1000, 1), (1, 1, 128), 24, kept=4, video_dtype=torch.float32),
    Case("unaligned-waveform", (2, 1, 1, 333, 1), (1, 1, 32), 10, offset=1, video_dtype=torch.float16),
    Case("float", (2, 3, 9, 20, 3), (2, 3, 5), 6, size=(7, 16), flip=True, video_dtype=torch.bfloat16),
]


@pytest.fixture(scope="module")
def kernels():
    sources = ("tokenize.cu", "tokenize_sm90.cu", "tokenize_device.cpp")
    return build(*(CSRC / name for name in sources))


def make_video(case):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, case.shape, generator=generator, dtype=torch.uint8)
    return video if case.video_dtype == torch.uint8 else (video / 128 - 1).to(case.video_dtype)


def where_of(case):
    """keep with tokens that occur twice, crop, flip, size and patch as the reference takes them."""
    generator = torch.Generator().manual_seed(1)
    batch, keep, crop, flip = case.shape[0], None, None, None
    if case.kept is not None or case.per_sample:
        kept = case.num_tokens if case.kept is None else case.kept
        rows = [torch.randperm(case.num_tokens, generator=generator)[:kept] for _ in range(batch)]
        keep = torch.stack(rows) if case.per_sample else rows[0]
        keep[..., 3::2] = keep[..., 1:2]
    if case.size is not None:
        last = torch.tensor(case.shape[2:4]) - torch.tensor(case.size)
        crop = (torch.rand(batch, 2, generator=generator) * (last + 1)).long()
        crop[:1], crop[-1:] = 0, last
    if case.flip:
        flip = torch.arange(batch) % 2 == 0
    return keep, crop, flip, case.window, case.patch


def parameters(case, dtype):
    """weight in the dtype of the product, bias, pos and agg."""
    weight = randn(case.dim, case.volume, seed=2, dtype=dtype) / case.volume**0.5
    bias, agg = randn(case.dim, seed=3), randn(case.dim, seed=4) if case.agg else None
    return weight, bias, randn(case.num_tokens, case.dim, seed=5), agg


def capsule(tensor):
    return None if tensor is None else to_dlpack(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor)


def forward(kernels, case, dtype, out_dtype=torch.float32, order=0):
    keep, crop, flip, size, patch = where_of(case)
    weight, bias, pos, agg = parameters(case, dtype)
    rows = (case.num_tokens if keep is None else keep.shape[-1]) + case.agg
    out = torch.zeros(case.shape[0], rows, case.dim, dtype=out_dtype)
    guards = [Guarded(tensor, case.offset) for tensor in (make_video(case), weight, pos, out)]
    video, weight_, pos_, out = (guard.tensor for guard in guards)
    tensors = (video, weight_, bias, pos_, agg, keep, crop, flip, out)
    kernels.set_order(order)
    kernels.tokenize_fwd_cuda("mma", *map(capsule, tensors), list(size), list(patch), 0)
    for guard in guards:
        guard.check()
    return out


def forward_reference(case, dtype, exact_dtype=None):
    tensors = [None if x is None else x.to(exact_dtype or x.dtype) for x in parameters(case, dtype)]
    return tokenize_reference(make_video(case), *tensors, *where_of(case), exact_dtype or dtype)


def gradient(case, dtype):
    keep = where_of(case)[0]
    rows = (case.num_tokens if keep is None else keep.shape[-1]) + case.agg
    return randn(case.shape[0], rows, case.dim, seed=6, dtype=dtype)


def backward(kernels, case, dtype, weight_dtype, order=0):
    keep, crop, flip, size, patch = where_of(case)
    splits = case.splits or 1
    out = torch.full(
        (splits, case.dim, case.volume), float("nan"), dtype=weight_dtype if splits == 1 else torch.float32
    )
    guards = [Guarded(tensor, case.offset) for tensor in (make_video(case), gradient(case, dtype), out)]
    video, grad, out = (guard.tensor for guard in guards)
    kernels.set_order(order)
    tensors = map(capsule, (grad, video, keep, crop, flip, out))
    kernels.tokenize_bwd_weight_cuda("mma", *tensors, case.agg, list(size), list(patch), 0)
    for guard in guards:
        guard.check()
    return out.sum(0, dtype=torch.float32).to(weight_dtype)


def backward_reference(case, dtype, weight_dtype, exact=False):
    grad = gradient(case, dtype).to(torch.float64 if exact else dtype)
    dtypes = (torch.float64, torch.float64) if exact else (dtype, weight_dtype)
    needs = [True, False, False, False]
    return tokenize_bwd_reference(grad, make_video(case), *where_of(case), case.agg, *dtypes, needs)[0]


def token_sum(case):
    """A token adds up its patch, bias and position; weights are of size volume^-1/2, pixels of 1."""
    return Sum(case.volume + 2, 4.0)


def gradient_sum(case):
    """Rows of gradients, of size 1 as pixels are."""
    rows = case.shape[0] * (case.num_tokens if case.kept is None else case.kept)
    return Sum(rows, 2 * rows**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(kernels, case, dtype):
    kernels.take_counts()
    actual = forward(kernels, case, dtype)
    exact = forward_reference(case, dtype, torch.float64)
    assert_within_budget(actual, forward_reference(case, dtype), exact, token_sum(case))
    assert kernels.take_counts().get("ldmatrix bank conflicts", 0) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(kernels, case, dtype):
    weight_dtype = torch.float32 if case.offset else dtype
    kernels.take_counts()
    actual = backward(kernels, case, dtype, weight_dtype)
    references = [backward_reference(case, dtype, weight_dtype, exact) for exact in (False, True)]
    assert_within_budget(actual, *references, gradient_sum(case), name="dweight")
    assert kernels.take_counts().get("ldmatrix bank conflicts", 0) == 0


BY_NAME = {case.name: case for case in CASES}
STEPS = [BY_NAME[name] for name in ("aligned", "all-of-more-than-a-tile", "odd", "waveform")]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_the_order_of_warps_changes_nothing(kernels, case, dtype):
    """A missing barrier or wait would: one warp would run ahead of another's reads or writes."""
    out, dweight = forward(kernels, case, dtype), backward(kernels, case, dtype, dtype)
    for order in (1, 5):
        assert torch.equal(forward(kernels, case, dtype, order=order), out)
        assert torch.equal(backward(kernels, case, dtype, dtype, order=order), dweight)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_output_is_rounded_once(kernels, out_dtype):
    case = BY_NAME["cropped-and-flipped"]
    whole = forward(kernels, case, torch.bfloat16)
    assert torch.equal(forward(kernels, case, torch.bfloat16, out_dtype), whole.to(out_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pixel_value(kernels, dtype):
    video, weight = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256, 1), torch.eye(256, dtype=dtype)
    out, nothing = torch.empty(1, 1, 256), (None,) * 6
    tensors = (video, weight, *nothing, out)
    kernels.tokenize_fwd_cuda("mma", *map(capsule, tensors), [1, 256], [1, 1, 256], 0)
    exact = torch.arange(256.0, dtype=torch.float64) * 2 / 255 - 1
    assert_within_budget(out.flatten(), exact.float(), exact, Sum(256))


@pytest.mark.parametrize(("front", "offset"), [(False, 0), (True, 0), (True, 1), (True, 2), (True, 3)])
def test_reads_nothing_around_the_video(kernels, front, offset):
    """Mirrored windows in the very first and the very last corner, which are read by words of four bytes."""
    case = Case("corners", (3, 2, 23, 53, 3), (2, 4, 16), 9, size=(20, 48), flip=True, agg=False)
    _, crop, flip, size, patch = where_of(case)
    weight, nothing = parameters(case, torch.float16)[0], (None,) * 4
    outputs = []
    for video in (make_video(case), Guarded(make_video(case), offset, 1, front=front).tensor):
        outputs.append(torch.zeros(3, case.num_tokens, case.dim))
        tensors = (video, weight, *nothing, crop, flip, outputs[-1])
        kernels.tokenize_fwd_cuda("mma", *map(capsule, tensors), list(size), list(patch), 0)
    assert torch.equal(*outputs)


def test_what_reaches_agg_stays_there(kernels):
    """An infinite gradient of the AGG row is no gradient of the weight."""
    grad, keep, dweight = torch.ones(2, 3, 5), torch.tensor([1, 0]), torch.zeros(1, 5, 12)
    call(kernels.tokenize_bwd_weight_cuda, BWD, {"grad": grad, "keep": keep, "out": dweight})
    spoilt, expected = grad.clone(), dweight.clone()
    spoilt[:, 0] = float("inf")
    call(kernels.tokenize_bwd_weight_cuda, BWD, {"grad": spoilt, "keep": keep, "out": dweight})
    assert torch.equal(dweight, expected)


def test_offsets_beyond_32_bits(kernels):
    case = Case("far", (2, 2, 8, 16, 3), (2, 8, 16), 4, agg=False)
    stride = (1 << 31) + 48
    memory = torch.empty(stride + 2000, dtype=torch.uint8)  # never touched but for the two samples
    video = memory.as_strided(case.shape, (stride, 8 * 48, 48, 3, 1))
    video.copy_(make_video(case))
    weight, grad = parameters(case, torch.bfloat16)[0], gradient(case, torch.bfloat16)
    out, dweight, nothing = torch.zeros(2, 1, 4), torch.zeros(1, 4, case.volume), (None,) * 6
    tensors = (video, weight, *nothing, out)
    kernels.tokenize_fwd_cuda("mma", *map(capsule, tensors), [8, 16], [2, 8, 16], 0)
    tensors = (grad, video, None, None, None, dweight)
    kernels.tokenize_bwd_weight_cuda("mma", *map(capsule, tensors), False, [8, 16], [2, 8, 16], 0)
    where = (None, None, None, [8, 16], [2, 8, 16])
    near = make_video(case)
    expected = tokenize_reference(near, weight.double(), None, None, None, *where, torch.float64)
    low = tokenize_reference(near, weight, None, None, None, *where, torch.bfloat16).float()
    assert_within_budget(out, low, expected, token_sum(case))
    needs = [True, False, False, False]
    expected = tokenize_bwd_reference(grad.double(), near, *where, False, torch.float64, torch.float64, needs)[0]
    assert_within_budget(dweight[0], expected.float(), expected, gradient_sum(case))


FWD = {
    "path": "mma",
    "video": torch.zeros(2, 2, 4, 4, 3, dtype=torch.uint8),
    "weight": torch.zeros(5, 12),
    "bias": None,
    "pos": None,
    "agg": torch.zeros(5),
    "keep": torch.tensor([1, 0]),
    "crop": None,
    "flip": None,
    "out": torch.zeros(2, 3, 5),
    "size": [4, 4],
    "patch": [1, 2, 2],
    "stream": 0,
}
BWD = {
    **{name: FWD[name] for name in ("path", "video", "keep", "crop", "flip", "size", "patch", "stream")},
    "grad": torch.zeros(2, 3, 5),
    "out": torch.zeros(1, 5, 12),
    "agg": True,
}


def call(function, arguments, changes):
    given = {**arguments, **changes}
    return function(**{name: capsule(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()})


@pytest.mark.parametrize("where", [{"keep": torch.tensor([1, 8])}, {"keep": torch.tensor([[0, 1], [2, -1]])}], ids=str)
def test_tokens_outside_the_grid_trap(kernels, where):
    for function, arguments in ((kernels.tokenize_fwd_cuda, FWD), (kernels.tokenize_bwd_weight_cuda, BWD)):
        call(function, arguments, {})
        with pytest.raises(RuntimeError, match="trap in block"):
            call(function, arguments, where)


@pytest.mark.parametrize("corner", [[0, 2], [2, 0], [-1, 0], [0, -1]])
def test_windows_outside_the_video_trap(kernels, corner):
    for function, arguments in ((kernels.tokenize_fwd_cuda, FWD), (kernels.tokenize_bwd_weight_cuda, BWD)):
        window = {"size": [3, 3], "keep": torch.tensor([1, 0])}
        call(function, arguments, {**window, "crop": torch.tensor([[0, 1], [1, 0]])})
        with pytest.raises(RuntimeError, match="trap in block"):
            call(function, arguments, {**window, "crop": torch.tensor([[0, 0], corner])})


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("fwd", {"path": "mmx"}, "path must be one of this module's, got mmx"),
        ("fwd", {"weight": torch.zeros(5, 11)}, r"weight must be contiguous .* \[5, 12\], got shape \[5, 11\]"),
        ("fwd", {"weight": torch.zeros(12, 5).T}, r"weight must be contiguous float32, bfloat16 or float16 \[5, 12\]"),
        ("fwd", {"bias": torch.zeros(5).half()}, r"bias must be contiguous float32 \[5\]"),
        ("fwd", {"pos": torch.zeros(7, 5)}, r"pos must be contiguous float32 \[8, 5\], got shape \[7, 5\]"),
        ("fwd", {"agg": None}, r"out must be contiguous .* \[2, 2, 5\], got shape \[2, 3, 5\]"),
        ("fwd", {"crop": torch.zeros(2, 2)}, r"crop must be contiguous int64 \[2, 2\]"),
        (
            "bwd_weight",
            {"grad": torch.zeros(2, 2, 5)},
            r"grad must be contiguous .* \[2, 3, 5\], got shape \[2, 2, 5\]",
        ),
        (
            "bwd_weight",
            {"out": torch.zeros(2, 5, 11)},
            r"out must be contiguous .* \[2, 5, 12\], got shape \[2, 5, 11\]",
        ),
        ("bwd_weight", {"out": torch.zeros(0, 5, 12)}, "out must have 1 to 65535 splits, got 0"),
        ("bwd_weight", {"out": torch.zeros(1, 5, 12).double()}, "out must be contiguous float32, bfloat16 or"),
    ],
)
def test_refuses_with_the_value(kernels, function, changes, message):
    with pytest.raises(ValueError, match=message):
        call(
            getattr(kernels, f"tokenize_{function}_cuda"),
            {"fwd": FWD, "bwd_weight": BWD}[function],
            changes,
        )


def test_splits_fill_the_device(kernels):
    """The emulated device has 4 multiprocessors: 8 places."""
    assert kernels.tokenize_bwd_splits(100, 128, 128, 0) == 1  # too short to be cut
    assert kernels.tokenize_bwd_splits(100_000, 128, 128, 0) == 8
    assert kernels.tokenize_bwd_splits(100_000, 256, 384, 0) == 4  # 24 of 24 places in three rounds
    assert kernels.tokenize_bwd_splits(100_000, 768, 3072, 0) == 1
