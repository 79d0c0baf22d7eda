"""Weights of the official TensorFlow VATT: variable name -> array, into any module of ours.

A module is described by rules: which official variables, of which shape, make each of its parameters. Names are
matched by their last components, so any scope in front of them is fine, as are ":0" behind them and the "__dup1" that
marks the second of two variables with one official name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vatt_engine.faults import is_raised_in
from vatt_engine.interop.rules import ImportReport, Match, Rule, Source, fill, same, under
from vatt_engine.interop.tf_names import NamedVariables, has_object_paths, object_names
from vatt_engine.models.embeddings import PatchStem, PositionEmbedding, VoxelPatch, WaveformPatch, resample_table
from vatt_engine.models.heads import Classifier, FactorizedHeads, JointHeads, SyncBatchNorm
from vatt_engine.models.text import LinearTextEncoder, TextEncoder, WordEmbedding, WordStem
from vatt_engine.models.transformer import Block, Transformer
from vatt_engine.models.vatt import VATT, AgnosticBackbone, PatchEncoder


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; nothing is unpickled.

    Raises:
        ValueError: the file is not an .npz, or holds pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
        # A damaged header makes NumPy raise a TypeError; one raised elsewhere is a wrong call.
        if isinstance(error, FileNotFoundError) or (isinstance(error, TypeError) and not is_raised_in(error, "numpy")):
            raise
        raise ValueError(f"{path}: the file must be an .npz of plain arrays, got {error!r}.") from error


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

    A table of word vectors is frozen, as when vectors are loaded from a file, unless the checkpoint holds a slot of the
    optimizer for it: officially it is not trained. `freeze_embedding` false leaves it trainable.

    Args:
        variables: official name -> array, in TensorFlow's layouts (Dense [in, out], Conv3D [t, h, w, in, out]). The
            names are Keras', or the paths of a TensorFlow 2 checkpoint as `read_tf_checkpoint` gives them.
        strict: raise unless every parameter is loaded and every variable is used.
        resample_positions: fit position tables of another size by the official spline, as official fine-tuning does.

    Raises:
        ValueError: with the report, when `strict` and something is missing, unused or of another shape; a name that
            stands for two variables; nothing that could be loaded.

    Source: official vatt/utils/train/restore.py.

    >>> load_tf_vatt(create_model("vit_base"), read_npz("vit_base.npz"))  # doctest: +SKIP
    """
    slots: set[str] = set()
    if has_object_paths(variables):
        names = object_names(variables)
        slots = {name for name, _ in names.slots}
        text = f"{len(variables)} keys are paths of a TensorFlow 2 checkpoint; its {len(names.variables)} variables"
        print(f"load_tf_vatt: the {text} are taken by their official names", file=sys.stderr)
        variables = NamedVariables(variables, names)
    elif any(isinstance(module, FactorizedHeads) for module in model.modules()):
        _check_both_norms(variables)
    index = Index(variables)

    def resampled(one: Match) -> list[np.ndarray] | None:
        if not one.rule.name.rpartition(".")[0].endswith("position.tables"):
            return None
        (table,) = one.read(variables)
        if table.ndim != 2 or len(table) == len(one.target):
            return None
        return [resample_table(torch.as_tensor(table).double(), len(one.target)).numpy()]

    options = {"adapt": resampled} if resample_positions else {}
    described = list(rules(model))
    report = fill(model, described, variables, index.find, where="load_tf_vatt", strict=strict, **options)
    trained = {rule.name for rule in described if any(index.find(rule, one) in slots for one in rule.sources)}
    for name, module in model.named_modules():
        table = f"{name}.weight".lstrip(".")
        if isinstance(module, WordEmbedding) and table in report.loaded:
            module.freeze_loaded(trained=table in trained)
    return report


def _check_both_norms(variables: Mapping[str, np.ndarray]) -> None:
    """Refuse names of Keras that have lost a BatchNorm: of two with one name a dict holds the last."""
    name = "hid_to_va/batch_norm/gamma"
    found = [key for key in variables if f"/{key}".replace(":0", "").removesuffix("__dup1").endswith(f"/{name}")]
    if len(found) == 1:
        raise ValueError(
            f"load_tf_vatt: variables must hold both BatchNorms of hid_to_va, not {found[0]} alone: Keras calls both "
            "alike, so a dict by name has lost one. Give `read_tf_checkpoint(prefix)`, whose paths tell them apart."
        )


