"""attention: every implementation against the fp64 reference, the definition, and the edges."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_cases import LONG, OPTIONS, SHORT, arguments, assert_right, attention_sum, label, long_cases, run
from pairwise import pairwise
from torch.nn.attention import SDPBackend, sdpa_kernel

from vatt_engine import ops
from vatt_engine.dispatch import use_impl
from vatt_engine.ops.attention import Options, attention_reference, dropout_mask
from vatt_engine.testing import Sum, assert_same_sums, gradients, impls_of, randn

GENERAL = [found for found in impls_of("attention") if found[0] != "cpp"]  # which takes dropout alone: the next file
IMPLS = [found for found in GENERAL if found[0] != "reference"]
CASES = pairwise({"rows": SHORT} | OPTIONS) + long_cases()


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_matches_reference(impl, device, case):
    if impl == "sdpa":
        case = case | {"dropout_p": 0.0}  # its masks are the library's own
    assert_right(impl, case, device)


def options(keep=None, bias=None, key_mask=None, cu_seqlens=None, dropout_p=0.0, seed=None, scale=0.7):
    return Options(keep, bias, key_mask, cu_seqlens, dropout_p, seed, scale)


def test_reference_is_the_definition():
    """Each output row is the weighted mean over the keys it may see, written as loops in fp64."""
    q, k, v = (randn(2, 2, 6, 3, seed=s, dtype=torch.float64) for s in range(3))
    bias = randn(2, 4, 4, seed=3, dtype=torch.float64)
    keep, key_mask = torch.tensor([[0, 3, 1, 5], [0, 2, 4, 1]]), torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]]).bool()
    seed, dropout_p = torch.tensor(3), 0.3
    kept = dropout_mask(seed, 2, 2, 4, dropout_p)
    y = attention_reference(q, k, v, options(keep=keep, bias=bias, key_mask=key_mask, dropout_p=dropout_p, seed=seed))
    for b, h, i in itertools.product(range(2), range(2), range(4)):
        rows = keep[b].tolist()
        seen = [j for j in range(4) if key_mask[b, j]]
        weights = [torch.exp(0.7 * q[b, h, rows[i]] @ k[b, h, rows[j]] + bias[h, i, j]) for j in seen]
        mean = torch.zeros(3, dtype=torch.float64)
        for j, weight in zip(seen, weights):
            if kept[b, h, i, j]:
                mean += weight / sum(weights) / (1 - dropout_p) * v[b, h, rows[j]]
        assert torch.allclose(y[b, h, i], mean, atol=1e-12)
    small = [x.requires_grad_() for x in (q, k, v, randn(2, 6, 6, seed=4, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda q, k, v, bias: attention_reference(q, k, v, options(bias=bias)), small)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("impl", "device"), GENERAL)
def test_packed_sequences_are_separate_ones(impl, device, masked):
    """Four sequences in one call, against four calls."""
    q, k, v = (randn(1, 2, 40, 16, seed=s, device=device).requires_grad_() for s in range(3))
    ends, mask = [0, 7, 14, 31, 40], torch.rand(1, 40, device=device) > 0.4
    mask[:, :31] |= not masked
    with use_impl(attention=impl):
        y = ops.attention(q, k, v, cu_seqlens=ends, key_mask=mask[:, 31:] if not masked else mask)
        pieces = [slice(a, b) for a, b in itertools.pairwise(ends)]
        parts = [ops.attention(*(x[:, :, p] for x in (q, k, v)), key_mask=mask[:, p]) for p in pieces]
        apart = torch.cat(parts, 2)
        for name, got, want in zip(("y", "dq", "dk", "dv"), with_gradients(y, q, k, v), with_gradients(apart, q, k, v)):
            assert_same_sums(got, want, attention_sum(17, 16), name=name)


def with_gradients(y, *inputs):
    return [y, *gradients(y, inputs)]


def test_dropout_mask_is_drawn_evenly():
    """Every row, column, and pair of neighbours loses its share, within five standard deviations."""
    dropout_p, size = 0.1, (4, 8, 256)
    dropped = ~dropout_mask(torch.tensor(11), *size, dropout_p)
    for share in (
        dropped.float().mean((0, 1, 2)),
        dropped.float().mean((0, 1, 3)),
        dropped.float().mean((2, 3)).flatten(),
    ):
        deviation = (dropout_p * (1 - dropout_p) / (dropped.numel() / len(share))) ** 0.5
        assert (share - dropout_p).abs().max() < 5 * deviation
    for a, b in ((dropped[..., 1:], dropped[..., :-1]), (dropped[..., 1:, :], dropped[..., :-1, :])):
        both = (a & b).float().mean()
        assert abs(both - dropout_p**2) < 5 * (dropout_p**2 / a.numel()) ** 0.5
    assert not torch.equal(dropped, ~dropout_mask(torch.tensor(12), *size, dropout_p))


@pytest.mark.parametrize(("impl", "device"), impls_of("attention"))
def test_dropout_without_a_seed(impl, device):
    """The mean stays, torch's generator decides, and backward drops what forward dropped."""
    q, k = (randn(8, 8, 64, 16, seed=s, device=device) for s in range(2))
    v = torch.ones(8, 8, 64, 16, device=device, requires_grad=True)
    with use_impl(attention=impl):
        torch.manual_seed(4)
        y = ops.attention(0 * q, k, v, dropout_p=0.25)
        torch.manual_seed(4)
        assert torch.equal(y, ops.attention(0 * q, k, v, dropout_p=0.25))
        assert not torch.equal(y, ops.attention(0 * q, k, v, dropout_p=0.25))
        # y is linear in v: <y, 1> = <v, dv> holds only if both passes drop the same.
        (dv,) = torch.autograd.grad(y.sum(), v)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    assert_same_sums(dv.sum(), y.sum(), Sum(y.numel()))


