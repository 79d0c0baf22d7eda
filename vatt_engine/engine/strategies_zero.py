"""DeepSpeed ZeRO: the optimizer state in parts over the ranks (1), the gradients too (2), the parameters too (3).

DeepSpeed moves and reduces; the update stays ours: its "client optimizer" is KerasAdam or KerasSGD over the flat part
of each rank, and the clipping that of `optim`. It skips steps whose gradient norm is not finite in float32, which is
what parameters are here: `precision="bf16"` is torch's autocast around them.

A few things that an update of our own needs have no public name in DeepSpeed. `PRIVATE` lists them all, and a DeepSpeed
that lacks one of them is refused before the first step.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from vatt_engine.collectives import rank, world_size
from vatt_engine.engine.optim import OptimConfig
from vatt_engine.engine.strategies import Single, Trained

DEEPSPEED = ">=0.19.8,<0.19.9"  # what this was run with; pyproject.toml says the same
# Attributes of DeepSpeed's own optimizer, beside its documented functions, by ZeRO stage: the norm of all gradients,
# which is known when the update begins; gradients that were summed on the host; the flat parts of stage 3 that the
# update changes, and the sums of their gradients.
PRIVATE = {
    1: ("_global_grad_norm",),
    2: ("_global_grad_norm",),
    3: ("_global_grad_norm", "fp32_partitioned_groups_flat", "grad_partitions_flat_buffer"),
}
PRIVATE_OFFLOADED = {1: (), 2: ("accumulated_grads_in_cpu",), 3: ()}  # with the state on the host
BUCKET_ELEMENTS = 50_000_000  # of gradients that travel together; DeepSpeed's 500 million take 2 GB of a GPU


def deepspeed_config(stage: int, *, offload: bool, num_elements: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is told.

    Args:
        stage: 1, 2 or 3.
        offload: optimizer state and update on the host.
        num_elements: of all trainable parameters; no bucket is larger.

    >>> deepspeed_config(2, offload=False, num_elements=1000)["zero_optimization"]["reduce_bucket_size"]
    1000
    """
    bucket = min(BUCKET_ELEMENTS, num_elements + num_elements % 2)  # an even number, for NCCL's alignment
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": False,  # wrong gradients in several releases (DeepSpeed issues 4298, 5294, 7188, 7718)
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its progress report alone, which is off; batches are the engine's
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # any number of backward passes, then a step
        "gradient_clipping": 0.0,  # 1.0 by default
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Zero(Single):
    """One of DeepSpeed's ZeRO stages.

    Args:
        trained: on its device, of equal weights on all ranks.
        optim: optimizer settings.
        stage: 1, 2 or 3.
        offload: keep the optimizer state, and compute the update, on the host.

    Raises:
        ValueError: deepspeed is not installed, or is of a version that this does not know.
    """

    def __init__(self, trained: Trained, optim: OptimConfig, *, stage: int, offload: bool):
        device = next(trained.parameters()).device
        deepspeed = _deepspeed(device)
        super().__init__(trained, optim, on_cpu=offload or None)
        self.stage, self.offload, self.zero3 = stage, offload, deepspeed.zero
        self.shapes = {id(p): p.shape for p in trained.parameters()}
        config = deepspeed_config(stage, offload=offload, num_elements=sum(p.numel() for p in self.parameters.values()))
        for buffer in trained.buffers():
            dist.broadcast(buffer, 0)  # DeepSpeed does so with the parameters
        if isinstance(trained.loss, nn.Module):  # before DeepSpeed's hooks, the first of which takes parameters away
            trained.loss.register_forward_hook(self._keep_changes)
        whole_groups = [list(group["params"]) for group in self.optimizer.param_groups]
        self.deepspeed, self.sharded, *_ = deepspeed.initialize(
            model=trained, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        check_private(self.sharded, stage, offload, deepspeed.__version__)
        own_groups = [group["params"] for group in self.optimizer.param_groups]  # stages 1 and 2: one flat part in each
        self.flat = self.sharded.fp32_partitioned_groups_flat if stage == 3 else [part for [part] in own_groups]
        for part in self.flat:
            self.optimizer.state[part] = self.optimizer.first_state(part)
        if stage < 3:
            for parameters, part in zip(whole_groups, self.flat):  # to which state of a part each parameter belongs
                deepspeed.utils.lazy_init_hp_params_optimizer_state(parameters, part, self.optimizer.state)
        if self.clip_norm:
            self.optimizer.register_step_pre_hook(self._clip)

    def begin(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # What the first backward pass does not reach would keep the gradients of the step before, or add to them.
        stale = [part.grad for part in self.flat if part.grad is not None]
        if self.stage == 3:
            stale.append(self.sharded.grad_partitions_flat_buffer)
        elif self.offload:
            stale += self.sharded.accumulated_grads_in_cpu.values()
        for sums in stale:
            sums.zero_()

    def run(self, part: str, *args: Any) -> Any:
        return self.deepspeed(part, *args)

    def backward(self, scalar: Tensor, *, last: bool) -> None:
        self.deepspeed.backward(scalar)

    def update(self) -> tuple[Tensor, bool]:
        self.deepspeed.step()
        return torch.as_tensor(self.deepspeed.get_global_grad_norm()), self.deepspeed.was_step_applied()

    def _keep_changes(self, module: nn.Module, *_: Any) -> None:
        """Take over what its forward pass did to parameters in place, as the loss does to bound its temperature.

        DeepSpeed steps from a copy and would undo it.
        """
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                self._write_master(parameter, parameter.detach())

    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """`clip_by_global_norm` by the norm over all ranks; DeepSpeed's own adds 1e-6 to it."""
        norm = torch.as_tensor(self.sharded._global_grad_norm, dtype=torch.float32)
        for group in optimizer.param_groups:
            for part in group["params"]:
                part.grad.mul_((self.clip_norm / norm.clamp(min=self.clip_norm)).to(part.grad.device))

    # ------------------------------------------------------------------------------------ the state, by name

    def _whole(self, tensor: Tensor, *, changed: bool = False) -> Any:
        """While entered, a parameter that is in parts (stage 3) is whole; rank 0's changes to it reach all ranks."""
        parts = [tensor] if self.stage == 3 and isinstance(tensor, nn.Parameter) else []
        return self.zero3.GatheredParameters(parts, modifier_rank=0 if changed else None, enabled=bool(parts))

    def _shape(self, tensor: Tensor) -> torch.Size:
        return self.shapes.get(id(tensor), tensor.shape)

    def lasts(self, group: str, name: str) -> bool:
        return True  # all are copies

    def _read(self, tensor: Tensor) -> Tensor:
        with self._whole(tensor):
            return tensor.detach().to("cpu", copy=True)

    @torch.no_grad()
    def _write(self, tensor: Tensor, value: Tensor) -> None:
        with self._whole(tensor, changed=True):
            tensor.copy_(value)
        if tensor.requires_grad:
            self._write_master(tensor, value)

    def _read_moments(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        own = self.optimizer.state[self.flat[0]]
        return {
            key: own[key].clone() if own[key].ndim == 0 else safe_get_full_optimizer_state(parameter, key).cpu()
            for key in self.optimizer.state_names
        }

    def _write_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        for part in self.flat:
            for value in self.optimizer.state[part].values():
                value.zero_()
        for name, values in moments.items():
            for key, value in values.items():
                if value.ndim:
                    self._write_master(self.parameters[name], value, key)
                else:
                    for part in self.flat:
                        self.optimizer.state[part][key].copy_(value)

    def _write_master(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """This rank's part of a whole float32 parameter, or of its moment `key`."""
        from deepspeed import utils

        if self.stage == 3:  # the functions for whole tensors cannot cut one that does not divide by the ranks
            part = utils.safe_get_local_fp32_param(parameter).numel()
            flat = nn.functional.pad(value.flatten(), (0, part * world_size() - value.numel()))
            own = flat[rank() * part : (rank() + 1) * part]
            if key is None:
                utils.safe_set_local_fp32_param(parameter, own)
            else:
                utils.safe_set_local_optimizer_state(parameter, own, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)


def check_private(optimizer: Any, stage: int, offload: bool, version: str) -> None:
    """Refuse a DeepSpeed whose optimizer lacks a name of `PRIVATE`.

    Args:
        optimizer: the second thing that `deepspeed.initialize` returns.
        stage, offload: see Zero.
        version: of DeepSpeed.

    Raises:
        ValueError: names what is missing, and the versions that have it.
    """
    wanted = PRIVATE[stage] + (PRIVATE_OFFLOADED[stage] if offload else ())
    missing = [name for name in wanted if not hasattr(optimizer, name)]
    if missing:
        text = f"engine: DeepSpeed must be {DEEPSPEED} for ZeRO {stage}, got {version}, whose optimizer has no"
        raise ValueError(f"{text} {', '.join(missing)}. Run `pip install 'deepspeed{DEEPSPEED}'`.")


def _deepspeed(device: torch.device) -> Any:
    """The package, quiet, on this kind of device, with a process group and the variables it expects to find."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it guesses by what is installed
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "engine: strategy must be single or ddp where deepspeed is not installed, got a ZeRO stage. "
            "Run `pip install 'vatt-engine[deepspeed]'`."
        ) from error
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning, "torch.distributed")  # of calls it makes
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings are of what is chosen here
    # An op for inference alone, which would be compiled at first use. Where this is renamed it costs half a minute.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed
