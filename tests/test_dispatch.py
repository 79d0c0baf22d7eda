"""The dispatcher: order of preference, forced choice, and messages that say why."""

from __future__ import annotations

import pytest
import torch

from vatt_engine import dispatch
from vatt_engine.dispatch import Impl, available_impls, define_choice, define_op, list_ops, use_impl

double = define_op(
    "toy",
    "toy_double(Tensor x) -> Tensor",
    fake=torch.empty_like,
    flops=lambda x, out_shape: x.numel(),
    impls=[
        Impl("absent", "cpu", "no_such_module:function", missing=lambda: "it is not built"),
        Impl("cuda", "cuda", "no_such_module:function"),
        Impl("small", "any", lambda x: 2 * x, refuses=lambda x: "more than 4 values" if x.numel() > 4 else None),
        Impl("reference", "any", lambda x: x + x),
    ],
)
which = define_choice(
    "toy_choice",
    [
        Impl("first", "cpu", lambda x, flag: "first", refuses=lambda x, flag: "flag" if flag else None),
        Impl("second", "any", lambda x, flag: "second"),
    ],
)


@pytest.fixture(autouse=True)
def _warned_already(monkeypatch):
    monkeypatch.setattr(dispatch, "_WARNED", {("toy", "absent")})


def test_the_first_that_can_run_is_taken():
    assert which(torch.ones(1), False) == "first"
    assert which(torch.ones(1), True) == "second"
    assert double(torch.ones(8)).tolist() == [2.0] * 8


def test_a_missing_preferred_one_warns_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_WARNED", set())
    with pytest.warns(UserWarning, match=r"toy: absent is not available, .* it is not built"):
        double(torch.ones(2))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double(torch.ones(2))


def test_a_forced_one_never_falls_back():
    with use_impl(toy="small"):
        assert double(torch.ones(4)).tolist() == [2.0] * 4
        with pytest.raises(RuntimeError, match=r"no implementation 'small' of toy_double on cpu \(small: more than 4"):
            double(torch.ones(5))
    with use_impl(toy="absent"), pytest.raises(RuntimeError, match="absent: it is not built"):
        double(torch.ones(1))
    with use_impl(toy="cuda"), pytest.raises(RuntimeError, match="cuda: runs on cuda"):
        double(torch.ones(1))
    assert double(torch.ones(5)).tolist() == [2.0] * 5


def test_forcing_nests_and_ends_with_the_block():
    def inner() -> str:
        return which(torch.ones(1), False)

    with use_impl(toy_choice="second"):
        assert inner() == "second"
        with use_impl(toy_choice="first"):
            assert inner() == "first"
        assert inner() == "second"
    assert inner() == "first"
    with pytest.raises(KeyError), use_impl(toy_choice="second"):
        raise KeyError
    assert inner() == "first"


def test_unknown_names():
    with pytest.raises(ValueError, match=r"use_impl: toy must be one of \['absent', 'cuda', 'reference', 'small'\]"):
        use_impl(toy="fast").__enter__()
    with pytest.raises(ValueError, match="op must be one of"):
        available_impls("no_such_op", "cpu")


def test_reasons_are_listed():
    assert available_impls("toy", "cpu") == {
        "absent": "it is not built",
        "cuda": "runs on cuda",
        "small": None,
        "reference": None,
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("stem", ["attention", "drop_token", "nce", "tokenize"])
def test_every_op_has_a_reference_everywhere(stem, device):
    assert stem in list_ops()
    assert available_impls(stem, device)["reference"] is None


def test_the_op_compiles_and_is_registered():
    torch.library.opcheck(double, (torch.ones(3),))
    compiled = torch.compile(lambda x: double(x) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(3)).tolist() == [3.0] * 3
