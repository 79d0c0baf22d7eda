"""One pre-training step of a whole model on synthetic clips, ours against those of benchmarks/peers.py.

FLOPs of a step are the usual ones behind MFU, those of `vatt_engine.analysis.flops`: every product on the tokens that
DropToken keeps, backward twice forward, nothing for the loss and for what is computed twice.
"""

import collections
import contextlib
import functools
import itertools
import math
import statistics
import time

import pytest
import torch

from benchmarks import machine, peers
from benchmarks.harness import Bench, Checked, assert_close, cases, one_pass
from benchmarks.shapes import SHAPES
from vatt_engine import Batch, VATTLoss
from vatt_engine.analysis.flops import step_flops
from vatt_engine.engine import Engine, EngineConfig, OptimConfig, ScheduleConfig
from vatt_engine.models import build_model, model_config
from vatt_engine.testing import randn

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # bf16: autocast, weights and optimizer in float32
DROPOUT_DRAWS = 5
PHASE_ROUNDS = 3
MARGIN = 0.01  # between a peer's parameters and FLOPs and ours
COMPARED = 2  # clips on which the plain peer must give our embeddings
STATE_BYTES = 12  # per parameter, float32: weight and two moments
ADAM_BYTES = 28  # per parameter, float32: weight, gradient and two moments read, all but the gradient written


def config_of(shape):
    """The named model at the shape's DropToken rate, and cut to its number of layers where it has one."""
    config = model_config(shape.model)
    changes = {f"{modality}.drop_token.keep_rate": shape.keep_rate for modality in ("video", "audio")}
    towers = ("shared",) if config.backbone == "agnostic" else (f"{m}.transformer" for m in ("video", "audio", "text"))
    for tower in towers if shape.layers else ():
        changes[f"{tower}.num_layers"] = shape.layers
    return model_config(shape.model, **changes)


def clips(shape, device):
    config = config_of(shape)
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, config.video.num_frames, *config.video.frame_size, 3)
    words = (shape.batch, shape.candidates, config.text.max_words)
    return Batch(
        video=torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device),
        audio=randn(shape.batch, config.audio.num_samples, seed=1, device=device).clamp(-1, 1),
        text=torch.randint(1, config.text.vocabulary_size, words, generator=generator).to(device),
    )


class StepLoss(VATTLoss):
    """VATTLoss as the engine calls it."""

    def forward(self, embeddings, batch):
        return super().forward(embeddings)


def engine(shape, dtype, device, *, compiled="off"):
    torch.manual_seed(0)
    model = build_model(config_of(shape))
    config = EngineConfig(precision=PRECISION[dtype], device=device, compile=compiled)
    return Engine(model, StepLoss(), config, OptimConfig(), ScheduleConfig())


def peer(shape, dtype, device, *, hf=False, compiled=False):
    """Another's step; the plain one has our weights. A cut model is compiled as a whole, a deep one layer by layer."""
    torch.manual_seed(0)
    config = config_of(shape)
    model = peers.PeerVATT(config, peers.HFEncoder if hf else peers.Encoder)
    if not hf:
        torch.manual_seed(0)
        model.load_state_dict(peers.plain_weights(build_model(config).state_dict(), config), strict=False)
    how = "no" if not compiled else "whole" if shape.layers else "layers"
    return peers.Peer(model, peers.clip_loss if hf else peers.naive_loss, dtype, device, compiled=how)


def inputs(shape, dtype, device):
    steppers = {name: make(shape, dtype, device) for name, make in STEPPERS.items()}
    if device == "cpu" and dtype != torch.float32:  # which many CPUs are slower at; peers are checked before ours
        steppers = {PLAIN_FP32: peer(shape, torch.float32, device)} | steppers
    return {"batch": clips(shape, device), "steppers": steppers}


def first_loss(engine, batch, draw):
    """Of the weights as they are, under one draw of the dropout masks; DropToken keeps the same tokens."""
    torch.manual_seed(draw)
    with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.config.precision == "bf16"):
        embeddings = engine.module(batch, seed=0)
    return engine.loss(embeddings, batch).total.item()


