"""The objects of the official program, as its checkpoints list them: a tree of attributes, numbered and written out.

TensorFlow restores a checkpoint by walking this graph beside the program's own objects, name by name, and the official
evaluation demands that each of its objects is there, down to those without a variable: dropouts, lists, inputs. So the
whole graph is written, as the official trainer (TensorFlow 2.7, Keras 2.7) does.

Source: official vatt/modeling; tensorflow/core/protobuf/trackable_object_graph.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Union

from vatt_engine.interop.tf_names import VALUE
from vatt_engine.interop.tf_wire import write_field
from vatt_engine.models.config import (
    AudioConfig,
    EncoderConfig,
    HeadConfig,
    TextConfig,
    TransformerConfig,
    VATTConfig,
    VideoConfig,
)
from vatt_engine.models.registry import ModelConfig

# An object: its attributes in order, or VARIABLE. One that is reached twice is the same Python object twice.
Tree = Union[dict[str, "Tree"], "Variable"]


class Variable:
    """A variable; compared by identity, since two attributes may lead to one."""


class Slot(NamedTuple):
    """What the optimizer keeps of a variable."""

    path: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.path}/.OPTIMIZER_SLOT/optimizer/{self.name}{VALUE}"


def official_objects(config: ModelConfig, optimizer: Sequence[str]) -> Tree:
    """The objects of the official trainer with the model of a config.

    Args:
        config: a whole model, or a video or audio classifier.
        optimizer: names of the optimizer's own variables.
    """
    kept: Tree = {name: Variable() for name in optimizer}
    model = _pretrained(config) if isinstance(config, VATTConfig) else _classifier(config)
    inputs = 3 if isinstance(config, VATTConfig) else 1
    # Keras lists an input's shape as an object where it is a list; that of the sound is none.
    layers: dict[str, Tree] = {f"layer-{n}": {} if n == 1 else {"_init_input_shape": {}} for n in range(inputs)}
    functional = {**layers, "layer_with_weights-0": model, f"layer-{inputs}": model, "optimizer": kept}
    return {"model": functional, "optimizer": kept, "save_counter": Variable()}


def _pretrained(config: VATTConfig) -> Tree:
    if config.backbone == "agnostic":
        base: Tree = {
            "_unified_model_kwargs": {},
            "unified_backbone": {"_ops": {}, "unified_transformer": _shared(config)},
        }
    else:
        base = {
            **{f"_{modality}_model_kwargs": {} for modality in ("audio", "text", "video")},
            "vid_backbone": {"_ops": {}, "_base": _tower(config.video)},
            "aud_backbone": {"_ops": {}, "_base": _tower(config.audio)},
            "txt_backbone": _text(config.text),
        }
    return {
        "_base_layer": base,
        "_head_layer": {"_bridge_heads": {"0": _heads(config.heads)}},
        "_loss_lib": {"bridge_losses": {}},
    }


def _classifier(config: EncoderConfig) -> Tree:
    tower = _tower(config.video if config.modality == "video" else config.audio)
    head = {"dropout": {}, "cls": _dense()} if config.num_classes else {}
    return {"_ops": head, "_base": tower, "pred_aggregator": {}}


def _tower(config: VideoConfig | AudioConfig) -> Tree:
    patch, axes = "voxel_to_patch", ("temporal", "vertical", "horizontal")
    if isinstance(config, AudioConfig):
        spectral = config.input == "spectrogram"
        patch, axes = ("spectrum_to_patch", ("temporal", "spectoral")) if spectral else ("wave_to_patch", ("temporal",))
    agg = Variable()
    return {
        patch: _dense(),
        **({"pre_proj": _dense()} if config.pre_projection else {}),
        "pos_embedding_lookup": _positions(axes),
        "tx": _transformer(config.transformer),
        **({"post_proj": _dense()} if config.post_projection else {}),
        "agg_embedding": agg,
        "agg_token_embd": agg,
    }


def _shared(config: VATTConfig) -> Tree:
    modalities = {"video": "vid", "audio": "aud", "text": "txt"}
    agg = {modality: Variable() for modality in modalities}
    axes = {"video": ("temporal", "vertical", "horizontal"), "audio": ("temporal",), "text": ("temporal",)}
    return {
        "raw_to_embeddings": {"video": _dense(), "audio": _dense(), "text": {"embeddings": Variable()}},
        "pre_proj": {modality: _dense() for modality in modalities},
        "max_buckets": {},
        "max_num_patches": {},
        "pos_embedding_lookup": {modality: _positions(axes[modality]) for modality in modalities},
        "tx": _transformer(config.shared),
        "post_proj": {modality: _dense() for modality in modalities},
        **{f"{short}_agg_embedding": agg[modality] for modality, short in modalities.items()},
        "agg_token": agg,
    }


def _text(config: TextConfig) -> Tree:
    embedding = {"embeddings": Variable()}
    if config.encoder == "linear":
        return {"embedding": embedding, "base_lm": {"conv1d": _dense()}}
    agg = Variable()
    layers = {str(index): _text_layer(first=index == 0) for index in range(config.transformer.num_layers)}
    encoder = {
        "relative_buckets": {},
        "relative_distances": {},
        "layers": layers,
        "final_layer_norm": {"weight": Variable()},
        "dropout": {},
    }
    bare = {"kernel": Variable()}
    return {"embedding": embedding, "pre_proj": bare, "base_lm": encoder, "agg_embedding": agg, "agg_token_embd": agg}


def _text_layer(*, first: bool) -> Tree:
    attention: dict[str, Tree] = {**{name: _dense(bias=False) for name in "qkvo"}, "dropout": {}}
    if first:
        attention["relative_attention_bias"] = {"embeddings": Variable()}
    return {
        "self_attention": {"attention": attention, "layer_norm": {"weight": Variable()}, "dropout": {}},
        "feed_forward": _feed_forward(bias=False),
    }


def _transformer(config: TransformerConfig) -> Tree:
    def layer() -> Tree:
        return {
            "layer_norm": _norm(),
            "mha": {**{name: _dense(bias=config.bias) for name in "qkvo"}, "dropout": {}},
            "dropout": {},
            "feed_forward": _feed_forward(bias=config.bias),
        }

    layers = {str(index): layer() for index in range(config.num_layers)}
    return {"layers": layers, "final_layer_norm": _norm(), "dropout": {}}


def _feed_forward(*, bias: bool) -> Tree:
    mlp = {"wi": _dense(bias=bias), "wo": _dense(bias=bias), "dropout": {}}
    return {"mlp": mlp, "layer_norm": _norm(), "dropout": {}}


def _heads(config: HeadConfig) -> Tree:
    def projection(*before: str) -> Tree:
        return {**{name: _batch_norm() for name in before}, "dense": _dense(bias=False), "bn": _batch_norm()}

    if config.kind == "joint":
        return {name: projection() for name in ("vid_to_vat", "aud_to_vat", "txt_to_vat")}
    return {
        "vid_to_hid": _dense(bias=False),
        "hid_to_va": projection("pre_bn"),
        "aud_to_va": _dense(),
        "va_to_vat": projection(),
        "txt_to_vat": _dense(),
    }


def _positions(axes: Sequence[str]) -> Tree:
    tables = {f"{axis}_position_embeddings": {"embeddings": Variable()} for axis in axes}
    return {**tables, "layernorm": _norm(), "dropout": {}}


def _dense(*, bias: bool = True) -> Tree:
    return {"kernel": Variable(), **({"bias": Variable()} if bias else {})}


def _norm() -> Tree:
    return {"axis": {}, "gamma": Variable(), "beta": Variable()}


def _batch_norm() -> Tree:
    return {"axis": {}, **{name: Variable() for name in ("gamma", "beta", "moving_mean", "moving_variance")}}


class ObjectGraph:
    """The objects of a tree, each once, numbered level by level as TensorFlow does.

    A path is the first that leads to its object.
    """

    def __init__(self, root: Tree) -> None:
        self.paths: list[str] = [""]
        self.objects: list[Tree] = [root]
        self._numbers: dict[int, int] = {id(root): 0}
        for place in self._growing():
            for name, child in self._children(place):
                if id(child) not in self._numbers:
                    self._numbers[id(child)] = len(self.objects)
                    self.objects.append(child)
                    self.paths.append(f"{self.paths[place]}/{name}".lstrip("/"))

    def _growing(self):
        place = 0
        while place < len(self.objects):
            yield place
            place += 1

    def _children(self, place: int) -> list[tuple[str, Tree]]:
        one = self.objects[place]
        return [] if isinstance(one, Variable) else list(one.items())

    @property
    def variables(self) -> list[str]:
        """Paths of the variables."""
        return [path for path, one in zip(self.paths, self.objects) if isinstance(one, Variable)]

    def serialized(self, slots: Sequence[Slot]) -> bytes:
        """The graph as a TrackableObjectGraph, the optimizer's slots behind the objects."""
        numbers = {path: number for number, path in enumerate(self.paths)}
        kinds = list(dict.fromkeys(slot.name for slot in slots))
        slots = sorted(slots, key=lambda slot: (kinds.index(slot.name), numbers[slot.path]))
        of_optimizer = b""
        for offset, slot in enumerate(slots):
            reference = _fields({1: numbers[slot.path], 2: slot.name.encode(), 3: len(self.objects) + offset})
            of_optimizer += write_field(3, reference)
        nodes = []
        for place, (path, one) in enumerate(zip(self.paths, self.objects)):
            node = b"".join(
                write_field(1, _fields({1: self._numbers[id(child)], 2: name.encode()}))
                for name, child in self._children(place)
            )
            if isinstance(one, Variable):
                node += _attribute(path + VALUE)
            nodes.append(node + (of_optimizer if path == "optimizer" else b""))
        nodes += [_attribute(slot.key) for slot in slots]
        return b"".join(write_field(1, node) for node in nodes)


def _attribute(key: str) -> bytes:
    # Without the variable's Keras name, as in the official files, which a distribution strategy wrote.
    return write_field(2, _fields({1: b"VARIABLE_VALUE", 3: key.encode()}))


def _fields(values: Mapping[int, int | bytes]) -> bytes:
    return b"".join(write_field(number, value) for number, value in values.items() if value)
