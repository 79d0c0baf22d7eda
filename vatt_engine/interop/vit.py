"""An image ViT (Hugging Face's or timm's names) as our video tower, its patches inflated over time.

    voxel weight[t, h, w] = image weight[h, w] / t;   E_t = 0,  E_hw = its positions,  AGG = its class token + position

A static clip then gives the image's tokens at every step of time, and a clip of one step (as many frames as a voxel
patch is long; so the paper feeds ImageNet) gives the image's output. On a longer one the patches outnumber AGG: among
T times as many equal keys it weighs less, and outputs differ.

The tower must have a table over all places of a frame and no norm on positions, as `vit_config` reads off the weights:
ViT's positions are no sum of a row's and a column's. Pictures are in [-1, 1] (mean and deviation 0.5); weights made for
another normalisation are not adapted. ViT's pooler is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vatt_engine.interop.rules import ImportReport, Rule, Source, fill, first_of, named, same, under
from vatt_engine.models.config import DropTokenConfig, PositionConfig, TransformerConfig, VideoConfig
from vatt_engine.models.embeddings import VoxelPatch, resample_frame
from vatt_engine.models.heads import Classifier
from vatt_engine.models.transformer import Block
from vatt_engine.models.vatt import PatchEncoder

_CLASS = ("embeddings.cls_token", "cls_token")
_POSITIONS = ("embeddings.position_embeddings", "pos_embed")
_PATCH = ("embeddings.patch_embeddings.projection", "patch_embed.proj")
_LAYERS = ("encoder.layer.{}.", "layers.{}.", "blocks.{}.")  # transformers before 5, since 5, timm
_NAMES = {  # ours -> theirs under each of these
    "attention_norm": ("layernorm_before", "layernorm_before", "norm1"),
    "attention.out": ("attention.output.dense", "attention.o_proj", "attn.proj"),
    "ff_norm": ("layernorm_after", "layernorm_after", "norm2"),
    "ff_in": ("intermediate.dense", "mlp.fc1", "mlp.fc1"),
    "ff_out": ("output.dense", "mlp.fc2", "mlp.fc2"),
}
_QKV = (("attention.attention.{}", ("query", "key", "value")), ("attention.{}_proj", ("q", "k", "v")))


def vit_config(
    weights: Mapping[str, Tensor], *, num_frames: int = 32, patch_frames: int = 4, num_heads: int | None = None
) -> VideoConfig:
    """The video tower that an image ViT's weights fit into.

    Args:
        weights: a state dict of ViTModel, ViTForImageClassification or timm's VisionTransformer, of square images.
        num_frames: of a clip; the positions over time start at zero.
        patch_frames: length of a voxel patch.
        num_heads: by default heads of 64, as in every published size.

    Raises:
        ValueError: no ViT.

    >>> vit_config(load_file("vit-base-patch16-224.safetensors")).frame_size  # doctest: +SKIP
    (224, 224)
    """
    weights = _bare(weights)
    positions, patch = _first(weights, _POSITIONS), _first(weights, [f"{name}.weight" for name in _PATCH])
    side, dim = math.isqrt(positions.shape[1] - 1), positions.shape[2]
    if side * side + 1 != positions.shape[1]:
        raise ValueError(f"vit_config: weights must have 1 + n * n positions, got {positions.shape[1]}.")
    hidden = _first(weights, [f"{layer.format(0)}{name}.weight" for layer, name in zip(_LAYERS, _NAMES["ff_in"])])
    norms = [layer + name + ".weight" for layer, name in zip(_LAYERS, _NAMES["ff_norm"])]
    height, width = patch.shape[2:]
    num_heads = num_heads or max(1, dim // 64)
    return VideoConfig(
        num_frames=num_frames,
        frame_size=(side * height, side * width),
        patch=(patch_frames, height, width),
        drop_token=DropTokenConfig(keep_rate=1.0),
        position=PositionConfig(tables="frame", norm=False),
        transformer=TransformerConfig(
            num_layers=next(i for i in range(10**4) if not any(name.format(i) in weights for name in norms)),
            dim=dim,
            ff_dim=hidden.shape[0],
            num_heads=num_heads,
            head_dim=dim // num_heads,
            norm_eps=1e-6 if _POSITIONS[1] in weights else 1e-12,  # timm's and Hugging Face's, which no weight tells
        ),
    )


def load_vit(
    model: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True, resample_positions: bool = False
) -> ImportReport:
    """Copy an image ViT into a video tower (`model.video` of a modality-specific VATT) or classifier.

    Args:
        model: a PatchEncoder of `vit_config`'s kind, or a Classifier around one, whose head then is loaded too.
        weights: as for `vit_config`.
        strict: raise unless every parameter is loaded and, the pooler aside, every weight is used.
        resample_positions: fit frames of another size by our spline, rows and then columns (ViT papers: bicubic).

    Raises:
        ValueError: another kind of module, or the report when `strict`.

    >>> load_vit(tower, load_file("vit-base-patch16-224.safetensors"))  # doctest: +SKIP
    """
    tower = model.encoder if isinstance(model, Classifier) else model
    fits = isinstance(tower, PatchEncoder) and isinstance(tower.stem.patch, VoxelPatch)
    if not fits or tower.stem.position.frame is None or not isinstance(tower.stem.position.norm, nn.Identity):
        raise ValueError(
            f"load_vit: model must be a video tower with position.tables 'frame' and no position.norm, got "
            f"{type(tower).__name__}. `vit_config(weights)` gives its config."
        )
    arrays = named(_bare(weights))
    if resample_positions:
        for name in arrays.keys() & set(_POSITIONS):
            arrays[name] = _resampled(arrays[name], tower.stem.position.frame)
    described = _tower(tower, fused=_LAYERS[2].format(0) + "attn.qkv.weight" in arrays)
    if isinstance(model, Classifier):
        described = [*under(described, "encoder"), *_linear("head", ("classifier", "head"), model.head)]
    return fill(model, described, arrays, first_of(arrays), where="load_vit", strict=strict)


def _resampled(positions: np.ndarray, frame: Sequence[int]) -> np.ndarray:
    """[1, 1 + n * n, D] -> [1, 1 + H * W, D]; the class token's stays."""
    side = math.isqrt(positions.shape[1] - 1)
    table = resample_frame(torch.as_tensor(positions[0, 1:]).double(), (side, side), frame)
    return np.concatenate([positions[:, :1], table.numpy()[None]], axis=1)


