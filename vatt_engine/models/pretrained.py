"""Models on disk: config.json + model.safetensors (+ tokenizer.json), nothing pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vatt_engine import schema
from vatt_engine.models.config import EncoderConfig, VATTConfig
from vatt_engine.models.registry import ModelConfig, build_model
from vatt_engine.models.streamed import write_safetensors
from vatt_engine.models.text import WordEmbedding
from vatt_engine.models.vatt import PatchEncoder

Modality = Literal["video", "audio"]

_KINDS = {"VATTConfig": VATTConfig, "EncoderConfig": EncoderConfig}


class Saveable(Protocol):
    """A vocabulary: whatever writes itself to a path."""

    def save(self, path: Path) -> None: ...


def save_pretrained(model: nn.Module, directory: str | Path, *, vocabulary: Saveable | None = None) -> None:
    """Write a model made by `create_model` so that `from_pretrained(directory)` gives it back.

    Args:
        model: its `config` says how to rebuild it.
        directory: made if needed; receives config.json, model.safetensors and, with a vocabulary, tokenizer.json.

    Raises:
        OSError: the disk is full or not writable; an older model.safetensors is then untouched.

    >>> save_pretrained(model, "out", vocabulary=vocabulary)  # doctest: +SKIP
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    partial = directory / "model.safetensors.tmp"
    try:
        save_file(weights, partial, metadata={"format": "pt"})
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{partial}: the weights must fit on the disk, got an error: {error}.") from error
    os.replace(partial, directory / "model.safetensors")
    tables = {name: module for name, module in model.named_modules() if isinstance(module, WordEmbedding)}
    frozen = [f"{name}.weight".lstrip(".") for name, table in tables.items() if not table.weight.requires_grad]
    _save_words(directory, model.config, frozen, vocabulary)


