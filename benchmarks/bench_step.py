"""One pre-training step of a whole model on synthetic clips: forward, loss, backward, optimizer.

FLOPs of a step are the usual ones behind MFU, those of `vatt_engine.analysis.flops`: every product on the tokens that
DropToken keeps, backward twice forward, nothing for the loss and for what is computed twice.
"""

import functools

import torch

from benchmarks import machine
from benchmarks.harness import Bench, Checked, cases, one_pass
from vatt_engine import Batch, VATTLoss, create_model
from vatt_engine.analysis.flops import step_flops
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


def flops(shape, _dtype, _passes):
    return step_flops(model_config(shape.model), shape.batch, candidates=shape.candidates).model


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