@pytest.mark.parametrize("form", ["bias", "keep_each", "packed_tail"])
@pytest.mark.parametrize(("impl", "device"), GENERAL)
def test_compiles(impl, device, form):
    case = {"form": form, "rows": 17, "masked": True, "dropout_p": 0.0, "dtype": torch.float32}
    leaves, rest = arguments(case | {"layout": "qkv", "size": (2, 3, 16)}, device)
    rest["cu_seqlens"] = rest["cu_seqlens"].tolist() if form == "packed_tail" else None

    def op(*leaves):
        return ops.attention(**dict(zip(names, leaves)), **rest)

    names = list(leaves)
    with use_impl(attention=impl):
        y = torch.compile(op, fullgraph=True, backend="aot_eager")(*leaves.values())
        for got, want in zip(with_gradients(y, *leaves.values()), run(impl, leaves, rest)):
            assert_same_sums(got, want, attention_sum(17, 16))


Q = torch.zeros(1, 2, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3)}, r"q must be \[B, H, N, D\], got shape \(2, 3\)"),
        ({"k": torch.zeros(1, 2, 4, 9)}, r"k must have the shape of q \[1, 2, 4, 8\], got \[1, 2, 4, 9\]"),
        ({"v": torch.zeros(1, 2, 5, 8)}, r"v must have the shape of q"),
        ({"v": Q.bfloat16()}, "v must be torch.float32 on cpu like q, got torch.bfloat16"),
        ({"v": None}, "k and v must be given together"),
        ({"k": None, "v": None}, r"qkv must be \[B, N, 3, H, D\], got shape \(1, 2, 4, 8\)"),
        ({"bias": torch.zeros(4, 4)}, r"bias must be .* got \[4, 4\]"),
        ({"bias": torch.zeros(2, 4, 4).double()}, "bias must have the dtype of q torch.float32, got torch.float64"),
        ({"bias": torch.zeros(2, 4, 4), "cu_seqlens": [0, 4]}, "bias must be None with keep or cu_seqlens"),
        ({"bias": torch.zeros(2, 4, 4), "keep": torch.tensor([0])}, "bias must be None with keep or cu_seqlens"),
        ({"key_mask": torch.ones(1, 4)}, r"key_mask must be bool \[1, 4\], got torch.float32"),
        ({"key_mask": torch.ones(1, 3).bool()}, r"key_mask must be bool \[1, 4\], got torch.bool \[1, 3\]"),
        ({"key_mask": torch.ones(1, 1).bool(), "cu_seqlens": [0, 2, 4]}, "key_mask must cover whole sequences"),
        ({"key_mask": torch.ones(1, 4, device="meta").bool()}, "key_mask must be on cpu like q, got meta"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"keep": torch.tensor([0.0])}, "keep must be int64, got torch.float32"),
        ({"keep": torch.zeros(2, 1).long()}, r"keep must be \[K\] or \[1, K\], got shape \(2, 1\)"),
        ({"keep": torch.tensor([0, 4])}, r"keep must hold positions in \[0, 4\), got 4"),
        ({"keep": torch.tensor([-1, 3])}, r"keep must hold positions in \[0, 4\), got -1"),
        ({"keep": torch.tensor([2, 0, 2])}, "keep must hold no position twice"),
        ({"keep": torch.tensor([0]), "cu_seqlens": [0, 4]}, "keep must be None with cu_seqlens"),
        ({"cu_seqlens": [0, 3]}, "cu_seqlens must ascend from 0 to 4, got"),
        ({"cu_seqlens": [0, 3, 2, 4]}, "cu_seqlens must ascend from 0 to 4, got"),
        ({"cu_seqlens": []}, "cu_seqlens must ascend from 0 to 4, got"),
        (
            {n: torch.zeros(2, 2, 4, 8) for n in "qkv"} | {"cu_seqlens": [0, 4]},
            "batch size of 1 and rows with cu_seqlens, got 2 x 4",
        ),
    ],
)
def test_rejects_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(**({"q": Q, "k": Q, "v": Q} | change))