def write_pretrained(
    directory: str | Path,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Iterable[tuple[str, np.ndarray]],
    *,
    frozen: Sequence[str] = (),
    vocabulary: Saveable | None = None,
) -> None:
    """What `save_pretrained` writes, from weights that come one after the other and were never together in memory.

    Args:
        directory: made if needed.
        config: of the model.
        shapes: of all its tensors by name, in the order of `weights`.
        weights: pairs of name and array.
        frozen: tables of word vectors that are not trained.

    Raises:
        OSError: the disk is full or not writable.

    >>> write_pretrained("out", config, {"head.bias": (2,)}, [("head.bias", np.zeros(2))])  # doctest: +SKIP
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", shapes, weights)
    _save_words(directory, config, frozen, vocabulary)


def _save_words(directory: Path, config: ModelConfig, frozen: Sequence[str], vocabulary: Saveable | None) -> None:
    """The files beside the weights. `frozen` is state and not config: loading vectors into a table freezes it."""
    document = {"kind": type(config).__name__, "config": schema.to_dict(config)}
    if frozen:
        document["frozen"] = list(frozen)
    (directory / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if vocabulary is not None:
        vocabulary.save(directory / "tokenizer.json")


def from_pretrained(directory: str | Path) -> nn.Module:
    """Load a model that `save_pretrained` wrote, in evaluation mode.

    Raises:
        ValueError: a file is damaged, or the weights are not those of the config.
        FileNotFoundError: a file is missing.

    >>> from_pretrained("out").training  # doctest: +SKIP
    False
    """
    config, frozen = _read_document(Path(directory) / "config.json")
    model = build_model(config)
    load_weights(model, Path(directory) / "model.safetensors")
    parameters = dict(model.named_parameters())
    for name in frozen:
        if name not in parameters:
            raise ValueError(f"{directory}/config.json: frozen must name parameters of the model, got {name!r}.")
        parameters[name].requires_grad_(False)
    return model.eval()


def read_config(path: str | Path) -> ModelConfig:
    """The config of a model in the config.json of its folder.

    Raises:
        ValueError: the file is no such config.
        FileNotFoundError: it is missing.

    >>> read_config("out/config.json").name  # doctest: +SKIP
    'vatt_bbs'
    """
    return _read_document(Path(path))[0]


def read_frozen(path: str | Path) -> list[str]:
    """Parameters that the config.json of a model's folder says are not trained.

    Raises:
        ValueError, FileNotFoundError: as `read_config`.

    >>> read_frozen("out/config.json")  # doctest: +SKIP
    ['text.embedding.weight']
    """
    return _read_document(Path(path))[1]


def _read_document(path: Path) -> tuple[ModelConfig, list[str]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("kind") not in list(_KINDS):
            raise ValueError(f"no kind, one of {' and '.join(_KINDS)}")
        frozen = document.get("frozen", [])
        if not isinstance(frozen, list) or not all(isinstance(name, str) for name in frozen):
            raise ValueError("frozen, which is no list of names")
    except ValueError as error:
        raise ValueError(f"{path}: the file must be a config that save_pretrained wrote, got {error!r}.") from error
    config = schema.from_dict(_KINDS[document["kind"]], document.get("config", {}), where=str(path))
    return config, frozen


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a module; every tensor must be there with its shape, and none besides.

    Raises:
        ValueError: the file is damaged, or lists what is missing, unknown or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: the file must be intact safetensors, got {error}.") from error
    wanted = model.state_dict()
    faults = [f"missing {name}" for name in wanted.keys() - weights.keys()]
    faults += [f"unknown {name}" for name in weights.keys() - wanted.keys()]
    faults += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(wanted[name].shape)}"
        for name in wanted.keys() & weights.keys()
        if weights[name].shape != wanted[name].shape
    ]
    if faults:
        raise ValueError(f"{path}: the weights must be those of the config, got {'; '.join(sorted(faults)[:8])}.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(weights[name])


def tower_config(config: ModelConfig, modality: Modality) -> EncoderConfig:
    """One modality's way through a model as an encoder of its own, without a classifier.

    A modality-agnostic model's is its stem, the shared transformer and its last projection.

    Raises:
        ValueError: an encoder of another modality.

    >>> tower_config(VATTConfig(backbone="agnostic"), "audio").audio.post_projection
    1024
    """
    if isinstance(config, EncoderConfig):
        if config.modality != modality:
            wanted = schema.with_article(f"{modality} tower")
            raise ValueError(f"tower_config: config must have {wanted}, got the {config.modality} encoder.")
        return replace(config, num_classes=0)
    part = getattr(config, modality)
    if config.backbone == "agnostic":
        part = replace(part, transformer=config.shared, post_projection=config.shared_projection)
    return EncoderConfig(name=config.name, modality=modality, **{modality: part})


def tower_weights(config: ModelConfig, weights: Mapping[str, Tensor], modality: Modality) -> dict[str, Tensor]:
    """Of a model's weights by name those of the encoder that `tower_config` describes, by its names."""
    if isinstance(config, EncoderConfig):
        parts = {"encoder.": ""} if config.num_classes else {"": ""}
    elif config.backbone == "agnostic":
        parts = {f"backbone.stems.{modality}.": "stem.", "backbone.transformer.": "transformer."}
        parts[f"backbone.post_projections.{modality}."] = "post_projection."
    else:
        parts = {f"{modality}.": ""}
    found = ((old, new, name) for old, new in parts.items() for name in weights if name.startswith(old))
    return {new + name.removeprefix(old): weights[name] for old, new, name in found}


def load_tower(encoder: PatchEncoder, config: EncoderConfig, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a tower into an encoder of another input size: position tables are resampled.

    Args:
        encoder: of the same sizes otherwise.
        config, weights: from `tower_config` and `tower_weights`.

    Raises:
        ValueError: something else than the position tables has another shape, is missing or unknown.
    """
    position = encoder.stem.position
    names = [f"stem.position.tables.{axis}" for axis in range(len(position.tables))]
    tables = [weights[name] for name in names if name in weights]
    if len(tables) == len(names):
        grid = getattr(config, config.modality).grid
        weights = {**weights, **dict(zip(names, position.resampled(tables, grid)))}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"load_tower: weights must be those of the encoder, got: {reason}") from error
