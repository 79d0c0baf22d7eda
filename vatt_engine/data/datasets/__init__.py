"""Importers of known datasets: annotation files as distributed, and a folder of media, to manifests."""

from vatt_engine.data.datasets.known import DATASETS, Imported, import_dataset

__all__ = ["DATASETS", "Imported", "import_dataset"]
