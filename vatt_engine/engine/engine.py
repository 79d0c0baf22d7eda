"""The training step, and the state that makes it resume bit for bit: a module, a loss, batches, and no modality."""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vatt_engine.engine import checkpoint
from vatt_engine.engine.faults import TrainingStopped
from vatt_engine.engine.logging import versions
from vatt_engine.engine.optim import OptimConfig, build_optimizer, clip_by_global_norm
from vatt_engine.engine.schedule import ScheduleConfig, learning_rate
from vatt_engine.engine.writer import CheckpointWriter


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How long, how often and on what a run trains.

    Args:
        steps: optimizer steps of the whole run.
        accumulate: micro-batches per step. Their gradients are averaged, so the negatives of a contrastive loss are
            those of one micro-batch.
        precision: "fp32", or "bf16" for autocast around the module (weights, loss and optimizer stay fp32).
        max_skipped: steps in a row that may be skipped for a loss or gradient that is not finite.
        log_every: steps per record in metrics.jsonl and per progress line.
        save_every: steps per checkpoint; the last step is always saved.
        keep_checkpoints: how many newest checkpoints stay.
        seed: of the weights, DropToken, dropout and the order of the data.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        spike_factor: a loss of this many times the median of the last 100 steps brings the run back to its newest
            checkpoint, and the data since then is skipped; 0 never does.
        tensorboard: write TensorBoard records too.
        wandb: log to Weights & Biases too.
    """

    steps: int = 500_000
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    max_skipped: int = 20
    log_every: int = 50
    save_every: int = 10_000
    keep_checkpoints: int = 3
    seed: int = 0
    device: str = "auto"
    spike_factor: float = 0.0
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        least = {"steps": 1, "accumulate": 1, "max_skipped": 1, "log_every": 1, "save_every": 1, "keep_checkpoints": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"EngineConfig: {name} must be at least {bound}, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"EngineConfig: seed must be in [0, 2^63), got {self.seed}.")
        if not (self.spike_factor == 0 or 1 < self.spike_factor < math.inf):
            raise ValueError(f"EngineConfig: spike_factor must be 0 or more than 1, got {self.spike_factor}.")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"EngineConfig: precision must be 'fp32' or 'bf16', got {self.precision!r}.")

    def torch_device(self) -> torch.device:
        """The device to train on.

        Raises:
            ValueError: the name means nothing, or the GPU is not there.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda") or str(device).startswith("cpu:"):
            raise ValueError(f"engine: device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {self.device!r}.")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            here = f"{self.device!r} where there are {torch.cuda.device_count()}"
            raise ValueError(f"engine: device must be a GPU of this machine, got {here}. Run `vatt doctor` to see why.")
        return device


class StepOutput(NamedTuple):
    """What one step did. `step` counts finished steps; `terms` are the loss's fields, averaged over micro-batches."""

    step: int
    terms: dict[str, Tensor]
    grad_norm: Tensor
    lr: float
    skipped: bool


