"""Names of variables in an official checkpoint: from paths through Python objects to the names of Keras.

A TensorFlow 2 checkpoint knows a variable by the attributes that lead to it, as in

    model/layer_with_weights-0/_base_layer/vid_backbone/_base/tx/layers/0/mha/q/kernel/.ATTRIBUTES/VARIABLE_VALUE

and keeps no Keras name: TensorFlow leaves that field empty under a distribution strategy, which the official trainer
always uses. The table here gives video_module/transformer/layer_0/multi_head_attention/q/kernel, which
`load_tf_vatt` knows. Unlike Keras' names these are never ambiguous: Keras calls two BatchNorms of the heads alike.

Source: the attributes in official vatt/modeling, and its table for fine-tuning in vatt/utils/train/restore.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vatt_engine.interop.rules import shape_of

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_SLOT = re.compile(r"(.*)/\.OPTIMIZER_SLOT/(?:.*/)?([^/]+)" + re.escape(VALUE))
_ROOTS = ("_base_layer", "_head_layer", "_base", "_ops")  # of the pre-trained model, and of a classifier

SCOPES = {
    "vid_backbone": "video_module",
    "aud_backbone": "audio_module",
    "txt_backbone": "text_module",
    "unified_backbone": "unified_module",
}
_DROPPED = {"_base", "base_lm", "unified_transformer"}
_RENAMED = {
    "tx": "transformer",
    "mha": "multi_head_attention",
    "mlp": "dense_gelu_dense",
    "layernorm": "layer_norm",  # of positions
    "wave_to_patch": "waveform_to_patch",
    "conv1d": "text_conv1",
    "agg_token_embd": "agg_embedding",  # the same variable by its other attribute
    "mask_token_embd": "mask_embedding",
}
_POSITIONS = {"video": "spatio_temporal_embeddings", "audio": "temporal_embeddings", "text": "temporal_embeddings"}
_STEMS = {"video": "voxel_to_patch", "audio": "waveform_to_patch", "text": "text_embedding"}
_SHORT = {"video": "vid", "audio": "aud", "text": "txt"}
_PATCHES = {"voxel_to_patch": "video", "wave_to_patch": "audio", "spectrum_to_patch": "audio"}


@dataclass
class ObjectNames:
    """Keys of a checkpoint by what they hold.

    `variables` maps names to keys, `slots` (name, slot) to keys, and `others` are the keys that belong to no variable
    of a model: the optimizer's numbers, the counter of saves, the graph of objects.
    """

    variables: dict[str, str] = field(default_factory=dict)
    slots: dict[tuple[str, str], str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def has_object_paths(keys: Iterable[str]) -> bool:
    """Whether these are keys of a TensorFlow 2 checkpoint, and not names of Keras."""
    return any(key.endswith(VALUE) for key in keys)


def object_names(keys: Iterable[str]) -> ObjectNames:
    """Names for the keys of an official checkpoint.

    Whatever stands before the model is left out, so a checkpoint of the model alone or of one below another object is
    read too. Attributes that the table does not know keep their names, and are then reported as unused.

    Raises:
        ValueError: two models, or two keys for one variable.

    >>> path = "model/layer_with_weights-0/_base_layer/aud_backbone/_base/tx/final_layer_norm/beta"
    >>> object_names([f"{path}/.ATTRIBUTES/VARIABLE_VALUE"]).variables.popitem()[0]
    'audio_module/transformer/final_layer_norm/beta'
    """
    found, paths, slots = ObjectNames(), {}, {}
    for key in keys:
        if match := _SLOT.fullmatch(key):
            slots[key] = (match[1], match[2])
        elif key.endswith(VALUE) and _root(key.split("/")) is not None:
            paths[key] = key.removesuffix(VALUE)
        else:
            found.others.append(key)
    tables = {prefix: _Table([path[len(prefix) :] for path in paths.values()]) for prefix in _prefixes(paths.values())}
    if len(tables) > 1:
        raise ValueError(f"a checkpoint must hold one model, got those below {' and '.join(sorted(tables))}.")
    names: dict[str, str] = {}
    for key, path in paths.items():
        [(prefix, table)] = tables.items()
        names[path] = name = table.name(path[len(prefix) :].split("/"))
        if name in found.variables:
            raise ValueError(f"{name} must have one value, got those of {found.variables[name]} and {key}.")
        found.variables[name] = key
    for key, (path, slot) in slots.items():
        if path in names:
            found.slots[names[path], slot] = key
        else:
            found.others.append(key)
    return found


class NamedVariables(Mapping[str, np.ndarray]):
    """The variables of a checkpoint by their official names; arrays are read when they are asked for."""

    def __init__(self, checkpoint: Mapping[str, np.ndarray], names: ObjectNames) -> None:
        self.checkpoint, self.names = checkpoint, names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names.variables)

    def __len__(self) -> int:
        return len(self.names.variables)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.checkpoint[self.names.variables[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a variable, without reading it where the checkpoint can tell."""
        return shape_of(self.checkpoint, self.names.variables[name])


