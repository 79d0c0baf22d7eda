"""`vatt convert CKPT OUT` for an official TensorFlow checkpoint: a model folder, or a run that goes on from it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vatt_engine.data.config import DataConfig
from vatt_engine.data.words import Vocabulary
from vatt_engine.engine import checkpoint
from vatt_engine.engine.logging import write_text
from vatt_engine.engine.seeds import random_state
from vatt_engine.interop.deepspeed import Universal
from vatt_engine.interop.tf_bundle import read_tf_checkpoint
from vatt_engine.interop.tf_model import OfficialModel, official_model
from vatt_engine.models import EncoderConfig, VATTConfig, read_config, write_pretrained
from vatt_engine.models.registry import ModelConfig
from vatt_engine.schema import ConfigError, dump_yaml, load_yaml, to_dict
from vatt_engine.tasks.config import OFFICIAL, RECIPES, PretrainConfig, load_config, recipe
from vatt_engine.tasks.finetune_config import ACTIONS, FINETUNE_RECIPES, FinetuneConfig


def read_official(source: str, head_dim: tuple[int, ...], described: str | None) -> OfficialModel:
    """The model of an official checkpoint; says on stderr what it is and what is left out.

    Args:
        source: as for `read_tf_checkpoint`.
        head_dim: see `official_model`.
        described: recipe, YAML file or config.json of the model, where the shapes are not to be asked.

    Raises:
        ValueError: it cannot be used; one line that begins with the file.
    """
    found = official_model(read_tf_checkpoint(source), head_dim=head_dim, config=described_model(described))
    print(f"{found.checkpoint.index}: {_summary(found)}", file=sys.stderr)
    if found.unused:
        names = ", ".join(found.unused[:4]) + (f" and {len(found.unused) - 4} more" if len(found.unused) > 4 else "")
        print(f"note: {names} has no place in our models and is left out", file=sys.stderr)
    return found


def described_model(described: str | None) -> ModelConfig | None:
    """The model of a recipe, of a YAML file (of a run, for instance), or of the config.json of a model's folder."""
    if described is None:
        return None
    if described.endswith(".json"):
        return read_config(described)
    is_file = Path(described).is_file()
    if (is_file and "init" in load_yaml(described).values) or described.replace(
        "-", "_"
    ) in FINETUNE_RECIPES.keys() - RECIPES:
        return load_config(described, FinetuneConfig, FINETUNE_RECIPES).model
    return load_config(described).model


def write_official_model(found: OfficialModel, destination: Path, vocabulary: str | None) -> None:
    """A folder that `from_pretrained` loads."""
    words = official_words(found.config, vocabulary)
    write_pretrained(destination, found.config, found.shapes, found.weights(), frozen=found.frozen, vocabulary=words)
    if words is None and isinstance(found.config, VATTConfig):
        print("note: without --vocabulary howto100m_en.txt the model has no tokenizer for captions", file=sys.stderr)


def write_official_run(found: OfficialModel, destination: Path, vocabulary: str | None) -> None:
    """A run folder that `vatt pretrain|finetune --resume` continues, at the step of the official run."""
    words, config = official_words(found.config, vocabulary), run_config(found, destination)
    held = as_universal(found)
    moments = {f"model.{name}": value for name, value in held.moments.items()}
    counters = {"finished": found.step, "skipped": 0, "skipped_in_a_row": 0}
    state = {**counters, "random": random_state(), "extra": {}}
    checkpoint.save(destination, found.step, {"model": held.weights, "optimizer": moments}, state)
    write_text(destination / "config.yaml", dump_yaml(to_dict(config)))
    if words is not None:
        words.save(destination / "tokenizer.json")
    if not held.moments:
        print("note: the checkpoint holds no state of Adam or SGD; the run goes on without moments", file=sys.stderr)
    verb = f"vatt {config.verb} --resume {destination} --data.train MANIFEST"
    print(f"config.yaml is the official recipe with this model's sizes; continue with: {verb}", file=sys.stderr)


def as_universal(found: OfficialModel) -> Universal:
    """Weights, moments and step, all in memory."""
    weights = {name: _tensor(array) for name, array in found.weights()}
    moments: dict[str, Tensor] = {}
    for name, array in found.moments():
        moments[name] = _tensor(array)
        if found.optimizer == "adam":
            moments[f"{name.rpartition('/')[0]}/step"] = torch.tensor(float(found.step))
    return Universal(weights, moments, found.step)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(array, np.float32, "W")).contiguous()


