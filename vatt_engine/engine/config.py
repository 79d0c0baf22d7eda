"""EngineConfig: how a run trains."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Strategy = Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"]
Compile = Literal["off", "layers", "default", "reduce-overhead", "max-autotune-no-cudagraphs"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How long, how often and on what a run trains.

    Args:
        steps: optimizer steps of the whole run.
        accumulate: parts of a rank's share of the batch that go through the backbones one after the other, for memory;
            heads, BatchNorm and loss see the whole batch, so the negatives of a contrastive loss stay the same.
        strategy: "single", "ddp", "zero1", "zero2" or "zero3" (DeepSpeed); "auto" is single on one process and on
            several ddp, or zero2 from 300 million trainable parameters where it can be.
        offload: keep the optimizer state on the host and compute the update there; zero2 and zero3 only.
        checkpoint_activations: keep only the inputs of transformer layers and compute them again in backward.
        compile: torch.compile of the backbones by its mode; "layers" of every layer by itself, where layers of
            the same sizes share what is made; or "off". "reduce-overhead" replays the backbones as CUDA
            graphs, on a GPU, and needs single or ddp; the others are not for zero3.
        precision: "fp32", or "bf16" for autocast around the module (weights, loss and optimizer stay fp32); "auto" is
            the one that the device is faster at, see `preferred_precision`.
        halve_on_oom: where a GPU's memory does not hold a part of the batch, go on with parts of half the size (on
            several ranks after a restart, which torchrun does), instead of stopping.
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
    strategy: Strategy = "auto"
    offload: bool = False
    checkpoint_activations: bool = False
    compile: Compile = "off"
    precision: Precision = "fp32"
    halve_on_oom: bool = False
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
        for name, kind in {"strategy": Strategy, "compile": Compile, "precision": Precision}.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"EngineConfig: {name} must be one of {', '.join(get_args(kind))}, got {value!r}.")
        if self.offload and self.strategy not in ("zero2", "zero3"):
            raise ValueError(f"EngineConfig: offload must be false with strategy {self.strategy}, got True.")
        if self.compile != "off" and self.strategy == "zero3":
            hint = "Its parameters come and go between the layers."
            raise ValueError(f"EngineConfig: compile must be off with strategy zero3, got {self.compile!r}. {hint}")
        if self.compile == "reduce-overhead" and self.strategy.startswith("zero"):
            hint = "DeepSpeed holds on to gradients, which the next replay of a graph writes over."
            raise ValueError(f"EngineConfig: compile must not be reduce-overhead with {self.strategy}. {hint}")

    def torch_device(self) -> torch.device:
        """The device to train on; of several GPUs the one of this process's LOCAL_RANK, as launchers set it.

        Raises:
            ValueError: the name means nothing, or the GPU is not there.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and "RANK" in os.environ:
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda") or str(device).startswith("cpu:"):
            raise ValueError(f"engine: device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {self.device!r}.")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            here = f"{name!r} where there are {torch.cuda.device_count()}"
            raise ValueError(f"engine: device must be a GPU of this machine, got {here}. Run `vatt doctor` to see why.")
        return device
