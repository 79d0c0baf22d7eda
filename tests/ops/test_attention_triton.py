"""attention in Triton, run by its interpreter through the public op: forward, all gradients, every option."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from attention_cases import LONG, OPTIONS, SHORT, arguments, assert_right, attention_sum, label, run
from pairwise import pairwise

from vatt_engine import dispatch, ops
from vatt_engine.dispatch import Impl, use_impl
from vatt_engine.ops.attention import dropout_mask
from vatt_engine.ops.attention_flash import _bwd, _fwd, flash_attention, flash_refuses
from vatt_engine.testing import assert_within_budget, randn

forward, backward = triton_interpreter.load("attention"), triton_interpreter.load("attention_bwd")
CASES = pairwise({"rows": SHORT} | OPTIONS)
PLAIN = {
    "form": "dense",
    "masked": False,
    "dropout_p": 0.0,
    "dtype": torch.bfloat16,
    "layout": "qkv",
    "size": (1, 1, 64),
}


def interpreted(launcher):
    """A launcher whose kernels run in the interpreter, what it allocates between guard bands."""

    def call(*args):
        with triton_interpreter.running(), triton_interpreter.guard_bands():
            return launcher(*args)

    return call


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """The implementation "triton" runs on a CPU."""
    table = {
        "attention": flash_attention,
        "attention_fwd": interpreted(forward.attention_fwd),
        "attention_bwd": interpreted(backward.attention_bwd),
    }
    for name, target in table.items():
        refuses = {"refuses": flash_refuses} if name == "attention" else {}
        others = [impl for impl in dispatch._IMPLS["attention"][name] if impl.name != "triton"]
        monkeypatch.setitem(dispatch._IMPLS["attention"], name, [*others, Impl("triton", "cpu", target, **refuses)])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_matches_reference(case):
    assert_right("triton", case)


@pytest.mark.parametrize("rows", [rows for rows in LONG if rows < 1000])
def test_matches_reference_at_long_lengths(rows):
    assert_right("triton", PLAIN | {"rows": rows, "form": "keep" if rows == 768 else "dense", "dropout_p": 0.1})


@pytest.mark.parametrize("rows", [1201, 1569])
def test_the_longest_forward(rows):
    leaves, rest = arguments(PLAIN | {"rows": rows})
    x = leaves["q"].detach()
    with use_impl(attention="triton"):
        y = ops.attention(x, **rest)
    with use_impl(attention="reference"):
        low, want = ops.attention(x, **rest), ops.attention(x.double(), **rest)
    assert_within_budget(y, low, want, attention_sum(rows, 64))


def test_the_mask_is_the_references():
    """v is the identity: y holds the probabilities that were kept."""
    rows = 64
    q, v = torch.zeros(2, 3, rows, 64), torch.eye(rows).expand(2, 3, rows, rows)
    with use_impl(attention="triton"):
        y = ops.attention(q, q, v, dropout_p=0.3, seed=-9)
    assert torch.equal(y > 0, dropout_mask(torch.tensor(-9), 2, 3, rows, 0.3))


def test_the_bits_are_the_same_in_every_run():
    case = PLAIN | {"rows": 17, "form": "bias", "dropout_p": 0.1, "size": (40, 2, 16), "dtype": torch.float32}
    torch.manual_seed(0)
    leaves, rest = arguments(case)
    assert all(map(torch.equal, run("triton", leaves, rest), run("triton", leaves, rest)))


def test_registration(monkeypatch):
    """Shapes, dtypes and strides of both private ops' fakes, with and without a bias."""
    monkeypatch.setattr(triton_interpreter, "guard_bands", nullcontext)  # what lies between bands has an offset
    q, k, v = (randn(2, 3, 9, 16, seed=s) for s in range(3))
    keep, bias = torch.tensor([4, 0, 7]), randn(3, 9, 9)
    for options in ((None, bias, None, None, None, 0.0, 0.25), (keep, None, None, None, None, 0.0, 0.25)):
        with use_impl(attention="triton"):
            out, lse = _fwd(q, k, v, *options)
            torch.library.opcheck(_fwd, (q, k, v, *options), test_utils="test_faketensor")
            args = (torch.ones_like(out), q, k, v, out, lse, *options, options[1] is not None)
            torch.library.opcheck(_bwd, args, test_utils="test_faketensor")


def test_compiles():
    leaves, rest = arguments(PLAIN | {"rows": 17, "form": "bias", "dropout_p": 0.1, "size": (2, 2, 16)})
    with use_impl(attention="triton"):
        compiled = torch.compile(
            lambda q, bias: ops.attention(q, bias=bias, **rest), fullgraph=True, backend="aot_eager"
        )
        y = compiled(*leaves.values())
    assert torch.equal(y, run("triton", leaves, rest)[0])
    y.sum().backward()
    assert leaves["bias"].grad.any()


@pytest.mark.parametrize("position", [-1, 4, 2**33])
def test_a_wrong_position_stops_the_run(position):
    """On a GPU the door does not look."""
    x = torch.zeros(1, 1, 4, 16)
    with triton_interpreter.running(), pytest.raises(Exception, match="keep must hold positions of tokens"):
        forward.attention_fwd(x, x, x, torch.tensor([0, position]), None, None, None, None, 0.0, 1.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float32, bfloat16 or float16"),
        ({"size": (1, 1, 24)}, "head_dim of 16, 32 or 64, got 24"),
    ],
)
def test_what_it_refuses(change, reason):
    leaves, rest = arguments(PLAIN | {"rows": 3} | change)
    with pytest.raises(RuntimeError, match=reason):
        run("triton", leaves, rest)
