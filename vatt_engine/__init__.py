"""VATT on PyTorch: self-supervised learning from raw video, audio and text.

The names below are imported when they are first used: `vatt VERB --help` and `vatt data` then need not wait for torch,
and `vatt` can choose how OpenMP's threads wait (see `vatt_engine.cpus`) before torch loads OpenMP.

>>> import vatt_engine
>>> model = vatt_engine.create_model("vatt_tiny")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
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

_PLACES = {  # module -> the public names in it
    "batch": ("Batch", "Embeddings"),
    "dispatch": ("available_impls", "use_impl"),
    "losses": ("LossConfig", "LossTerms", "VATTLoss"),
    "models": ("VATT", "VATTConfig", "create_model", "from_pretrained", "list_models", "save_pretrained"),
    "ops": (),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name == place or name in names:
            importlib.import_module("vatt_engine.ops")  # `available_impls` is about them; torch.ops.vatt is there too
            module = importlib.import_module(f"vatt_engine.{place}")
            return module if name == place else getattr(module, name)
    raise AttributeError(f"module 'vatt_engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
