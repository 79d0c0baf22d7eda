"""The genuine checkpoints of the official trainers beside this file, and what TensorFlow computed with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vatt_engine.models import VATT

FOLDERS = Path(__file__).parent / "tf_checkpoints"
# Folder -> width of the attention heads, the one size that the files do not hold; tx has two.
HEAD_DIMS = {"tx": (6, 8), "ut": (6,), "vit": (6,), "wat": (8,)}


def inputs(name: str) -> dict[str, Tensor]:
    """The inputs of a folder, by modality: video [B, T, H, W, 3], audio [B, L], text [B, W]."""
    with np.load(FOLDERS / name / "expected.npz") as archive:
        found = {key.removeprefix("in/"): archive[key] for key in archive if key.startswith("in/")}
    tensors = {}
    for key, array in found.items():
        modality = {"images": "video"}.get(key, key)
        tensors[modality] = torch.from_numpy(array.reshape(len(array), -1) if modality == "audio" else array)
    if "text" in tensors:
        tensors["text"] = tensors["text"].long()
    return tensors


@torch.no_grad()
def worst_error(model: nn.Module, name: str) -> dict[str, float]:
    """The largest difference from each of TensorFlow's outputs."""
    given = inputs(name)
    if isinstance(model, VATT):
        features = {modality: getattr(model, f"encode_{modality}")(x) for modality, x in given.items()}
        heads = model.heads(**features)
        outputs = {f"out/{modality}/features_pooled": x for modality, x in features.items()}
        outputs |= {"out/video/toaud": heads.video_audio, "out/audio/tovid": heads.audio_video}
        outputs |= {"out/video/totxt": heads.video_text, "out/text/tovid": heads.text_video}
    else:
        outputs = {"out/logits": model(*given.values())}
    with np.load(FOLDERS / name / "expected.npz") as archive:
        wanted = {key: archive[key] for key in archive if key.startswith("out/") and "probabilities" not in key}
    assert outputs.keys() == wanted.keys()
    return {key: float(np.abs(outputs[key].numpy() - value).max()) for key, value in wanted.items()}