def check(_bench, case, given):
    """Who may be timed.

    Ours compiled: its mean loss over a few dropout masks may be off eager's by five deviations of the difference, plus
    half of the digits; a model without dropout has but that. The plain peer, compiled or not, has our weights: it must
    give our embeddings of two clips in evaluation mode, to half of the digits. Every peer: parameters and FLOPs within
    1 % of ours, without the FLOPs of the tokens that it makes and drops.
    """
    checked = Checked({}, {}, {})
    shape, steppers = SHAPES[case.op][case.device][case.shape], given["steppers"]
    for name, stepper in steppers.items():
        try:
            fault = own_fault(name, given) if isinstance(stepper, Engine) else peer_fault(name, shape, given)
        except torch.OutOfMemoryError as error:
            checked.refused[name] = str(error)
            continue
        if fault:
            checked.failed[name] = fault
        else:
            checked.calls[name] = one_pass(RIVALS[name], shape, given, "step")
    for name in [*checked.calls, *checked.calls]:  # twice: the first to step had the moments of the others to come
        try:
            checked.calls[name]()
        except torch.OutOfMemoryError as error:
            checked.refused[name] = str(error)
    calls = {name: call for name, call in checked.calls.items() if name not in checked.refused}
    return checked._replace(calls=calls)


def own_fault(name, given):
    """Why a compiled form of ours is not what eager is, or None."""
    if name == OURS:
        return None
    steppers, draws = (given["steppers"][OURS], given["steppers"][name]), range(DROPOUT_DRAWS)
    eager, compiled = ([first_loss(stepper, given["batch"], draw) for draw in draws] for stepper in steppers)
    half = steppers[0].config.precision == "bf16"
    digits = torch.finfo(torch.bfloat16 if half else torch.float32).eps ** 0.5
    deviation = math.sqrt((statistics.variance(eager) + statistics.variance(compiled)) / DROPOUT_DRAWS)
    allowed = 5 * deviation + digits * max(map(abs, eager))
    means = statistics.mean(compiled), statistics.mean(eager)
    if abs(means[0] - means[1]) <= allowed:
        return None
    return f"the first loss is {means[0]:.6g} in the mean, eager's {means[1]:.6g}, allowed {allowed:.3g} apart"


def peer_fault(name, shape, given):
    """Why a peer does not do what ours does, or None."""
    ours, stepper = given["steppers"][OURS], given["steppers"][name]
    sizes = [sum(p.numel() for p in module.parameters()) for module in (stepper.model, ours.module)]
    config = config_of(shape)
    counted = peers.counted_flops(stepper.model, config, shape.candidates) - peers.wasted_flops(
        config, shape.candidates
    )
    counts = (counted, flops(shape, None, None) / shape.batch)
    for what, (other, own) in (("parameters", sizes), ("FLOPs per clip", counts)):
        if abs(other / own - 1) > MARGIN:
            return f"{other:.4g} {what}, ours {own:.4g}: more than {MARGIN:.0%} apart"
    if "plain" not in name:
        return None
    two = Batch(**{field: value[:COMPARED] for field, value in given["batch"].tensors().items()})
    ours.module.eval(), stepper.model.eval()
    with torch.no_grad(), torch.autocast(ours.device.type, torch.bfloat16, enabled=stepper.half):
        own, other = ours.module(two), stepper.call(two)
    ours.module.train(), stepper.model.train()
    try:
        exact = (own.video_audio, own.audio_video, own.video_text, own.text_video)
        assert_close(["video_audio", "audio_video", "video_text", "text_video"], other, exact)
    except AssertionError as error:
        return str(error)
    return None


def flops(shape, _dtype, _passes):
    return step_flops(config_of(shape), shape.batch, candidates=shape.candidates).model


@functools.cache
def num_parameters(shape):
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config_of(shape)).parameters())


