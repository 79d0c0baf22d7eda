"""drop_token, y[b, k] = tokens[b, keep[k]] (or keep[b, k]) with its scatter backward, and the sampling of keep."""

import torch

from benchmarks.harness import FORWARD, FORWARD_BACKWARD, Bench, cases, compiled
from vatt_engine.dispatch import use_impl
from vatt_engine.ops import drop_token, sample_keep
from vatt_engine.testing import Sum, randn


def sample_inputs(shape, _dtype, device):
    ids = torch.arange(shape.batch, device=device) if shape.per_sample else None
    return {"seed": torch.tensor(1, device=device), "sample_id": ids}


def sample_op(shape, seed, sample_id):
    return sample_keep(shape.tokens, shape.kept, seed=seed, sample_id=sample_id)


def sample_definition(shape, seed, sample_id):
    with use_impl(drop_token="reference"):
        return sample_op(shape, seed, sample_id)


def inputs(shape, dtype, device):
    tokens = randn(shape.batch, shape.tokens, shape.dim, seed=1, dtype=dtype, device=device)
    return {"tokens": tokens.requires_grad_(), "keep": sample_definition(shape, **sample_inputs(shape, dtype, device))}


def op(_shape, tokens, keep):
    return drop_token(tokens, keep)


def eager(_shape, tokens, keep):
    if keep.ndim == 1:
        return tokens[:, keep]
    return tokens[torch.arange(len(tokens), device=keep.device)[:, None], keep]


def bytes_moved(shape, dtype, passes):
    """Kept rows read and written; backward reads their gradients and writes all rows."""
    row = shape.batch * shape.dim * dtype.itemsize
    return row * (2 * shape.kept + (shape.kept + shape.tokens if passes == FORWARD_BACKWARD else 0))


BENCH = Bench(
    name="drop_token",
    stem="drop_token",
    op=op,
    rivals={"eager": eager, **compiled("eager compiled", eager)},
    inputs=inputs,
    exact=eager,
    sums=lambda _shape, _name: [Sum(1)],  # rows are moved
    bytes_moved=bytes_moved,
    flops=lambda *_: 0,
)
SAMPLE = Bench(
    name="sample_keep",
    stem="drop_token",
    op=sample_op,
    inputs=sample_inputs,
    exact=sample_definition,
    bytes_moved=lambda shape, *_: 8 * shape.kept * (shape.batch if shape.per_sample else 1),  # keep, written
    flops=lambda *_: 0,
    passes=(FORWARD,),
    dtypes={"cpu": ("int64",), "cuda": ("int64",)},
)


@cases(BENCH)
def test_drop_token(measure, case):
    measure(BENCH, case)


@cases(SAMPLE)
def test_sample_keep(measure, case):
    measure(SAMPLE, case)
