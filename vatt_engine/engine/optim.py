"""Keras' Adam, Keras' SGD with momentum and TensorFlow's global-norm clipping, with torch's optimiser interface."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Which optimiser, its peak learning rate and its constants; the schedule shapes the rate over the steps.

    The defaults are the official pre-training's: Adam without weight decay or clipping. Fine-tuning uses
    `name="sgd"` with `clip_norm=0.75` on the backbone (official; the paper does not mention clipping).

    Args:
        name: "adam" or "sgd".
        lr: learning rate at the end of the warm-up.
        betas: decay of Adam's first and second moment, each in [0, 1).
        eps: Adam's epsilon in Keras' sense, added to sqrt(v) before any bias correction.
        momentum: SGD's momentum, in [0, 1).
        weight_decay: decoupled decay, w -= lr * weight_decay * w, of parameters with two or more axes.
        clip_norm: global gradient norm above which the engine scales gradients down; 0 leaves them alone.
        clip_prefix: of the names of the parameters that this concerns; "model.encoder." of a classifier leaves its head
            alone.

    Raises:
        ValueError: a constant is out of its range.

    >>> OptimConfig(name="sgd").momentum
    0.9
    """

    name: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-7
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    clip_prefix: str = ""

    def __post_init__(self) -> None:
        if self.name not in ("adam", "sgd"):
            raise ValueError(f"optim: name must be adam or sgd, got {self.name!r}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim: betas must be two numbers in [0, 1), got {self.betas}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim: momentum must be in [0, 1), got {self.momentum}.")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"optim: eps must be a finite number > 0, got {self.eps}.")
        for name in ("lr", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"optim: {name} must be a finite number >= 0, got {value}.")


class KerasAdam(torch.optim.Adam):
    """Adam as Keras computes it: epsilon is not bias-corrected, and one step count t serves all parameters.

        w -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    torch adds its epsilon to sqrt(v) / sqrt(1 - beta2^t), so torch's Adam with eps_t = eps / sqrt(1 - beta2^t) is
    exactly this. The difference shows where gradients are as small as epsilon. A parameter without a gradient keeps
    its weights and moments, but its t goes on, as Keras' only counter does.

    Each parameter's state is `step` (float32 scalar on the CPU, so reading it never waits for a GPU), `exp_avg` and
    `exp_avg_sq`; nothing else is needed to go on. Source: Keras 2.7 `optimizer_v2/adam.py`.
    """

    state_names = ("step", "exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        settings = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            taken = self._steps_taken(group)
            group["eps"] /= math.sqrt(1 - group["betas"][1] ** (taken + 1))
        try:
            loss = super().step(closure)
        finally:
            for group, eps in zip(self.param_groups, settings):
                group["eps"] = eps
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    self.state[parameter]["step"] += 1
        return loss

    def _steps_taken(self, group: dict) -> int:
        """Updates made so far; gives every parameter its state, so that none starts to count late."""
        taken = max((int(self.state[p]["step"]) for p in group["params"] if self.state[p]), default=0)
        for parameter in group["params"]:
            if not self.state[parameter]:
                self.state[parameter] = self.first_state(parameter, taken)
        return taken

    @staticmethod
    def first_state(parameter: Tensor, taken: int = 0) -> dict[str, Tensor]:
        """What a parameter's state is after `taken` steps without a gradient."""
        moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.tensor(float(taken)), **moments}


class KerasSGD(torch.optim.Optimizer):
    """SGD with Keras' momentum, whose velocity already holds the learning rate.

        velocity = momentum * velocity - lr * gradient;   w += velocity

    torch's momentum multiplies by the learning rate of the present step instead, which differs whenever the rate
    changes. Each parameter's state is `velocity`. Source: Keras 2.7 `optimizer_v2/gradient_descent.py`, no Nesterov.
    """

    state_names = ("velocity",)

    def __init__(self, params, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight] = self.first_state(weight)
            velocities = [self.state[weight]["velocity"] for weight in weights]
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, [weight.grad for weight in weights], alpha=-group["lr"])
            torch._foreach_add_(weights, velocities)
        return loss

    @staticmethod
    def first_state(parameter: Tensor) -> dict[str, Tensor]:
        """What a parameter's state is before its first gradient."""
        return {"velocity": torch.zeros_like(parameter, requires_grad=False)}


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]], config: OptimConfig, *, on_cpu: bool | None = None
) -> torch.optim.Optimizer:
    """The configured optimiser over the parameters that require a gradient, at the peak learning rate.

    The engine writes the schedule's rate into `group["lr"]` before each step. Groups carry `param_names`, so state can
    be stored by name.

    Args:
        named_parameters: pairs of name and parameter, as `module.named_parameters()` gives.
        config: the optimiser and its constants.
        on_cpu: whether the updates will be computed on the CPU; by default if all parameters are there.

    Raises:
        ValueError: no parameter requires a gradient.

    >>> build_optimizer(torch.nn.Linear(2, 2).named_parameters(), OptimConfig()).param_groups[0]["param_names"]
    ['weight', 'bias']
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("build_optimizer: named_parameters must hold a parameter that requires a gradient, got none.")
    groups = [{"params": trainable}]
    if config.weight_decay:
        matrices = [(name, p) for name, p in trainable if p.ndim >= 2]
        others = [(name, p) for name, p in trainable if p.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return KerasSGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return KerasAdam(
        groups,
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=True,
        # One pass over memory on the CPU. On a GPU torch chooses its multi-tensor form, which keeps `step` on the CPU.
        fused=True if (all(p.device.type == "cpu" for _, p in trainable) if on_cpu is None else on_cpu) else None,
    )


def clip_by_global_norm(gradients: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that their joint L2 norm is at most `max_norm`; returns the norm before.

        norm = sqrt(sum of squares over all gradients);   gradient *= max_norm / max(norm, max_norm)

    Unlike `torch.nn.utils.clip_grad_norm_` nothing is added to the norm, and a norm that is not finite turns every
    gradient into NaN, as `tf.clip_by_global_norm` does: the fault shows instead of becoming a step of 0.

    Args:
        gradients: tensors of any shapes, changed in place.
        max_norm: the largest allowed norm, > 0.

    Returns:
        Scalar norm on the gradients' device; reading it is left to the caller.

    Raises:
        ValueError: `max_norm` is not a finite positive number.

    >>> clip_by_global_norm([torch.tensor([3.0, 4.0])], 0.75).item()
    5.0
    """
    if not (math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"clip_by_global_norm: max_norm must be a finite number > 0, got {max_norm}.")
    gradients = list(gradients)
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = torch.where(norm.isfinite(), max_norm / norm.clamp(min=max_norm), torch.nan)
    torch._foreach_mul_(gradients, scale)
    return norm
