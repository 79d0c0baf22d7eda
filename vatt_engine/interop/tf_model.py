"""An official checkpoint as one of our models: which one it is, its weights, and the state of its optimizer.

Nothing is read before it is asked for, and then one tensor at a time: a full-size training checkpoint holds three times
as many numbers as its model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vatt_engine.interop.rules import Match, match
from vatt_engine.interop.tf_bundle import TFCheckpoint
from vatt_engine.interop.tf_names import VALUE, NamedVariables, ObjectNames, has_object_paths, object_names
from vatt_engine.interop.tf_sizes import config_of_shapes
from vatt_engine.interop.tf_vatt import Index, rules
from vatt_engine.models import build_model
from vatt_engine.models.registry import ModelConfig

# Ours -> theirs, of what an optimizer keeps per parameter.
ADAM = {"exp_avg": "m", "exp_avg_sq": "v"}
SGD = {"velocity": "momentum"}
TABLES = ("text.embedding.weight", "backbone.stems.text.embedding.weight")


@dataclass(frozen=True)
class OfficialModel:
    """What an official checkpoint holds, by our names.

    `shapes` are our tensors' in the order in which `weights` gives them, `optimizer` is whose state there is, `step`
    the finished steps, `unused` the variables that our models have no place for, and `frozen` our tables of word
    vectors that the checkpoint holds no slot of the optimizer for.
    """

    checkpoint: TFCheckpoint
    names: ObjectNames
    config: ModelConfig
    matches: tuple[Match, ...]
    unused: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {one.rule.name: tuple(one.target.shape) for one in self.matches}

    @property
    def optimizer(self) -> Literal["adam", "sgd"] | None:
        kept = {slot for _, slot in self.names.slots}
        known = {"adam": set(ADAM.values()), "sgd": set(SGD.values())}
        return next((name for name, slots in known.items() if slots == kept), None)

    @property
    def step(self) -> int:
        return int(self.number("iter", 0))

    @property
    def frozen(self) -> list[str]:
        """The table of word vectors, unless it has slots."""
        tables = [one for one in self.matches if one.rule.name in TABLES]
        return [
            one.rule.name
            for one in tables
            if not any((key, slot) in self.names.slots for key in one.keys for slot in "mv")
        ]

    def number(self, name: str, default: float) -> float:
        """A number of the optimizer: iter, beta_1, beta_2, momentum, decay."""
        key = f"optimizer/{name}{VALUE}"
        return self.checkpoint[key].item() if key in self.checkpoint else default

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Pairs of our name and the float32 array in our layout, parameters and buffers."""
        variables = NamedVariables(self.checkpoint, self.names)
        for one in self.matches:
            yield one.rule.name, one.rule.join(one.read(variables))

    def moments(self) -> Iterator[tuple[str, np.ndarray]]:
        """Pairs of `<parameter>/<moment>`, as this engine's optimizers name them, and the array in our layout."""
        kept = {"adam": ADAM, "sgd": SGD, None: {}}[self.optimizer]
        for one in self.matches:
            for ours, theirs in kept.items():
                keys = [self.names.slots.get((key, theirs)) for key in one.keys]
                if None not in keys:
                    yield f"{one.rule.name}/{ours}", one.rule.join([self.checkpoint[key] for key in keys])
                elif any(keys):
                    expected = f"have {theirs} for all its parts, got it for some"
                    raise ValueError(f"{self.checkpoint.index}: {one.rule.name} must {expected}.")


def official_model(
    checkpoint: TFCheckpoint, *, head_dim: tuple[int, ...] = (), config: ModelConfig | None = None
) -> OfficialModel:
    """What model an official checkpoint is.

    Args:
        checkpoint: of the official trainer, for pre-training or fine-tuning.
        head_dim: width of an attention head, the one size that no shape tells: none for 64, one number, or video's and
            audio's.
        config: of the model, in place of the one that the shapes tell.

    Raises:
        ValueError: it is no such checkpoint, or not of that config; the message begins with the file.

    >>> official_model(read_tf_checkpoint("ckpt-500000")).config.name  # doctest: +SKIP
    'vatt_bbs'
    """
    try:
        if not has_object_paths(checkpoint):
            keys = ", ".join(list(checkpoint)[:2]) or "none"
            raise ValueError(f"the keys must be paths through objects, as a TensorFlow 2 trainer saves, got {keys}")
        names = object_names(checkpoint)
        if not names.variables:
            key = f"{min(names.others, default='nothing')[:60]} ..."
            raise ValueError(f"the checkpoint must be of an official VATT model, got none of its variables, but {key}")
        variables = NamedVariables(checkpoint, names)
        if config is None:
            config = config_of_shapes({name: variables.shape(name) for name in variables}, head_dim)
        with torch.device("meta"):
            model = build_model(config)
        index = Index(variables)
        matches, report = match(model.state_dict(), rules(model), variables, index.find)
        for one in matches:
            report.misshaped += one.misshaped([variables.shape(key) for key in one.keys])
        if report.missing or report.misshaped:
            faults = report.missing + report.misshaped
            more = f" and {len(faults) - 2} more" if len(faults) > 2 else ""
            raise ValueError(
                f"the checkpoint must fit {config.name}, got other variables for {', '.join(faults[:2])}{more}"
            )
    except ValueError as error:
        if str(error).startswith(str(checkpoint.prefix)):
            raise
        raise ValueError(f"{checkpoint.index}: {str(error).rstrip('.')}.") from error
    return OfficialModel(checkpoint, names, config, tuple(matches), tuple(report.unused))
