"""The training step, and the state that makes it resume bit for bit: a module, a loss, batches, and no modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vatt_engine.collectives import rank, world_size
from vatt_engine.engine import checkpoint
from vatt_engine.engine.config import EngineConfig
from vatt_engine.engine.faults import TrainingStopped
from vatt_engine.engine.logging import versions
from vatt_engine.engine.optim import OptimConfig
from vatt_engine.engine.precision import preferred_precision
from vatt_engine.engine.schedule import ScheduleConfig, learning_rate
from vatt_engine.engine.seeds import derive_seed, random_state, set_random_state
from vatt_engine.engine.strategies import DDP, Single, Trained, trainable
from vatt_engine.engine.strategies_zero import Zero
from vatt_engine.engine.writer import CheckpointWriter
from vatt_engine.output import say, write_text

PARTS_FILE = "accumulate"  # in the run folder, where memory has run out: the parts that go on
ZERO_FROM = 300_000_000  # trainable parameters from which "auto" is ZeRO-2: vatt_lbs and vatt_ma_large are above


class StepOutput(NamedTuple):
    """What one step did. `step` counts finished steps; `terms` are the loss's fields, as this rank has them."""

    step: int
    terms: dict[str, Tensor]
    grad_norm: Tensor
    lr: float
    skipped: bool


