"""`vatt convert SOURCE DESTINATION`: between runs, models as plain safetensors, DeepSpeed universal checkpoints and the
official TensorFlow checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from vatt_engine.data.words import Vocabulary
from vatt_engine.engine import checkpoint
from vatt_engine.engine.seeds import random_state
from vatt_engine.interop.deepspeed import Universal, is_universal, read_universal, write_universal
from vatt_engine.interop.tf_export import write_tf_checkpoint
from vatt_engine.interop.tf_files import is_tf_checkpoint
from vatt_engine.models import build_model, from_pretrained, read_config, read_frozen, save_pretrained
from vatt_engine.models.registry import ModelConfig
from vatt_engine.schema import ConfigError, PathText
from vatt_engine.tasks.convert_official import (
    as_universal,
    described_model,
    read_official,
    write_official_model,
    write_official_run,
)
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.results import check_writable
from vatt_engine.tasks.towers import load_run_config


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """From one form of a trained model to another; what SOURCE is shows in its files.

    Args:
        source: a run folder (its newest valid checkpoint), a model folder (config.json and model.safetensors), a
            DeepSpeed universal checkpoint, LOAD_DIR/TAG, or an official TensorFlow 2 checkpoint: its prefix, its .index
            or the folder with it. DeepSpeed's files are pickles; they are read by torch's restricted unpickler in a
            process of its own.
        destination: a new folder.
        to: "model" for plain safetensors, "universal" for DeepSpeed, "run" for a checkpoint that
            `vatt pretrain CONFIG --out DESTINATION --resume` continues: without moments after a model folder, and with
            the data from its beginning; "tensorflow" for a checkpoint that the official code restores.
        config: recipe, YAML file or config.json of the model, for a universal source that becomes a model; of an
            official checkpoint the shapes tell it.
        head_dim: width of an attention head in an official checkpoint, which its shapes do not tell: none for 64, one
            number, or two, video's and audio's.
        vocabulary: howto100m_en.txt of an official model, a word per line; becomes its tokenizer.json.
    """

    source: PathText
    destination: PathText
    to: Literal["model", "universal", "run", "tensorflow"] = "model"
    config: PathText | None = None
    head_dim: tuple[int, ...] = ()
    vocabulary: PathText | None = None


def main(argv: Sequence[str]) -> int:
    config = parse_flags(ConvertConfig, argv, prog="vatt convert", positional=("source", "destination"))
    destination = Path(config.destination)
    if destination.exists() and any(destination.iterdir() if destination.is_dir() else [destination]):
        raise ConfigError(f"vatt convert: DESTINATION must be a new folder, got {destination}, which is there.")
    check_writable(destination, "vatt convert", "Name another DESTINATION.")
    if is_tf_checkpoint(Path(config.source)):
        return _from_official(config, destination)
    for name in ("head_dim", "vocabulary"):
        if getattr(config, name):
            flag = name.replace("_", "-")
            expected = "be left out where SOURCE is no official TensorFlow checkpoint"
            raise ConfigError(f"vatt convert: --{flag} must {expected}, got {getattr(config, name)}.")
    found = _read(Path(config.source), config.to)
    if config.to == "model":
        _write_model(found, config, destination)
    elif config.to == "run":
        moments = {f"model.{name}": value for name, value in found.moments.items()}
        tensors = {"model": found.weights, "optimizer": moments}
        counters = {"finished": found.step, "skipped": 0, "skipped_in_a_row": 0}
        state = {**counters, "random": random_state(), "extra": {}, "frozen": _frozen(Path(config.source))}
        checkpoint.save(destination, found.step, tensors, state)
        if (words := _words(config)) is not None:
            words.save(destination / "tokenizer.json")
    elif config.to == "universal":
        _write_universal(found, config, destination, _model(config))
    else:
        _write_tensorflow(found, config, destination)
    _done(config, found.step, len(found.weights))
    return 0


def _from_official(config: ConvertConfig, destination: Path) -> int:
    if config.to == "tensorflow":
        raise ConfigError(f"vatt convert: --to must be another form than that of {config.source}, got 'tensorflow'.")
    found = read_official(config.source, config.head_dim, config.config)
    if config.to == "model":
        write_official_model(found, destination, config.vocabulary)
    elif config.to == "run":
        write_official_run(found, destination, config.vocabulary)
    else:
        with torch.device("meta"):
            model = build_model(found.config)
        _write_universal(as_universal(found), config, destination, model)
    _done(config, found.step, len(found.matches))
    return 0


def _write_universal(found: Universal, config: ConvertConfig, destination: Path, model: nn.Module) -> None:
    if not any(name.endswith("/exp_avg") for name in found.moments):
        got = "those of SGD" if found.moments else "none"
        raise ConfigError(f"vatt convert: {config.source} must hold Adam's moments for DeepSpeed, got {got}.")
    write_universal(destination, found, buffers={name for name, _ in model.named_buffers()})


def _write_tensorflow(found: Universal, config: ConvertConfig, destination: Path) -> None:
    source, constants = Path(config.source), {}
    if (source / "config.yaml").is_file():
        optim = load_run_config(source).optim
        constants = {"beta_1": optim.betas[0], "beta_2": optim.betas[1], "momentum": optim.momentum}
    prefix = write_tf_checkpoint(
        destination, _model_config(config), found.weights, moments=found.moments, step=found.step, constants=constants
    )
    print(f"the official code restores {prefix} with --override_checkpoint, or by --model_dir", file=sys.stderr)


def _done(config: ConvertConfig, step: int, num_tensors: int) -> None:
    print(f"{config.source}, step {step} -> {config.destination} ({num_tensors} tensors)", file=sys.stderr)


def _read(source: Path, to: str) -> Universal:
    if is_universal(source):
        return read_universal(source)
    if (source / "model.safetensors").is_file():
        return Universal(from_pretrained(source).state_dict(), {}, 0)
    found = checkpoint.load_latest(source)
    for reason in found.skipped:
        print(reason, file=sys.stderr)
    if "loss" in found.tensors:
        names = ", ".join(found.tensors["loss"])
        if to not in ("model", "tensorflow"):
            expected = f"have no parameters of the loss, which have no place in a {to} one"
            raise ConfigError(f"vatt convert: {source} must {expected}, got {names}. `--to model` leaves them out.")
        print(f"note: {names} of the loss has no place in a model and is left out", file=sys.stderr)
    optimizer = found.tensors["optimizer"].items()
    moments = {name.removeprefix("model."): value for name, value in optimizer if name.startswith("model.")}
    return Universal(found.tensors["model"], moments, found.step)


def _model(config: ConvertConfig) -> nn.Module:
    return build_model(_model_config(config))


def _model_config(config: ConvertConfig) -> ModelConfig:
    source = Path(config.source)
    if config.config is None and (source / "config.json").is_file():
        return read_config(source / "config.json")
    described = config.config or str(source / "config.yaml")
    if config.config is None and not Path(described).is_file():
        raise ConfigError(f"vatt convert: --config must name the model of {source}, got none. A recipe or a YAML file.")
    return described_model(described)


def _write_model(found: Universal, config: ConvertConfig, destination: Path) -> None:
    model = _model(config)
    try:
        model.load_state_dict(found.weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"vatt convert: {config.source} must fit the model of its config, got: {reason}") from error
    save_pretrained(model, destination, vocabulary=_words(config))


def _frozen(source: Path) -> list[str]:
    """Tables of word vectors that a model's folder says are not trained."""
    model = source / "config.json"
    return read_frozen(model) if model.is_file() else []


def _words(config: ConvertConfig) -> Vocabulary | None:
    path = Path(config.source) / "tokenizer.json"
    return Vocabulary.load(path) if path.is_file() else None
