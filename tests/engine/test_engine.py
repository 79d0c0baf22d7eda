"""The step is the formula it says, skips what is not finite, and resumes bit for bit."""

from __future__ import annotations

import random
import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from vatt_engine.engine.checkpoint import CheckpointError, load_latest
from vatt_engine.engine.engine import Engine, EngineConfig
from vatt_engine.engine.faults import TrainingStopped
from vatt_engine.engine.optim import OptimConfig
from vatt_engine.engine.schedule import ScheduleConfig
from vatt_engine.engine.seeds import derive_seed, random_state, set_random_state

OPTIM = OptimConfig(lr=1e-2)
SCHEDULE = ScheduleConfig(final=1e-3, warmup_steps=3, total_steps=12)


class Rows(NamedTuple):
    """A batch of [B, D] rows."""

    x: Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(self.x.to(device))

    def split(self, num_parts: int) -> list[Rows]:
        return [Rows(x) for x in self.x.tensor_split(num_parts)]

    def __len__(self) -> int:
        return len(self.x)


class Terms(NamedTuple):
    total: Tensor
    square: Tensor


class Toy(nn.Module):
    """Everything whose state must survive: running statistics, dropout, randomness from the seed, tied weights."""

    def __init__(self, *, dropout: float = 0.5):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(dropout)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, batch: Rows, *, seed: int) -> Tensor:
        return self.heads(**self.features(batch, seed=seed))

    def features(self, batch: Rows, *, seed: int) -> dict[str, Tensor | None]:
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
        return {"x": self.drop(self.second(self.first(batch.x[:, order]))), "absent": None}

    def heads(self, x: Tensor, absent: None) -> Tensor:
        return self.norm(x)


