"""Weights from elsewhere."""

from vatt_engine.interop.tf_vatt import ImportReport, load_tf_vatt, read_npz

__all__ = ["ImportReport", "load_tf_vatt", "read_npz"]
