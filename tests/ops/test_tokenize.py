"""tokenize: patches of the kept tokens, scaled, projected, placed; AGG first."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from vatt_engine.dispatch import use_impl
from vatt_engine.ops import tokenize_native, tokenize_video, tokenize_waveform
from vatt_engine.ops.tokenize import _bwd, _fwd
from vatt_engine.ops.tokenize_reference import patches_reference
from vatt_engine.testing import Sum, assert_same_sums, assert_within_budget, gradients, impls_of, randn


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # B, T, H, W
    patch: tuple[int, int, int]
    kept: int | None  # tokens; None keeps all
    per_sample: bool = False
    pos: bool = True
    agg: bool = True
    window: tuple[int, int] | None = None  # cropped to, some samples mirrored
    dim: int = 8
    video: torch.dtype = torch.uint8

    def __str__(self):
        keep = "all" if self.kept is None else f"{self.kept}{'-each' if self.per_sample else ''}"
        options = [name for name in ("pos", "agg", "window") if getattr(self, name)]
        return "-".join(["x".join(map(str, self.shape)), f"keep-{keep}", *options, str(self.video)[6:]])

    @property
    def tokens(self):
        size = (self.shape[1], *(self.window or self.shape[2:]))
        t, h, w = (length // step for length, step in zip(size, self.patch))
        return t * h * w


CASES = [
    Case((2, 8, 32, 48), (4, 16, 16), 5),
    Case((2, 8, 32, 48), (4, 16, 16), None, pos=False),
    Case((3, 9, 37, 51), (4, 16, 16), 7, per_sample=True, agg=False),  # frames, rows and columns left over
    Case((1, 4, 16, 16), (4, 16, 16), 1),  # one token of one
    Case((1, 4, 16, 16), (4, 16, 16), 1, pos=False, agg=False),
    Case((2, 5, 7, 11), (2, 3, 5), 4, dim=5),  # odd everywhere
    Case((3, 5, 21, 27), (2, 3, 5), 9, per_sample=True, window=(17, 25), dim=13),
    Case((3, 8, 40, 61), (4, 16, 16), None, window=(32, 48), agg=False),
    Case((2, 4, 33, 34), (4, 16, 16), 3, window=(32, 32), pos=False, video=torch.float32),
    Case((2, 9, 32, 48), (4, 16, 16), 12, per_sample=True, video=torch.float32),
    Case((1, 32, 224, 224), (4, 16, 16), 784),  # the paper's
]
IMPLS = impls_of("tokenize")
CPU_IMPLS = [impl for impl, device in IMPLS if device == "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dtypes_of(impl):
    """What it multiplies."""
    return DTYPES[1:] if impl == "wgmma" else DTYPES


def make_video(shape, *, seed=0, device="cpu", dtype=torch.uint8):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
    return (video if dtype == torch.uint8 else video.to(dtype) / 100).to(device)


def make_keep(case: Case, device="cpu"):
    if case.kept is None:
        return None
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(case.tokens, generator=generator)[: case.kept] for _ in range(case.shape[0])]
    return (torch.stack(rows) if case.per_sample else rows[0]).to(device)


def make_window(case: Case, device="cpu"):
    if case.window is None:
        return {}
    generator = torch.Generator().manual_seed(2)
    room = [have - need + 1 for have, need in zip(case.shape[2:], case.window)]
    crop = torch.stack([torch.randint(size, case.shape[:1], generator=generator) for size in room], 1)
    flip = torch.arange(case.shape[0]) % 2 == 0
    return {"size": case.window, "crop": crop.to(device), "flip": flip.to(device)}


def parameters(size, dtype, device, dim=8, tokens=0, agg=False):
    """weight, bias and, where asked for, pos and agg; the numbers do not depend on the dtype."""
    shapes = [(dim, size), (dim,), *([(tokens, dim)] if tokens else []), *([(dim,)] if agg else [])]
    values = [randn(*shape, seed=2 + i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    values[0] /= size**0.5
    return [value.to(dtype).to(device).requires_grad_() for value in values]


def forward_and_gradients(impl, case, dtype, device, exact=False):
    """The output and all gradients; `exact` takes the same numbers through float64."""
    volume = 3 * case.patch[0] * case.patch[1] * case.patch[2]
    given = parameters(volume, dtype, device, case.dim, case.tokens if case.pos else 0, case.agg)
    video = make_video(case.shape, device=device, dtype=case.video)
    if exact:
        given = [x.detach().double().requires_grad_() for x in given]
    weight, bias, *rest = given
    named = dict(zip([name for name in ("pos", "agg") if getattr(case, name)], rest))
    inputs = dict(weight=weight, bias=bias, **named)
    if video.is_floating_point():
        video = inputs["video"] = (video.double() if exact else video).requires_grad_()
    with use_impl(tokenize=impl):
        window = make_window(case, device)
        out = tokenize_video(video, weight, bias, **named, keep=make_keep(case, device), patch=case.patch, **window)
        return {"y": out.detach(), **dict(zip(inputs, gradients(out, list(inputs.values()))))}


def sums_of(case, name):
    """A token adds up its patch, bias and position, a pixel's gradient D products, those of parameters rows."""
    volume, rows = 3 * math.prod(case.patch), case.shape[0] * ((case.kept or case.tokens) + case.agg)
    return Sum({"y": volume + 2, "video": case.dim}.get(name, rows))


