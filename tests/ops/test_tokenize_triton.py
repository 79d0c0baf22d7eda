"""tokenize in Triton, run by its interpreter: every option with every other, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from pairwise import pairwise

from vatt_engine.ops.tokenize_reference import tokenize_bwd_reference, tokenize_reference
from vatt_engine.testing import Sum, assert_within_budget, randn

kernels = triton_interpreter.load("tokenize")

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8

# patch (t, h, w), channels, tokens along each axis, what remains of each, D; the first two can be read in words.
SHAPES = {
    "words": ((2, 2, 4), 1, (2, 2, 2), (0, 0, 0), 20),
    "words_rests": ((2, 3, 8), 3, (2, 1, 3), (1, 2, 4), 70),
    "odd": ((2, 3, 5), 3, (1, 2, 2), (1, 0, 1), 7),
    "wave": ((1, 1, 9), 1, (1, 1, 5), (0, 0, 3), 1),
    "long": ((1, 2, 4), 1, (3, 1, 100), (0, 0, 0), 300),
}
OPTIONS = {
    "dtype": [F32, BF16, F16],
    "video": [U8, F32, BF16],
    "shape": ["words", "words_rests", "odd", "wave"],
    "weight": [F32, BF16],
    "bias": [None, F32, F16],
    "pos": [None, F32, BF16, torch.float64],
    "agg": [None, F32, BF16],
    "keep": ["all", "batch", "sample", "twice"],
    "crop": [False, True],
    "flip": [False, True],
    "layout": ["contiguous", "strided", "shifted"],
    "batch": [1, 2],
}
WORDS = {"video": [U8], "shape": ["words", "words_rests"], "crop": [False], "flip": [False]}
WORDS["layout"] = ["contiguous", "strided"]
CASES = [*pairwise(OPTIONS), *pairwise(OPTIONS | WORDS)]


def label(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def build(case, seed=0):
    """The private op's arguments but the last (dtype), and A."""
    patch, channels, grid, rests, dim = SHAPES[case["shape"]]
    torch.manual_seed(seed)
    batch, tokens = case["batch"], grid[0] * grid[1] * grid[2]
    frames, *size = (count * step + rest for count, step, rest in zip(grid, patch, rests))
    height, width = (extent + 3 * case["crop"] for extent in size)
    video = stored((batch, frames, height, width, channels), case["video"], case["layout"])
    weight = randn(dim, patch[0] * patch[1] * patch[2] * channels, dtype=case["weight"])
    bias, pos, agg = (
        None if case[name] is None else randn(*shape, seed=i, dtype=case[name])
        for i, (name, shape) in enumerate([("bias", (dim,)), ("pos", (tokens, dim)), ("agg", (dim,))])
    )
    keep = {
        "all": None,
        "batch": torch.randperm(tokens)[: (tokens + 1) // 2],
        "sample": torch.stack([torch.randperm(tokens) for _ in range(batch)])[:, 1:],
        "twice": torch.randint(tokens, (batch, 2 * tokens)),
    }[case["keep"]]
    crop = torch.randint(4, (batch, 2)) if case["crop"] else None
    flip = torch.arange(batch) % 2 == 0 if case["flip"] else None
    return [video, weight, bias, pos, agg, keep, crop, flip, size, list(patch)]


def stored(shape, dtype, layout):
    """A video: contiguous, one whose frames and rows have gaps, or one that begins at an odd address."""
    batch, frames, height, width, channels = shape
    if layout == "contiguous":
        return values(shape, dtype)
    if layout == "strided":  # rows keep a distance that four divides
        return values((batch, frames + 1, 2 * height, width + 4, channels), dtype)[:, 1:, ::2, 4:]
    flat = values((1 + batch * frames * height * width * channels,), dtype)
    return flat[1:].view(shape)


def values(shape, dtype):
    return torch.randint(0, 256, shape, dtype=U8) if dtype == U8 else randn(*shape, dtype=dtype)


def fwd_reference(args, dtype):
    """The reference in `dtype`, and in float64."""
    video, *parameters, keep, crop, flip, size, patch = args
    exact = [None if x is None else x.double() for x in parameters]
    return (
        tokenize_reference(*args, dtype),
        tokenize_reference(video, *exact, keep, crop, flip, size, patch, torch.float64),
    )


def bwd_reference(grad, video, rest, dtype, weight_dtype, needs):
    return (
        tokenize_bwd_reference(grad, video, *rest, dtype, weight_dtype, needs),
        tokenize_bwd_reference(grad.double(), video, *rest, torch.float64, torch.float64, needs),
    )


def token_sum(args):
    """A token adds up its patch, bias and position."""
    volume = args[1].shape[1]
    return Sum(volume + 2, max(volume, 1) ** 0.5 * args[1].abs().max().item())


def gradient_sum(grad, video):
    """Rows; there may be one result alone, which may cancel."""
    rows = grad.shape[0] * grad.shape[1]
    pixel = 1.0 if video.dtype == U8 else video.abs().max().item()
    return Sum(rows, rows**0.5 * grad.abs().max().item() * max(pixel, 1.0))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_forward(case):
    args = build(case)
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        actual = kernels.tokenize_fwd(*args, case["dtype"])
    assert_within_budget(actual, *fwd_reference(args, case["dtype"]), token_sum(args), name="y")


@pytest.mark.parametrize("case", CASES, ids=label)
def test_backward(case):
    video, weight, _, _, agg, *rest = build(case)
    rest.append(agg is not None)
    grad = randn(
        video.shape[0], kernels.Patches(video, *rest).rows, weight.shape[0], dtype=case["pos"] or case["dtype"]
    )
    args = (case["dtype"], weight.dtype, [True, True, True, agg is not None])
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        actual = kernels.tokenize_bwd(grad, video, *rest, *args)
    for name, *triple in zip(("dweight", "dbias", "dpos", "dagg"), actual, *bwd_reference(grad, video, rest, *args)):
        assert_within_budget(*triple, gradient_sum(grad, video), name=name)


LONG = {"dtype": F32, "video": U8, "shape": "long", "weight": F32, "bias": F32, "pos": F32, "agg": F32}
LONG |= {"keep": "sample", "crop": False, "flip": False, "layout": "contiguous", "batch": 2}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("tiles", kernels.FWD_TILES, ids=str)
def test_every_row_of_the_forward_table(tiles, flip, monkeypatch):
    dtype = BF16 if tiles.half else F32
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: tiles)
    args = build(LONG | {"flip": flip})
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        actual = kernels.tokenize_fwd(*args, dtype)
    assert_within_budget(actual, *fwd_reference(args, dtype), token_sum(args), name="y")


