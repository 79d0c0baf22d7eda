"""`vatt convert SOURCE DESTINATION`: between runs, models as plain safetensors, and DeepSpeed universal checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vatt_engine.data.words import Vocabulary
from vatt_engine.engine import checkpoint
from vatt_engine.engine.seeds import random_state
from vatt_engine.interop.deepspeed import Universal, is_universal, read_universal, write_universal
from vatt_engine.models import VATT, build_model, from_pretrained, save_pretrained
from vatt_engine.schema import ConfigError
from vatt_engine.tasks.config import load_config
from vatt_engine.tasks.flags import parse_flags


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """From one form of a trained model to another; what SOURCE is shows in its files.

    Args:
        source: a run folder (its newest valid checkpoint), a model folder (config.json and model.safetensors), or a
            DeepSpeed universal checkpoint, LOAD_DIR/TAG. DeepSpeed's files are pickles; they are read by torch's
            restricted unpickler in a process of its own.
        destination: a new folder.
        to: "model" for plain safetensors, "universal" for DeepSpeed, "run" for a checkpoint that
            `vatt pretrain CONFIG --out DESTINATION --resume` continues: without moments after a model folder, and with
            the data from its beginning.
        config: recipe or YAML file of the model, for a universal source that becomes a model.
    """

    source: str
    destination: str
    to: Literal["model", "universal", "run"] = "model"
    config: str | None = None


def main(argv: Sequence[str]) -> int:
    config = parse_flags(ConvertConfig, argv, prog="vatt convert", positional=("source", "destination"))
    destination = Path(config.destination)
    if destination.exists() and any(destination.iterdir() if destination.is_dir() else [destination]):
        raise ConfigError(f"vatt convert: DESTINATION must be a new folder, got {destination}, which is there.")
    found = _read(Path(config.source), config.to)
    if config.to == "model":
        _write_model(found, config, destination)
    elif config.to == "run":
        moments = {f"model.{name}": value for name, value in found.moments.items()}
        tensors = {"model": found.weights, "optimizer": moments}
        counters = {"finished": found.step, "skipped": 0, "skipped_in_a_row": 0}
        checkpoint.save(destination, found.step, tensors, {**counters, "random": random_state(), "extra": {}})
        if (words := _words(config)) is not None:
            words.save(destination / "tokenizer.json")
    else:
        if not any(name.endswith("/exp_avg") for name in found.moments):
            got = "those of SGD" if found.moments else "none"
            raise ConfigError(f"vatt convert: {config.source} must hold Adam's moments for DeepSpeed, got {got}.")
        model = _model(config)
        write_universal(destination, found, buffers={name for name, _ in model.named_buffers()})
    print(f"{config.source}, step {found.step} -> {destination} ({len(found.weights)} tensors)", file=sys.stderr)
    return 0


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
        if to != "model":
            expected = f"have no parameters of the loss, which have no place in a {to} one"
            raise ConfigError(f"vatt convert: {source} must {expected}, got {names}. `--to model` leaves them out.")
        print(f"note: {names} of the loss has no place in a model and is left out", file=sys.stderr)
    optimizer = found.tensors["optimizer"].items()
    moments = {name.removeprefix("model."): value for name, value in optimizer if name.startswith("model.")}
    return Universal(found.tensors["model"], moments, found.step)


def _model(config: ConvertConfig) -> VATT:
    source = Path(config.source)
    if config.config is None and (source / "config.json").is_file():
        return from_pretrained(source)
    described = config.config or str(source / "config.yaml")
    if config.config is None and not Path(described).is_file():
        raise ConfigError(f"vatt convert: --config must name the model of {source}, got none. A recipe or a YAML file.")
    return build_model(load_config(described).model)


def _write_model(found: Universal, config: ConvertConfig, destination: Path) -> None:
    model = _model(config)
    try:
        model.load_state_dict(found.weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"vatt convert: {config.source} must fit the model of its config, got: {reason}") from error
    save_pretrained(model, destination, vocabulary=_words(config))


def _words(config: ConvertConfig) -> Vocabulary | None:
    path = Path(config.source) / "tokenizer.json"
    return Vocabulary.load(path) if path.is_file() else None