def loop_form(video, keep, patch):
    """[B, K, t*h*w*C] float64, one element at a time."""
    batch, frames, height, width, channels = video.shape
    t, h, w = patch
    grid_h, grid_w = height // h, width // w
    tokens = (frames // t) * grid_h * grid_w
    rows = torch.arange(tokens).expand(batch, -1) if keep is None else keep.expand(batch, -1)
    out = torch.empty(batch, rows.shape[1], t * h * w * channels, dtype=torch.float64)
    for b in range(batch):
        for k, token in enumerate(rows[b].tolist()):
            corner = (token // (grid_h * grid_w) * t, token // grid_w % grid_h * h, token % grid_w * w)
            values = []
            for dt in range(t):
                for dy in range(h):
                    for dx in range(w):
                        for c in range(channels):
                            pixel = video[b, corner[0] + dt, corner[1] + dy, corner[2] + dx, c].item()
                            values.append(pixel * 2 / 255 - 1 if video.dtype == torch.uint8 else pixel)
            out[b, k] = torch.tensor(values, dtype=torch.float64)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("impl", "device", "dtype"),
    [pytest.param(*pair, dtype, id=f"{'-'.join(pair)}-{dtype}") for pair in IMPLS for dtype in dtypes_of(pair[0])],
)
def test_matches_reference(impl, device, case, dtype):
    actual = forward_and_gradients(impl, case, dtype, device)
    reference = forward_and_gradients("reference", case, dtype, device)
    exact = forward_and_gradients("reference", case, dtype, device, exact=True)
    for name, value in actual.items():
        assert_within_budget(value, reference[name], exact[name], sums_of(case, name), name=name)


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_reference_is_the_definition(case):
    video, keep, window = make_video(case.shape, dtype=case.video), make_keep(case), make_window(case)
    volume = 3 * case.patch[0] * case.patch[1] * case.patch[2]
    weight, bias, pos, agg = parameters(volume, torch.float64, "cpu", case.dim, case.tokens, agg=True)
    with use_impl(tokenize="reference"):
        actual = tokenize_video(video, weight, bias, pos=pos, agg=agg, keep=keep, patch=case.patch, **window)
    cut = video
    if window:
        (height, width), corners = window["size"], window["crop"].tolist()
        cut = torch.stack([clip[:, y : y + height, x : x + width] for clip, (y, x) in zip(video, corners)])
        cut = torch.stack([clip.flip(2) if mirrored else clip for clip, mirrored in zip(cut, window["flip"])])
    token = torch.arange(case.tokens) if keep is None else keep
    rows = torch.stack([pos[token.expand(len(video), -1)[b]] for b in range(len(video))])
    expected = loop_form(cut, keep, case.patch) @ weight.T + bias + rows
    torch.testing.assert_close(actual[:, 1:], expected)
    assert torch.equal(actual[:, 0], agg.expand(len(video), -1))


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_projection_is_the_official_convolution(case):
    t, h, w = case.patch
    video, keep = make_video(case.shape), make_keep(case)
    kernel = randn(t, h, w, 3, 8, dtype=torch.float64)  # as the official checkpoints store it
    bias = randn(8, dtype=torch.float64)
    scaled = (video.double() * 2 / 255 - 1).permute(0, 4, 1, 2, 3)
    expected = F.conv3d(scaled, kernel.permute(4, 3, 0, 1, 2), bias, stride=case.patch).flatten(2).mT
    if keep is not None:
        expected = expected.gather(1, keep[:, :, None].expand(-1, -1, 8))
    actual = tokenize_video(video, kernel.flatten(0, 3).T.contiguous(), bias, keep=keep, patch=case.patch)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("per_sample", [False, True])
def test_waveform_is_the_official_convolution(per_sample):
    wave = randn(2, 1000, dtype=torch.float64).requires_grad_()
    weight, bias = parameters(128, torch.float64, "cpu")
    keep = torch.tensor([[6, 0, 3], [1, 2, 5]]) if per_sample else torch.tensor([6, 0, 3])
    actual = tokenize_waveform(wave, weight, bias, keep=keep)
    every = F.conv1d(wave[:, None], weight[:, None], bias, stride=128).mT
    expected = every.gather(1, keep.expand(2, -1)[:, :, None].expand(-1, -1, 8))
    torch.testing.assert_close(actual, expected)
    inputs = (wave, weight, bias)
    for ours, theirs in zip(gradients(actual, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("keep", [None, torch.tensor([3, 0]), torch.tensor([[1, 1], [2, 0]])], ids=["all", "K", "BK"])
def test_float_video_has_a_gradient(keep):
    video = randn(2, 3, 4, 5, 2, dtype=torch.float64).requires_grad_()
    weight, bias = parameters(2 * 2 * 2 * 2, torch.float64, "cpu", dim=3)
    project = lambda *x: tokenize_video(*x, keep=keep, patch=(2, 2, 2))  # noqa: E731
    assert torch.autograd.gradcheck(project, (video, weight, bias))


@pytest.mark.parametrize("placed", [False, True])
def test_autocast_chooses_the_dtype_of_the_product(placed):
    case = CASES[0]
    video, keep = make_video(case.shape), make_keep(case)
    given = parameters(3072, torch.float32, "cpu", tokens=case.tokens * placed, agg=placed)

    def tokens(impl, weight, bias, pos=None, agg=None):
        with use_impl(tokenize=impl), torch.autocast("cpu", torch.bfloat16):
            out = tokenize_video(video, weight, bias, pos=pos, agg=agg, keep=keep)
        return [out.detach(), *gradients(out, given)]

    actual, reference = tokens("cpp", *given), tokens("reference", *given)
    # The sum with float32 positions promotes; float32 parameters have float32 gradients.
    assert [x.dtype for x in actual] == [torch.float32 if placed else torch.bfloat16] + [torch.float32] * len(given)
    given = [x.detach().double().requires_grad_() for x in given]
    for name, *values in zip(("y", "weight", "bias", "pos", "agg"), actual, reference, tokens("reference", *given)):
        assert_within_budget(*values, sums_of(case, name), name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[9]], ids=str)
def test_cpp_multiplies_in_any_dtype_the_library_is_fast_in(monkeypatch, case, dtype):
    """On a CPU with AMX the product of bfloat16 is taken in bfloat16, elsewhere in float32: both here."""
    if dtype == torch.float16:
        monkeypatch.setattr(tokenize_native, "PIECE_BYTES", 1)  # one row, one run at a time
    monkeypatch.setattr(tokenize_native, "_product_dtype", lambda _: torch.bfloat16 if dtype.itemsize == 2 else dtype)
    dtype = torch.bfloat16 if dtype.itemsize == 2 else dtype
    actual = forward_and_gradients("cpp", case, dtype, "cpu")
    reference = forward_and_gradients("reference", case, dtype, "cpu")
    exact = forward_and_gradients("reference", case, dtype, "cpu", exact=True)
    for name, value in actual.items():
        assert_within_budget(value, reference[name], exact[name], sums_of(case, name), name=name)


@pytest.mark.parametrize("keep", [None, torch.tensor([3, 0]), torch.tensor([[1, 1], [2, 0]])], ids=["all", "K", "BK"])
@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_registration(impl, device, keep):
    video = make_video((2, 5, 8, 8), device=device)
    keep = None if keep is None else keep.to(device)
    crop, flip = torch.tensor([[0, 1], [2, 0]], device=device), torch.tensor([True, False], device=device)
    geometry, low = ([6, 7], [2, 3, 3]), torch.bfloat16
    kept = 8 if keep is None else 2
    with use_impl(tokenize=impl):
        for dtype in (torch.float32, low):
            weight, bias, pos, agg = (x.detach() for x in parameters(54, dtype, device, dim=6, tokens=8, agg=True))
            torch.library.opcheck(_fwd, (video, weight, bias, pos, agg, keep, crop, flip, *geometry, dtype))
            torch.library.opcheck(_fwd, (video, weight, None, None, None, keep, None, None, *geometry, dtype))
            grad = randn(2, kept + 1, 6, dtype=dtype, device=device)
            given = (grad, video, keep, crop, flip, *geometry, True, dtype, torch.float32)
            torch.library.opcheck(_bwd, (*given, [True] * 4))
            torch.library.opcheck(_bwd, (*given, [False, True, False, False]))
            torch.library.opcheck(_bwd, (*given, [False, False, True, True]))


@pytest.mark.parametrize("device", sorted({device for _, device in IMPLS}))
def test_compiles(device):
    weight, bias, pos, agg = parameters(3072, torch.float32, device, tokens=8, agg=True)
    wave_weight, wave_bias = parameters(128, torch.float32, device)

    def tokens(video, wave, keep):
        frames = tokenize_video(video, weight, bias, pos=pos, agg=agg, keep=keep)
        return torch.cat((frames, tokenize_waveform(wave, wave_weight, wave_bias, keep=keep)), 1)

    compiled = torch.compile(tokens, fullgraph=True, dynamic=True, backend="aot_eager")
    keep = torch.tensor([2, 0, 1], device=device)
    for batch in (2, 3):
        video = make_video((batch, 8, 32, 32), device=device)
        wave = randn(batch, 700, device=device).requires_grad_()
        inputs = (wave, weight, bias, pos, agg, wave_weight, wave_bias)
        actual, expected = compiled(video, wave, keep), tokens(video, wave, keep)
        names = ("y", "wave", "weight", "bias", "pos", "agg", "wave_weight", "wave_bias")
        ours, theirs = ([y, *gradients(y, inputs)] for y in (actual, expected))
        for name, *values in zip(names, ours, theirs):
            assert_same_sums(*values, Sum(3072), name=name)  # of a patch, the longest


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_every_pixel_value_to_the_bit(impl):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256, 1)
    with use_impl(tokenize=impl):
        actual = tokenize_video(pixels, torch.ones(1, 1), patch=(1, 1, 1))
    expected = torch.arange(256.0) * 2 / 255 - 1
    assert torch.equal(actual.flatten(), expected)
    assert (expected[0].item(), expected[255].item()) == (-1, 1)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_edges(impl, device):
    weight, bias = (x.detach() for x in parameters(96, dtypes_of(impl)[0], device))

    def tokens(name, video, keep):
        with use_impl(tokenize=name):
            return tokenize_video(video, weight.to(video.device), bias, keep=keep, patch=(2, 4, 4))

    whole = make_video((4, 7, 21, 26), device=device)
    keep = torch.tensor([[5, 0], [1, 1], [3, 2]], device=device)
    # Strided in every axis that may be, and a keep with strides of its own.
    view = whole[1:, ::2, 1::3, 3:17]
    wide = torch.stack((keep, keep + 1), -1)[..., 0]
    assert not view.is_contiguous()
    assert not wide.is_contiguous()
    actual = tokens(impl, view, wide)
    assert_same_sums(actual, tokens("reference", view.clone(), keep), Sum(96))
    # No samples, no tokens, one after the other twice the same.
    assert tokens(impl, view[:0], keep[0]).shape == (0, 2, 8)
    assert tokens(impl, view, keep[:, :0]).shape == (3, 0, 8)
    assert torch.equal(actual, tokens(impl, view, wide))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_no_tokens_give_zero_gradients(impl, device):
    weight, bias, pos, agg = parameters(96, dtypes_of(impl)[0], device, tokens=8, agg=True)
    video, keep = make_video((2, 4, 8, 8), device=device), torch.zeros(0, dtype=torch.int64, device=device)
    with use_impl(tokenize=impl):
        for clips, factor in ((video, 2.0), (video[:0], 0.0)):
            out = tokenize_video(clips, weight, bias, pos=pos, agg=agg, keep=keep, patch=(2, 4, 4))
            *others, dagg = torch.autograd.grad(out.sum(), (weight, bias, pos, agg))
            assert all(not gradient.any() for gradient in others)
            assert (dagg == factor).all()


@pytest.mark.parametrize(("impl", "device"), [pair for pair in IMPLS if pair[0] != "reference"])
def test_more_bytes_than_31_bits_count(impl, device):
    """The last token of a video of 2.4 GB; on the CPU its pages are made only where they are read."""
    video = torch.zeros(2, 100, 2000, 2000, 3, dtype=torch.uint8, device=device)
    video[1, -4:, -16:, -16:] = make_video((4, 16, 16), device=device)
    weight, bias = parameters(3072, dtypes_of(impl)[0], device)
    keep = torch.tensor([25 * 125 * 125 - 1], device=device)
    with use_impl(tokenize=impl):
        actual = tokenize_video(video, weight, bias, keep=keep)
    alone = tokenize_video(video[1:, -4:, -16:, -16:].contiguous(), weight, bias)
    assert_same_sums(actual[1:], alone, Sum(3072))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_writes_its_output_and_nothing_else(dtype):
    from torch.utils.dlpack import to_dlpack

    from vatt_engine import _C

    video, keep = make_video((2, 4, 9, 9)), torch.tensor([4, 7])
    expected = patches_reference(video, keep, None, None, (9, 9), (2, 3, 3), dtype)
    for row, rows, run, runs in ((0, 6, 0, 6), (1, 3, 0, 6), (0, 6, 2, 3), (5, 1, 5, 1)):
        guarded = torch.full((64 + rows * runs * 9 + 64,), 7.0, dtype=dtype)
        out = guarded[64:-64].view(rows, runs * 9)
        capsules = [to_dlpack(video), to_dlpack(keep), None, None, to_dlpack(out)]
        _C.tokenize_patches(*capsules, [9, 9], [2, 3, 3], True, row, run, 3)
        whole = torch.cat([torch.zeros_like(expected[:, :1]), expected], 1).flatten(0, 1)
        assert torch.equal(out, whole[row : row + rows, run * 9 : (run + runs) * 9])
        assert (guarded[:64] == 7).all()
        assert (guarded[-64:] == 7).all()