class Engine:
    """Trains a module with a loss: micro-batches in, one optimizer step out; saves and resumes bit for bit.

        loss = mean_m loss(module(batch_m, seed=s_m), batch_m),  s_m = hash(config.seed, step, m)

    The global random state is set from s_m before each micro-batch, so dropout too depends on (seed, step, m) alone.
    A step whose loss or gradient is not finite is skipped: weights, optimizer and buffers stay as they were, the step
    counts. (The official run sets such gradient entries to 0 and steps.)

    Args:
        module: called as `module(batch, seed=int)`.
        loss: called as `loss(outputs, batch)`; returns a NamedTuple of scalar tensors whose first field is `total`. Its
            parameters, if it is a module, are trained too.
        config: steps, accumulation, precision.
        optim: optimizer settings.
        schedule: learning rate by step.
        run_dir: where `save` and `resume` put and find `checkpoints/`.

    Raises:
        ValueError: a parameter has 0 dimensions (DeepSpeed cannot partition one), or nothing is trainable.

    >>> engine = Engine(model, loss, EngineConfig(steps=600), OptimConfig(), ScheduleConfig())  # doctest: +SKIP
    >>> engine.step([batch]).terms["total"]  # doctest: +SKIP
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Any, Any], Any],
        config: EngineConfig,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        *,
        run_dir: str | Path | None = None,
    ):
        self.config, self.schedule, self.run_dir = config, schedule, run_dir
        self.writer = None if run_dir is None else CheckpointWriter(run_dir, keep=config.keep_checkpoints)
        self.peak, self.clip_norm = optim.lr, optim.clip_norm
        self.device = config.torch_device()
        self.module = module.to(self.device).train()
        self.loss = loss.to(self.device).train() if isinstance(loss, nn.Module) else loss
        self.modules = {"model": self.module, **({"loss": self.loss} if isinstance(loss, nn.Module) else {})}
        self.parameters = _trainable(self.modules)
        self.optimizer = build_optimizer(self.parameters.items(), optim)
        self.finished = 0  # steps
        self.skipped = 0  # of them, in the whole run
        self.skipped_in_a_row = 0

    def step(self, batches: Sequence[Any]) -> StepOutput:
        """One optimizer step on the mean loss of `batches`, one after the other.

        Raises:
            ValueError: no batches.
            TrainingStopped: `config.max_skipped` steps in a row were skipped.
        """
        if not batches:
            raise ValueError("Engine.step: batches must hold at least one micro-batch, got none.")
        lr = learning_rate(self.finished, self.schedule, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = [(buffer, buffer.clone()) for module in self.modules.values() for buffer in module.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            for name, value in self._backward(batch.to(self.device), index, len(batches)).items():
                terms[name] = terms[name] + value if name in terms else value
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = clip_by_global_norm(gradients, self.clip_norm) if self.clip_norm else nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(norm) & torch.isfinite(terms["total"]))  # the one wait for the device
        if finite:
            self.optimizer.step()
        else:
            for buffer, value in before:
                buffer.copy_(value)
        self._count(finite, terms)
        return StepOutput(self.finished, terms, norm, lr, not finite)

    def _backward(self, batch: Any, index: int, count: int) -> dict[str, Tensor]:
        """Gradients of one micro-batch's share of the loss, added up; returns its terms' shares."""
        seed = derive_seed(self.config.seed, self.finished, index)
        torch.manual_seed(seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            outputs = self.module(batch, seed=seed)
        terms = self.loss(outputs, batch)
        (terms.total / count).backward()
        return {name: value.detach() / count for name, value in terms._asdict().items() if value is not None}

    def _count(self, finite: bool, terms: Mapping[str, Tensor]) -> None:
        self.finished += 1
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.max_skipped:
            shown = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise TrainingStopped(
                f"Engine.step: loss and gradients must be finite, got {self.skipped_in_a_row} steps in a row that are "
                f"not, up to step {self.finished} ({shown}). Lower the learning rate, or check the data of these steps."
            )

    # ------------------------------------------------------------------------------------ checkpoints

    def save(self, *, wait: bool = True, **extra: Any) -> Path | None:
        """Write a checkpoint of this moment; `extra` (JSON values: loader state, config) comes back from `resume`.

        Returns:
            Its folder, or None with `wait=False`: it is written in the background, and `writer.news()` tells the rest.

        Raises:
            OSError: with `wait`, it could not be written; older checkpoints are intact.
        """
        writer = self._writer()
        tensors = {name: module.state_dict() for name, module in self.modules.items() if module.state_dict()}
        moments, scalars = self._optimizer_state()
        counters = {name: getattr(self, name) for name in ("finished", "skipped", "skipped_in_a_row")}
        state = {
            **counters,
            "optimizer": scalars,
            "random": random_state(),
            "versions": versions("vatt_engine", "torch"),
            "extra": extra,
        }
        tensors["optimizer"] = moments
        writer.save(self.finished, tensors, state)
        return writer.finish() if wait else None

    def resume(self) -> checkpoint.Checkpoint:
        """Continue from the newest valid checkpoint of the run folder; what `save` was given is in `.state["extra"]`.

        Raises:
            CheckpointError: there is none, or it belongs to another model or optimizer.
        """
        self._writer().join()
        found = checkpoint.load_latest(self.run_dir)
        try:
            for name, module in self.modules.items():
                module.load_state_dict(found.tensors.get(name, {}), strict=True)
            self._load_optimizer(found.tensors["optimizer"], found.state["optimizer"])
            for name in ("finished", "skipped", "skipped_in_a_row"):
                setattr(self, name, int(found.state[name]))
            set_random_state(found.state["random"])
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:400]
            raise checkpoint.CheckpointError(
                f"{found.path}: the checkpoint must fit the model and optimizer of this run, got: {reason}"
            ) from error
        return found

    def _writer(self) -> CheckpointWriter:
        if self.writer is None:
            raise ValueError("Engine: run_dir must be given to save or resume, got None.")
        return self.writer

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Moments by `<parameter>/<moment>`, and what is not a tensor."""
        tensors, scalars = {}, {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                (tensors if isinstance(value, Tensor) else scalars)[f"{name}/{key}"] = value
        return tensors, scalars

    def _load_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.optimizer.state.clear()
        for full, value in {**tensors, **scalars}.items():
            name, _, key = full.rpartition("/")
            parameter = self.parameters[name]
            if key not in self.optimizer.state_names:
                raise ValueError(f"{full}, which is no state of {type(self.optimizer).__name__}")
            if isinstance(value, Tensor):
                if value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"{full} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
                value = value.clone() if value.ndim == 0 else value.to(self.device, copy=True)
            self.optimizer.state[parameter][key] = value


def derive_seed(*parts: int) -> int:
    """A 48-bit seed that is a function of integers alone, the same on every machine.

    >>> derive_seed(0, 1) == derive_seed(0, 1) != derive_seed(1, 0)
    True
    """
    digest = hashlib.blake2b(b"".join(part.to_bytes(8, "little") for part in parts), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def random_state() -> dict[str, Any]:
    """The state of Python's, torch's and (where it is loaded) NumPy's global generators, as JSON values."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": _hex(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [_hex(one) for one in torch.cuda.get_rng_state_all()]
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, keys.tolist(), position, has_gauss, cached]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo of `random_state`; generators of GPUs that are not here are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(_unhex(state["torch"]))
    for index, one in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_unhex(one), index)
    if "numpy" in state:
        import numpy as np

        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _unhex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _trainable(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Trainable parameters by `<group>.<name>`; a shared one once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for group, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 0:
                raise ValueError(
                    f"Engine: {group}.{name} must have at least one dimension, got shape (). Use shape (1,)."
                )
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{group}.{name}"] = parameter
    if not found:
        raise ValueError("Engine: module must have a trainable parameter, got none.")
    return found
