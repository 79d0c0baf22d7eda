"""tokenize_video: uint8 read once and kept patches only, against Conv3d over the float clip and against a gather first.

y[b, 0] = agg,  y[b, 1 + k] = weight @ patch(video[b], keep[k]) + bias + pos[keep[k]]
"""

import torch
from torch.nn import functional as F

from benchmarks.harness import FORWARD_BACKWARD, Bench, cases, compiled
from vatt_engine.ops import tokenize_video
from vatt_engine.testing import Sum, randn


def inputs(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    clip = (shape.batch, shape.frames, shape.size, shape.size, 3)
    tensors = {
        "weight": randn(shape.dim, shape.patch_size, seed=1, dtype=dtype).div_(shape.patch_size**0.5),
        "bias": randn(shape.dim, seed=2, dtype=dtype),
        "pos": randn(shape.tokens, shape.dim, seed=3, dtype=dtype),
        "agg": randn(shape.dim, seed=4, dtype=dtype),
        "video": torch.randint(0, 256, clip, generator=generator, dtype=torch.uint8),
        "keep": torch.randperm(shape.tokens, generator=generator)[: shape.kept],
    }
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}


def op(shape, video, weight, bias, pos, agg, keep):
    return tokenize_video(video, weight, bias, pos=pos, agg=agg, keep=keep, patch=shape.patch)


def conv3d(shape, video, weight, bias, pos, agg, keep):
    """The eager way of other projects: the whole clip as float, every token projected, half of them dropped."""
    scaled = (video.float() * 2 / 255 - 1).to(weight.dtype).permute(0, 4, 1, 2, 3)
    kernel = weight.view(len(weight), *shape.patch, 3).permute(0, 4, 1, 2, 3)
    tokens = F.conv3d(scaled, kernel, bias, stride=shape.patch).flatten(2).mT + pos
    return torch.cat([agg.expand(len(video), 1, -1), tokens[:, keep]], dim=1)


def gather_first(shape, video, weight, bias, pos, agg, keep):
    """The best that plain PyTorch does: kept patches are gathered as bytes, scaled, and given to the library's GEMM."""
    (grid_t, grid_h, grid_w), (t, h, w) = shape.grid, shape.patch
    cells = video.view(-1, grid_t, t, grid_h, h, grid_w, w, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
    sample = torch.arange(len(video), device=video.device)[:, None]
    patches = cells[sample, keep // (grid_h * grid_w), keep // grid_w % grid_h, keep % grid_w].flatten(2)
    tokens = F.linear(patches.to(weight.dtype) * 2 / 255 - 1, weight, bias) + pos[keep]
    return torch.cat([agg.expand(len(video), 1, -1), tokens], dim=1)


def bytes_moved(shape, dtype, passes):
    """Kept pixels and parameters read, tokens written; backward reads pixels and gradients, writes the parameters'."""
    pixels = shape.batch * shape.kept * shape.patch_size
    tokens = shape.batch * (shape.kept + 1) * shape.dim * dtype.itemsize
    weight, vectors = shape.dim * shape.patch_size * dtype.itemsize, 2 * shape.dim * dtype.itemsize
    position = shape.dim * dtype.itemsize
    forward = pixels + weight + vectors + shape.kept * position + tokens
    backward = pixels + tokens + weight + vectors + shape.tokens * position
    return forward + (backward if passes == FORWARD_BACKWARD else 0)


def sums(shape, name):
    """A token adds up its patch, bias and position; a parameter's gradient the tokens."""
    return [Sum(shape.patch_size + 2 if name == "y" else shape.batch * (shape.kept + 1))]


def flops(shape, _dtype, passes):
    """The projection of kept patches; backward, the weight's gradient, is as much again."""
    product = 2 * shape.batch * shape.kept * shape.patch_size * shape.dim
    return product * (2 if passes == FORWARD_BACKWARD else 1)


BENCH = Bench(
    name="tokenize",
    stem="tokenize",
    op=op,
    rivals={
        "eager Conv3d": conv3d,
        "gather-first": gather_first,
        **compiled("gather-first compiled", gather_first),
    },
    inputs=inputs,
    exact=gather_first,
    sums=sums,
    bytes_moved=bytes_moved,
    flops=flops,
    metrics=lambda shape, _dtype, seconds: {"us/clip": seconds / shape.batch * 1e6},
)


@cases(BENCH)
def test_tokenize(measure, case):
    measure(BENCH, case)
