"""One tower of whatever was trained: of a run, or of a folder that holds a model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vatt_engine.data.config import DataConfig
from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.models import EncoderConfig, from_pretrained, tower_config, tower_weights
from vatt_engine.models.pretrained import Modality
from vatt_engine.schema import ConfigError, load_yaml, with_article
from vatt_engine.tasks.config import RECIPES, PretrainConfig, config_of_run, load_config, verb_of
from vatt_engine.tasks.finetune_config import FINETUNE_RECIPES, FinetuneConfig


class Tower(NamedTuple):
    """An encoder's config and weights, and the clips it was trained on, where a run says so."""

    config: EncoderConfig
    weights: dict[str, Tensor]
    data: DataConfig | None


def read_tower(path: str, modality: Modality) -> Tower:
    """The video or audio tower of a run's newest valid checkpoint, or of a model that `from_pretrained` loads.

    Raises:
        ValueError: the folder holds neither, or another tower alone.

    >>> read_tower("runs/demo/run", "video").config.video.frame_size  # doctest: +SKIP
    (48, 48)
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        model = from_pretrained(folder)
        config, weights, data = model.config, model.state_dict(), None
    elif (folder / "config.yaml").is_file():
        run = load_run_config(folder)
        config, weights, data = run.model, load_latest(folder).tensors.get("model", {}), run.data
    else:
        text = "be a run folder, with a config.yaml, or a model's, with a config.json"
        found = "neither"
        if (folder / "ablation.json").is_file():
            found = "the folder of an ablation, whose runs are the folders in it"
        raise ConfigError(f"{path}: the folder must {text}, got {found}.")
    if isinstance(config, EncoderConfig) and config.modality != modality:
        wanted = with_article(f"{modality} tower")
        raise ConfigError(f"{path}: the model must have {wanted}, got the {config.modality} encoder.")
    return Tower(tower_config(config, modality), tower_weights(config, weights, modality), data)


def load_run_config(folder: Path) -> PretrainConfig | FinetuneConfig:
    """The config that a run folder keeps.

    Raises:
        ConfigError: the folder is no run's; it says what else it is.
    """
    path = config_of_run(folder)
    if verb_of(load_yaml(path).values) == FinetuneConfig.verb:
        return load_config(str(path), FinetuneConfig, FINETUNE_RECIPES)
    return load_config(str(path), PretrainConfig, RECIPES)
