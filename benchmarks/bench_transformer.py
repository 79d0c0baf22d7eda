"""Choices around attention, each against its alternative: forward and backward of whole modules, as they are trained.

block        a block as it is, and under torch.compile (which then fuses residual + LayerNorm, and bias + GELU)
progressive  a block on tokens that are dropped: gathered before it, or by attention through the index
packed       the modality-agnostic backbone: a pass for each modality, or one for all sequences packed together
"""

import copy
import functools

import torch
from torch.nn import functional as F

from benchmarks.bench_attention import kept_rows
from benchmarks.harness import FORWARD_BACKWARD, Bench, Checked, assert_close, cases, compiled, in_double, one_pass
from benchmarks.shapes import SHAPES
from vatt_engine import create_model
from vatt_engine.models.config import TransformerConfig
from vatt_engine.models.transformer import Block
from vatt_engine.ops import attention, drop_token
from vatt_engine.testing import randn


def block_inputs(shape, dtype, device):
    """Parameters are inputs, so that their gradients are made and compared; no dropout, whose masks would differ."""
    torch.manual_seed(0)
    block = Block(TransformerConfig(dim=shape.dim, ff_dim=shape.ff_dim, num_heads=shape.heads, dropout=0.0))
    block = block.to(device, dtype)
    parameters = {name: p.detach().requires_grad_() for name, p in block.named_parameters()}
    x = randn(shape.batch, shape.tokens, shape.dim, dtype=dtype, device=device).requires_grad_()
    return {"x": x, "block": block} | parameters


def eager(_shape, x, block, **parameters):
    return torch.func.functional_call(block, parameters, (x,))


def gathered_first(shape, x, block, **parameters):
    return eager(shape, drop_token(x, kept_rows(shape, x.device)), block, **parameters)


def through_the_index(shape, x, block, **parameters):
    """q, k and v of all tokens; attention reads the rows that stay, the residual is gathered."""
    keep, weight = kept_rows(shape, x.device), parameters
    norm = F.layer_norm(x, (shape.dim,), weight["attention_norm.weight"], weight["attention_norm.bias"], 1e-6)
    qkv = F.linear(norm, weight["attention.qkv.weight"], weight["attention.qkv.bias"])
    y = attention(qkv.view(*x.shape[:2], 3, shape.heads, -1), keep=keep).transpose(1, 2).flatten(2)
    y = drop_token(x, keep) + F.linear(y, weight["attention.out.weight"], weight["attention.out.bias"])
    norm = F.layer_norm(y, (shape.dim,), weight["ff_norm.weight"], weight["ff_norm.bias"], 1e-6)
    hidden = F.gelu(F.linear(norm, weight["ff_in.weight"], weight["ff_in.bias"]))
    return y + F.linear(hidden, weight["ff_out.weight"], weight["ff_out.bias"])


def block_flops(shape, _dtype, _passes):
    linear = 2 * shape.rows * (4 * shape.dim**2 + 2 * shape.dim * shape.ff_dim)
    return 3 * (linear + 4 * shape.pairs * shape.dim)


def block_bytes(shape, dtype, _passes):
    """Weights read twice and their gradients written; x and dy read, y and dx written."""
    weights = 4 * shape.dim**2 + 2 * shape.dim * shape.ff_dim
    return dtype.itemsize * (3 * weights + 4 * shape.rows * shape.dim)


def bench(name, rivals):
    return Bench(
        name=name,
        rivals=rivals,
        inputs=block_inputs,
        exact=next(iter(rivals.values())),
        bytes_moved=block_bytes,
        flops=block_flops,
        passes=(FORWARD_BACKWARD,),
    )


BLOCK = bench("block", {"eager": eager, **compiled("compiled", eager)})
PROGRESSIVE = bench("progressive", {"gathered first": gathered_first, "through the index": through_the_index})


def packed_inputs(shape, dtype, device):
    torch.manual_seed(0)
    still = {"position": {"dropout": 0.0}}
    shared = {"num_layers": shape.layers, "dropout": 0.0}
    model = create_model(shape.model, video=still, audio=still, text=still | {"vocabulary_size": 1000}, shared=shared)
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (shape.batch, 32, 224, 224, 3), generator=generator, dtype=torch.uint8)
    words = torch.randint(1, 1000, (shape.batch * shape.candidates, 16), generator=generator)
    audio = randn(shape.batch, 153_600, seed=1).clamp(-1, 1)
    signals = {"video": video.to(device), "audio": audio.to(device), "text": words.to(device)}
    return {"signals": signals, "backbone": model.backbone.to(device).train(), "dtype": dtype}


def backbone_step(shape, signals, backbone, dtype, *, packed):
    """Pooled features of all modalities; the gradients of a fixed function of them are left in the parameters."""
    backbone.zero_grad(set_to_none=True)
    half = dtype == torch.bfloat16
    with torch.autocast(signals["video"].device.type, torch.bfloat16, enabled=half):
        found = backbone.pooled(signals, seeds={"video": 1, "audio": 2}, packed=packed)
    y = torch.cat([x.flatten().to(torch.promote_types(x.dtype, torch.float32)) for x in found.values()])
    (y * randn(y.numel(), seed=3).to(y)).sum().backward()
    return y.detach()


def check_packed(bench, case, given):
    """Features and all gradients against three passes in float64."""
    names = ["y", *(name for name, p in given["backbone"].named_parameters() if p.requires_grad)]

    def results(function, backbone, signals, dtype):
        y = function(SHAPES[case.op][case.device][case.shape], signals, backbone, dtype)
        # Under autocast gradients are float32 sums of products of halves: they have the halves' digits.
        low = torch.bfloat16 if dtype == torch.bfloat16 else y.dtype
        return [x.to(low) for x in (y, *(p.grad for p in backbone.parameters() if p.requires_grad))]

    first = next(iter(bench.rivals.values()))
    exact = results(first, copy.deepcopy(given["backbone"]).double(), in_double(given["signals"]), torch.float64)
    checked = Checked({}, {}, {})
    for name, function in bench.rivals.items():
        try:
            assert_close(names, results(function, **given), exact)
        except AssertionError as error:
            checked.failed[name] = str(error)
            continue
        checked.calls[name] = one_pass(function, SHAPES[case.op][case.device][case.shape], given, "step")
    return checked


PACKED = Bench(
    name="packed",
    rivals={
        "three passes": functools.partial(backbone_step, packed=False),
        "packed": functools.partial(backbone_step, packed=True),
    },
    inputs=packed_inputs,
    check=check_packed,
    bytes_moved=lambda shape, dtype, _passes: 3 * dtype.itemsize * shape.weights,
    flops=lambda shape, *_: shape.flops,
    passes=("step",),
    dtypes={"cpu": ("fp32",), "cuda": ("bf16",)},
)


@cases(BLOCK)
def test_block(measure, case):
    measure(BLOCK, case)


@cases(PROGRESSIVE)
def test_progressive(measure, case):
    measure(PROGRESSIVE, case)


@cases(PACKED)
def test_packed(measure, case):
    measure(PACKED, case)
