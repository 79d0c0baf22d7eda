"""tokenize: patches of the kept tokens, scaled and projected."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from vatt_engine.dispatch import available_impls, use_impl
from vatt_engine.ops import tokenize_video, tokenize_waveform
from vatt_engine.ops.tokenize import patches_reference
from vatt_engine.testing import assert_within_budget, gradients, impls_of, randn


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # B, T, H, W
    patch: tuple[int, int, int]
    kept: int | None  # tokens; None keeps all
    per_sample: bool = False

    def __str__(self):
        keep = "all" if self.kept is None else f"{self.kept}{'-each' if self.per_sample else ''}"
        return f"{'x'.join(map(str, self.shape))}-keep-{keep}"


CASES = [
    Case((2, 8, 32, 48), (4, 16, 16), 5),
    Case((2, 8, 32, 48), (4, 16, 16), None),
    Case((3, 9, 37, 51), (4, 16, 16), 7, per_sample=True),  # frames, rows and columns left over
    Case((1, 4, 16, 16), (4, 16, 16), 1),  # one token of one
    Case((2, 5, 7, 11), (2, 3, 5), 4),  # odd everywhere
    Case((1, 32, 224, 224), (4, 16, 16), 784),  # the paper's
]
IMPLS = impls_of("tokenize")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_video(shape, *, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8).to(device)


def make_keep(case: Case, device="cpu"):
    if case.kept is None:
        return None
    batch, (t, h, w) = case.shape[0], (size // step for size, step in zip(case.shape[1:], case.patch))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(t * h * w, generator=generator)[: case.kept] for _ in range(batch)]
    return (torch.stack(rows) if case.per_sample else rows[0]).to(device)


def parameters(size, dtype, device, dim=8):
    weight = randn(dim, size, seed=2, dtype=dtype, device=device).div_(size**0.5)
    bias = randn(dim, seed=3, dtype=dtype, device=device)
    return weight.requires_grad_(), bias.requires_grad_()


def forward_and_gradients(impl, case, dtype, device):
    weight, bias = parameters(3 * case.patch[0] * case.patch[1] * case.patch[2], dtype, device)
    with use_impl(tokenize=impl):
        out = tokenize_video(
            make_video(case.shape, device=device), weight, bias, keep=make_keep(case, device), patch=case.patch
        )
        return [out.detach(), *gradients(out, (weight, bias))]


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_matches_reference(impl, device, case, dtype):
    actual = forward_and_gradients(impl, case, dtype, device)
    reference = forward_and_gradients("reference", case, dtype, device)
    exact = forward_and_gradients("reference", case, torch.float64, device)
    for name, values in zip(("y", "dweight", "dbias"), zip(actual, reference, exact)):
        assert_within_budget(*values, name=name)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_reference_is_the_definition(case):
    for video in (make_video(case.shape), randn(*case.shape, 3, dtype=torch.float64)):
        keep = make_keep(case)
        torch.testing.assert_close(
            patches_reference(video, keep, case.patch, torch.float64), loop_form(video, keep, case.patch)
        )


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


def test_autocast_chooses_the_dtype():
    case = CASES[0]
    video, keep = make_video(case.shape), make_keep(case)
    weight, bias = parameters(3072, torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        actual = tokenize_video(video, weight, bias, keep=keep)
    assert actual.dtype == torch.bfloat16
    expected = tokenize_video(video, weight.bfloat16(), bias.bfloat16(), keep=keep)
    assert torch.equal(actual, expected)
    assert gradients(actual, (weight,))[0].dtype == torch.float32


@pytest.mark.parametrize("keep", [None, torch.tensor([3, 0]), torch.tensor([[1, 1], [2, 0]])], ids=["all", "K", "BK"])
@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_registration(impl, device, keep):
    video = make_video((2, 5, 8, 8), device=device)
    keep = None if keep is None else keep.to(device)
    with use_impl(tokenize=impl):
        for dtype in (torch.float32, torch.bfloat16):
            torch.library.opcheck(torch.ops.vatt.patches_fwd.default, (video, keep, [2, 4, 4], dtype))


def test_all_patches_of_a_waveform_are_a_copy():
    """They are a view of the input, which an op must not give back."""
    wave = randn(2, 256)[:, :, None, None, None]
    torch.library.opcheck(torch.ops.vatt.patches_fwd.default, (wave, None, [16, 1, 1], torch.float32))


@pytest.mark.parametrize("device", sorted({device for _, device in IMPLS}))
def test_compiles(device):
    weight, bias = parameters(3072, torch.float32, device)
    wave_weight, wave_bias = parameters(128, torch.float32, device)

    def tokens(video, wave, keep):
        return torch.cat(
            (
                tokenize_video(video, weight, bias, keep=keep),
                tokenize_waveform(wave, wave_weight, wave_bias, keep=keep),
            ),
            1,
        )

    compiled = torch.compile(tokens, fullgraph=True, dynamic=True, backend="aot_eager")
    keep = torch.tensor([2, 0, 1], device=device)
    for batch in (2, 3):
        video = make_video((batch, 8, 32, 32), device=device)
        wave = randn(batch, 700, device=device).requires_grad_()
        inputs = (wave, weight, bias, wave_weight, wave_bias)
        actual, expected = compiled(video, wave, keep), tokens(video, wave, keep)
        torch.testing.assert_close(actual, expected)
        for ours, theirs in zip(gradients(actual, inputs), gradients(expected, inputs)):
            torch.testing.assert_close(ours, theirs)


VIDEO = make_video((2, 4, 16, 32))
WEIGHT = torch.zeros(8, 3072)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokenize_video(VIDEO[0], WEIGHT), r"video must be \[B, T, H, W, C\], got shape \(4, 16, 32, 3\)"),
        (lambda: tokenize_video(VIDEO.int(), WEIGHT), "video must be uint8 or float, got torch.int32"),
        (lambda: tokenize_video(VIDEO[:, :3], WEIGHT), r"at least one patch \(4, 16, 16\), got .* \(3, 16, 32\)"),
        (lambda: tokenize_video(VIDEO, WEIGHT, patch=(4, 0, 16)), r"three positive sizes .*, got \(4, 0, 16\)"),
        (lambda: tokenize_video(VIDEO, WEIGHT[:, 1:]), r"weight must be float \[D, 3072\], got .*\[8, 3071\]"),
        (lambda: tokenize_video(VIDEO, WEIGHT, torch.zeros(7)), r"bias must be torch.float32 \[8\], got .*\[7\]"),
        (lambda: tokenize_video(VIDEO, WEIGHT, keep=torch.zeros(1)), "keep must be int64, got torch.float32"),
        (lambda: tokenize_video(VIDEO, WEIGHT, keep=torch.zeros(3, 1).long()), r"\[2, K\], got shape \(3, 1\)"),
        (lambda: tokenize_video(VIDEO, WEIGHT.to("meta")), "weight must be on the device of video, cpu, got meta"),
        (lambda: tokenize_waveform(VIDEO, WEIGHT), r"wave must be float \[B, L\], got torch.uint8"),
        (lambda: tokenize_waveform(torch.zeros(1, 127), WEIGHT), "at least 128 samples, got 127"),
        (lambda: tokenize_waveform(torch.zeros(1, 128), WEIGHT), r"weight must be float \[D, 128\]"),
    ],
)
def test_rejects_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("token", [-1, 2])
@pytest.mark.parametrize("impl", [impl for impl, device in IMPLS if device == "cpu"])
def test_rejects_tokens_outside_the_grid(impl, token):
    with use_impl(tokenize=impl), pytest.raises(ValueError, match=rf"numbers in \[0, 2\), got {token}"):
        tokenize_video(VIDEO, WEIGHT, keep=torch.tensor([0, token]))


def test_a_forced_implementation_does_not_fall_back():
    with use_impl(tokenize="cpp"):
        with pytest.raises(RuntimeError, match=r"cpp.*reads uint8 video, got torch.float32"):
            tokenize_video(VIDEO.float(), WEIGHT)
        with pytest.raises(RuntimeError, match=r"rows \[W, C\] without gaps"):
            tokenize_video(VIDEO.permute(0, 1, 2, 4, 3).contiguous().permute(0, 1, 2, 4, 3), WEIGHT)


def test_preference():
    assert list(available_impls("tokenize", "cuda")) == ["cpp", "reference", "cuda"]  # cuda is unmeasured
    assert available_impls("tokenize", "cpu")["cpp"] is None, "the native module is part of the test set-up"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", [impl for impl, device in IMPLS if device == "cpu"])
def test_every_pixel_value_to_the_bit(impl, dtype):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256, 1)
    with use_impl(tokenize=impl):
        actual = torch.ops.vatt.patches_fwd(pixels, None, [1, 1, 256], dtype)
    expected = (torch.arange(256.0) * 2 / 255 - 1).to(dtype)
    assert torch.equal(actual.flatten(), expected)
    assert (expected[0].item(), expected[255].item()) == (-1, 1)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_edges(impl, device):
    with use_impl(tokenize=impl):
        extract = lambda video, keep: torch.ops.vatt.patches_fwd(video, keep, [2, 4, 4], torch.float32)  # noqa: E731
        whole = make_video((4, 7, 21, 26), device=device)
        keep = torch.tensor([[5, 0], [1, 1], [3, 2]], device=device)
        # Strided in every axis that may be, and a keep with strides of its own.
        view = whole[1:, ::2, 1::3, 3:17]
        expected = patches_reference(view.clone(), keep, [2, 4, 4], torch.float32)
        wide = torch.stack((keep, keep + 1), -1)[..., 0]
        assert not view.is_contiguous()
        assert not wide.is_contiguous()
        assert torch.equal(extract(view, wide), expected)
        # No samples, no tokens, one after the other twice the same.
        assert extract(view[:0], keep[0]).shape == (0, 2, 96)
        assert extract(view, keep[:, :0]).shape == (3, 0, 96)
        assert torch.equal(extract(view, keep), extract(view, keep))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_writes_its_output_and_nothing_else(dtype):
    from torch.utils.dlpack import to_dlpack

    from vatt_engine import _C

    video = make_video((2, 4, 9, 9))
    keep = torch.tensor([4, 7])
    guarded = torch.full((64 + 2 * 2 * 54 + 64,), 7.0, dtype=dtype)
    out = guarded[64:-64].view(2, 2, 54)
    _C.tokenize_patches(to_dlpack(video), to_dlpack(keep), to_dlpack(out), [2, 3, 3], 3, 0)
    assert torch.equal(out, patches_reference(video, keep, [2, 3, 3], dtype))
    assert (guarded[:64] == 7).all()
    assert (guarded[-64:] == 7).all()
