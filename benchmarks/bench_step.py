"""One pre-training step of a whole model on synthetic clips: forward, loss, backward, optimizer.

Model FLOPs of a step, the usual count behind MFU: per encoder of L layers, width d, inner = heads * head_dim,
feed-forward f and n tokens (AGG included),

    forward = L (2 n (4 d inner + 2 d f) + 4 n^2 inner) + projections before and behind it,  backward = 2 forward

and 2 K P d each for the projection of K kept patches of P elements and for its weight's gradient (pixels need none).
Heads and loss, under a thousandth of it, and the recomputation of anything are not counted.
"""

import functools
import math

import torch

from benchmarks import machine
from benchmarks.harness import Bench, Checked, cases, one_pass
from vatt_engine import Batch, VATTLoss, create_model
from vatt_engine.engine import Engine, EngineConfig, OptimConfig, ScheduleConfig
from vatt_engine.models import model_config
from vatt_engine.models.transformer import Block
from vatt_engine.testing import randn

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # bf16: autocast, weights and optimizer in float32
DROPOUT_DRAWS = 5
STATE_BYTES = 12  # per parameter, float32: weight and two moments
ADAM_BYTES = 28  # per parameter, float32: weight, gradient and two moments read, all but the gradient written


def clips(shape, device):
    config = model_config(shape.model)
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, config.video.num_frames, *config.video.frame_size, 3)
    words = (shape.batch, shape.candidates, config.text.max_words)
    return Batch(
        video=torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device),
        audio=randn(shape.batch, config.audio.num_samples, seed=1, device=device).clamp(-1, 1),
        text=torch.randint(1, config.text.vocabulary_size, words, generator=generator).to(device),
    )


def engine(shape, dtype, device, *, compiled):
    torch.manual_seed(0)
    model = create_model(shape.model)
    for block in model.modules() if compiled else ():
        if isinstance(block, Block):  # all layers of a tower share what is compiled; the whole model takes minutes
            block.compile(dynamic=False)
    loss = VATTLoss()
    return Engine(
        model,
        lambda embeddings, batch: loss(embeddings),
        EngineConfig(precision=PRECISION[dtype], device=device),
        OptimConfig(),
        ScheduleConfig(),
    )


def inputs(shape, dtype, device):
    engines = {name: engine(shape, dtype, device, compiled=name == COMPILED) for name in RIVALS}
    return {"batch": clips(shape, device), "engines": engines}


def first_loss(engine, batch, draw):
    """Of the weights as they are, under one draw of the dropout masks; DropToken keeps the same tokens."""
    torch.manual_seed(draw)
    with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.config.precision == "bf16"):
        embeddings = engine.module(batch, seed=0)
    return engine.loss(embeddings, batch).total.item()


def check(_bench, case, given):
    """A compiled step's loss may be as far from eager's as eager's own losses under other dropout masks are apart.

    Plus one rounding; a model without dropout has but that.
    """
    eager = [first_loss(given["engines"]["eager"], given["batch"], draw) for draw in range(DROPOUT_DRAWS)]
    rounding = torch.finfo(torch.bfloat16 if case.dtype == "bf16" else torch.float32).eps * max(map(abs, eager))
    allowed = max(eager) - min(eager) + rounding
    checked = Checked({}, {}, {})
    for name, step in RIVALS.items():
        loss = first_loss(given["engines"][name], given["batch"], 0)
        if not abs(loss - eager[0]) <= allowed:
            checked.failed[name] = f"the first loss is {loss:.6g}, eager's {eager[0]:.6g}, allowed {allowed:.3g} apart"
        else:
            checked.calls[name] = one_pass(step, None, given, "step")
    return checked


def encoder_flops(config, tokens):
    """Forward FLOPs of one sequence through the blocks of a TransformerConfig."""
    inner = config.num_heads * config.head_dim
    linear = 2 * tokens * (4 * config.dim * inner + 2 * config.dim * config.ff_dim)
    return config.num_layers * (linear + 4 * tokens**2 * inner)


def flops(shape, _dtype, _passes):
    config = model_config(shape.model)
    agnostic = config.backbone == "agnostic"
    total = 0
    for tower, channels in ((config.video, 3), (config.audio, 1)):
        kept = tower.drop_token.num_kept(math.prod(tower.grid))
        transformer = config.shared if agnostic else tower.transformer
        around = (transformer.dim if tower.pre_projection else 0) * transformer.dim * kept
        behind = config.shared_projection if agnostic else tower.post_projection
        around += behind * transformer.dim * (kept + 1)
        patches = kept * channels * math.prod(tower.patch) * transformer.dim
        total += 3 * (encoder_flops(transformer, kept + 1) + 2 * around) + 2 * 2 * patches
    transformer = config.shared if agnostic else config.text.transformer
    words = config.text.max_words + 1
    around = config.text.embedding_dim + (config.shared_projection if agnostic else 0)
    text = encoder_flops(transformer, words) + 2 * words * around * transformer.dim
    return shape.batch * (total + 3 * shape.candidates * text)


@functools.cache
def num_parameters(model):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(model).parameters())


def metrics(shape, dtype, seconds):
    peak = machine.datasheet_rate(dtype) if torch.cuda.is_available() else None
    # What a call takes on top does not hold weights and moments, which are there before it.
    found = {"samples/s": shape.batch / seconds, "state MiB": STATE_BYTES * num_parameters(shape.model) / 2**20}
    return found | ({"% MFU": 100 * flops(shape, dtype, "step") / seconds / peak} if peak else {})


def provider(name):
    return lambda _shape, batch, engines: engines[name].step(batch).terms


COMPILED = "blocks compiled"
RIVALS = {name: provider(name) for name in ("eager", COMPILED)}
BENCH = Bench(
    name="step",
    rivals=RIVALS,
    inputs=inputs,
    check=check,
    bytes_moved=lambda shape, *_: ADAM_BYTES * num_parameters(shape.model),
    flops=flops,
    passes=("step",),
    dtypes={"cpu": ("fp32", "bf16"), "cuda": ("bf16",)},
    metrics=metrics,
)


@cases(BENCH)
def test_step(measure, case):
    measure(BENCH, case)