class Loss(nn.Module):
    """Mean square times a learnable (1,) scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, outputs: Tensor, batch: Rows) -> Terms:
        square = (outputs - batch.x).square().mean()
        return Terms(total=square * self.scale.square().sum(), square=square)


def plain_loss(outputs: Tensor, batch: Rows) -> Terms:
    square = (outputs - batch.x).square().mean()
    return Terms(total=square, square=square)


def rows(step: int, size: int = 8) -> Rows:
    """The data of one step, a function of its place in the run alone."""
    return Rows(torch.randn(size, 4, generator=torch.Generator().manual_seed(step)))


def build(run_dir=None, *, module=None, loss=None, optim=None, **config) -> Engine:
    torch.manual_seed(0)
    config = EngineConfig(**{"steps": 12, "device": "cpu", **config})
    return Engine(module or Toy(), loss or Loss(), config, optim or OPTIM, SCHEDULE, run_dir=run_dir)


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """Every tensor that training changes, weights, buffers, moments and random state alike."""
    state = engine.strategy.export_state()
    found = {f"{group}.{name}": value for group, values in state.items() for name, value in values.items()}
    return {key: value.clone() for key, value in found.items()} | {"random": torch.get_rng_state()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumes_bit_for_bit_at_every_step(tmp_path, accumulate, precision):
    options = {"precision": precision, "accumulate": accumulate}
    straight = build(**options)
    after = []
    for step in range(12):
        straight.step(rows(step))
        after.append(everything(straight))
    assert not torch.equal(after[0]["model.first.weight"], after[11]["model.first.weight"])
    assert not torch.equal(after[0]["model.norm.running_var"], after[11]["model.norm.running_var"])
    for stop in range(1, 12):
        run_dir = tmp_path / f"{stop}"
        first = build(run_dir, **options)
        for step in range(stop):
            first.step(rows(step))
        first.save(loader={"position": stop})
        second = build(run_dir, **options)
        torch.manual_seed(99)  # a new process starts from other random states
        random.seed(99)
        assert second.resume().state["extra"] == {"loader": {"position": stop}}
        assert_same(everything(second), after[stop - 1])
        for step in range(stop, 12):
            second.step(rows(step))
        assert_same(everything(second), after[11])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_beside_the_copy_changes_nothing_of_it(tmp_path, monkeypatch, accumulate):
    """The thread copies weights and moments only when the next step's gradients are there: buffers may have moved."""
    engine, twin = (build(tmp_path / name, accumulate=accumulate) for name in ("background", "at once"))
    for step in range(2):
        engine.step(rows(step))
        twin.step(rows(step))
    gate, copy, settle, late = threading.Event(), engine.writer._copy, engine.writer.settle, []

    def when_waited_for(values):
        if threading.current_thread() is not threading.main_thread():
            late.extend(values)
            gate.wait(60)
        copy(values)

    monkeypatch.setattr(engine.writer, "_copy", when_waited_for)
    monkeypatch.setattr(engine.writer, "settle", lambda: (gate.set(), settle()))
    engine.save(wait=False)
    before = everything(engine)
    engine.step(rows(2))
    assert not torch.equal(everything(engine)["model.norm.running_var"], before["model.norm.running_var"])
    engine.writer.finish()
    twin.save()
    found, expected = load_latest(tmp_path / "background"), load_latest(tmp_path / "at once")
    for group, values in expected.tensors.items():
        assert [name for name, value in values.items() if not torch.equal(found.tensors[group][name], value)] == []
    assert {("model", "first.weight"), ("optimizer", "model.first.weight/exp_avg")} <= set(late)
    assert not {("model", "norm.running_var"), ("loss", "scale")} & set(late)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_step_is_the_gradient_of_one_batch(parts, dropout):
    """The same masks in both passes, and the BatchNorm's statistics those of all rows, taken once."""
    engine = build(module=Toy(dropout=dropout), loss=plain_loss, accumulate=parts)
    twin = build(module=Toy(dropout=dropout), loss=plain_loss)
    twin.module.load_state_dict(engine.module.state_dict())
    features = []
    for index, part in enumerate(rows(0).split(parts)):
        torch.manual_seed(derive_seed(0, 0, index, 0))
        features.append(twin.module.features(part, seed=derive_seed(0, 0))["x"])
    loss = plain_loss(twin.module.heads(torch.cat(features), None), rows(0)).total
    loss.backward()
    out = engine.step(rows(0))
    torch.testing.assert_close(out.terms["total"], loss.detach())
    gradients = [(p.grad, twin.strategy.parameters[name].grad) for name, p in engine.strategy.parameters.items()]
    for got, wanted in gradients:
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(out.grad_norm, torch.stack([wanted.norm() for _, wanted in gradients]).norm())
    torch.testing.assert_close(engine.module.norm.running_var, twin.module.norm.running_var)
    assert engine.module.norm.num_batches_tracked == 1


def test_parts_make_the_same_step_as_the_whole():
    """All weights after twelve steps; as many parts as rows at most. (Adam makes steps of the biases' rounding.)"""
    sgd = OptimConfig(name="sgd", lr=1e-2)
    whole, *others = (build(module=Toy(dropout=0.0), accumulate=n, optim=sgd) for n in (1, 2, 3, 99))
    for step in range(12):
        for engine in (whole, *others):
            engine.step(rows(step))
    for other in others:
        for name, value in everything(whole).items():
            if "random" not in name:
                torch.testing.assert_close(everything(other)[name], value, rtol=1e-4, atol=1e-6)


def test_first_step_has_the_schedules_rate():
    engine = build()
    assert [round(engine.step(rows(step)).lr, 12) for step in range(4)] == [
        0.0,
        round(1e-2 / 3, 12),
        round(2e-2 / 3, 12),
        1e-2,
    ]


def test_only_trainable_parameters_move_and_the_losss_do():
    engine = build()
    before = everything(engine)
    for step in range(3):
        engine.step(rows(step))
    after = everything(engine)
    assert torch.equal(before["model.frozen"], after["model.frozen"])
    assert not torch.equal(before["loss.scale"], after["loss.scale"])
    assert "model.second.weight" not in engine.strategy.parameters  # tied to first.weight, stepped once


