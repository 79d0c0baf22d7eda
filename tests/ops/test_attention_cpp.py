"""attention with dropout on a CPU: native code between the library's products, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from attention_cases import LONG, OPTIONS, SHORT, arguments, assert_right, attention_sum, label, run
from pairwise import pairwise

from vatt_engine import _C, ops
from vatt_engine.dispatch import available_impls, use_impl
from vatt_engine.ops import attention_native
from vatt_engine.testing import assert_same_sums, gradients, randn

DENSE = {"form": "dense", "masked": False}
VARIED = {"rows": SHORT, "dropout_p": [0.1, 0.7]} | {name: OPTIONS[name] for name in ("dtype", "layout", "size")}
LONG_CASES = [{"rows": n, "dropout_p": 0.1, "dtype": torch.float32, "layout": "qkv", "size": (1, 2, 64)} for n in LONG]


@pytest.mark.parametrize("case", pairwise(VARIED) + LONG_CASES, ids=label)
def test_matches_reference(case):
    assert_right("cpp", DENSE | case)


def test_pieces_are_numbered_on(monkeypatch):
    """A head's mask is its own, however few heads a piece holds."""
    case = DENSE | {"rows": 17, "dropout_p": 0.5, "dtype": torch.float32, "layout": "qkv", "size": (3, 5, 16)}
    whole = run("cpp", *arguments(case))
    for piece in (1, 2 * 4 * 17**2, 4 * 4 * 17**2):
        monkeypatch.setattr(attention_native, "PIECE_BYTES", piece)
        for got, want in zip(run("cpp", *arguments(case)), whole):
            assert_same_sums(got, want, attention_sum(17, 16))


def test_preferred_where_probabilities_drop():
    x = randn(1, 5, 3, 2, 16)
    assert next(iter(available_impls("attention", "cpu"))) == "cpp"
    with use_impl(attention="cpp"):
        forced = ops.attention(x, dropout_p=0.5, seed=1)
    assert torch.equal(ops.attention(x, dropout_p=0.5, seed=1), forced)


@pytest.mark.parametrize("factor", [1e4, 1e15, 0.0])
def test_extreme_scores(factor):
    x = (factor * randn(2, 33, 3, 2, 16)).requires_grad_()
    with use_impl(attention="cpp"):
        y = ops.attention(x, dropout_p=0.1, seed=1)
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(y / max(factor, 1), [x]))


def test_nan_is_not_swallowed():
    """The engine skips a step by it."""
    x = randn(1, 33, 3, 1, 16)
    x[0, 7, 1] = torch.nan  # a key, which every row sees
    x.requires_grad_()
    with use_impl(attention="cpp"):
        y = ops.attention(x, dropout_p=0.5, seed=1)
        assert y.isnan().all()
        assert gradients(y, [x])[0].isnan().any()


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 5, 3, 0, 16)])
def test_nothing(shape):
    x = torch.zeros(shape, requires_grad=True)
    with use_impl(attention="cpp"):
        y = ops.attention(x, dropout_p=0.1, seed=1)
    assert y.shape == (shape[0], shape[3], 5, 16)
    assert gradients(y, [x])[0].shape == shape


def test_autocast_and_compile_change_nothing():
    case = DENSE | {"rows": 65, "dropout_p": 0.3, "dtype": torch.bfloat16, "layout": "qkv", "size": (2, 3, 16)}
    want = run("cpp", *arguments(case))
    leaves, rest = arguments(case)
    compiled = torch.compile(lambda q: ops.attention(q, **rest), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(leaves["q"])
        assert all(torch.equal(a, b) for a, b in zip([y, *gradients(y, [leaves["q"]])], want))


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"keep": torch.arange(2)}, "takes no keep"),
        ({"key_mask": torch.ones(1, 5, dtype=torch.bool)}, "takes no key_mask"),
        ({"cu_seqlens": [0, 5]}, "takes no cu_seqlens"),
        ({"dropout_p": 0.0}, "drops probabilities"),
    ],
)
def test_refusals(rest, message):
    with use_impl(attention="cpp"), pytest.raises(RuntimeError, match=f"cpp: {message}"):
        ops.attention(randn(1, 5, 3, 2, 16), **{"dropout_p": 0.5} | rest)
    with use_impl(attention="cpp"), pytest.raises(RuntimeError, match=r"cpp: multiplies float32, .*float64"):
        ops.attention(randn(1, 5, 3, 2, 16).double(), dropout_p=0.5)


def test_native_code_refuses_what_it_would_misread():
    scores, lse, seed = torch.zeros(2, 4, 4), torch.zeros(2, 4), torch.tensor(1)

    def call(scores, lse, seed):
        _C.attention_softmax(*map(torch.utils.dlpack.to_dlpack, (scores, lse, seed)), 0, 0.1, 1.0, 1)

    call(scores, lse, seed)
    for wrong in ((scores.mT, lse, seed), (scores[..., :3], lse, seed), (scores.double(), lse, seed)):
        with pytest.raises(ValueError, match=r"scores must be contiguous float32 \[heads, rows, rows\]"):
            call(*wrong)
    with pytest.raises(ValueError, match=r"lse must be contiguous float32 \[heads, rows\]"):
        call(scores, lse[:1], seed)
    with pytest.raises(ValueError, match="seed must be one int64"):
        call(scores, lse, seed.int())