def metrics(shape, dtype, seconds):
    peak = machine.datasheet_rate(dtype) if torch.cuda.is_available() else None
    # What a call takes on top does not hold weights and moments, which are there before it.
    found = {"clips/s": shape.batch / seconds, "state MiB": STATE_BYTES * num_parameters(shape) / 2**20}
    return found | ({"% MFU": 100 * flops(shape, dtype, "step") / seconds / peak} if peak else {})


class Marks:
    """The times at which the phases of a step end, on the device's own clock."""

    def __init__(self, device):
        self.cuda, self.times = device == "cuda", []

    def __call__(self, phase):
        event = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            event.record()
        self.times.append((phase, event))

    def milliseconds(self):
        if self.cuda:
            torch.cuda.synchronize()
        found = collections.Counter()  # adds up: an optimizer that calls its base's step tells its end twice
        for (_, a), (phase, b) in itertools.pairwise(self.times):
            found[phase] += a.elapsed_time(b) if self.cuda else 1e3 * (b - a)
        return found


def phases(case, name, given):
    """Milliseconds of each phase, medians, of steps on a batch in the host's memory.

    `data` is its way to the device; `backward` of ours holds the gradients' norm, on which a step that is not finite is
    skipped. The phases of a step add up to more than its median where the host is slower than the GPU: nothing here
    runs ahead of it.
    """
    stepper, pinned = given["steppers"][name], case.device == "cuda"
    host = {field: value.cpu() for field, value in given["batch"].tensors().items()}
    batch = Batch(**{field: value.pin_memory() if pinned else value for field, value in host.items()})
    rounds = []
    for _ in range(PHASE_ROUNDS):
        mark = Marks(case.device)
        mark("start")
        if isinstance(stepper, Engine):
            with hooked(stepper, mark):
                run(stepper, batch)
        else:
            run(stepper, batch, mark)
        rounds.append(mark.milliseconds())
    return {f"{phase} ms": statistics.median(one[phase] for one in rounds) for phase in rounds[0]}


@contextlib.contextmanager
def hooked(engine, mark):
    """The engine tells `mark` the end of each phase."""
    hooks = [
        engine.trained.register_forward_pre_hook(lambda *_: mark("data")),
        engine.loss.register_forward_pre_hook(lambda *_: mark("forward")),
        engine.loss.register_forward_hook(lambda *_: mark("loss")),
        engine.strategy.optimizer.register_step_pre_hook(lambda *_: mark("backward")),
        engine.strategy.optimizer.register_step_post_hook(lambda *_: mark("optimizer")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run(stepper, batch, *mark):
    """One step; its gradients do not stay, since five steppers share the memory."""
    if isinstance(stepper, Engine):
        out, owner = stepper.step(batch).terms, stepper.trained
    else:
        out, owner = stepper.step(batch, *mark), stepper.model
    owner.zero_grad(set_to_none=True)
    return out


def provider(name):
    return lambda _shape, batch, steppers: run(steppers[name], batch)


OURS, PLAIN_FP32 = "ours", "plain, fp32"
STEPPERS = {
    "plain": peer,
    "plain compiled": functools.partial(peer, compiled=True),
    **({"hf": functools.partial(peer, hf=True)} if peers.HAS_HF else {}),
    OURS: engine,
    "ours, layers compiled": functools.partial(engine, compiled="layers"),
}
RIVALS = {name: provider(name) for name in (*STEPPERS, PLAIN_FP32)}
BENCH = Bench(
    name="step",
    rivals=RIVALS,
    inputs=inputs,
    check=check,
    bytes_moved=lambda shape, *_: ADAM_BYTES * num_parameters(shape),
    flops=flops,
    passes=("step",),
    dtypes={"cpu": ("fp32", "bf16"), "cuda": ("bf16",)},
    metrics=metrics,
    columns=phases,
)


@pytest.mark.timeout(1800)
@cases(BENCH)
def test_step(measure, case):
    measure(BENCH, case)
