"""A pre-training run's configuration: the Config of each room in one tree, recipes that fill it, YAML files on top."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.config import DataConfig
from vatt_engine.engine.config import EngineConfig
from vatt_engine.engine.optim import OptimConfig
from vatt_engine.engine.schedule import ScheduleConfig
from vatt_engine.losses import LossConfig
from vatt_engine.models import VATTConfig, model_config
from vatt_engine.models.config import AudioConfig
from vatt_engine.schema import ConfigError, PathText, from_dict, load_yaml, nearest


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Where words and their vectors come from.

    Args:
        vocabulary: tokenizer.json or a text file of one word per line; None trains one on the captions of the training
            manifest, of at most `model.text.vocabulary_size` words.
        vectors: word2vec file (text or .bin) or .npz; its vectors replace the rows of the words it has, and the table
            is then frozen unless `model.text.freeze_embedding` says otherwise. None trains the table from scratch.
    """

    vocabulary: PathText | None = None
    vectors: PathText | None = None


class RunConfig(Protocol):
    """What the configs of all runs have, whatever they train."""

    verb: ClassVar[str]  # the command that makes such runs
    out: PathText
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    engine: EngineConfig


C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Self-supervised pre-training on video, audio and text.

    Args:
        out: run folder; receives config.yaml, env.json, metrics.jsonl, tokenizer.json, checkpoints/, quarantine.jsonl,
            plots/, and at the end model/, which `from_pretrained` loads.
        heldout: set whose loss is recorded, like `data.train`; "" is none.
        evaluate_every: steps per evaluation on it; before the first and after the last step it is always evaluated.
    """

    verb: ClassVar[str] = "pretrain"
    out: PathText = "runs/pretrain"
    heldout: PathText = ""
    evaluate_every: int = 1_000
    model: VATTConfig = field(default_factory=VATTConfig)
    text: WordsConfig = field(default_factory=WordsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("PretrainConfig: out must be the name of a folder, got ''.")
        if self.evaluate_every < 1:
            raise ValueError(f"PretrainConfig: evaluate_every must be at least 1, got {self.evaluate_every}.")

    def check_shapes(self) -> None:
        """Refuse clips of another size than the model's.

        Raises:
            ConfigError: with both values.
        """
        model, data = self.model, self.data
        is_spectrogram = model.audio.input == "spectrogram" and data.num_samples > 0
        for name, given, key, wanted in (
            ("num_frames", data.num_frames, "video.num_frames", model.video.num_frames),
            ("frame_size", (data.frame_size, data.frame_size), "video.frame_size", model.video.frame_size),
            ("num_samples", data.num_samples or model.audio.num_samples, "audio.num_samples", model.audio.num_samples),
            ("max_words", data.max_words, "text.max_words", model.text.max_words),
            # Patches of a waveform are so many samples at any rate; bands of a spectrogram are hertz.
            *([("sample_rate", data.sample_rate, "audio.sample_rate", model.audio.sample_rate)] * is_spectrogram),
        ):
            if given != wanted:
                raise ConfigError(
                    f"vatt pretrain: data.{name} must equal model.{key} {wanted}, got {given}. Set both to train on "
                    "clips of another size."
                )


def fitted_noise(data: DataConfig, audio: AudioConfig) -> DataConfig:
    """The data of a run whose sound goes into this tower, with `augment.audio_noise` decided.

    The official code adds noise of 1 % of the peak to every waveform that is trained on, and none in evaluation. A
    waveform tower hardly notices. In a spectrogram, which is logarithmic and scaled to [0, 1] by its own extremes, the
    noise is the floor of every quiet clip, so that clean clips of evaluation look like nothing that training has shown.
    Therefore a spectrogram gets none unless the config asks for it.
    """
    if data.augment.audio_noise is not None or audio.input == "waveform":
        return data
    return dataclasses.replace(data, augment=dataclasses.replace(data.augment, audio_noise=0.0))


def noise_notes(data: DataConfig, audio: AudioConfig) -> list[str]:
    """What to tell of noise that a config asks for although the tower sees a spectrogram."""
    if audio.input == "waveform" or not data.num_samples or not data.augment.audio_noise:
        return []
    unlike = "makes training's spectrograms unlike those of clean clips in evaluation"
    return [f"note: data.augment.audio_noise {data.augment.audio_noise:g} {unlike}; 0 leaves it out"]


def _official(name: str) -> PretrainConfig:
    """The settings of the released checkpoints: Adam, 5k warm-up, 1e-4 -> 5e-5 in 500k steps, batch 2048, DropToken.

    Source: official vatt/configs and paper section 4.1.
    """
    return PretrainConfig(
        out=f"runs/{name.replace('_', '-')}",
        model=model_config(name),
        data=DataConfig(batch_size=2048, num_workers=8),
        engine=EngineConfig(precision="auto"),
    )


def demo() -> PretrainConfig:
    """The demo world on a CPU: vatt_tiny on 0.8 s of picture and sound, minutes on two cores."""
    steps = 600
    data = DataConfig(
        batch_size=64,
        num_frames=8,
        fps=10.0,
        frame_size=48,
        num_samples=9_600,
        sample_rate=12_000,
        cache="memory",
        augment=AugmentConfig(flip=0.0, color_jitter=0.0),  # captions name colours and directions
    )
    return PretrainConfig(
        out="runs/demo/run",
        model=model_config("vatt_tiny"),
        data=data,
        optim=OptimConfig(lr=1e-3),
        schedule=ScheduleConfig(final=1e-5, warmup_steps=60, total_steps=steps),
        engine=EngineConfig(steps=steps, log_every=20, save_every=200),
    )


# Keys of a config file that one command alone knows; by them a file tells what it is for.
OWN_KEYS = {
    "pretrain": ("heldout", "evaluate_every", "text"),
    "finetune": ("init", "mixup", "test", "test_windows", "test_crops"),
}
OFFICIAL = ("vatt_bbs", "vatt_mbs", "vatt_lbs", "vatt_ma_base", "vatt_ma_medium", "vatt_ma_large")
RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "demo": demo,
    **{name: functools.partial(_official, name) for name in OFFICIAL},
}


def recipe(name: str, recipes: dict[str, Callable[[], C]] = RECIPES, *, where: str = "vatt pretrain") -> C:
    """A recipe's config by its name, `-` or `_`.

    Raises:
        ConfigError: there is none of this name.

    >>> recipe("vatt-mbs").schedule.warmup_steps
    5000
    """
    key = name.replace("-", "_")
    if key not in recipes:
        raise ConfigError(f"{where}: recipe must be one of {', '.join(recipes)}, got {name!r}. {nearest(key, recipes)}")
    return recipes[key]()


def config_of_run(folder: str | Path) -> Path:
    """The config.yaml of a run folder.

    Raises:
        ConfigError: there is none; it says what the folder is instead.
    """
    folder = Path(folder)
    path = folder / "config.yaml"
    if folder.is_dir() and not path.is_file():
        kinds = {
            "ablation.json": "the folder of an ablation, whose runs are the folders in it",
            "config.json": "a model's folder, which has none",
        }
        found = next((kind for name, kind in kinds.items() if (folder / name).is_file()), "a folder without it")
        raise ConfigError(f"{path}: the config file must exist in a run folder, got {found}.")
    return path


def verb_of(values: Mapping[str, Any]) -> str | None:
    """The command whose configs have these keys, or None where they may be of several.

    >>> verb_of({"init": "runs/demo/run", "out": "tuned"})
    'finetune'
    """
    return next((verb for verb, keys in OWN_KEYS.items() if any(key in values for key in keys)), None)


def load_config(source: str, kind: type[C] = PretrainConfig, recipes: dict[str, Callable[[], C]] = RECIPES) -> C:
    """The config of a recipe's name, or of a YAML file: its optional `recipe:` as a base, its other keys on top.

    Raises:
        ConfigError: no such recipe or file, or a wrong key or value, with `file:line:`.

    >>> load_config("demo").engine.steps
    600
    """
    source = os.path.expanduser(source)
    is_file = source.endswith((".yaml", ".yml")) or "/" in source or Path(source).is_file()
    if not is_file:
        return recipe(source, recipes, where=f"vatt {kind.verb}")
    document = load_yaml(source)
    if (verb := verb_of(document.values)) not in (None, kind.verb):
        key = next(key for key in OWN_KEYS[verb] if key in document.values)
        raise ConfigError(
            f"{document.where}:{document.lines[key]}: {key} must be of a config for `vatt {kind.verb}`, got one of "
            f"`vatt {verb}`. Use that command."
        )
    values, base = dict(document.values), kind()
    if "recipe" in values:
        name = values.pop("recipe")
        where = f"{document.where}:{document.lines['recipe']}"
        if not isinstance(name, str):
            raise ConfigError(f"{where}: recipe must be one of {', '.join(recipes)}, got {name!r}.")
        base = recipe(name, recipes, where=where)
    return from_dict(kind, values, where=document.where, base=base, lines=document.lines)
