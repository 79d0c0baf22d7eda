"""tokenize: what it refuses, in which words, and what stands in where an implementation is missing."""

import sys
import warnings

import pytest
import torch

from vatt_engine import dispatch
from vatt_engine.dispatch import available_impls, use_impl
from vatt_engine.ops import tokenize_video, tokenize_waveform
from vatt_engine.testing import gradients, impls_of, randn

CPU_IMPLS = [impl for impl, device in impls_of("tokenize") if device == "cpu"]
VIDEO = torch.arange(2 * 4 * 16 * 32 * 3).view(2, 4, 16, 32, 3).to(torch.uint8)
WEIGHT = torch.zeros(8, 3072)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokenize_video(VIDEO[0], WEIGHT), r"video must be \[B, T, H, W, C\], got shape \(4, 16, 32, 3\)"),
        (lambda: tokenize_video(VIDEO.int(), WEIGHT), "video must be uint8 or float, got torch.int32"),
        (lambda: tokenize_video(VIDEO[:, :3], WEIGHT), r"at least one patch \(4, 16, 16\), got .* \(3, 16, 32\)"),
        (lambda: tokenize_video(VIDEO, WEIGHT, patch=(4, 0, 16)), r"three positive sizes .*, got \(4, 0, 16\)"),
        (lambda: tokenize_video(VIDEO, WEIGHT[:, 1:]), r"weight must be float \[D, 3072\], got .*\[8, 3071\]"),
        (lambda: tokenize_video(VIDEO, WEIGHT, torch.zeros(7)), r"bias must be float \[8\], got .*\[7\]"),
        (lambda: tokenize_video(VIDEO, WEIGHT, keep=torch.zeros(1)), "keep must be int64, got torch.float32"),
        (lambda: tokenize_video(VIDEO, WEIGHT, keep=torch.zeros(3, 1).long()), r"\[2, K\], got shape \(3, 1\)"),
        (lambda: tokenize_video(VIDEO, WEIGHT.to("meta")), "weight must be on cpu like the input, got meta"),
        (lambda: tokenize_video(VIDEO, WEIGHT, pos=torch.zeros(3, 8)), r"pos must be float \[2, 8\], got .*\[3, 8\]"),
        (lambda: tokenize_video(VIDEO, WEIGHT, agg=torch.zeros(8).int()), r"agg must be float \[8\], got torch.int32"),
        (lambda: tokenize_video(VIDEO, WEIGHT, size=(16, 33)), r"size must lie within the frame \(16, 32\), got"),
        (lambda: tokenize_video(VIDEO, WEIGHT, crop=torch.zeros(2).long()), r"crop must be int64 \[2, 2\], got"),
        (lambda: tokenize_video(VIDEO, WEIGHT, flip=torch.zeros(2)), r"flip must be bool \[2\], got torch.float32"),
        (lambda: tokenize_waveform(VIDEO, WEIGHT), r"wave must be float \[B, L\], got torch.uint8"),
        (lambda: tokenize_waveform(torch.zeros(1, 127), WEIGHT), "at least 128 samples, got 127"),
        (lambda: tokenize_waveform(torch.zeros(1, 128), WEIGHT), r"weight must be float \[D, 128\]"),
    ],
)
def test_rejects_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("token", [-1, 2])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_rejects_what_lies_outside(impl, token):
    with use_impl(tokenize=impl):
        with pytest.raises(ValueError, match=rf"numbers in \[0, 2\), got {token}"):
            tokenize_video(VIDEO, WEIGHT, keep=torch.tensor([0, token]))
        crop = torch.tensor([[0, 0], [0, 17 if token > 0 else token]])
        with pytest.raises(ValueError, match=rf"crop must lie in \[0, 0\] x \[0, 16\], got \[0, {crop[1, 1]}\]"):
            tokenize_video(VIDEO, WEIGHT, size=(16, 16), crop=crop)


def test_a_forced_implementation_does_not_fall_back():
    with use_impl(tokenize="cpp"):
        with pytest.raises(RuntimeError, match=r"cpp.*at most 32 bits, got torch.float64"):
            tokenize_video(VIDEO.double(), WEIGHT)
        with pytest.raises(RuntimeError, match=r"cpp: multiplies torch.float32.*, got torch.float64"):
            tokenize_video(VIDEO, WEIGHT.double())
        with pytest.raises(RuntimeError, match=r"rows \[W, C\] without gaps"):
            tokenize_video(VIDEO.permute(0, 1, 2, 4, 3).contiguous().permute(0, 1, 2, 4, 3), WEIGHT)


def test_without_the_native_module_the_reference_runs_after_one_warning(monkeypatch):
    weight, bias, pos, agg = (
        randn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(8, 3072), (8,), (2, 8), (8,)])
    )
    with use_impl(tokenize="reference"):
        expected = tokenize_video(VIDEO, weight, bias, pos=pos, agg=agg)
    monkeypatch.setitem(sys.modules, "vatt_engine._C", None)  # importing it raises ImportError, as an ABI mismatch does
    monkeypatch.setattr(dispatch, "_WARNED", set())
    dispatch.native_missing.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                actual = tokenize_video(VIDEO, weight, bias, pos=pos, agg=agg)
                gradients(actual, (weight, bias, pos, agg))
        with use_impl(tokenize="cpp"), pytest.raises(RuntimeError, match=r"not built .*run `pip install -e \.`"):
            tokenize_video(VIDEO, weight, bias)
    finally:
        dispatch.native_missing.cache_clear()
    assert [str(w.message)[:35] for w in caught] == ["tokenize: cpp is not available, the"]
    assert torch.equal(actual, expected)


def test_preference():
    assert list(available_impls("tokenize", "cuda")) == ["cpp", "triton", "wgmma", "cuda", "reference"]
    assert available_impls("tokenize", "cpu")["cpp"] is None, "the native module is part of the test set-up"