def _root(parts: Sequence[str]) -> int | None:
    """Where the model begins in a path."""
    return next((place for place, part in enumerate(parts) if part in _ROOTS), None)


def _prefixes(paths: Iterable[str]) -> set[str]:
    """What stands before the model."""
    found = set()
    for path in paths:
        parts = path.split("/")
        found.add("".join(f"{part}/" for part in parts[: _root(parts)]))
    return found


class _Table:
    """Names in one model, all of whose paths are given: some names depend on what else there is."""

    def __init__(self, paths: Sequence[str]) -> None:
        # Neither a classifier's modality nor an audio tower's kind of positions is in a variable's own path.
        of_classifier = {_PATCHES[path.split("/")[1]] for path in paths if path.split("/")[1] in _PATCHES}
        self.modality = of_classifier.pop() if len(of_classifier) == 1 else ""
        self.spectral = any("spectoral_position_embeddings" in path for path in paths)  # their spelling

    def name(self, parts: Sequence[str]) -> str:
        root, *rest = parts
        if root == "_base_layer":
            scope = SCOPES.get(rest[0], rest[0]) if rest else ""
            translate = self._agnostic if scope == "unified_module" else self._tower
            modality = "" if scope == "unified_module" else scope.removesuffix("_module")
            return "/".join([scope, *translate(_numbered(rest[1:]), modality)])
        if root == "_head_layer":
            rest = rest[2:] if rest[:1] == ["_bridge_heads"] else rest
            return "/".join("linear_projection" if part == "dense" else part for part in rest)
        if root == "_ops":
            return "/".join(["classification/weights" if part == "cls" else part for part in rest])
        return "/".join([f"{self.modality}_module", *self._tower(_numbered(rest), self.modality)])

    def _tower(self, parts: Sequence[str], modality: str) -> list[str]:
        special = {}
        if modality == "text":
            parts = [part for place, part in enumerate(parts) if (parts[place - 1 : place], part) != _T5_ATTENTION]
        else:
            kind = "spectro_temporal_embeddings" if modality == "audio" and self.spectral else _POSITIONS.get(modality)
            special = {"pre_proj": "pre_tx_projection", "post_proj": "post_tx_projection", "pos_embedding_lookup": kind}
        return [special.get(part) or _RENAMED.get(part, part) for part in parts]

    def _agnostic(self, parts: Sequence[str], _: str) -> list[str]:
        layer, modality, rest = parts[0] if parts else "", parts[1] if len(parts) > 1 else "", list(parts[2:])
        if modality in _STEMS:
            named = {
                "raw_to_embeddings": _STEMS[modality],
                "pre_proj": f"{modality}_pre_tx_projection",
                "post_proj": f"{modality}_post_tx_projection",
                "pos_embedding_lookup": f"{modality}_{_POSITIONS[modality]}",
                "agg_token": f"{_SHORT[modality]}_agg_embedding",
            }
            if layer in named:
                parts = [named[layer], *rest]
        return [_RENAMED.get(part, part) for part in parts]


_T5_ATTENTION = (["self_attention"], "attention")  # an object between the two that Keras' names leave out


def _numbered(parts: Sequence[str]) -> list[str]:
    """Without objects that have no name, and layers/3 as layer_3."""
    parts = [part for part in parts if part not in _DROPPED]
    found: list[str] = []
    for part in parts:
        if found and found[-1] == "layers" and part.isdigit():
            found[-1] = f"layer_{part}"
        else:
            found.append(part)
    return found
