"""attention, softmax(q k^T / sqrt(D)) v without mask or bias, at VATT's lengths (AGG included)."""

from torch.nn import functional as F

from benchmarks.harness import FORWARD_BACKWARD, Bench, cases, compiled
from vatt_engine.ops import attention
from vatt_engine.testing import randn


def inputs(shape, dtype, device):
    size = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
    return {n: randn(*size, seed=i, dtype=dtype, device=device).requires_grad_() for i, n in enumerate("qkv")}


def op(_shape, q, k, v):
    return attention(q, k, v)


def bare_sdpa(_shape, q, k, v):
    """The library's call, without our door before it."""
    return F.scaled_dot_product_attention(q, k, v)


def eager(shape, q, k, v):
    """Scores stored."""
    return (q @ k.mT * shape.head_dim**-0.5).softmax(-1) @ v


def bytes_moved(shape, dtype, passes):
    """q, k, v read and y written; backward reads those and dy, writes dq, dk, dv."""
    one = shape.batch * shape.heads * shape.tokens * shape.head_dim * dtype.itemsize
    return one * (4 + (8 if passes == FORWARD_BACKWARD else 0))


def flops(shape, _dtype, passes):
    """Two products; backward makes the scores again and has four products of its own."""
    product = 2 * shape.batch * shape.heads * shape.tokens**2 * shape.head_dim
    return product * (2 + (5 if passes == FORWARD_BACKWARD else 0))


BENCH = Bench(
    name="attention",
    stem="attention",
    op=op,
    rivals={"bare sdpa": bare_sdpa, "eager": eager, **compiled("eager compiled", eager)},
    inputs=inputs,
    exact=eager,
    bytes_moved=bytes_moved,
    flops=flops,
)


@cases(BENCH)
def test_attention(measure, case):
    measure(BENCH, case)
