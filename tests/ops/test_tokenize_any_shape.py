"""tokenize, over shapes that hypothesis draws (in a file of its own: a GPU machine may lack hypothesis)."""

import pytest
import torch

from vatt_engine.dispatch import use_impl
from vatt_engine.ops import tokenize_video
from vatt_engine.testing import Sum, assert_within_budget, gradients, impls_of, randn

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

IMPLS = [pair for pair in impls_of("tokenize") if pair[0] != "reference"]


def draw_call(draw, device):
    """A video and the other arguments of tokenize_video, any of them odd."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    small = st.integers(1, 6)
    patch, rests = [[draw(small) - low for _ in range(3)] for low in (0, 1)]
    grid = [draw(st.integers(1, 4)) for _ in range(3)]
    batch, channels, dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(24, 70))
    frames, *size = (count * step + rest for count, step, rest in zip(grid, patch, rests))
    border = [draw(small) - 1 for _ in range(2)] if draw(st.booleans()) else [0, 0]
    frame = [length + extra for length, extra in zip(size, border)]
    tokens = (frames // patch[0]) * (size[0] // patch[1]) * (size[1] // patch[2])

    video = torch.randint(0, 256, (batch, frames, *frame, channels), dtype=torch.uint8)
    if draw(st.booleans()):
        video = (video.float() / 255).requires_grad_()
    shape = draw(st.sampled_from([None, (1,), (batch, tokens), (2 * tokens,)]))
    call = {"patch": patch, "keep": None if shape is None else torch.randint(tokens, shape).to(device)}
    if any(border):
        call["size"] = size
        call["crop"] = torch.stack([torch.randint(extra + 1, (batch,)) for extra in border], 1).to(device)
    if draw(st.booleans()):
        call["flip"] = torch.randint(2, (batch,)).bool().to(device)
    shapes = {"weight": (dim, patch[0] * patch[1] * patch[2] * channels), "bias": (dim,), "pos": (tokens, dim)}
    names = [name for name in ("weight", "bias", "pos", "agg") if name == "weight" or draw(st.booleans())]
    parameters = {name: randn(*shapes.get(name, (dim,)), seed=i) for i, name in enumerate(names)}
    parameters["weight"] /= shapes["weight"][1] ** 0.5
    return video, parameters, call


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_stays_inside_the_budget(impl, device, data):
    halves = [torch.bfloat16, torch.float16]
    dtype = data.draw(st.sampled_from(halves if impl == "wgmma" else [torch.float32, *halves]))
    video, parameters, call = draw_call(data.draw, device)

    def run(name, exact=False):
        given = {key: value.to(dtype).double() if exact else value.to(dtype) for key, value in parameters.items()}
        if video.is_floating_point():
            given["video"] = video.detach().double() if exact else video.detach()
        given = {key: value.to(device).requires_grad_() for key, value in given.items()}
        with use_impl(tokenize=name):
            out = tokenize_video(**{"video": video.to(device), **given}, **call)
            return {"y": out.detach(), **dict(zip(given, gradients(out, list(given.values()))))}

    actual, reference, expected = run(impl), run("reference"), run("reference", exact=True)
    dim, volume = parameters["weight"].shape
    rows = actual["y"].shape[0] * actual["y"].shape[1]
    terms = {"y": volume + 2, "video": dim * rows}  # a token that is kept often has as many gradients
    for key, value in actual.items():
        assert_within_budget(value, reference[key], expected[key], Sum(terms.get(key, rows)), name=key)
