"""mil_nce (nce is its case of one candidate): similarities by tiles against a stored matrix.

s = a @ b.T / temperature [B, B P],  loss = mean_i(logsumexp(row i and column i of s) - logsumexp(positives of i))
"""

import torch
from torch.nn import functional as F

from benchmarks.harness import FORWARD_BACKWARD, Bench, cases, compiled
from vatt_engine.ops import mil_nce
from vatt_engine.testing import randn

TEMPERATURE = 0.07


def inputs(shape, dtype, device):
    video = randn(shape.batch, shape.dim, seed=1, dtype=dtype, device=device)
    text = randn(shape.batch, shape.candidates, shape.dim, seed=2, dtype=dtype, device=device)
    return {"video": video.requires_grad_(), "text": text.requires_grad_()}


def op(_shape, video, text):
    return mil_nce(video, text, TEMPERATURE)


def eager(_shape, video, text):
    """The joint loss as one writes it down: normalise, one matrix, both directions side by side, autograd."""
    dtype = torch.promote_types(video.dtype, torch.float32)
    video, text = F.normalize(video.to(dtype), dim=-1), F.normalize(text.to(dtype), dim=-1)
    s = (video @ text.flatten(0, 1).T).view(len(video), len(text), -1) / TEMPERATURE
    both = torch.cat([s.flatten(1), s.transpose(0, 1).flatten(1)], dim=1)
    return (both.logsumexp(1) - s.diagonal().logsumexp(0)).mean()


def bytes_moved(shape, dtype, passes):
    """Both embeddings read once per pass, their gradients written: the matrix need not touch memory."""
    embeddings = shape.batch * (1 + shape.candidates) * shape.dim * dtype.itemsize
    return embeddings * (3 if passes == FORWARD_BACKWARD else 1)


def flops(shape, _dtype, passes):
    """One product for the statistics; backward makes s again and multiplies its gradient with both sides."""
    product = 2 * shape.batch**2 * shape.candidates * shape.dim
    return product * (4 if passes == FORWARD_BACKWARD else 1)


BENCH = Bench(
    name="nce",
    stem="nce",
    op=op,
    rivals={"eager": eager, **compiled("eager compiled", eager)},
    inputs=inputs,
    exact=eager,
    bytes_moved=bytes_moved,
    flops=flops,
)


@cases(BENCH)
def test_nce(measure, case):
    measure(BENCH, case)
