"""Weights from elsewhere."""

from vatt_engine.interop.rules import ImportReport
from vatt_engine.interop.t5 import load_t5, t5_config
from vatt_engine.interop.tf_vatt import load_tf_vatt, read_npz
from vatt_engine.interop.vit import load_vit, vit_config

__all__ = ["ImportReport", "load_t5", "load_tf_vatt", "load_vit", "read_npz", "t5_config", "vit_config"]