def test_clip_norm_bounds_the_gradient():
    engine = build(loss=plain_loss, optim=OptimConfig(lr=1e-2, clip_norm=1e-3))
    out = engine.step(rows(0))
    clipped = torch.stack([p.grad.norm() for p in engine.strategy.parameters.values()]).norm()
    assert out.grad_norm > 1e-2
    torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-3, atol=0)


class Fragile(nn.Module):
    """The loss is finite but its gradient is not, where `x` is all zeros."""

    def forward(self, outputs, batch):
        total = (outputs * batch.x).sum().abs().sqrt()
        return Terms(total=total, square=total)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(poison, accumulate):
    engine = build(accumulate=accumulate)
    for step in range(2):
        engine.step(rows(step))
    before = everything(engine)
    bad = rows(2)
    bad.x[3, 1] = poison
    out = engine.step(bad)
    assert (out.skipped, out.step, engine.skipped, engine.skipped_in_a_row) == (True, 3, 1, 1)
    after = everything(engine)
    del before["random"], after["random"]
    assert_same(after, before)  # the BatchNorm statistics too, which the forward pass had already touched
    assert not engine.step(rows(3)).skipped
    assert (engine.skipped, engine.skipped_in_a_row) == (1, 0)


def test_a_gradient_that_is_not_finite_changes_nothing():
    engine = build(loss=Fragile())
    before = everything(engine)
    out = engine.step(Rows(torch.zeros(8, 4)))
    assert torch.isfinite(out.terms["total"])
    assert not torch.isfinite(out.grad_norm)
    assert out.skipped
    assert torch.equal(everything(engine)["model.first.weight"], before["model.first.weight"])


def test_stops_after_too_many_skipped_in_a_row():
    engine = build(max_skipped=3)
    bad = Rows(torch.full((8, 4), float("nan")))
    engine.step(bad)
    engine.step(bad)
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        engine.step(bad)


def test_seeds_differ_by_every_part():
    seeds = {derive_seed(*parts) for parts in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 256, 0), (256, 0, 0))}
    assert len(seeds) == 6
    assert derive_seed(7, 3, 1) == 209270423655585
    assert all(0 <= seed < 2**48 for seed in seeds)


def test_random_state_comes_back():
    import numpy as np

    state = random_state()
    drawn = (random.random(), random.gauss(0, 1), torch.randn(3).tolist(), np.random.rand(3).tolist())
    set_random_state(state)
    assert (random.random(), random.gauss(0, 1), torch.randn(3).tolist(), np.random.rand(3).tolist()) == drawn


def test_a_parameter_without_dimensions_is_refused_by_name():
    module = Toy()
    module.register_parameter("temperature", nn.Parameter(torch.tensor(0.07)))
    with pytest.raises(ValueError, match=r"model\.temperature must have at least one dimension, got shape \(\)"):
        build(module=module)


def test_nothing_to_train_and_nothing_to_train_on_are_refused():
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        build(module=Toy().requires_grad_(False), loss=plain_loss)
    with pytest.raises(ValueError, match="batch must hold at least one row, got none"):
        build().step(rows(0, size=0))
    with pytest.raises(ValueError, match="run_dir must be given"):
        build().save()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    engine = build(tmp_path)
    engine.step(rows(0))
    engine.save()
    other = Toy()
    other.first = nn.Linear(4, 5)
    with pytest.raises(CheckpointError, match=r"step-00000001: the checkpoint must fit the model .* shape"):
        build(tmp_path, module=other).resume()
    with pytest.raises(CheckpointError, match="must fit the model"):
        build(tmp_path, loss=plain_loss).resume()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("accumulate", 0),
        ("keep_checkpoints", 1),
        ("seed", -1),
        ("precision", "fp16"),
        ("strategy", "fsdp"),
        ("offload", True),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"EngineConfig: {field} must .*got"):
        EngineConfig(**{field: value})


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x", "cpu:7"])
def test_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=r"engine: device must .*got"):
        EngineConfig(device=device).torch_device()
