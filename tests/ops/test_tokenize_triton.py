"""tokenize in Triton, run by its interpreter: every option with every other, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter

from vatt_engine.testing import assert_within_budget, randn

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
    "pos": [None, F32, BF16],
    "agg": [None, F32, BF16],
    "keep": ["all", "batch", "sample", "twice"],
    "crop": [False, True],
    "flip": [False, True],
    "layout": ["contiguous", "strided", "shifted"],
    "batch": [1, 2],
}
WORDS = {"video": [U8], "shape": ["words", "words_rests"], "crop": [False], "flip": [False]}
WORDS["layout"] = ["contiguous", "strided"]
CASES = [*triton_interpreter.pairwise(OPTIONS), *triton_interpreter.pairwise(OPTIONS | WORDS)]


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


def patches_of(video, keep, crop, flip, size, patch, exact):
    """[B, K, P]: each sample's window, cut up, in float64 or in float32."""
    samples = []
    for b, sample in enumerate(video):
        y, x = (0, 0) if crop is None else crop[b].tolist()
        window = sample[:, y : y + size[0], x : x + size[1]]
        if flip is not None and flip[b]:
            window = window.flip(2)
        for axis, step in enumerate(patch):
            window = window.unfold(axis, step, step)  # [nt, nh, nw, C, t, h, w]
        tokens = window.permute(0, 1, 2, 4, 5, 6, 3).flatten(3).flatten(0, 2)
        samples.append(tokens if keep is None else tokens[keep[b] if keep.ndim == 2 else keep])
    x = torch.stack(samples).to(torch.float64 if exact else F32)
    return x * 2 / 255 - 1 if video.dtype == U8 else x


def fwd_plain(video, weight, bias, pos, agg, keep, crop, flip, size, patch, dtype, exact):
    """The formula in float64, or with products and sums in `dtype` as PyTorch has them."""
    to = torch.float64 if exact else dtype
    y = patches_of(video, keep, crop, flip, size, patch, exact).to(to) @ weight.to(to).T
    if bias is not None:
        y = y + bias.to(to)
    if pos is not None:
        y = y + (pos.to(torch.promote_types(to, pos.dtype)) if keep is None else pos[keep])
    if agg is not None:
        y = torch.cat([agg.to(y.dtype).expand(y.shape[0], 1, -1), y], 1)
    return y


def bwd_plain(grad, video, pos, agg, keep, crop, flip, size, patch, dtype, weight_dtype, exact):
    """dweight, dbias, dpos, dagg."""
    sums = torch.float64 if exact else F32
    token_grad = grad[:, 1:] if agg else grad
    x = patches_of(video, keep, crop, flip, size, patch, exact)
    to = torch.float64 if exact else dtype
    dweight = token_grad.flatten(0, 1).to(to).T @ x.flatten(0, 1).to(to)
    dpos = torch.zeros(pos, grad.shape[2], dtype=sums)
    token = torch.arange(pos) if keep is None else keep
    dpos.index_add_(0, token.expand(token_grad.shape[:2]).flatten(), token_grad.flatten(0, 1).to(sums))
    dagg = grad[:, 0].to(sums).sum(0) if agg else torch.empty(0)
    return dweight.to(sums if exact else weight_dtype), token_grad.to(sums).sum((0, 1)), dpos, dagg


@pytest.mark.parametrize("case", CASES, ids=label)
def test_forward(case):
    args = build(case)
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        actual = kernels.tokenize_fwd(*args, case["dtype"])
    low, exact = (fwd_plain(*args, case["dtype"], exact) for exact in (False, True))
    assert_within_budget(actual, low, exact, name="y")