@pytest.mark.parametrize("programs", [1, 264])
@pytest.mark.parametrize("tiles", kernels.BWD_TILES, ids=str)
def test_every_row_of_the_backward_table(tiles, programs, monkeypatch):
    """With the sum over tokens in one piece, and in several."""
    dtype = BF16 if tiles.half else F32
    video, weight, _, _, _, *rest = build(LONG)
    rest.append(True)
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: tiles)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    grad = randn(2, kernels.Patches(video, *rest).rows, weight.shape[0], dtype=dtype)
    args = (dtype, BF16, [True, False, False, False])
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        dweight, *others = kernels.tokenize_bwd(grad, video, *rest, *args)
    low, exact = bwd_reference(grad, video, rest, *args)
    assert [other.numel() for other in others] == [0, 0, 0]
    assert_within_budget(dweight, low[0], exact[0], gradient_sum(grad, video), name="dweight")


def test_the_table_has_a_row_for_everything():
    for arch in (80, 90, 100):
        for dtype in (F32, BF16, F16):
            for word in (1, 4):
                for rows in (1, 4095, 4096, 10**6):
                    tiles = kernels.choose_tiles(kernels.FWD_TILES, arch, dtype, word, rows)
                    assert arch in tiles.archs
                    assert {1, word} & set(tiles.words)
                    assert kernels.choose_tiles(kernels.BWD_TILES, arch, dtype, 1, rows).half == (dtype != F32)


