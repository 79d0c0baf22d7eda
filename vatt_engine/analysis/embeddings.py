"""Features of clips and where they lie: by modality behind the tokenizer and in the common space, and t-SNE of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vatt_engine.analysis.report import GRID, new_figure, save_figure
from vatt_engine.models import VATT

MODALITY_COLORS = {"video": "#1f77b4", "audio": "#d1662c", "text": "#2a8f5a"}
PAIR_COLORS = {"positive": "#1f77b4", "random": "#8b929c"}
LEGEND_GROUPS = 12  # more classes than these are not named
NUM_BINS = 60


def token_means(model: VATT, modality: str, x: Tensor) -> Tensor:
    """A clip right behind its tokenizer: the mean of its tokens, before any layer of the transformer.

    Args:
        modality: "video", "audio" or "text".
        x: video [B, T, H, W, 3], waveform [B, L] or word ids [B, W], where padding does not count.

    Returns:
        [B, D], D the width of this modality's tokens.
    """
    if model.config.backbone == "agnostic":
        tokens = model.backbone.stems[modality](x)[:, 1:]
    elif modality != "text":
        tokens = getattr(model, modality).stem(x)[:, 1:]
    elif model.config.text.encoder == "t5":
        tokens = F.gelu(model.text.pre_projection(model.text.embedding(x)))
    else:
        tokens = F.relu(model.text.projection(model.text.embedding(x)))
    seen = (x != 0).to(tokens)[..., None] if modality == "text" else torch.ones_like(tokens[..., :1])
    return (tokens * seen).sum(1) / seen.sum(1).clamp_min(1)


def common_space(model: VATT, modality: str, pooled: Tensor) -> Tensor:
    """A pooled feature [B, D] in the one space that all modalities reach, of unit length [B, Dvt].

    With factorized heads that is the video-text space: sound is brought into the video-audio space and on from there,
    as the picture is (paper section 3.3).
    """
    z = model.heads(**{"video": None, "audio": None, "text": None} | {modality: pooled})
    if modality == "audio":
        joint = model.config.heads.kind == "joint"
        found = z.audio_video if joint else model.heads.video_text(model.heads.between(z.audio_video))
    else:
        found = z.video_text if modality == "video" else z.text_video
    return F.normalize(found, dim=-1)


def tsne(features: Sequence[Tensor], *, seed: int = 0) -> Tensor:
    """t-SNE of rows by their cosine distance, the same for the same rows and seed.

    Args:
        features: [Ni, Di] each, at least 4 rows in all; narrower ones are padded with zeros, which keeps every distance
            within them.
        seed: of openTSNE; it starts from the principal components.

    Returns:
        [sum Ni, 2], float32.

    Raises:
        ValueError: fewer than 4 rows.
    """
    width, count = max(x.shape[1] for x in features), sum(map(len, features))
    if count < 4:
        raise ValueError(f"tsne: features must hold at least 4 clips, got {count}.")
    from openTSNE import TSNE

    rows = torch.cat([F.pad(x.double().cpu(), (0, width - x.shape[1])) for x in features]).numpy()
    settings = {"metric": "cosine", "neighbors": "exact", "negative_gradient_method": "bh", "initialization": "pca"}
    found = TSNE(perplexity=min(30, (count - 1) / 3), random_state=seed, n_jobs=1, **settings).fit(rows)
    return torch.tensor(found, dtype=torch.float32)


def densities(positive: Tensor, random: Tensor) -> list[dict[str, float]]:
    """Densities of two sets of cosines over equal bins of [-1, 1], each of area 1; a row per bin.

    >>> row = densities(torch.tensor([0.99, 0.98]), torch.tensor([0.0]))[-1]
    >>> row["positive"], row["random"]
    (30.0, 0.0)
    """
    width, rows = 2 / NUM_BINS, []
    for index in range(NUM_BINS):
        row = {"cosine": -1 + (index + 0.5) * width}
        for name, values in (("positive", positive), ("random", random)):
            places = ((values.clamp(-1, 1) + 1) / width).long().clamp_max(NUM_BINS - 1)
            row[name] = (places == index).double().mean().item() / width
        rows.append({name: round(value, 6) for name, value in row.items()})
    return rows


def plot_points(panels: Mapping[str, tuple[Tensor, Sequence[str]]], path: Path, title: str) -> Path:
    """Scatter plots side by side: a title, points [N, 2] and their groups for each."""
    groups = sorted({group for _, names in panels.values() for group in names}, key=_order)
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = new_figure(max(4.2, 3.6 * columns), 3.7 * rows + 0.9)
    figure.suptitle(title, x=0.01, ha="left")
    colors = _colors(groups)
    for number, (name, (points, members)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        size = 22 if len(points) < 400 else 7
        for group in groups:
            own = points[[member == group for member in members]]
            axes.scatter(own[:, 0], own[:, 1], s=size, color=colors[group], label=group, alpha=0.8, linewidths=0)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.spines[:].set_color(GRID["color"])
    if len(groups) <= LEGEND_GROUPS:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=len(groups) if len(groups) <= 8 else 6,
            columnspacing=1.2,
            handletextpad=0.2,
            frameon=False,
            markerscale=1.5,
        )
    return save_figure(figure, path)


def plot_densities(panels: Mapping[str, Sequence[Mapping[str, float]]], path: Path, title: str) -> Path:
    """Densities of positive and random pairs, a panel each, over the same axis."""
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = new_figure(max(4.8, 4.2 * columns), 2.6 * rows + 0.7)
    figure.suptitle(title, x=0.01, ha="left")
    for number, (name, bins) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        x = [row["cosine"] for row in bins]
        for kind, color in PAIR_COLORS.items():
            axes.fill_between(x, [row[kind] for row in bins], step="mid", color=color, alpha=0.35, linewidth=0)
            axes.step(x, [row[kind] for row in bins], where="mid", color=color, label=f"{kind} pairs")
        axes.set_title(name, fontsize=10, loc="left")
        axes.set(xlim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1), ylabel="density")
        axes.set_ylim(bottom=0)
        axes.grid(**GRID)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 1:
            axes.legend(frameon=False, fontsize=9)
        if number > len(panels) - columns:
            axes.set_xlabel("cosine similarity")
    return save_figure(figure, path)


def _order(group: str) -> tuple[bool, int, str]:
    """Numbers by value, then the modalities as always, then names."""
    places = [*MODALITY_COLORS].index(group) if group in MODALITY_COLORS else len(MODALITY_COLORS)
    return (not group.isdigit(), int(group) if group.isdigit() else places, group)


def _colors(groups: Sequence[str]) -> dict[str, object]:
    """The modalities' own colors; else as many different ones as there are groups."""
    from matplotlib import colormaps

    few = colormaps["tab10" if len(groups) <= 10 else "tab20"].colors
    many = [colormaps["hsv"](index / max(1, len(groups))) for index in range(len(groups))]
    chosen = few if len(groups) <= len(few) else many
    return {group: MODALITY_COLORS.get(group, color) for group, color in zip(groups, chosen)}
