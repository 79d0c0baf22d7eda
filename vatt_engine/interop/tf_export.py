"""Our models as official TensorFlow checkpoints: the import's rules, walked backwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vatt_engine.interop.rules import Match, match
from vatt_engine.interop.tf_graph import ObjectGraph, Slot, official_objects
from vatt_engine.interop.tf_model import ADAM, SGD
from vatt_engine.interop.tf_names import VALUE, ObjectNames, object_names
from vatt_engine.interop.tf_vatt import Index, rules
from vatt_engine.interop.tf_write import BundleWriter
from vatt_engine.models import EncoderConfig, VATTConfig, build_model
from vatt_engine.models.registry import ModelConfig

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def write_tf_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    moments: Mapping[str, Tensor] | None = None,
    step: int = 0,
    constants: Mapping[str, float] | None = None,
) -> Path:
    """Write a model as the official trainer saves one: `ckpt-<step>.*`, and `checkpoint`, which names it.

    Args:
        folder: made if needed.
        config: of a whole model, or of a video or audio tower with or without a classifier.
        weights: parameters and buffers by our names.
        moments: by `<parameter>/<moment>`, of KerasAdam or KerasSGD; parameters without any get no slots.
        step: finished steps.
        constants: beta_1 and beta_2 or momentum, where they are not the official ones.

    Returns:
        The checkpoint's prefix.

    Raises:
        ValueError: the official code has no such model.
        OSError: the disk is full or not writable.

    >>> write_tf_checkpoint("out", model.config, model.state_dict())  # doctest: +SKIP
    PosixPath('out/ckpt-0')
    """
    moments = moments or {}
    adam = any(name.endswith("/exp_avg") for name in moments) or (not moments and isinstance(config, VATTConfig))
    kept = ADAM if adam else SGD
    numbers = {"beta_1": 0.9, "beta_2": 0.999, "decay": 0.0} if adam else {"decay": 0.0, "momentum": 0.9}
    numbers |= {name: value for name, value in (constants or {}).items() if name in numbers}
    matches, names, graph = _matched(config, ["iter", *numbers])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix, slots = folder / f"ckpt-{step}", []
    with BundleWriter(prefix) as bundle:
        for one in matches:
            for key, array in _parts(one, weights[one.rule.name], names):
                bundle.add(key, array)
            for ours, theirs in kept.items():
                if (moment := moments.get(f"{one.rule.name}/{ours}")) is not None:
                    for key, array in _parts(one, moment, names):
                        slots.append(Slot(key.removesuffix(VALUE), theirs))
                        bundle.add(slots[-1].key, array)
        bundle.add(f"optimizer/iter{VALUE}", np.int64(step))
        for name, value in numbers.items():
            bundle.add(f"optimizer/{name}{VALUE}", np.float32(value))
        bundle.add(f"save_counter{VALUE}", np.int64(1))
        bundle.add_text(GRAPH, graph.serialized(slots))
    state = f'model_checkpoint_path: "{prefix.name}"\nall_model_checkpoint_paths: "{prefix.name}"\n'
    (folder / "checkpoint").write_text(state, encoding="utf-8")
    return prefix


def _matched(config: ModelConfig, optimizer: list[str]) -> tuple[list[Match], ObjectNames, ObjectGraph]:
    """Our tensors, each with the official variables that make it, and the official program's objects."""
    if isinstance(config, EncoderConfig) and config.modality == "text":
        expected = "be of a whole model, or of a video or audio tower"
        raise ValueError(f"write_tf_checkpoint: config must {expected}, got {config.name}.")
    graph = ObjectGraph(official_objects(config, optimizer))
    names = object_names(path + VALUE for path in graph.variables)
    with torch.device("meta"):
        model = build_model(config)
    variables = dict.fromkeys(names.variables)
    matches, report = match(model.state_dict(), rules(model), variables, Index(variables).find)
    text = config.text if isinstance(config, VATTConfig) and config.backbone == "specific" else None
    if report.missing or report.unused or (text is not None and text.relative_bias != "all"):
        odd = (report.missing + [f"no {name}" for name in report.unused] or ["text.relative_bias 'first'"])[0]
        raise ValueError(f"write_tf_checkpoint: config must be of a model that the official code has, got {odd}.")
    return matches, names, graph


def _parts(one: Match, tensor: Tensor, names: ObjectNames) -> Iterator[tuple[str, np.ndarray]]:
    """The official variables that make one of our tensors, with their keys.

    A rule only moves numbers; so joining their places tells where each number of ours came from.
    """
    sizes = [int(np.prod(source.shape)) for source in one.rule.sources]
    ends = np.cumsum(sizes)
    places = [
        np.arange(end - size, end).reshape(source.shape) for size, end, source in zip(sizes, ends, one.rule.sources)
    ]
    flat = np.empty(ends[-1], np.float32)
    flat[one.rule.join(places).reshape(-1)] = tensor.detach().float().cpu().numpy().reshape(-1)
    for key, size, end, source in zip(one.keys, sizes, ends, one.rule.sources):
        yield names.variables[key], flat[end - size : end].reshape(source.shape)
