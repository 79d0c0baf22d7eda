"""Weights from elsewhere."""

from vatt_engine.interop.rules import ImportReport
from vatt_engine.interop.t5 import load_t5, t5_config
from vatt_engine.interop.tf_bundle import TFCheckpoint, read_tf_checkpoint
from vatt_engine.interop.tf_export import write_tf_checkpoint
from vatt_engine.interop.tf_vatt import load_tf_vatt, read_npz
from vatt_engine.interop.vit import load_vit, vit_config

__all__ = [
    "ImportReport",
    "TFCheckpoint",
    "load_t5",
    "load_tf_vatt",
    "load_vit",
    "read_npz",
    "read_tf_checkpoint",
    "t5_config",
    "vit_config",
    "write_tf_checkpoint",
]
