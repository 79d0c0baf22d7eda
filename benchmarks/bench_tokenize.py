"""tokenize_video, forward and backward: uint8 read once, kept patches only, against Conv3d over the float clip."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from vatt_engine.dispatch import available_impls, use_impl
from vatt_engine.ops import tokenize_video
from vatt_engine.testing import assert_within_budget, impls_of, randn


@dataclass(frozen=True)
class Shape:
    batch: int
    frames: int
    size: int
    dim: int
    kept: int
    patch: tuple[int, int, int] = (4, 16, 16)


SHAPES = {"demo": Shape(16, 8, 48, 128, 9), "base": Shape(4, 32, 224, 768, 784)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    clip = (shape.batch, shape.frames, shape.size, shape.size, 3)
    t, h, w = shape.patch
    tokens = (shape.frames // t) * (shape.size // h) * (shape.size // w)
    video = torch.randint(0, 256, clip, generator=generator, dtype=torch.uint8)
    keep = torch.randperm(tokens, generator=generator)[: shape.kept]
    weight = randn(shape.dim, 3 * t * h * w, seed=1, dtype=dtype).div_((3 * t * h * w) ** 0.5)
    bias = randn(shape.dim, seed=2, dtype=dtype)
    return [tensor.to(device) for tensor in (video, keep, weight, bias)]


def conv3d(video, keep, weight, bias, patch):
    """The eager way of other projects: the whole clip as float, every token projected, half of them dropped."""
    scaled = (video.to(weight.dtype) * 2 / 255 - 1).permute(0, 4, 1, 2, 3)
    kernel = weight.view(len(weight), *patch, 3).permute(0, 4, 1, 2, 3)
    return F.conv3d(scaled, kernel, bias, stride=patch).flatten(2).mT[:, keep]


def implementation(name):
    def tokenize(video, keep, weight, bias, patch):
        with use_impl(tokenize=name):
            return tokenize_video(video, weight, bias, keep=keep, patch=patch)

    return tokenize


def check(name, provider, video, keep, weight, bias, patch):
    """Ours inside the error budget; a peer in float64, since how it rounds below that is not ours to judge."""
    reference = implementation("reference")
    exact = reference(video, keep, weight.double(), bias.double(), patch)
    if name in available_impls("tokenize", video.device.type):
        actual = provider(video, keep, weight, bias, patch)
        assert_within_budget(actual, reference(video, keep, weight, bias, patch), exact, name=name)
    else:
        torch.testing.assert_close(provider(video, keep, weight.double(), bias.double(), patch), exact)


PROVIDERS = [(name, device, implementation(name)) for name, device in impls_of("tokenize")]
PROVIDERS += [("conv3d", device, conv3d) for device in dict.fromkeys(device for _, device in impls_of("tokenize"))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "device", "provider"), PROVIDERS, ids=[f"{n}-{d}" for n, d, _ in PROVIDERS])
def test_tokenize_video(benchmark, name, device, provider, shape, dtype):
    benchmark.group = f"tokenize {shape} {dtype} {device}"
    shape = SHAPES[shape]
    video, keep, weight, bias = inputs(shape, DTYPES[dtype], device)
    weight.requires_grad_(), bias.requires_grad_()

    check(name, provider, video, keep, weight.detach(), bias.detach(), shape.patch)
    dy = randn(shape.batch, shape.kept, shape.dim, seed=3, dtype=weight.dtype, device=device)

    def step():
        provider(video, keep, weight, bias, shape.patch).backward(dy)
        weight.grad = bias.grad = None
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
