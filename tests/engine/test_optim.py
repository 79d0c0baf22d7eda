import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Linear, Sequential

from vatt_engine.engine.optim import KerasAdam, OptimConfig, build_optimizer, clip_by_global_norm
from vatt_engine.engine.strategies import Single, Trained
from vatt_engine.testing import Sum, assert_same_sums

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "g_schedules_optimizers.npz")
GRADIENTS = torch.from_numpy(GOLDEN["opt/grads"])
START = torch.from_numpy(GOLDEN["opt/w0"])


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def trajectory(optimizer, weight, rates):
    """Weights before the first and after every update with the recorded gradients."""
    path = [weight.detach().clone()]
    for gradient, rate in zip(GRADIENTS, rates):
        weight.grad = gradient.clone()
        set_rate(optimizer, rate)
        optimizer.step()
        path.append(weight.detach().clone())
    return torch.stack(path)


@pytest.mark.parametrize(("case", "name"), [("adam", "adam"), ("adam_sched", "adam"), ("sgd_momentum", "sgd")])
def test_matches_keras(case, name):
    weight = torch.nn.Parameter(START.clone())
    optimizer = build_optimizer([("w", weight)], OptimConfig(name=name))
    rates = GOLDEN[f"opt/{case}_lr"].tolist()
    path, expected = trajectory(optimizer, weight, rates), torch.from_numpy(GOLDEN[f"opt/{case}_traj"])
    assert_same_sums(path, expected, Sum(len(rates)))  # each update rounds the weight
    assert torch.equal(path[1], path[0]) == (rates[0] == 0)


def test_tiny_gradients_tell_keras_epsilon_from_torchs():
    """Column 0 has gradients near 1e-6: torch's own rule with the same epsilon misses the recorded path."""
    weight = torch.nn.Parameter(START.clone())
    plain = torch.optim.Adam([weight], eps=1e-7)
    path = trajectory(plain, weight, GOLDEN["opt/adam_lr"].tolist())
    distance = (path - torch.from_numpy(GOLDEN["opt/adam_traj"])).abs().amax(0)
    assert distance[0] > 1e-3
    assert distance[1:].max() < 1e-5


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e-12])
def test_adam_is_its_formula(fused, scale):
    beta1, beta2, eps, rate = 0.8, 0.95, 1e-7, 0.01
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64))
    optimizer = KerasAdam([weight], lr=rate, betas=(beta1, beta2), eps=eps, fused=fused, foreach=False)
    w, m, v = (torch.zeros(64, dtype=torch.float64) for _ in range(3))
    for t in range(1, 21):
        gradient = torch.randn(64, generator=generator) * scale
        weight.grad = gradient.clone()
        optimizer.step()
        m = beta1 * m + (1 - beta1) * gradient.double()
        v = beta2 * v + (1 - beta2) * gradient.double() ** 2
        w -= rate * math.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (v.sqrt() + eps)
    torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=w.abs().max().item() * 1e-5)
    assert optimizer.param_groups[0]["eps"] == eps


def test_adam_counts_steps_for_parameters_without_a_gradient():
    """Keras has one counter: a parameter that first gets a gradient at step 3 is corrected with t = 3."""
    rate, betas, eps = 0.1, (0.9, 0.999), 1e-7
    always, late = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = build_optimizer([("always", always), ("late", late)], OptimConfig(betas=betas, eps=eps))
    set_rate(optimizer, rate)
    for t in range(1, 4):
        always.grad = torch.ones(1)
        late.grad = torch.ones(1) if t == 3 else None
        optimizer.step()
        assert late.item() == 0 or t == 3
    m, v = 1 - betas[0], 1 - betas[1]
    expected = -rate * math.sqrt(1 - betas[1] ** 3) / (1 - betas[0] ** 3) * m / (math.sqrt(v) + eps)
    assert late.item() == pytest.approx(expected, rel=1e-6)
    assert [int(optimizer.state[p]["step"]) for p in (always, late)] == [3, 3]


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_state_stored_by_name_continues_bit_for_bit(name):
    rates = GOLDEN["opt/adam_sched_lr"].tolist()
    weight = torch.nn.Parameter(START.clone())
    optimizer = build_optimizer([("w", weight)], OptimConfig(name=name))
    whole = trajectory(optimizer, weight, rates)

    weight = torch.nn.Parameter(START.clone())
    optimizer = build_optimizer([("w", weight)], OptimConfig(name=name))
    for index, rate in enumerate(rates):
        if index == 4:  # into a fresh optimiser, by name, tensors alone
            (group,) = optimizer.param_groups
            stored = {
                f"{label}.{key}": value.clone()
                for label, p in zip(group["param_names"], group["params"])
                for key, value in optimizer.state[p].items()
            }
            expected = {"w.velocity"} if name == "sgd" else {"w.step", "w.exp_avg", "w.exp_avg_sq"}
            assert set(stored) == expected
            weight = torch.nn.Parameter(weight.detach().clone())
            optimizer = build_optimizer([("w", weight)], OptimConfig(name=name))
            optimizer.state[weight] = {key.split(".")[1]: value for key, value in stored.items()}
        weight.grad = GRADIENTS[index].clone()
        set_rate(optimizer, rate)
        optimizer.step()
    assert torch.equal(weight.detach(), whole[-1])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_torch_state_dict_round_trip(name):
    weight = torch.nn.Parameter(START.clone())
    optimizer = build_optimizer([("w", weight)], OptimConfig(name=name))
    trajectory(optimizer, weight, GOLDEN["opt/adam_lr"].tolist())
    twin = torch.nn.Parameter(weight.detach().clone())
    other = build_optimizer([("w", twin)], OptimConfig(name=name))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch keeps the tensors it is given
    ends = [trajectory(o, w, [0.01] * 8)[-1] for o, w in ((optimizer, weight), (other, twin))]
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_weight_decay_is_decoupled_and_spares_vectors(name):
    module = torch.nn.Linear(3, 3)
    torch.nn.init.ones_(module.bias)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(module.named_parameters(), OptimConfig(name=name, weight_decay=0.5))
    set_rate(optimizer, 0.1)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(module.bias.detach(), torch.ones(3))