class Engine:
    """Trains a module with a loss: this rank's share of a batch in, one optimizer step out; saves and resumes.

        loss = loss(module(batch, seed=s), batch),  s = hash(config.seed, step)

    The gradient is the mean over ranks. With `accumulate` > 1 the backbones run part by part:

        f_c = features(part c, seed=s), without graph;   t = loss(heads(f), batch);   g = dt/df
        then for each part again, with its graph:  d<f_c, g_c>

    which is the same gradient. The global random state is set from hash(config.seed, step, c, rank) before part c, each
    of the two times, so dropout depends on that alone.

    A step whose gradient is not finite on any rank is skipped on all: weights, optimizer and buffers stay as they were,
    the step counts. (The official run sets such gradient entries to 0 and steps.) A loss that is not finite counts as
    such a gradient.

    Args:
        module: called as `module(batch, seed=int)`, or as the two it is made of: `features(batch, seed=)`, a dict of
            tensors in which no row depends on another, and `heads(**features)`. Accumulation needs these; calls
            then may change buffers of the heads only, and never parameters.
        loss: called as `loss(outputs, batch)`; returns a NamedTuple of scalar tensors whose first field is `total`. Its
            parameters, if it is a module, are trained too.
        config: steps, accumulation, strategy, precision.
        optim: optimizer settings.
        schedule: learning rate by step.
        run_dir: where `save` and `resume` put and find `checkpoints/`.

    Raises:
        ValueError: a parameter has 0 dimensions (DeepSpeed cannot partition one), nothing is trainable, the module
            cannot be run in parts, or the strategy does not fit the number of processes.

    >>> engine = Engine(model, loss, EngineConfig(steps=600), OptimConfig(), ScheduleConfig())  # doctest: +SKIP
    >>> engine.step(batch).terms["total"]  # doctest: +SKIP
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
        self.config, self.schedule, self.run_dir, self.peak = config, schedule, run_dir, optim.lr
        self.versions = versions("vatt_engine", "torch")
        self.writer = CheckpointWriter(keep=config.keep_checkpoints)
        self.parts = config.accumulate
        if config.halve_on_oom and run_dir is not None and (path := Path(run_dir) / PARTS_FILE).is_file():
            self.parts = max(self.parts, int(path.read_text(encoding="utf-8")))
        self.device = config.torch_device()
        self.module, self.loss = module, loss
        self.precision = preferred_precision(self.device) if config.precision == "auto" else config.precision
        self.trained = Trained(module, loss, autocast=self.precision == "bf16", compiled=config.compile)
        self.trained.to(self.device).train()
        if config.accumulate > 1 and not self.trained.splits:
            wanted = "have features and heads to accumulate"
            raise ValueError(
                f"Engine: module must {wanted}, got a {type(module).__name__}. Set engine.accumulate to 1."
            )
        if config.checkpoint_activations:
            for part in _able(module, "checkpoint_activations", "checkpoint its activations"):
                part.checkpoint_activations = True
        if config.compile == "layers":
            for part in _able(module, "compile_layers", "compile its layers"):
                part.compile_layers()
        self.strategy_name = _strategy_name(self.trained, config, optim)
        self.strategy = _strategy(self.strategy_name, self.trained, config, optim)
        self.finished = 0  # steps
        self.skipped = 0  # of them, in the whole run
        self.skipped_in_a_row = 0

    def step(self, batch: Any) -> StepOutput:
        """One optimizer step on this rank's share of a batch.

        Args:
            batch: has `to(device)`, `len` and, for accumulation, `split(num_parts)`; of equal size on all ranks.

        Raises:
            ValueError: the batch is empty.
            TrainingStopped: `config.max_skipped` steps in a row were skipped.
        """
        if not len(batch):
            raise ValueError("Engine.step: batch must hold at least one row, got none.")
        lr = learning_rate(self.finished, self.schedule, self.peak)
        self.strategy.begin(lr)
        before = [(buffer, buffer.clone()) for buffer in self.trained.buffers()]
        batch = batch.to(self.device)
        while True:
            try:
                terms = self._backward(batch)
                break
            except torch.OutOfMemoryError as error:
                self._halve(len(batch), error)
            for buffer, value in before:
                buffer.copy_(value)
            self.strategy.begin(lr)
        self.writer.settle()
        norm, taken = self.strategy.update()
        if not taken:
            for buffer, value in before:
                buffer.copy_(value)
        self._count(taken, terms)
        return StepOutput(self.finished, terms, norm, lr, not taken)

    def _backward(self, batch: Any) -> dict[str, Tensor]:
        """Gradients of the loss; returns its terms."""
        seed: int | Tensor = derive_seed(self.config.seed, self.finished)
        if self.config.compile != "off":
            seed = torch.tensor(seed, device=self.device)  # a number would be compiled in
        parts = min(self.parts, len(batch))
        if parts > 1:
            terms = self._backward_in_parts(batch, batch.split(parts), seed)
        else:
            self._set_random(0)
            terms = self.strategy.run("whole", batch, seed)
            self.strategy.backward(_or_nan(terms.total), last=True)
        return {name: value.detach() for name, value in terms._asdict().items() if value is not None}

    def _backward_in_parts(self, batch: Any, parts: list[Any], seed: int | Tensor) -> Any:
        computed = self._pooled(parts, seed)
        whole = _joined(computed)
        for x in whole.values():
            if x is not None:
                x.requires_grad_()
        self._set_random(len(parts))
        terms = self.strategy.run("terms", dict(whole), batch)  # DeepSpeed puts other tensors into the dict it gets
        self.strategy.backward(_or_nan(terms.total), last=False)
        used = {name: x.grad for name, x in whole.items() if x is not None and x.grad is not None}
        gradients = {name: grad.split([len(c[name]) for c in computed]) for name, grad in used.items()}
        for index, part in enumerate(parts):
            self._set_random(index)
            features = self.strategy.run("features", part, seed)
            products = [(features[name].float() * g[index].float()).sum() for name, g in gradients.items()]
            self.strategy.backward(torch.stack(products).sum(), last=index == len(parts) - 1)
        return terms

    @torch.no_grad()
    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """The loss's terms on this rank's share of a batch, in evaluation mode; training does not notice.

        All ranks call it, with shares of equal size.

        >>> engine.evaluate(batch)["total"]  # doctest: +SKIP
        """
        batch = batch.to(self.device)
        parts = min(self.parts, len(batch))
        self.trained.eval()
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                if parts > 1:
                    computed = self._pooled(batch.split(parts), 0)
                    terms = self.strategy.run("terms", _joined(computed), batch)
                else:
                    terms = self.strategy.run("whole", batch, 0)
        finally:
            self.trained.train()
        return {name: value for name, value in terms._asdict().items() if value is not None}

    @torch.no_grad()
    def _pooled(self, parts: list[Any], seed: int | Tensor) -> list[dict[str, Tensor | None]]:
        """The features of each part, without their graph; clones, as a CUDA graph writes each into the same memory."""
        computed = []
        for index, part in enumerate(parts):
            self._set_random(index)
            features = self.strategy.run("features", part, seed)
            computed.append({name: None if x is None else x.clone() for name, x in features.items()})
        return computed

    def _halve(self, num_rows: int, error: torch.OutOfMemoryError) -> None:
        """Twice as many parts from here on, or, where ranks are in the midst of a collective, from the restart on."""
        if not self.config.halve_on_oom or self.run_dir is None or not self.trained.splits or self.parts >= num_rows:
            raise error
        self.parts *= 2
        text = f"step {self.finished + 1}: out of memory; from here on the batch goes through in {self.parts} parts"
        write_text(self._folder() / PARTS_FILE, f"{self.parts}\n")
        if world_size() > 1:
            raise TrainingStopped(f"rank {rank()}: {text}, after a restart with --resume.") from error
        say(text)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _set_random(self, part: int) -> None:
        torch.manual_seed(derive_seed(self.config.seed, self.finished, part, rank()))

    def _count(self, taken: bool, terms: Mapping[str, Tensor]) -> None:
        self.finished += 1
        self.skipped += not taken
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.max_skipped:
            shown = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise TrainingStopped(
                f"Engine.step: loss and gradients must be finite, got {self.skipped_in_a_row} steps in a row that are "
                f"not, up to step {self.finished} ({shown}). Lower the learning rate, or check the data of these steps."
            )

    # ------------------------------------------------------------------------------------ checkpoints

    def save(self, *, wait: bool = True, **extra: Any) -> Path | None:
        """Write a checkpoint of this moment; `extra` (JSON values: loader state, config) comes back from `resume`.

        All ranks call it, each writes its share.

        Returns:
            Its folder, or None with `wait=False`: it is written in the background, and `writer.news()` tells the rest.

        Raises:
            OSError: with `wait`, it could not be written; older checkpoints are intact.
        """
        tensors = self.strategy.export_state(rank(), world_size())
        counters = {name: getattr(self, name) for name in ("finished", "skipped", "skipped_in_a_row")}
        state = {**counters, "random": random_state(), "versions": self.versions, "extra": extra}
        self.writer.save(self._folder(), self.finished, tensors, state, lasts=self.strategy.lasts)
        return self.writer.finish() if wait else None

    def resume(self) -> checkpoint.Checkpoint:
        """Continue from the newest valid checkpoint of the run folder; what `save` was given is in `.state["extra"]`.

        Raises:
            CheckpointError: there is none, or it belongs to another model or optimizer.
        """
        self.writer.join()
        found = checkpoint.load_latest(self._folder())
        try:
            self.strategy.import_state(found.tensors)
            for name in ("finished", "skipped", "skipped_in_a_row"):
                setattr(self, name, int(found.state[name]))
            set_random_state(found.state["random"])
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:400]
            raise checkpoint.CheckpointError(
                f"{found.path}: the checkpoint must fit the model and optimizer of this run, got: {reason}"
            ) from error
        return found

    def _folder(self) -> Path:
        if self.run_dir is None:
            raise ValueError("Engine: run_dir must be given to save or resume, got None.")
        return Path(self.run_dir)


def _strategy_name(trained: Trained, config: EngineConfig, optim: OptimConfig) -> str:
    """The one to use: "auto" decided, "ddp" of one process is "single"."""
    if config.strategy == "single" and world_size() > 1:
        raise ValueError(f"engine: strategy must share the work of {world_size()} processes, got single.")
    if config.strategy.startswith("zero"):
        if optim.clip_prefix:
            text = f"be single or ddp where optim.clip_prefix is given, got {config.strategy}"
            raise ValueError(f"engine: strategy must {text}. ZeRO knows the norm of all gradients alone.")
        return config.strategy
    if world_size() == 1:
        return "single"
    many = sum(p.numel() for p in trainable(trained).values()) >= ZERO_FROM
    able = not optim.clip_prefix and config.compile != "reduce-overhead"
    return "zero2" if config.strategy == "auto" and many and able else "ddp"


def _strategy(name: str, trained: Trained, config: EngineConfig, optim: OptimConfig) -> Single:
    if name.startswith("zero"):
        return Zero(trained, optim, stage=int(name[-1]), offload=config.offload)
    return DDP(trained, optim) if name == "ddp" else Single(trained, optim)


def _able(module: nn.Module, name: str, what: str) -> list[nn.Module]:
    """Every part that can do what is asked, which it says by having the attribute."""
    able = [part for part in module.modules() if hasattr(part, name)]
    if not able:
        setting = "checkpoint_activations to false" if name == "checkpoint_activations" else "compile to another mode"
        raise ValueError(f"Engine: module must have a part that can {what}, got none. Set engine.{setting}.")
    return able


def _joined(parts: list[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    return {name: None if x is None else torch.cat([part[name] for part in parts]) for name, x in parts[0].items()}


def _or_nan(total: Tensor) -> Tensor:
    """A loss that is not finite gets gradients that are not either, which every rank then sees and skips."""
    return total * torch.where(total.detach().isfinite(), 1.0, torch.nan)