@pytest.mark.parametrize("needs", [[False] * 4, [False, True, False, False], [False, False, True, True]])
def test_only_what_is_needed(needs):
    video, weight, _, _, _, *rest = build(LONG | {"shape": "odd"})
    rest.append(True)
    grad = randn(2, kernels.Patches(video, *rest).rows, weight.shape[0])
    with triton_interpreter.running():
        actual = kernels.tokenize_bwd(grad, video, *rest, F32, F32, needs)
    assert [gradient.numel() > 0 for gradient in actual] == needs
    for triple in zip(actual, *bwd_reference(grad, video, rest, F32, F32, needs)):
        assert_within_budget(*triple, gradient_sum(grad, video))


@pytest.mark.parametrize(("batch", "kept", "agg"), [(0, 3, True), (2, 0, False), (2, 0, True)])
def test_nothing_kept(batch, kept, agg):
    video = torch.zeros(batch, 2, 4, 4, 1, dtype=U8)
    keep = torch.zeros(batch, kept, dtype=torch.int64)
    row = torch.arange(5.0)
    rest = (keep, None, None, [4, 4], [2, 2, 4])
    with triton_interpreter.running():
        y = kernels.tokenize_fwd(video, torch.ones(5, 16), row, None, row if agg else None, *rest, F32)
        grads = kernels.tokenize_bwd(torch.ones_like(y), video, *rest, agg, F32, F32, [True, True, True, agg])
    assert torch.equal(y, row.expand(batch, kept + agg, 5) if kept == 0 else y.new_empty(0, 4, 5))
    assert [grad.tolist() for grad in grads[:3]] == [[[0.0] * 16] * 5, [0.0] * 5, [[0.0] * 5] * 2]
    assert grads[3].tolist() == ([float(batch)] * 5 if agg else [])


@pytest.mark.parametrize("token", [-1, 2, 2**40])
def test_a_wrong_token_stops_the_run(token):
    keep = torch.tensor([[0, token]])
    with triton_interpreter.running(), pytest.raises(Exception, match="keep must hold token numbers of the grid"):
        patches_at(keep, None).corners()


@pytest.mark.parametrize("corner", [(-1, 0), (0, -1), (2, 0), (0, 2)])
def test_a_wrong_window_stops_the_run(corner):
    with triton_interpreter.running():
        assert patches_at(None, torch.tensor([(1, 1)])).corners().tolist() == [1 + 6, 1 + 6 + 12]
        with pytest.raises(Exception, match="crop must be corners of windows inside the video"):
            patches_at(None, torch.tensor([corner])).corners()


def patches_at(keep, crop):
    """Two tokens of 2 x 4 pixels in a window of 4 x 5 in a picture of 5 x 6."""
    video = torch.zeros(1, 1, 5, 6, 1, dtype=U8)
    return kernels.Patches(video, keep, crop, None, (4, 5), (1, 2, 4), False)


def test_corners_beyond_two_to_the_31():
    """Strides below 2^31 elements whose multiples are not (memory that nobody touches)."""
    sample, frame = 2**30 + 2**20, 2**30 + 2**10
    video = torch.empty(2**32 + 2**29, dtype=U8).as_strided((3, 3, 2, 4, 1), (sample, frame, 4, 1, 1))
    patches = kernels.Patches(video, None, None, torch.tensor([False, True, False]), (2, 4), (1, 2, 2), False)
    with triton_interpreter.running():
        corner = patches.corners().view(3, 3, 2)
    plain = torch.tensor([[0, 2], [frame, frame + 2], [2 * frame, 2 * frame + 2]])
    assert torch.equal(corner[0], plain)
    assert torch.equal(~corner[1], sample + plain.flip(1))
    assert torch.equal(corner[2], 2 * sample + plain)
