"""nn.Modules made of ops, and the named sizes of the paper."""

from vatt_engine.models.config import EncoderConfig, VATTConfig
from vatt_engine.models.pretrained import (
    from_pretrained,
    load_tower,
    load_weights,
    read_config,
    read_frozen,
    save_pretrained,
    tower_config,
    tower_weights,
    write_pretrained,
)
from vatt_engine.models.registry import build_model, create_model, list_models, model_config
from vatt_engine.models.vatt import VATT

__all__ = [
    "VATT",
    "EncoderConfig",
    "VATTConfig",
    "build_model",
    "create_model",
    "from_pretrained",
    "list_models",
    "load_tower",
    "load_weights",
    "model_config",
    "read_config",
    "read_frozen",
    "save_pretrained",
    "tower_config",
    "tower_weights",
    "write_pretrained",
]
