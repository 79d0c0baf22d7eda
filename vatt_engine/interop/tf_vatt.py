"""Weights of the official TensorFlow VATT: variable name -> array, into any module of ours.

A module is described by rules: which official variables, of which shape, make each of its parameters. Names are
matched by their last components, so any scope in front of them is fine, as are ":0" behind them and the "__dup1" that
marks the second of two variables with one official name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vatt_engine.models.embeddings import PatchStem, PositionEmbedding, VoxelPatch, WaveformPatch, resample_table
from vatt_engine.models.heads import Classifier, FactorizedHeads, JointHeads, SyncBatchNorm
from vatt_engine.models.text import LinearTextEncoder, TextEncoder, WordStem
from vatt_engine.models.transformer import Block, Transformer
from vatt_engine.models.vatt import VATT, AgnosticBackbone, PatchEncoder

Shape = tuple[int, ...]


class Source(NamedTuple):
    """One official variable: its names relative to the module, and its shape."""

    names: tuple[str, ...]
    shape: Shape


class Rule(NamedTuple):
    """Our parameter `name` is `join` of the official variables `sources`."""

    name: str
    sources: tuple[Source, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    scope: str = ""  # a component that the official name must have, when any name has it


@dataclass
class ImportReport:
    """What an import did, by name; `unused` are official names, `missing` and `misshaped` ours with the reason."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every parameter was loaded and every variable used."""
        return not (self.missing or self.misshaped or self.unused)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        for kind in ("missing", "misshaped", "unused"):
            lines += [f"{kind}: {name}" for name in getattr(self, kind)]
        return "\n  ".join(lines)