def test_frozen_parameters_are_left_out():
    module = torch.nn.Linear(3, 3)
    module.weight.requires_grad_(False)
    optimizer = build_optimizer(module.named_parameters(), OptimConfig())
    assert optimizer.param_groups[0]["param_names"] == ["bias"]
    module.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="must hold a parameter that requires a gradient, got none"):
        build_optimizer(module.named_parameters(), OptimConfig())


def test_clip_matches_tensorflow():
    gradients = [torch.from_numpy(GOLDEN[f"clip/in{i}"]).clone() for i in range(2)]
    norm = clip_by_global_norm(gradients, 0.75)
    squares = Sum(sum(gradient.numel() for gradient in gradients))
    assert_same_sums(norm, torch.from_numpy(GOLDEN["clip/global_norm"]), squares)
    for i, gradient in enumerate(gradients):
        assert_same_sums(gradient, torch.from_numpy(GOLDEN[f"clip/out{i}"]), squares)


def test_clip_edges():
    small = torch.tensor([0.3, 0.4])
    assert clip_by_global_norm([small], 0.75).item() == pytest.approx(0.5)
    assert torch.equal(small, torch.tensor([0.3, 0.4]))
    zero = torch.zeros(3)
    assert clip_by_global_norm([zero], 1.0).item() == 0
    assert torch.equal(zero, torch.zeros(3))
    assert clip_by_global_norm([], 1.0).item() == 0
    for poison in (math.inf, math.nan):  # as in TensorFlow: nothing hides behind a scale of 0
        gradients = [torch.tensor([poison, 1.0]), torch.ones(2)]
        clip_by_global_norm(gradients, 1.0)
        assert all(gradient.isnan().all() for gradient in gradients)
    with pytest.raises(ValueError, match="max_norm must be a finite number > 0, got 0"):
        clip_by_global_norm([zero], 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "lamb"}, "name must be adam or sgd, got 'lamb'"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps must be a finite number > 0, got 0.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
        ({"clip_norm": math.inf}, "clip_norm must be a finite number >= 0, got inf"),
    ],
)
def test_rejects_bad_configs(values, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)


def test_the_backbone_alone_is_clipped():
    """One step of SGD at rate 1 without momentum moves weights by what is left of the gradients."""
    trained = Trained(
        Sequential(Linear(3, 4), Linear(4, 2)), lambda outputs, batch: None, autocast=False, compiled=False
    )
    gradients = [100 * torch.randn_like(parameter) for parameter in trained.parameters()]
    config = OptimConfig(name="sgd", momentum=0.0, clip_norm=0.75, clip_prefix="model.0.")
    single, before = Single(trained, config), [p.detach().clone() for p in trained.parameters()]
    single.begin(1.0)
    for parameter, gradient in zip(trained.parameters(), gradients):
        parameter.grad = gradient.clone()
    norm, taken = single.update()
    moved = [b - p.detach() for b, p in zip(before, trained.parameters())]
    total = torch.cat([g.flatten() for g in gradients]).norm()
    assert taken
    torch.testing.assert_close(norm, total)
    assert torch.cat([m.flatten() for m in moved[:2]]).norm().item() == pytest.approx(0.75, rel=1e-4)
    torch.testing.assert_close(moved[2:], gradients[2:], rtol=1e-5, atol=1e-4)
    for parameter in list(trained.parameters())[2:]:  # a head that is not finite skips the step too
        parameter.grad = torch.full_like(parameter, torch.inf)
    assert single.update()[1] is False
