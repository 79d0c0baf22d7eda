"""Where parameters, gradients and optimizer state live: on one device, or the same on every rank (DDP).

A strategy runs the module, gives every rank the gradients' mean over ranks, takes or skips the optimizer step, and has
the whole state by name, whatever it looks like inside: a checkpoint of any strategy continues under any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from vatt_engine.collectives import world_size
from vatt_engine.engine.checkpoint import share
from vatt_engine.engine.optim import OptimConfig, build_optimizer, clip_by_global_norm

BUCKET_BYTES = 25 << 20  # of gradients that travel together, as in torch's DDP
State = dict[str, dict[str, Tensor]]  # group ("model", "loss", "optimizer") -> name -> tensor


class Trained(nn.Module):
    """A module and its loss as one, so that a strategy owns all parameters and sees every use of them.

    Args:
        module: called as `module(batch, seed=)`. With `features(batch, seed=) -> dict of tensors`, in which no row
            depends on another, and `heads(**features)` it can be trained part by part.
        loss: called as `loss(outputs, batch)`; a module's parameters are trained too.
        autocast: run the module, and not the loss, in bfloat16 where that is safe.
        compiled: mode to compile the features in (the heads talk to other ranks), or "off", or "layers" where the
            module's parts were told to compile themselves. Under "reduce-overhead" a call writes features, and its
            backward pass gradients, into the same memory as the call before.
    """

    def __init__(self, module: nn.Module, loss: Callable[..., Any], *, autocast: bool, compiled: str):
        super().__init__()
        self.model, self.loss = module, loss
        self.autocast = autocast
        self.splits = hasattr(module, "features") and hasattr(module, "heads")
        self.compute = module.features if self.splits else module.__call__
        self.replays = compiled == "reduce-overhead"
        if compiled not in ("off", "layers"):
            self.compute = torch.compile(self.compute, mode=compiled)

    def forward(self, part: str, *args: Any) -> Any:
        """`part` is "features", "terms" (of features) or "whole": every call comes through here, for ZeRO's hooks."""
        return getattr(self, part)(*args)

    def features(self, batch: Any, seed: int | Tensor) -> Any:
        if self.replays:  # nothing of the call before is in use any more
            torch.compiler.cudagraph_mark_step_begin()
        with self._precision():
            return self.compute(batch, seed=seed)

    def terms(self, features: Mapping[str, Tensor | None], batch: Any) -> Any:
        with self._precision():
            outputs = self.model.heads(**features)
        return self.loss(outputs, batch)

    def whole(self, batch: Any, seed: int | Tensor) -> Any:
        computed = self.features(batch, seed)
        return self.terms(computed, batch) if self.splits else self.loss(computed, batch)

    def _precision(self) -> torch.autocast:
        return torch.autocast(next(self.parameters()).device.type, torch.bfloat16, enabled=self.autocast)


