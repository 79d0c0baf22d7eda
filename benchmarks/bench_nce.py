"""nce and mil_nce, forward and backward: similarities by tiles against a stored matrix.

`pytest benchmarks/bench_nce.py`; a provider that is wrong fails before it is timed.
"""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from vatt_engine.dispatch import use_impl
from vatt_engine.ops import mil_nce
from vatt_engine.testing import assert_within_budget, impls_of, randn


@dataclass(frozen=True)
class Shape:
    batch: int
    candidates: int
    dim: int


SHAPES = {
    "demo": Shape(64, 5, 128),
    "video-audio": Shape(1024, 1, 512),
    "video-text": Shape(1024, 5, 256),
    "large": Shape(4096, 1, 512),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs(shape, dtype, device):
    video = randn(shape.batch, shape.dim, seed=1, dtype=dtype, device=device)
    return video, randn(shape.batch, shape.candidates, shape.dim, seed=2, dtype=dtype, device=device)


def naive(video, text):
    """The joint loss as one writes it down: normalise, one matrix, both directions side by side, autograd."""
    dtype = torch.promote_types(video.dtype, torch.float32)
    video, text = F.normalize(video.to(dtype), dim=-1), F.normalize(text.to(dtype), dim=-1)
    s = (video @ text.flatten(0, 1).T).view(len(video), len(text), -1) / 0.07
    both = torch.cat([s.flatten(1), s.transpose(0, 1).flatten(1)], dim=1)
    return (both.logsumexp(1) - s.diagonal().logsumexp(0)).mean()


def implementation(name):
    def loss(video, text):
        with use_impl(nce=name):
            return mil_nce(video, text, 0.07)

    return loss


PROVIDERS = [(name, device, implementation(name)) for name, device in impls_of("nce")]
PROVIDERS += [("naive", device, naive) for device in dict.fromkeys(device for _, device in impls_of("nce"))]


def gradients(provider, video, text):
    video, text = video.detach().requires_grad_(), text.detach().requires_grad_()
    return torch.autograd.grad(provider(video, text), (video, text))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "device", "provider"), PROVIDERS, ids=[f"{n}-{d}" for n, d, _ in PROVIDERS])
def test_nce(benchmark, name, device, provider, shape, dtype):
    benchmark.group = f"nce {shape} {dtype} {device}"
    video, text = inputs(SHAPES[shape], DTYPES[dtype], device)
    exact = gradients(naive, video.double(), text.double())
    reference = gradients(implementation("reference"), video, text)
    for actual, same_dtype, want in zip(gradients(provider, video, text), reference, exact):
        assert_within_budget(actual, same_dtype, want, name=name)

    def step():
        gradients(provider, video, text)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