@pytest.mark.parametrize("case", CASES, ids=label)
def test_backward(case):
    video, weight, _, _, agg, keep, crop, flip, size, patch = build(case)
    agg, dtype = agg is not None, case["dtype"]
    tokens = kernels.Patches(video, keep, crop, flip, size, patch, agg).num_tokens
    rows = agg + (tokens if keep is None else keep.shape[-1])
    grad = randn(video.shape[0], rows, weight.shape[0], seed=9, dtype=case["pos"] or dtype)
    rest = (keep, crop, flip, size, patch)
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        actual = kernels.tokenize_bwd(grad, video, *rest, agg, dtype, weight.dtype, [True, True, True, agg])
    low, exact = (bwd_plain(grad, video, tokens, agg, *rest, dtype, weight.dtype, exact) for exact in (False, True))
    for name, *triple in zip(("dweight", "dbias", "dpos", "dagg"), actual, low, exact):
        assert_within_budget(*triple, name=name)


LONG = {"dtype": F32, "video": U8, "shape": "long", "weight": F32, "bias": F32, "pos": F32, "agg": F32}
LONG |= {"keep": "sample", "crop": False, "flip": False, "layout": "contiguous", "batch": 2}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("tiles", kernels.FWD_TILES, ids=str)
def test_every_row_of_the_forward_table(tiles, flip, monkeypatch):
    case = LONG | {"dtype": BF16 if tiles.half else F32, "flip": flip}
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: tiles)
    args = build(case)
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        actual = kernels.tokenize_fwd(*args, case["dtype"])
    low, exact = (fwd_plain(*args, case["dtype"], exact) for exact in (False, True))
    assert_within_budget(actual, low, exact, name="y")


@pytest.mark.parametrize("programs", [1, 264])
@pytest.mark.parametrize("tiles", kernels.BWD_TILES, ids=str)
def test_every_row_of_the_backward_table(tiles, programs, monkeypatch):
    """With the sum over tokens in one piece, and in several."""
    dtype = BF16 if tiles.half else F32
    video, weight, _, _, _, keep, crop, flip, size, patch = build(LONG)
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: tiles)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    grad = randn(2, 1 + keep.shape[1], weight.shape[0], dtype=dtype)
    rest = (keep, crop, flip, size, patch)
    with triton_interpreter.running(), triton_interpreter.guard_bands():
        dweight, *others = kernels.tokenize_bwd(grad, video, *rest, True, dtype, BF16, [True, False, False, False])
    assert [other.numel() for other in others] == [0, 0, 0]
    low, exact = (bwd_plain(grad, video, 300, True, *rest, dtype, BF16, exact)[0] for exact in (False, True))
    assert_within_budget(dweight, low, exact, name="dweight")


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
    video, weight, _, _, _, keep, crop, flip, size, patch = build(CASES[0] | {"keep": "twice", "shape": "odd"})
    grad = randn(video.shape[0], 1 + keep.shape[1], weight.shape[0])
    rest = (keep, crop, flip, size, patch)
    with triton_interpreter.running():
        actual = kernels.tokenize_bwd(grad, video, *rest, True, F32, F32, needs)
    low, exact = (bwd_plain(grad, video, 4, True, *rest, F32, F32, exact) for exact in (False, True))
    for need, *triple in zip(needs, actual, low, exact):
        if need:
            assert_within_budget(*triple)
        else:
            assert triple[0].shape == (0,)


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
    """More than 2^31 bytes between samples, and between the first and the last frame (memory that nobody touches)."""
    flat = torch.empty(2**32 + 2**29, dtype=U8)
    video = flat.as_strided((2, 3, 2, 4, 1), (2**31 + 2**20, 2**30 + 2**10, 4, 1, 1))
    patches = kernels.Patches(video, None, None, torch.tensor([False, True]), (2, 4), (1, 2, 2), False)
    with triton_interpreter.running():
        corner = patches.corners().view(2, 3, 2)
    frame, sample = 2**30 + 2**10, 2**31 + 2**20
    assert corner[0].tolist() == [[0, 2], [frame, frame + 2], [2 * frame, 2 * frame + 2]]
    assert (~corner[1]).tolist() == [[sample + t * frame + 2, sample + t * frame] for t in range(3)]