def read_npz(path: str | Path, *, prefixes: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name, or only those whose name starts with one of `prefixes`; nothing is unpickled.

    Raises:
        ValueError: the file is not an .npz, or holds pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in archive.files if not prefixes or name.startswith(tuple(prefixes))]
            return {name: archive[name] for name in names}
    except (ValueError, OSError, EOFError, KeyError, AttributeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: the file must be an .npz of plain arrays, got {error!r}.") from error


@torch.no_grad()
def load_tf_vatt(
    model: nn.Module,
    variables: Mapping[str, np.ndarray],
    *,
    strict: bool = True,
    resample_positions: bool = False,
) -> ImportReport:
    """Copy official variables into `model`: a VATT, an encoder, a classifier, or projection heads.

    An encoder also finds its part in the variables of a whole model, with `strict=False`: of a modality-agnostic one
    too, into a tower with `pre_projection` and `post_projection`, as official fine-tuning does.

    Args:
        variables: official name -> array, in TensorFlow's layouts (Dense [in, out], Conv3D [t, h, w, in, out]).
        strict: raise unless every parameter is loaded and every variable is used.
        resample_positions: fit position tables of another size by the official spline, as official fine-tuning does.

    Raises:
        ValueError: with the whole report, when `strict` and something is missing, unused or of another shape; a name
            that stands for two variables.

    Source: official vatt/utils/train/restore.py.

    >>> load_tf_vatt(create_model("vit_base"), read_npz("vit_base.npz"))  # doctest: +SKIP
    """
    index = _Index(variables)
    targets = model.state_dict()
    report = ImportReport()
    for rule in rules(model):
        target = targets.pop(rule.name)
        keys = [index.find(source.names, rule.scope) for source in rule.sources]
        if None in keys:
            absent = [source.names[0] for source, key in zip(rule.sources, keys) if key is None]
            report.missing.append(f"{rule.name} (from {', '.join(absent)})")
            continue
        arrays = [np.asarray(variables[key]) for key in keys]
        index.used.update(keys)
        if resample_positions and rule.name.rpartition(".")[0].endswith("position.tables"):
            table = resample_table(torch.as_tensor(arrays[0]).double(), target.shape[0])
            arrays = [table.numpy()] if arrays[0].ndim == 2 else arrays
        wrong = [
            f"{rule.name} (from {key}: {list(array.shape)}, expected {list(source.shape)})"
            for source, key, array in zip(rule.sources, keys, arrays)
            if array.shape != source.shape
        ]
        if wrong:
            report.misshaped += wrong
            continue
        target.copy_(torch.as_tensor(np.ascontiguousarray(rule.join(arrays))))
        report.loaded.append(rule.name)
    report.missing += [f"{name} (no official counterpart)" for name in targets]
    report.unused = sorted(set(variables) - index.used)
    if strict and not report.complete:
        raise ValueError(f"load_tf_vatt: variables must match the {type(model).__name__} one to one, got\n  {report}")
    return report


class _Index:
    """Official names by their last components."""

    def __init__(self, variables: Mapping[str, np.ndarray]) -> None:
        self.parts = {key: tuple(key.replace(":0", "").split("/")) for key in variables}
        self.components = {part for parts in self.parts.values() for part in parts}
        self.scopes = self.components & {"video_module", "audio_module", "text_module", "unified_module"}
        self.by_last: dict[str, list[str]] = {}
        for key, parts in self.parts.items():
            self.by_last.setdefault(parts[-1], []).append(key)
        self.used: set[str] = set()

    def find(self, names: Sequence[str], scope: str) -> str | None:
        for name in names:
            suffix = tuple(name.split("/"))
            found = [k for k in self.by_last.get(suffix[-1], []) if self.parts[k][-len(suffix) :] == suffix]
            found = [key for key in found if self.in_scope(key, scope)]
            if len(found) > 1:
                raise ValueError(f"load_tf_vatt: {name} must name one variable, got {', '.join(sorted(found))}.")
            if found:
                return found[0]
        return None

    def in_scope(self, key: str, scope: str) -> bool:
        if scope == "heads":  # the heads stand beside the modality modules
            return not self.scopes.intersection(self.parts[key])
        return scope not in self.scopes or scope in self.parts[key]


def rules(module: nn.Module) -> Iterator[Rule]:
    """Every parameter and buffer of `module` with the official variables it is made of."""
    for kind, describe in _DESCRIPTIONS.items():
        if isinstance(module, kind):
            return describe(module)
    raise ValueError(f"load_tf_vatt: model must be a module with an official counterpart, got {type(module).__name__}.")


def _under(inner: Iterator[Rule], ours: str, theirs: str = "", scope: str = "") -> Iterator[Rule]:
    for rule in inner:
        sources = tuple(Source(tuple(theirs + name for name in s.names), s.shape) for s in rule.sources)
        yield Rule(f"{ours}.{rule.name}" if ours else rule.name, sources, rule.join, scope or rule.scope)


def _same(name: str, official: str, tensor: Tensor) -> Rule:
    return Rule(name, (Source((official,), tuple(tensor.shape)),), lambda arrays: arrays[0])


def _kernel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Dense [in, out] and Conv [..., in, out] kernels as one [out, in] weight; several are stacked along out."""
    return np.concatenate([array.reshape(-1, array.shape[-1]).T for array in arrays])


def _dense(name: str, official: Sequence[str], layer: nn.Linear) -> Iterator[Rule]:
    shape = (layer.in_features, layer.out_features)
    yield Rule(f"{name}.weight", (Source(tuple(f"{o}/kernel" for o in official), shape),), _kernel)
    if layer.bias is not None:
        source = Source(tuple(f"{o}/bias" for o in official), shape[1:])
        yield Rule(f"{name}.bias", (source,), lambda arrays: arrays[0])


def _norm(name: str, official: str, norm: nn.Module) -> Iterator[Rule]:
    if isinstance(norm, nn.RMSNorm):
        yield _same(f"{name}.weight", f"{official}/weight", norm.weight)
    elif isinstance(norm, nn.LayerNorm):
        yield _same(f"{name}.weight", f"{official}/gamma", norm.weight)
        yield _same(f"{name}.bias", f"{official}/beta", norm.bias)


def _block(block: Block) -> Iterator[Rule]:
    rms = isinstance(block.attention_norm, nn.RMSNorm)
    attention = "self_attention" if rms else "multi_head_attention"
    yield from _norm("attention_norm", f"{attention}/layer_norm" if rms else "layer_norm", block.attention_norm)
    qkv = block.attention.qkv
    for suffix, parameter in (("kernel", qkv.weight), ("bias", qkv.bias)):
        if parameter is not None:
            third = qkv.out_features // 3
            shape = (qkv.in_features, third) if suffix == "kernel" else (third,)
            sources = tuple(Source((f"{attention}/{letter}/{suffix}",), shape) for letter in "qkv")
            join = _kernel if suffix == "kernel" else np.concatenate
            yield Rule(f"attention.qkv.{'weight' if suffix == 'kernel' else 'bias'}", sources, join)
    yield from _dense("attention.out", [f"{attention}/o"], block.attention.out)
    yield from _norm("ff_norm", "feed_forward/layer_norm", block.ff_norm)
    yield from _dense("ff_in", ["feed_forward/dense_gelu_dense/wi"], block.ff_in)
    yield from _dense("ff_out", ["feed_forward/dense_gelu_dense/wo"], block.ff_out)


def _transformer(transformer: Transformer) -> Iterator[Rule]:
    for index, block in enumerate(transformer.layers):
        yield from _under(_block(block), f"layers.{index}", f"layer_{index}/")
    yield from _norm("final_norm", "final_layer_norm", transformer.final_norm)


def _position(position: PositionEmbedding, scope: str = "") -> Iterator[Rule]:
    layer, axes = {
        1: ("temporal_embeddings", ("temporal",)),
        2: ("spectro_temporal_embeddings", ("temporal", "spectoral")),  # their spelling
        3: ("spatio_temporal_embeddings", ("temporal", "vertical", "horizontal")),
    }[len(position.tables)]
    for index, (axis, table) in enumerate(zip(axes, position.tables)):
        yield _same(f"tables.{index}", f"{scope}{layer}/{axis}_position_embeddings/embeddings", table)
    yield from _norm("norm", f"{scope}{layer}/layer_norm", position.norm)


def _patch(patch: nn.Module) -> Iterator[Rule]:
    dim = patch.weight.shape[0]
    if isinstance(patch, VoxelPatch):
        name, kernel = "voxel_to_patch", (*patch.patch, 3, dim)
    elif isinstance(patch, WaveformPatch):
        name, kernel = "waveform_to_patch", (patch.patch, 1, dim)
    else:
        name, kernel = "spectrum_to_patch", (*patch.patch, 1, dim)
    yield Rule("weight", (Source((f"{name}/kernel",), kernel),), _kernel)
    yield _same("bias", f"{name}/bias", patch.bias)


def _patch_stem(stem: PatchStem, modality: str = "") -> Iterator[Rule]:
    """`modality` is the prefix the unified backbone puts before its layers, e.g. 'video_'."""
    yield from _under(_patch(stem.patch), "patch")
    if stem.pre_projection is not None:
        yield from _dense("pre_projection", [f"{modality}pre_tx_projection"], stem.pre_projection)
    yield from _under(_position(stem.position, modality), "position")
    yield _same("agg", {"": "", "video_": "vid_", "audio_": "aud_"}[modality] + "agg_embedding", stem.agg)


def _word_stem(stem: WordStem) -> Iterator[Rule]:
    yield _same("embedding.weight", "text_embedding/embeddings", stem.embedding.weight)
    yield from _dense("pre_projection", ["text_pre_tx_projection"], stem.pre_projection)
    yield from _under(_position(stem.position, "text_"), "position")
    yield _same("agg", "txt_agg_embedding", stem.agg)


def _patch_encoder(encoder: PatchEncoder) -> Iterator[Rule]:
    def inner() -> Iterator[Rule]:
        yield from _under(_patch_stem(encoder.stem), "stem")
        yield from _under(_transformer(encoder.transformer), "transformer", "transformer/")
        if encoder.post_projection is not None:
            yield from _dense("post_projection", ["post_tx_projection"], encoder.post_projection)

    modality = "video" if isinstance(encoder.stem.patch, VoxelPatch) else "audio"
    for rule in _under(inner(), "", scope=f"{modality}_module"):
        yield rule._replace(sources=tuple(_or_unified(source, modality) for source in rule.sources))


def _or_unified(source: Source, modality: str) -> Source:
    """A tower's variable by its own name, or by the unified backbone's: video_pre_tx_projection, vid_agg_embedding."""
    prefixes = ("", f"{modality}_", f"{modality[:3]}_")
    return source._replace(names=tuple(prefix + name for prefix in prefixes for name in source.names))


def _agnostic(backbone: AgnosticBackbone) -> Iterator[Rule]:
    def inner() -> Iterator[Rule]:
        for modality, stem in backbone.stems.items():
            described = _word_stem(stem) if modality == "text" else _patch_stem(stem, f"{modality}_")
            yield from _under(described, f"stems.{modality}")
            projection = backbone.post_projections[modality]
            yield from _dense(f"post_projections.{modality}", [f"{modality}_post_tx_projection"], projection)
        yield from _under(_transformer(backbone.transformer), "transformer", "transformer/")

    return _under(inner(), "", scope="unified_module")


def _text_encoder(encoder: TextEncoder) -> Iterator[Rule]:
    def inner() -> Iterator[Rule]:
        yield _same("embedding.weight", "embedding/embeddings", encoder.embedding.weight)
        yield _same("agg", "agg_embedding", encoder.agg)
        yield from _dense("pre_projection", ["pre_proj"], encoder.pre_projection)
        table = encoder.relative_bias.table
        yield _same("relative_bias.table", "layer_0/self_attention/relative_attention_bias/embeddings", table)
        yield from _under(_transformer(encoder.transformer), "transformer")

    return _under(inner(), "", scope="text_module")


def _linear_text(encoder: LinearTextEncoder) -> Iterator[Rule]:
    yield _same("embedding.weight", "embedding/embeddings", encoder.embedding.weight)._replace(scope="text_module")
    layer = encoder.projection
    shape = (1, layer.in_features, layer.out_features)
    yield Rule("projection.weight", (Source(("text_conv1/kernel",), shape),), _kernel, "text_module")
    yield _same("projection.bias", "text_conv1/bias", layer.bias)._replace(scope="text_module")


def _batch_norm(norm: SyncBatchNorm, official: Sequence[str], duplicate: str = "") -> Iterator[Rule]:
    pairs = (("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean"), ("running_var", "moving_variance"))
    for ours, theirs in pairs:
        names = tuple(f"{o}/{theirs}" + (duplicate if o.endswith("batch_norm") else "") for o in official)
        yield Rule(ours, (Source(names, tuple(norm.weight.shape)),), lambda arrays: arrays[0])


def _factorized(heads: FactorizedHeads) -> Iterator[Rule]:
    if len(heads.audio_video) > 1:
        raise ValueError("load_tf_vatt: heads.style must be 'code' (the paper's heads were not released), got 'paper'.")
    yield from _dense("video_hidden.0", ["vid_to_hid"], heads.video_hidden[0])
    # pre_bn and bn share one official variable name; pre_bn was created first.
    first, second = ["hid_to_va/pre_bn", "hid_to_va/batch_norm"], ["hid_to_va/bn", "hid_to_va/batch_norm"]
    yield from _under(_batch_norm(heads.video_hidden[1], first), "video_hidden.1")
    yield from _dense("video_audio.0", ["hid_to_va/linear_projection"], heads.video_audio[0])
    yield from _under(_batch_norm(heads.video_audio[1], second, "__dup1"), "video_audio.1")
    yield from _dense("video_text.0", ["va_to_vat/linear_projection"], heads.video_text[0])
    yield from _under(_batch_norm(heads.video_text[1], ["va_to_vat/bn", "va_to_vat/batch_norm"]), "video_text.1")
    audio_names = ["aud_to_va", "aud_to_va(aud_to_vid)", "aud_to_vid"]
    text_names = ["txt_to_vat", "txt_to_vat(txt_to_vid)", "txt_to_vid"]
    yield from _dense("audio_video.0", audio_names, heads.audio_video[0])
    yield from _dense("text_video.0", text_names, heads.text_video[0])


def _joint(heads: JointHeads) -> Iterator[Rule]:
    for ours, theirs in (("video", "vid_to_vat"), ("audio", "aud_to_vat"), ("text", "txt_to_vat")):
        layer, norm = getattr(heads, ours)
        yield from _dense(f"{ours}.0", [f"{theirs}/linear_projection"], layer)
        yield from _under(_batch_norm(norm, [f"{theirs}/bn", f"{theirs}/batch_norm"]), f"{ours}.1")


def _classifier(classifier: Classifier) -> Iterator[Rule]:
    yield from _under(rules(classifier.encoder), "encoder")
    yield from _dense("head", ["classification/weights"], classifier.head)


def _vatt(model: VATT) -> Iterator[Rule]:
    for name, child in model.named_children():
        yield from _under(rules(child), name, scope="heads" if name == "heads" else "")


_DESCRIPTIONS: dict[type[nn.Module], Callable[..., Iterator[Rule]]] = {
    VATT: _vatt,
    AgnosticBackbone: _agnostic,
    PatchEncoder: _patch_encoder,
    TextEncoder: _text_encoder,
    LinearTextEncoder: _linear_text,
    FactorizedHeads: _factorized,
    JointHeads: _joint,
    Classifier: _classifier,
}
