"""tokenize, over shapes that hypothesis draws (in a file of its own: a GPU machine may lack hypothesis)."""

import pytest
import torch

from vatt_engine.dispatch import use_impl
from vatt_engine.ops.tokenize import patches_reference
from vatt_engine.testing import impls_of

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(("impl", "device"), impls_of("tokenize"))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_reference_to_the_bit(impl, device, data):
    size = st.integers(1, 6)
    patch = [data.draw(size) for _ in range(3)]
    rests = [data.draw(size) - 1 for _ in range(3)]
    grid = [data.draw(st.integers(1, 4)) for _ in range(3)]
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    extent = [count * step + rest for count, step, rest in zip(grid, patch, rests)]
    tokens = grid[0] * grid[1] * grid[2]

    video = torch.randint(0, 256, (batch, *extent, channels), dtype=torch.uint8).to(device)
    keep = torch.randint(tokens, data.draw(st.sampled_from([(1,), (batch, tokens), (2 * tokens,)]))).to(device)
    with use_impl(tokenize=impl):
        actual = torch.ops.vatt.patches_fwd(video, keep, patch, dtype)
    # A rest may hold a whole patch more along an axis: the token numbers above still lie in the grid.
    assert torch.equal(actual, patches_reference(video, keep, patch, dtype))
