"""Inputs of attention in every form, and what they must come to; for the tests on devices and in the interpreter."""

from __future__ import annotations

import torch

from vatt_engine import ops
from vatt_engine.dispatch import use_impl
from vatt_engine.testing import Sum, assert_within_budget, gradients, randn

# Tokens of video and audio at 50 % and 100 %, with AGG, the multiples of tiles near them, and edges of tiles.
SHORT = (1, 16, 17, 63, 64, 65)
LONG = (576, 601, 640, 768, 785, 1201, 1569)
OPTIONS = {
    "form": ["dense", "bias", "bias_each", "keep", "keep_each", "packed", "packed_tail"],
    "masked": [False, True],
    "dropout_p": [0.0, 0.1],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "layout": ["separate", "qkv", "strided"],
    "size": [(1, 1, 64), (2, 3, 32), (3, 2, 16)],  # B, H, D
}
SEED = 5


def long_cases():
    """Every long length in every dtype, the other options in turn."""
    cases = []
    for i, rows in enumerate(LONG):
        for n, dtype in enumerate(OPTIONS["dtype"]):
            turn = {name: values[(i + 2 * n) % len(values)] for name, values in OPTIONS.items()}
            cases.append(turn | {"rows": rows, "dtype": dtype, "size": (1, 1, 64)})
    return cases


def label(case):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in case.values())


def arguments(case, device="cpu"):
    """Leaves that get gradients by name, and the other arguments of ops.attention."""
    form, rows, (batch, heads, dim) = case["form"], case["rows"], case["size"]
    rest = {"dropout_p": case["dropout_p"], "seed": SEED if case["dropout_p"] else None}
    tokens, lengths = rows, [0]
    if form.startswith("keep"):
        tokens = rows + 3
        keep = torch.stack([torch.randperm(tokens)[:rows] for _ in range(batch)])
        rest["keep"] = (keep if form == "keep_each" else keep[0]).to(device)
    if form.startswith("packed"):
        last = min(rows, 17)
        batch, lengths = 1, [rows, max(1, rows // 3), 0, last, last]
        rest["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
        tokens = sum(lengths)
    if case["masked"] or form == "packed_tail":
        masked = sum(lengths[-2:]) if form == "packed_tail" else tokens
        rest["key_mask"] = (torch.rand(batch, masked) > 0.3).to(device)
        if form.startswith("packed") or batch > 1:  # the last sequence has nothing to see
            rest["key_mask"][-1, -lengths[-1] :] = False
    leaves = projections(case["layout"], (batch, heads, tokens, dim), case["dtype"], device)
    if form.startswith("bias"):
        each = (batch,) if form == "bias_each" else ()
        leaves["bias"] = randn(*each, heads, tokens, tokens, seed=7, dtype=case["dtype"], device=device)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, rest


def projections(layout, size, dtype, device):
    """q, k and v contiguous, of strides of their own, or one tensor as a linear layer gives it; three are views."""
    batch, heads, tokens, dim = size
    if layout == "qkv":
        return {"q": randn(batch, tokens, 3, heads, dim, dtype=dtype, device=device)}
    leaves = {name: randn(*size, seed=i, dtype=dtype, device=device) for i, name in enumerate("qkv")}
    if layout == "strided":
        leaves["q"] = leaves["q"].transpose(1, 2).contiguous().transpose(1, 2)
        leaves["v"] = leaves["v"].mT.contiguous().mT
    return leaves


def run(impl, leaves, rest):
    """The output and the gradients of all leaves."""
    with use_impl(attention=impl):
        y = ops.attention(**leaves, **rest)
        return [y, *gradients(y, list(leaves.values()))]


def assert_right(impl, case, device="cpu"):
    """Forward and every gradient inside the budget; rows that are not kept get exactly none."""
    torch.manual_seed(0)
    leaves, rest = arguments(case, device)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    names = ["y", *(f"d{name}" for name in leaves)]
    low, want, actual = run("reference", leaves, rest), run("reference", exact, rest), run(impl, leaves, rest)
    for name, got, same_dtype, right in zip(names, actual, low, want):
        sums = [attention_sum(case["rows"], case["size"][2])]
        if name in ("dq", "dk", "dbias") and case["rows"] == 1:
            sums += cancelled(leaves, want[0])
        assert_within_budget(got, same_dtype, right, *sums, name=name)
    if "keep" in rest:
        for grad, leaf in zip(actual[1:], leaves.values()):
            assert not rows_first(grad, case)[dropped_rows(rows_first(leaf, case), rest["keep"])].any()


def attention_sum(rows, dim):
    """A score adds up D products, and scales a probability by its own rounding; an output or gradient adds up N of
    these. Keys that a row does not see make both sums shorter.
    """
    return Sum(rows + dim)


def cancelled(leaves, y):
    """What rounding leaves of dq, dk and dbias where a row sees one key: dp - delta is 0 then, a difference of two sums
    of D products, of which delta comes from y, rounded to its dtype; q or k times 1 / sqrt(D) follow.
    """
    dim, dtype = y.shape[-1], next(iter(leaves.values())).dtype
    largest = max(leaf.detach().abs().max().item() for leaf in leaves.values())
    weights = randn(*y.shape, seed=1).abs().max().item()  # those of vatt_engine.testing.gradients
    size = dim**0.5 * weights * largest * max(1.0, largest * dim**-0.5)
    return [Sum(2 * dim, size), Sum(1, size, dtype)]


def rows_first(x, case):
    """[B, N, ...] of a leaf or its gradient."""
    return x if case["layout"] == "qkv" else x.transpose(1, 2)


def dropped_rows(x, keep):
    """[B, N] bool: rows whose gradient must be exactly zero."""
    dropped = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return dropped.scatter_(1, keep.expand(len(x), -1), False)