class Index:
    """Official names by their last components."""

    def __init__(self, variables: Mapping[str, np.ndarray]) -> None:
        self.parts = {key: tuple(key.replace(":0", "").split("/")) for key in variables}
        self.components = {part for parts in self.parts.values() for part in parts}
        self.scopes = self.components & {"video_module", "audio_module", "text_module", "unified_module"}
        self.by_last: dict[str, list[str]] = {}
        for key, parts in self.parts.items():
            self.by_last.setdefault(parts[-1], []).append(key)

    def find(self, rule: Rule, source: Source) -> str | None:
        for name in source.names:
            suffix = tuple(name.split("/"))
            found = [k for k in self.by_last.get(suffix[-1], []) if self.parts[k][-len(suffix) :] == suffix]
            found = [key for key in found if self.in_scope(key, rule.scope)]
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


def _kernel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Dense [in, out] and Conv [..., in, out] kernels as one [out, in] weight; several are stacked along out."""
    parts = [array.reshape(-1, array.shape[-1]).T for array in arrays]
    if len(parts) == 1:
        return parts[0]  # a view: whoever takes it copies it
    # torch transposes as it copies, three times faster than NumPy; it warns of arrays that must not be written to.
    return torch.cat([torch.from_numpy(np.require(part, requirements="W")) for part in parts]).numpy()


def _dense(name: str, official: Sequence[str], layer: nn.Linear) -> Iterator[Rule]:
    shape = (layer.in_features, layer.out_features)
    yield Rule(f"{name}.weight", (Source(tuple(f"{o}/kernel" for o in official), shape),), _kernel)
    if layer.bias is not None:
        source = Source(tuple(f"{o}/bias" for o in official), shape[1:])
        yield Rule(f"{name}.bias", (source,), lambda arrays: arrays[0])


def _norm(name: str, official: str, norm: nn.Module) -> Iterator[Rule]:
    if isinstance(norm, nn.RMSNorm):
        yield same(f"{name}.weight", f"{official}/weight", norm.weight)
    elif isinstance(norm, nn.LayerNorm):
        yield same(f"{name}.weight", f"{official}/gamma", norm.weight)
        yield same(f"{name}.bias", f"{official}/beta", norm.bias)


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
        yield from under(_block(block), f"layers.{index}", f"layer_{index}/")
    yield from _norm("final_norm", "final_layer_norm", transformer.final_norm)


def _position(position: PositionEmbedding, scope: str = "") -> Iterator[Rule]:
    if position.frame is not None:
        raise ValueError("load_tf_vatt: position.tables must be 'axis', got 'frame'. `load_vit` loads an image ViT.")
    layer, axes = {
        1: ("temporal_embeddings", ("temporal",)),
        2: ("spectro_temporal_embeddings", ("temporal", "spectoral")),  # their spelling
        3: ("spatio_temporal_embeddings", ("temporal", "vertical", "horizontal")),
    }[len(position.tables)]
    for index, (axis, table) in enumerate(zip(axes, position.tables)):
        yield same(f"tables.{index}", f"{scope}{layer}/{axis}_position_embeddings/embeddings", table)
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
    yield same("bias", f"{name}/bias", patch.bias)


def _patch_stem(stem: PatchStem, modality: str = "") -> Iterator[Rule]:
    """`modality` is the prefix the unified backbone puts before its layers, e.g. 'video_'."""
    yield from under(_patch(stem.patch), "patch")
    if stem.pre_projection is not None:
        yield from _dense("pre_projection", [f"{modality}pre_tx_projection"], stem.pre_projection)
    yield from under(_position(stem.position, modality), "position")
    yield same("agg", {"": "", "video_": "vid_", "audio_": "aud_"}[modality] + "agg_embedding", stem.agg)


def _word_stem(stem: WordStem) -> Iterator[Rule]:
    yield same("embedding.weight", "text_embedding/embeddings", stem.embedding.weight)
    yield from _dense("pre_projection", ["text_pre_tx_projection"], stem.pre_projection)
    yield from under(_position(stem.position, "text_"), "position")
    yield same("agg", "txt_agg_embedding", stem.agg)


def _patch_encoder(encoder: PatchEncoder) -> Iterator[Rule]:
    def inner() -> Iterator[Rule]:
        yield from under(_patch_stem(encoder.stem), "stem")
        yield from under(_transformer(encoder.transformer), "transformer", "transformer/")
        if encoder.post_projection is not None:
            yield from _dense("post_projection", ["post_tx_projection"], encoder.post_projection)

    modality = "video" if isinstance(encoder.stem.patch, VoxelPatch) else "audio"
    for rule in under(inner(), "", scope=f"{modality}_module"):
        yield rule._replace(sources=tuple(_or_unified(source, modality) for source in rule.sources))


def _or_unified(source: Source, modality: str) -> Source:
    """A tower's variable by its own name, or by the unified backbone's: video_pre_tx_projection, vid_agg_embedding."""
    prefixes = ("", f"{modality}_", f"{modality[:3]}_")
    return source._replace(names=tuple(prefix + name for prefix in prefixes for name in source.names))


def _agnostic(backbone: AgnosticBackbone) -> Iterator[Rule]:
    def inner() -> Iterator[Rule]:
        for modality, stem in backbone.stems.items():
            described = _word_stem(stem) if modality == "text" else _patch_stem(stem, f"{modality}_")
            yield from under(described, f"stems.{modality}")
            projection = backbone.post_projections[modality]
            yield from _dense(f"post_projections.{modality}", [f"{modality}_post_tx_projection"], projection)
        yield from under(_transformer(backbone.transformer), "transformer", "transformer/")

    return under(inner(), "", scope="unified_module")


def _text_encoder(encoder: TextEncoder) -> Iterator[Rule]:
    if encoder.pre_projection is None:
        raise ValueError("load_tf_vatt: text.style must be 'code', got 't5'. `load_t5` loads T5's own weights.")

    def inner() -> Iterator[Rule]:
        yield same("embedding.weight", "embedding/embeddings", encoder.embedding.weight)
        yield same("agg", "agg_embedding", encoder.agg)
        yield from _dense("pre_projection", ["pre_proj"], encoder.pre_projection)
        table = encoder.relative_bias.table
        yield same("relative_bias.table", "layer_0/self_attention/relative_attention_bias/embeddings", table)
        yield from under(_transformer(encoder.transformer), "transformer")

    return under(inner(), "", scope="text_module")


def _linear_text(encoder: LinearTextEncoder) -> Iterator[Rule]:
    yield same("embedding.weight", "embedding/embeddings", encoder.embedding.weight)._replace(scope="text_module")
    layer = encoder.projection
    shape = (1, layer.in_features, layer.out_features)
    yield Rule("projection.weight", (Source(("text_conv1/kernel",), shape),), _kernel, "text_module")
    yield same("projection.bias", "text_conv1/bias", layer.bias)._replace(scope="text_module")


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
    yield from under(_batch_norm(heads.video_hidden[1], first), "video_hidden.1")
    yield from _dense("video_audio.0", ["hid_to_va/linear_projection"], heads.video_audio[0])
    yield from under(_batch_norm(heads.video_audio[1], second, "__dup1"), "video_audio.1")
    yield from _dense("video_text.0", ["va_to_vat/linear_projection"], heads.video_text[0])
    yield from under(_batch_norm(heads.video_text[1], ["va_to_vat/bn", "va_to_vat/batch_norm"]), "video_text.1")
    audio_names = ["aud_to_va", "aud_to_va(aud_to_vid)", "aud_to_vid"]
    text_names = ["txt_to_vat", "txt_to_vat(txt_to_vid)", "txt_to_vid"]
    yield from _dense("audio_video.0", audio_names, heads.audio_video[0])
    yield from _dense("text_video.0", text_names, heads.text_video[0])


def _joint(heads: JointHeads) -> Iterator[Rule]:
    for ours, theirs in (("video", "vid_to_vat"), ("audio", "aud_to_vat"), ("text", "txt_to_vat")):
        layer, norm = getattr(heads, ours)
        yield from _dense(f"{ours}.0", [f"{theirs}/linear_projection"], layer)
        yield from under(_batch_norm(norm, [f"{theirs}/bn", f"{theirs}/batch_norm"]), f"{ours}.1")


def _classifier(classifier: Classifier) -> Iterator[Rule]:
    yield from under(rules(classifier.encoder), "encoder")
    yield from _dense("head", ["classification/weights"], classifier.head)


def _vatt(model: VATT) -> Iterator[Rule]:
    for name, child in model.named_children():
        yield from under(rules(child), name, scope="heads" if name == "heads" else "")


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
