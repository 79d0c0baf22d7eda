"""VATT on PyTorch: self-supervised learning from raw video, audio and text.

>>> import vatt_engine
>>> model = vatt_engine.create_model("vatt_tiny")
"""

from vatt_engine import ops
from vatt_engine.batch import Batch, Embeddings
from vatt_engine.dispatch import available_impls, use_impl
from vatt_engine.losses import LossConfig, LossTerms, VATTLoss
from vatt_engine.models import VATT, VATTConfig, create_model, from_pretrained, list_models, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "VATT",
    "Batch",
    "Embeddings",
    "LossConfig",
    "LossTerms",
    "VATTConfig",
    "VATTLoss",
    "available_impls",
    "create_model",
    "from_pretrained",
    "list_models",
    "ops",
    "save_pretrained",
    "use_impl",
]
