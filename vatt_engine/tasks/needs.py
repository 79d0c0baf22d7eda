"""What a training run needs: its sets and files are looked at before anything else, and told of all at once."""

from __future__ import annotations

from pathlib import Path

from vatt_engine.data.manifest import Sample
from vatt_engine.data.shards import read_samples
from vatt_engine.refusals import Refusals
from vatt_engine.schema import ConfigError
from vatt_engine.tasks.config import PretrainConfig


def training_sets(config: PretrainConfig) -> list[list[Sample]]:
    """The training sets of a pre-training run.

    Raises:
        ConfigError: the shapes do not fit each other; a set or a file of words is not there or is wrong; shards are
            sound alone. All of it, a line each.
    """
    refusals = Refusals()
    refusals.of(config.check_shapes)
    sources = [refusals.of(read_training_manifest, path, config.verb) for path in config.data.sources]
    if config.heldout:
        refusals.of(read_samples, config.heldout)
    for name in ("vocabulary", "vectors"):
        path = getattr(config.text, name)
        if path is not None and not Path(path).exists():
            refusals.add(f"{path}: text.{name} must name a file, got no such file.")
    for path, samples in zip(config.data.sources, sources):
        if samples and config.data.num_frames and all(sample.in_shard and sample.video is None for sample in samples):
            refusals.add(f"vatt {config.verb}: data.train must hold pictures, got {path}, which is sound alone.")
    refusals.settle()
    return sources


def read_training_manifest(path: str, verb: str) -> list[Sample]:
    """The samples to train on.

    Raises:
        ValueError: no manifest was given, or it is wrong somewhere (ManifestError, with file and line).
    """
    if not path:
        hint = "`vatt demo-data DIRECTORY` makes a small world with one."
        raise ConfigError(f"vatt {verb}: --data.train must be the path of a manifest, got none. {hint}")
    return read_samples(path)
