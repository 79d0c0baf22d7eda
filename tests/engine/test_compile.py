"""torch.compile in each mode trains as without it, and what CUDA graphs write over has been copied before."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, get_args

import pytest
import torch
from test_engine import Rows
from torch import Tensor, nn

from vatt_engine.engine import Engine, EngineConfig, OptimConfig, ScheduleConfig
from vatt_engine.engine.config import Compile
from vatt_engine.testing import Sum, assert_same_sums

MODES = [mode for mode in get_args(Compile) if mode != "off"]


class Terms(NamedTuple):
    total: Tensor


class Net(nn.Module):
    """Two layers, what they see of a row drawn from the seed, and a BatchNorm over the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 5), nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, batch: Rows, *, seed: int | Tensor) -> Tensor:
        return self.heads(**self.features(batch, seed=seed))

    def features(self, batch: Rows, *, seed: int | Tensor) -> dict[str, Tensor | None]:
        kept = (seed + torch.arange(6)) % 3 > 0
        return {"x": self.second(torch.tanh(self.first(batch.x * kept))), "absent": None}

    def heads(self, x: Tensor, absent: None) -> Tensor:
        return self.norm(x)

    def compile_layers(self) -> None:
        self.first.compile()
        self.second.compile()


class Graph(torch.autograd.Function):
    """`second(tanh(first(x)))` as a CUDA graph gives it: the same memory for outputs and gradients at each replay."""

    memory: ClassVar[dict[str, Tensor]] = {}

    @classmethod
    def written(cls, name: str, value: Tensor) -> Tensor:
        """A new tensor on old memory."""
        cls.memory.setdefault(f"{name} {tuple(value.shape)}", value.clone()).copy_(value)
        return cls.memory[f"{name} {tuple(value.shape)}"].detach()

    @staticmethod
    def forward(ctx, x, *weights):
        with torch.enable_grad():
            ctx.inputs = [w.detach().requires_grad_() for w in weights]
            ctx.output = nn.functional.linear(torch.tanh(nn.functional.linear(x, *ctx.inputs[:2])), *ctx.inputs[2:])
        return Graph.written("output", ctx.output.detach())

    @staticmethod
    def backward(ctx, gradient):
        gradients = torch.autograd.grad(ctx.output, ctx.inputs, gradient)
        return None, *(Graph.written(f"gradient {index}", value) for index, value in enumerate(gradients))


def product(outputs: Tensor, batch: Rows) -> Terms:
    return Terms((outputs * batch.x[:, :4]).square().mean())


def train(net: nn.Module, compiled: str, parts: int, *, replace: bool = False) -> dict[str, Tensor]:
    """The state after three steps on seven rows."""
    torch.manual_seed(0)
    config = EngineConfig(device="cpu", accumulate=parts, compile=compiled)
    engine = Engine(net, product, config, OptimConfig(name="sgd", lr=0.1), ScheduleConfig(warmup_steps=0))
    if replace:
        first, second = net.first, net.second
        weights = [first.weight, first.bias, second.weight, second.bias]
        engine.trained.compute = lambda batch, seed: {
            "x": Graph.apply(batch.x * ((seed + torch.arange(6)) % 3 > 0), *weights),
            "absent": None,
        }
    for step in range(3):
        engine.step(Rows(torch.randn(7, 6, generator=torch.Generator().manual_seed(step))))
    return {name: value.clone() for name, value in net.state_dict().items()}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_as_without_it(mode, parts):
    torch.compiler.reset()
    expected, found = train(net(), "off", parts), train(net(), mode, parts)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
def test_what_a_replay_writes_over_has_been_copied(parts):
    expected = train(net(), "off", parts)
    found = train(net(), "reduce-overhead", parts, replace=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    if parts > 1:
        broken = train(net(), "default", parts, replace=True)
        assert not torch.allclose(broken["first.weight"], expected["first.weight"], rtol=1e-3)


def test_the_same_masks_in_both_passes():
    """Dropout of the pass without a graph is that of the pass with one, or cached gradients would be another step's."""
    torch.compiler.reset()
    drop = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.GELU(), nn.Linear(6, 6), nn.Dropout(0.3)).train()
    compiled, x, found = torch.compile(drop), torch.randn(9, 6), []
    for grad in (False, True):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            found.append(compiled(x).detach())
    assert_same_sums(*found, Sum(2 * 6))  # compiled twice
    torch.manual_seed(2)
    assert not torch.equal(compiled(x), found[0])


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_config_refuses(strategy):
    with pytest.raises(ValueError, match="EngineConfig: compile must not be reduce-overhead with zero"):
        EngineConfig(compile="reduce-overhead", strategy=strategy)
    with pytest.raises(ValueError, match=r"EngineConfig: compile must be one of off, .* got 'max-autotune'"):
        EngineConfig(compile="max-autotune")