def trainable(trained: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by `<group>.<name>`; a shared one once.

    Raises:
        ValueError: one has no dimension (DeepSpeed cannot partition it), or nothing is trainable.
    """
    for name, parameter in trained.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(f"Engine: {name} must have at least one dimension, got shape (). Use shape (1,).")
    found = {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}
    if not found:
        raise ValueError("Engine: module must have a trainable parameter, got none.")
    return found


class Single:
    """Everything on one device.

    Args:
        trained: on its device.
        optim: optimizer settings.
        on_cpu: whether updates are computed on the CPU; by default if the parameters are there.
    """

    def __init__(self, trained: Trained, optim: OptimConfig, *, on_cpu: bool | None = None):
        self.trained, self.clip_norm = trained, optim.clip_norm
        self.parameters = trainable(trained)
        self.weights = {name for name, _ in trained.model.named_parameters()}
        self.clipped = {name for name in self.parameters if name.startswith(optim.clip_prefix)}
        if not self.clipped:
            names = f"{next(iter(self.parameters))} and others"
            raise ValueError(f"optim: clip_prefix must begin the name of {names}, got {optim.clip_prefix!r}.")
        self.optimizer = build_optimizer(self.parameters.items(), optim, on_cpu=on_cpu)
        if trained.replays:  # autograd takes the graph's memory for `grad`, see pytorch issue 169545
            for parameter in self.parameters.values():
                parameter.register_post_accumulate_grad_hook(_own_gradient)

    def begin(self, lr: float) -> None:
        """A step with this learning rate begins: no gradients yet."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.trained.zero_grad(set_to_none=True)

    def run(self, part: str, *args: Any) -> Any:
        """A part of `Trained`."""
        return self.trained(part, *args)

    def backward(self, scalar: Tensor, *, last: bool) -> None:
        """Add the gradients of `scalar`; `last` is true once, in the last call of a step."""
        scalar.backward()

    def update(self) -> tuple[Tensor, bool]:
        """Clip the gradients and step, unless one is not finite: (their norm before, whether it stepped)."""
        named = [(name, p.grad) for name, p in self.parameters.items() if p.grad is not None]
        gradients = [grad for name, grad in named if name in self.clipped]
        norm = clip_by_global_norm(gradients, self.clip_norm) if self.clip_norm else nn.utils.get_total_norm(gradients)
        if len(gradients) < len(named):
            others = nn.utils.get_total_norm([grad for name, grad in named if name not in self.clipped])
            norm = torch.hypot(norm, others)
        finite = bool(norm.isfinite())  # the one wait for the device
        if finite:
            self.optimizer.step()
        return norm, finite

    # ------------------------------------------------------------------------------------ the state, by name

    def lasts(self, group: str, name: str) -> bool:
        """Whether a tensor of the state is the same until `update`: buffers are not, nor what belongs to a loss."""
        return group == "optimizer" or (group == "model" and name in self.weights)

    def export_state(self, rank: int = 0, size: int = 1) -> State:
        """The state in groups, tensors of full size: "model", "loss" if it has any, and "optimizer".

        All ranks must call it. It may be the live tensors, which the next step changes; where ranks hold parts it is
        copies on the CPU, gathered one after the other.

        Args:
            rank, size: whose `share` of the state to keep, by default all of it.
        """
        return {"optimizer": {}} | share(self._items(), rank, size)  # there are no moments before the first step

    def _items(self) -> Iterator[tuple[str, str, Tensor]]:
        for full, tensor in self.trained.state_dict(keep_vars=True).items():
            group, _, name = full.partition(".")
            yield group, name, self._read(tensor)
        for full, parameter in self.parameters.items():
            for key, value in self._read_moments(parameter).items():
                yield "optimizer", f"{full}/{key}", value

    def import_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Undo of `export_state`, from the whole state on every rank.

        Raises:
            ValueError: names or shapes are not those of this module and optimizer.
        """
        own = self.trained.state_dict(keep_vars=True)
        given = {
            f"{g}.{name}": value for g, group in state.items() if g != "optimizer" for name, value in group.items()
        }
        if own.keys() != given.keys():
            odd = sorted(own.keys() ^ given.keys())
            raise ValueError(f"{odd[0]} {'is missing' if odd[0] in own else 'belongs to no part of it'}")
        shapes = {full: self._shape(tensor) for full, tensor in own.items()}
        moments: dict[str, dict[str, Tensor]] = {}
        for full, value in state["optimizer"].items():
            name, _, key = full.rpartition("/")
            if key not in self.optimizer.state_names:
                raise ValueError(f"{full}, which is no state of {type(self.optimizer).__name__}")
            if name not in self.parameters or (value.ndim and value.shape != shapes[name]):
                raise ValueError(f"{full} of shape {tuple(value.shape)}, which no trained parameter has")
            moments.setdefault(name, {})[key] = value
        for full, value in given.items():
            if value.shape != shapes[full]:
                raise ValueError(f"{full} has shape {tuple(value.shape)}, the module's {tuple(shapes[full])}")
        for full, value in given.items():
            self._write(own[full], value)
        self._write_moments(moments)

    def _shape(self, tensor: Tensor) -> torch.Size:
        return tensor.shape

    def _read(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @torch.no_grad()
    def _write(self, tensor: Tensor, value: Tensor) -> None:
        tensor.copy_(value)

    def _read_moments(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        return self.optimizer.state.get(parameter, {})

    def _write_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.optimizer.state.clear()
        for name, values in moments.items():
            parameter = self.parameters[name]
            device = {key: "cpu" if value.ndim == 0 else parameter.device for key, value in values.items()}
            self.optimizer.state[parameter] = {k: v.to(device[k], copy=True) for k, v in values.items()}


def _own_gradient(parameter: Tensor) -> None:
    parameter.grad = parameter.grad.clone()


class DDP(Single):
    """The same parameters on every rank; gradients are averaged in buckets while backward goes on.

    torch's DistributedDataParallel expects one forward and one backward per step; with accumulation there are several,
    and the heads' gradients are complete before the backbones' last part. Here a bucket leaves when all its gradients
    are complete: those that the previous backward reached wait for the last one, the others do not. Should the last
    backward reach more than that, their bucket goes once more at the end.
    """

    def __init__(self, trained: Trained, optim: OptimConfig):
        super().__init__(trained, optim)
        with torch.no_grad():
            for tensor in trained.state_dict().values():
                dist.broadcast(tensor, 0)
        self.buckets: list[list[nn.Parameter]] = [[]]
        size = 0
        for parameter in reversed(self.parameters.values()):  # backward's order, about
            if self.buckets[-1] and size + parameter.nbytes > BUCKET_BYTES:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += parameter.nbytes
        self.reached = set(self.parameters.values())  # by the newest backward
        self.last = False
        for index, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._complete, index))

    def begin(self, lr: float) -> None:
        super().begin(lr)
        self.sent: dict[int, tuple[Tensor, Any]] = {}

    def backward(self, scalar: Tensor, *, last: bool) -> None:
        self.last = last
        expected, self.reached = self.reached, set()
        self.waiting = [expected.intersection(bucket) for bucket in self.buckets]
        scalar.backward()
        self.last = False

    def _complete(self, index: int, parameter: nn.Parameter) -> None:
        self.reached.add(parameter)
        if not self.last:
            return
        if parameter not in self.waiting[index]:
            self.waiting[index].add(parameter)  # not expected: this bucket is sent, or sent again, at the end
            return
        self.waiting[index].discard(parameter)
        for ready in range(len(self.sent), len(self.buckets)):  # in order, the same on all ranks
            if self.waiting[ready]:
                return
            self.sent[ready] = self._send(self.buckets[ready])

    def _send(self, bucket: Sequence[nn.Parameter]) -> tuple[Tensor, Any]:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        return flat, dist.all_reduce(flat, async_op=True)

    def update(self) -> tuple[Tensor, bool]:
        for index, bucket in enumerate(self.buckets):
            if self.waiting[index] and index in self.sent:
                self.sent.pop(index)[1].wait()
            if index not in self.sent:
                self.sent[index] = self._send(bucket)
        for index, bucket in enumerate(self.buckets):
            flat, work = self.sent[index]
            work.wait()
            flat /= world_size()
            parts = zip(bucket, flat.split([p.numel() for p in bucket]))
            present = [(p.grad, part.view_as(p)) for p, part in parts if p.grad is not None]
            if present:
                torch._foreach_copy_(*map(list, zip(*present)))
        self.sent = {}
        return super().update()
