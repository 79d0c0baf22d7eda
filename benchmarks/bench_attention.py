"""attention, softmax(q k^T / sqrt(D) + bias) v, at VATT's lengths (AGG included), in the forms that its towers use."""

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import FORWARD_BACKWARD, Bench, cases, check_values, compiled, one_pass
from benchmarks.shapes import SHAPES, AttentionPacked
from vatt_engine.dispatch import use_impl
from vatt_engine.ops import attention, drop_token
from vatt_engine.testing import Sum, randn


def projections(batch, heads, tokens, head_dim, dtype, device):
    size = (batch, heads, tokens, head_dim)
    return {n: randn(*size, seed=i, dtype=dtype, device=device).requires_grad_() for i, n in enumerate("qkv")}


def inputs(shape, dtype, device):
    return projections(shape.batch, shape.heads, shape.tokens, shape.head_dim, dtype, device)


def op(_shape, q, k, v):
    return attention(q, k, v)


def bare_sdpa(_shape, q, k, v):
    """The library's call, without our door before it."""
    return F.scaled_dot_product_attention(q, k, v)


def library(backend):
    """One of the library's own implementations, by name."""

    def call(_shape, q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def eager(shape, q, k, v):
    """Scores stored."""
    return (q @ k.mT * shape.head_dim**-0.5).softmax(-1) @ v


def bytes_moved(shape, dtype, passes):
    """q, k, v read and y written; backward reads those and dy, writes dq, dk, dv."""
    one = shape.rows * shape.heads * shape.head_dim * dtype.itemsize
    return one * (4 + (8 if passes == FORWARD_BACKWARD else 0))


def sums(shape, _name):
    """A score's products, and a row's keys or a key's rows, of which no sequence has more."""
    longest = shape.video if isinstance(shape, AttentionPacked) else shape.tokens
    return [Sum(longest + shape.head_dim)]


def flops(shape, _dtype, passes):
    """Two products; backward makes the scores again and has four products of its own."""
    product = 2 * shape.pairs * shape.heads * shape.head_dim
    return product * (2 + (5 if passes == FORWARD_BACKWARD else 0))


LIBRARY = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BENCH = Bench(
    name="attention",
    stem="attention",
    op=op,
    rivals={
        "bare sdpa": bare_sdpa,
        "eager": eager,
        **compiled("eager compiled", eager),
        **({name: library(backend) for name, backend in LIBRARY.items()} if torch.cuda.is_available() else {}),
    },
    inputs=inputs,
    exact=eager,
    sums=sums,
    bytes_moved=bytes_moved,
    flops=flops,
)


def text_inputs(shape, dtype, device):
    """A bias for each head, and captions of 1 to all words."""
    bias = randn(shape.heads, shape.tokens, shape.tokens, seed=4, dtype=dtype, device=device).requires_grad_()
    words = torch.arange(shape.batch, device=device) % shape.tokens
    seen = torch.arange(shape.tokens, device=device) <= words[:, None]
    return inputs(shape, dtype, device) | {"bias": bias, "key_mask": seen}


def text_op(_shape, q, k, v, bias, key_mask):
    return attention(q, k, v, bias=bias, key_mask=key_mask)


def text_eager(shape, q, k, v, bias, key_mask):
    scores = q @ k.mT * shape.head_dim**-0.5 + bias
    return scores.masked_fill(~key_mask[:, None, None], -torch.inf).softmax(-1) @ v


TEXT = Bench(
    name="attention_text",
    stem="attention",
    op=text_op,
    rivals={"eager": text_eager, **compiled("eager compiled", text_eager)},
    inputs=text_inputs,
    exact=text_eager,
    sums=sums,
    bytes_moved=bytes_moved,
    flops=flops,
)


def packed_inputs(shape, dtype, device):
    return projections(1, shape.heads, shape.rows, shape.head_dim, dtype, device)


def packed_op(shape, q, k, v):
    return attention(q, k, v, cu_seqlens=shape.cu_seqlens)


def by_modality(function):
    """`function` called once for all sequences of each length."""

    def call(shape, q: Tensor, k: Tensor, v: Tensor):
        rows = [count * length for count, length in shape.runs]
        parts = []
        for (count, length), *piece in zip(shape.runs, *(x[0].split(rows, 1) for x in (q, k, v))):
            y = function(shape, *(x.unflatten(1, (count, length)).transpose(0, 1) for x in piece))
            parts.append(y.transpose(0, 1).flatten(1, 2))
        return torch.cat(parts, 1)[None]

    return call


PACKED = Bench(
    name="attention_packed",
    stem="attention",
    op=packed_op,
    rivals={"bare sdpa by modality": by_modality(bare_sdpa)},
    inputs=packed_inputs,
    exact=by_modality(eager),
    sums=sums,
    bytes_moved=bytes_moved,
    flops=flops,
)


@functools.cache
def kept_rows(shape, device):
    """AGG and `kept` - 1 others, another choice for every sample."""
    draw = torch.Generator().manual_seed(0)
    keep = torch.stack(
        [torch.randperm(shape.tokens - 1, generator=draw)[: shape.kept - 1] + 1 for _ in range(shape.batch)]
    )
    return F.pad(keep, (1, 0)).to(device)


def keep_inputs(shape, dtype, device):
    return projections(shape.batch, shape.heads, shape.tokens, shape.head_dim, dtype, device) | {
        "keep": kept_rows(shape, device)
    }


def keep_op(_shape, q, k, v, keep):
    return attention(q, k, v, keep=keep)


def gathered(function):
    """`function` of rows that drop_token has gathered, [B, N, H D] as a projection gives them."""

    def call(shape, q, k, v, keep):
        rows = (drop_token(x.transpose(1, 2).flatten(2), keep).unflatten(2, (shape.heads, -1)) for x in (q, k, v))
        return function(shape, *(x.transpose(1, 2) for x in rows))

    return call


KEEP = Bench(
    name="attention_keep",
    stem="attention",
    op=keep_op,
    rivals={"drop_token, then bare sdpa": gathered(bare_sdpa)},
    inputs=keep_inputs,
    exact=gathered(eager),
    sums=sums,
    bytes_moved=bytes_moved,
    flops=flops,
)


def dropout_op(_shape, q, k, v):
    return attention(q, k, v, dropout_p=DROPOUT_P, seed=5)


def dropout_exact(shape, q, k, v):
    with use_impl(attention="reference"):
        return dropout_op(shape, q, k, v)


def check_dropout(bench, case, given):
    """Ours drop the same; the library's masks are its own, and what it computes without them is checked above."""
    checked = check_values(replace(bench, rivals={}), case, given)
    shape = SHAPES[case.op][case.device][case.shape]
    rivals = {name: one_pass(function, shape, given, case.passes) for name, function in bench.rivals.items()}
    return checked._replace(calls=checked.calls | rivals)


DROPOUT_P = 0.1
DROPOUT = Bench(
    name="attention_dropout",
    stem="attention",
    op=dropout_op,
    rivals={"bare sdpa": lambda _shape, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT_P)},
    inputs=inputs,
    exact=dropout_exact,
    sums=sums,
    check=check_dropout,
    bytes_moved=bytes_moved,
    flops=flops,
)


@cases(BENCH)
def test_attention(measure, case):
    measure(BENCH, case)


@cases(DROPOUT)
def test_dropout(measure, case):
    measure(DROPOUT, case)


@cases(TEXT)
def test_text(measure, case):
    measure(TEXT, case)


@cases(PACKED)
def test_packed(measure, case):
    measure(PACKED, case)


@cases(KEEP)
def test_keep(measure, case):
    measure(KEEP, case)
