"""CUDA graphs of vatt_tiny: a whole training step in one, and the backbones as `engine.compile` replays them."""

from __future__ import annotations

import copy

import pytest
import torch

from vatt_engine import Batch, VATTLoss, create_model
from vatt_engine.engine import Engine, EngineConfig, OptimConfig, ScheduleConfig, build_optimizer
from vatt_engine.testing import randn

pytestmark = pytest.mark.cuda
STEPS = 3


def clips(step, device):
    draw = torch.Generator().manual_seed(step)
    return Batch(
        video=torch.randint(0, 256, (4, 8, 48, 48, 3), generator=draw, dtype=torch.uint8).to(device),
        audio=randn(4, 9600, seed=step, device=device).clamp(-1, 1),
        text=torch.randint(1, 1024, (4, 5, 16), generator=draw).to(device),
        text_mask=torch.tensor([True, False, True, True], device=device),
    )


def step_of(model, optimizer, batch, seed):
    """A step on whatever `batch` and `seed` hold when it runs. SGD: its update has no count that the host keeps."""
    loss = VATTLoss()

    def step():
        loss(model(batch, seed=seed), text_mask=batch.text_mask).total.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("device", ["cuda"])
def test_a_training_step_can_be_captured(device):
    """Replayed on new clips and seeds it does what the eager step does, to float32's half digits."""
    torch.manual_seed(0)
    model = create_model("vatt_tiny").to(device).train()
    eager = copy.deepcopy(model)
    first = copy.deepcopy(model.state_dict())
    config = OptimConfig(name="sgd", lr=0.05)
    batch, seed = clips(0, device), torch.zeros((), dtype=torch.int64, device=device)

    optimizer = build_optimizer(model.named_parameters(), config)
    step = step_of(model, optimizer, batch, seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at the first call is made outside the graph
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    model.load_state_dict(first)
    for state in optimizer.state.values():
        state["velocity"].zero_()
    other = build_optimizer(eager.named_parameters(), config)
    for n in range(STEPS):
        given = clips(n, device)
        for name, tensor in given.tensors().items():
            batch.tensors()[name].copy_(tensor)
        seed.fill_(n)
        for parameter in model.parameters():  # the graph adds to the gradients it has made
            if parameter.grad is not None:
                parameter.grad.zero_()
        graph.replay()
        other.zero_grad(set_to_none=True)
        step_of(eager, other, given, seed)()
    for (name, got), want in zip(model.state_dict().items(), eager.state_dict().values()):
        error, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
        eps = torch.finfo(torch.float32).eps
        rest = eps * got.numel() ** 0.5  # BatchNorm hides a shift: of its gradient rounding alone is left
        assert error <= eps**0.5 * size + rest, name


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("parts", [1, 2])
def test_cuda_graphs_train_as_eager_code_does(device, parts):
    """vatt_tiny, four steps: the first record the graphs, the others replay them; none was left out."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses, states = [], []
    for mode in ("off", "reduce-overhead"):
        torch.manual_seed(0)
        model = create_model("vatt_tiny")
        config = EngineConfig(device=device, accumulate=parts, compile=mode, strategy="single")
        optim, schedule = OptimConfig(name="sgd", lr=1e-3), ScheduleConfig(warmup_steps=0)
        engine = Engine(model, lambda embeddings, _: VATTLoss()(embeddings), config, optim, schedule)
        losses.append([engine.step(clips(step, device)).terms["total"].item() for step in range(4)])
        states.append(engine.strategy.export_state()["model"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, expected in states[0].items():
        error = (states[1][name].double() - expected.double()).norm()
        assert error <= torch.finfo(torch.float32).eps ** 0.5 * expected.double().norm() + 1e-7, name
    assert counters["inductor"]["cudagraph_skips"] == 0