def test_a_seed_is_never_ignored():
    with (
        use_impl(attention="sdpa"),
        pytest.raises(RuntimeError, match="sdpa: draws its dropout from torch's generator"),
    ):
        ops.attention(Q, Q, Q, dropout_p=0.5, seed=1)
    assert torch.equal(*(ops.attention(Q, Q, Q + 1, dropout_p=0.5, seed=1) for _ in range(2)))


@pytest.mark.parametrize(("impl", "device"), GENERAL)
def test_edges(impl, device):
    with use_impl(attention=impl):
        q, k, v = (randn(2, 2, 6, 16, seed=s, device=device).requires_grad_() for s in range(3))
        mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0] * 6], device=device).bool()
        y = ops.attention(q, k, v, key_mask=mask)
        assert not y[-1].any()  # a row that may see nothing gives zeros
        assert all(g.isfinite().all() for g in gradients(y, [q, k, v]))
        huge = ops.attention(q * 1e4, k * 1e4, v)
        assert huge.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(huge, [q, k, v]))
        hidden = torch.full((2, 6, 6), -torch.inf, device=device).triu(
            1
        )  # a bias may hide keys, here those that follow
        assert_same_sums(ops.attention(q, k, v, bias=hidden)[:, :, 0], v[:, :, 0], attention_sum(6, 16))
        nothing = ops.attention(*(x[:0] for x in (q, k, v)))
        assert nothing.shape == (0, 2, 6, 16)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["CUDNN_ATTENTION", "CUDNN_ATTENTION masked", "FLASH_ATTENTION"])
@pytest.mark.parametrize("rows", LONG)
def test_the_library_at_our_lengths(rows, backend):
    """cuDNN's once gave NaN gradients where N % 128 == 64 and a mask was given (pytorch#196678); flash takes none."""
    name, _, masked = backend.partition(" ")
    case = {"form": "dense", "rows": rows, "masked": bool(masked), "dropout_p": 0.0, "dtype": torch.bfloat16}
    with sdpa_kernel(getattr(SDPBackend, name)):
        assert_right("sdpa", case | {"layout": "separate", "size": (2, 2, 64)}, "cuda")