def _bare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the scope of ViTForImageClassification and the pooler."""
    bare = {name.removeprefix("vit."): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in bare.items() if not name.startswith("pooler.")}


def _first(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    found = next((weights[name] for name in names if name in weights), None)
    if found is None:
        raise ValueError(f"vit_config: weights must hold a ViT, got none of {', '.join(names)}.")
    return found


def _tower(tower: PatchEncoder, *, fused: bool) -> Iterator[Rule]:
    stem = tower.stem
    frames, height, width = stem.patch.patch
    dim, places = len(stem.agg), len(stem.position.tables[1])
    positions = Source(_POSITIONS, (1, 1 + places, dim))

    def inflated(arrays: Sequence[np.ndarray]) -> np.ndarray:  # [D, 3, h, w] -> [D, t, h, w, 3]
        image = arrays[0].transpose(0, 2, 3, 1)[:, None] / frames
        return np.broadcast_to(image, (dim, frames, height, width, 3)).reshape(dim, -1)

    kernel = Source(tuple(f"{name}.weight" for name in _PATCH), (dim, 3, height, width))
    yield Rule("stem.patch.weight", (kernel,), inflated)
    yield same("stem.patch.bias", [f"{name}.bias" for name in _PATCH], stem.patch.bias)
    yield Rule("stem.position.tables.0", (), lambda _: np.zeros(stem.position.tables[0].shape))
    yield Rule("stem.position.tables.1", (positions,), lambda arrays: arrays[0][0, 1:])
    agg = Source(_CLASS, (1, 1, dim))
    yield Rule("stem.agg", (agg, positions), lambda arrays: arrays[0][0, 0] + arrays[1][0, 0])
    for index, block in enumerate(tower.transformer.layers):
        yield from under(_block(block, index, fused), f"transformer.layers.{index}")
    yield from _linear("transformer.final_norm", ("layernorm", "norm"), tower.transformer.final_norm)


def _block(block: Block, index: int, fused: bool) -> Iterator[Rule]:
    scopes = [layer.format(index) for layer in _LAYERS]
    for ours, theirs in _NAMES.items():
        layer = block.get_submodule(ours)
        yield from _linear(ours, [scope + name for scope, name in zip(scopes, theirs)], layer)
    for kind in ("weight", "bias"):
        parameter = getattr(block.attention.qkv, kind)
        if fused:
            yield same(f"attention.qkv.{kind}", f"{scopes[2]}attn.qkv.{kind}", parameter)
            continue
        third = (parameter.shape[0] // 3, *parameter.shape[1:])
        names = [
            [f"{scope}{form.format(letter)}.{kind}" for letter in letters]
            for scope, (form, letters) in zip(scopes, _QKV)
        ]
        sources = tuple(Source(alternatives, third) for alternatives in zip(*names))
        yield Rule(f"attention.qkv.{kind}", sources, np.concatenate)


def _linear(ours: str, theirs: Sequence[str], layer: nn.Module) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield same(f"{ours}.{kind}", [f"{name}.{kind}" for name in theirs], getattr(layer, kind))