def official_words(config: ModelConfig, path: str | None) -> Vocabulary | None:
    """The vocabulary, whose words are the rows of the model's table."""
    if path is None:
        return None
    if isinstance(config, EncoderConfig):
        raise ConfigError(
            f"vatt convert: --vocabulary must be left out for {config.name}, which reads no words, got {path}."
        )
    words = Vocabulary.load(path)
    if words.size > config.text.vocabulary_size:
        rows = config.text.vocabulary_size
        raise ConfigError(f"{path}: vocabulary must fit the {rows} rows of the model's table, got {words.size} words.")
    if words.size < config.text.vocabulary_size:
        rows = config.text.vocabulary_size
        print(f"note: {path} has {words.size} words for the {rows} rows of the model's table", file=sys.stderr)
    return words


def run_config(found: OfficialModel, destination: Path) -> PretrainConfig | FinetuneConfig:
    """The official recipe of such a run, with this model, its clips and its optimizer's constants."""
    if isinstance(found.config, VATTConfig):
        return _pretraining(found, destination)
    return _finetuning(found, destination)


def _pretraining(found: OfficialModel, destination: Path) -> PretrainConfig:
    model: VATTConfig = found.config
    base = recipe(model.name if model.name in OFFICIAL else OFFICIAL[0])
    if found.frozen:
        model = replace(model, text=replace(model.text, freeze_embedding=True))
    betas = (round(found.number("beta_1", 0.9), 7), round(found.number("beta_2", 0.999), 7))  # float32 there
    return replace(
        base,
        out=str(destination),
        model=model,
        data=replace(
            base.data,
            num_samples=model.audio.num_samples,
            max_words=model.text.max_words,
            **_frames(found, model.video.num_frames, model.video.frame_size),
        ),
        optim=replace(base.optim, betas=betas),
    )


def _finetuning(found: OfficialModel, destination: Path) -> FinetuneConfig:
    model: EncoderConfig = found.config
    own = getattr(model, model.modality)
    model = replace(model, **{model.modality: replace(own, drop_token=replace(own.drop_token, keep_rate=1.0))})
    names = {classes: name for name, classes in ACTIONS.items()} | {339: "moments"}
    name = names.get(model.num_classes, "kinetics400") if model.modality == "video" else "audioset"
    base = FINETUNE_RECIPES[name]()
    if model.modality == "video":
        sizes: dict[str, Any] = _frames(found, model.video.num_frames, model.video.frame_size)
    else:
        sizes = {"num_samples": model.audio.num_samples, "num_classes": model.num_classes}
    data: DataConfig = replace(base.data, **sizes)
    optim = replace(base.optim, momentum=round(found.number("momentum", 0.9), 7))
    return replace(base, out=str(destination), model=model, data=data, optim=optim)


def _frames(found: OfficialModel, num_frames: int, size: tuple[int, int]) -> dict[str, int]:
    if size[0] != size[1]:
        raise ConfigError(f"{found.checkpoint.index}: a run's frames must be square, got a model for {list(size)}.")
    return {"num_frames": num_frames, "frame_size": size[0]}


def _summary(found: OfficialModel) -> str:
    """What the model is, in a line."""
    config = found.config
    if isinstance(config, EncoderConfig):
        part = getattr(config, config.modality)
        towers, kind = [part.transformer], f"{config.modality} classifier of {config.num_classes} classes"
    elif config.backbone == "agnostic":
        towers, kind = [config.shared], f"modality-agnostic, {config.heads.kind} heads"
    else:
        towers = [config.video.transformer, config.audio.transformer]
        kind = f"modality-specific, {config.heads.kind} heads"
    heads = " and ".join(dict.fromkeys(f"{tower.num_heads} of {tower.head_dim}" for tower in towers))
    sizes = " and ".join(dict.fromkeys(f"{tower.num_layers} x {tower.dim}" for tower in towers))
    kept = {"adam": "Adam's moments", "sgd": "SGD's velocity", None: "no moments"}[found.optimizer]
    return f"{config.name}, {kind}; layers {sizes}, attention heads {heads}; step {found.step}, {kept}"
