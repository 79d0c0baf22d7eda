"""From media files to batches: manifests, decoding, augmentation, words, loading."""

from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.dali import build_loader
from vatt_engine.data.loader import DataConfig, Loader
from vatt_engine.data.manifest import Caption, ManifestError, Sample, read_manifest, write_manifest
from vatt_engine.data.media import MediaError, decode, decode_clip, probe
from vatt_engine.data.shards import read_samples, read_shards
from vatt_engine.data.words import Vocabulary, load_word_vectors

__all__ = [
    "AugmentConfig",
    "Caption",
    "DataConfig",
    "Loader",
    "ManifestError",
    "MediaError",
    "Sample",
    "Vocabulary",
    "build_loader",
    "decode",
    "decode_clip",
    "load_word_vectors",
    "probe",
    "read_manifest",
    "read_samples",
    "read_shards",
    "write_manifest",
]
