"""Which nodes of a backbone answer to which modality: mean activations per layer and node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vatt_engine.analysis.report import new_figure, save_figure
from vatt_engine.models import VATT
from vatt_engine.models.text import word_mask
from vatt_engine.models.vatt import MODALITIES

Hook = Literal["mlp-input", "mlp-output"]


class MeanActivation:
    """Means over all tokens that passed while watched: `layers` holds [layers, nodes] by modality."""

    def __init__(self, hook: Hook = "mlp-input") -> None:
        self.hook = hook
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: Counter[tuple[str, int]] = Counter()

    @property
    def layers(self) -> dict[str, Tensor]:
        means: dict[str, list[Tensor]] = {}
        for key in sorted(self.sums, key=lambda key: key[1]):
            means.setdefault(key[0], []).append(self.sums[key] / self.counts[key])
        return {modality: torch.stack(means[modality]) for modality in MODALITIES if modality in means}

    @contextmanager
    def watch(self, model: VATT, modality: str, signals: Tensor) -> Iterator[None]:
        """While it is entered, all that `model` computes of these signals is added; padding of words is not.

        The hook is at "mlp-input", what a layer's MLP reads (behind its LayerNorm), or at "mlp-output", what it adds
        to the tokens. Source: paper section 4.3, figure 4, by its text the activations before the MLP.
        """
        agnostic = model.config.backbone == "agnostic"
        transformer = model.backbone.transformer if agnostic else getattr(model, modality).transformer
        seen = word_mask(signals) if modality == "text" else None

        def add(layer: int, values: Tensor) -> None:
            rows = (values if seen is None else values[seen]).flatten(0, -2).double().cpu()
            self.sums[modality, layer] = self.sums.get((modality, layer), 0.0) + rows.sum(0)
            self.counts[modality, layer] += len(rows)

        handles = []
        for index, layer in enumerate(transformer.layers):
            if self.hook == "mlp-input":
                handle = layer.ff_in.register_forward_pre_hook(lambda _, given, index=index: add(index, given[0]))
            else:
                handle = layer.ff_out.register_forward_hook(lambda _, __, out, index=index: add(index, out))
            handles.append(handle)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def plot_activations(layers: Mapping[str, Tensor], path: Path, title: str) -> Path:
    """A map of layers by nodes for each modality, on one scale."""
    limit = max(values.abs().flatten().quantile(0.99).item() for values in layers.values()) or 1.0
    figure = new_figure(8, 1.1 + len(layers) * (0.9 + 0.11 * max(len(values) for values in layers.values())))
    figure.suptitle(title, x=0.01, ha="left")
    panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, (modality, values) in zip(panels, layers.items()):
        image = axes.imshow(
            values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        axes.set_title(modality, fontsize=10, loc="left")
        axes.set_ylabel("layer")
        axes.set_yticks(range(0, len(values), max(1, len(values) // 6)))
    panels[-1].set_xlabel("node")
    bar = figure.colorbar(image, ax=list(panels), extend="both", shrink=0.9)
    bar.set_label("mean activation")
    bar.outline.set_visible(False)
    return save_figure(figure, path)
