"""From media files to batches: manifests, decoding, augmentation, words, loading.

The names below are imported when they are first used: manifests and datasets need no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
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

_PLACES = {  # module -> the public names in it
    "augment": ("AugmentConfig",),
    "dali": ("build_loader",),
    "loader": ("DataConfig", "Loader"),
    "manifest": ("Caption", "ManifestError", "Sample", "read_manifest", "write_manifest"),
    "media": ("MediaError", "decode", "decode_clip", "probe"),
    "shards": ("read_samples", "read_shards"),
    "words": ("Vocabulary", "load_word_vectors"),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name == place or name in names:
            module = importlib.import_module(f"vatt_engine.data.{place}")
            return module if name == place else getattr(module, name)
    raise AttributeError(f"module 'vatt_engine.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
