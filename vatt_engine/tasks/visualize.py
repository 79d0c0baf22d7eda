"""`vatt visualize RUN...`: the paper's figures 2, 3 and 4 of trained runs, as PNG and as the numbers behind them."""

from __future__ import annotations

import csv
import dataclasses
import io
import random
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vatt_engine.analysis.activation import Hook, MeanActivation, plot_activations
from vatt_engine.analysis.embeddings import common_space, densities, plot_densities, plot_points, token_means, tsne
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import Sample, read_manifest
from vatt_engine.models import VATT
from vatt_engine.output import put
from vatt_engine.schema import ConfigError, PathText
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.probe import Features, ProbeConfig
from vatt_engine.tasks.results import Results
from vatt_engine.tasks.retrieve import load_run

Rows = list[dict[str, Any]]
Figure = tuple[Rows, Callable[[Path], object]]  # the numbers, and what draws them into a file


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Writes OUT/FIGURE.png and OUT/FIGURE.csv, several runs side by side; prints what of the CSV cannot be written.

    Args:
        runs: run folders of `vatt pretrain`, for tsne-classes also of `vatt finetune`, or folders with a video model;
            also as words before the flags.
        data: manifest of clips the runs have not seen.
        figure: tsne-classes (paper, figure 2): video features by class. tsne-modalities (figure 3): video, audio and
            text behind the tokenizers and in the common space. similarity (figure 3): densities of the cosines of
            positive and random pairs. activation (figure 4): mean activation per layer and node.
        out: folder; by default plots/ of the first run.
        num_classes: classes of tsne-classes, drawn at random; needs labels in the manifest.
        num_clips: clips, drawn at random.
        hook: where `activation` looks: what the MLP reads, as the paper's text says, or what it gives.
        batch_size: clips embedded at once.
        seed: of all draws and of t-SNE.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    runs: tuple[PathText, ...]
    data: PathText
    figure: Literal["tsne-classes", "tsne-modalities", "similarity", "activation"]
    out: PathText | None = None
    num_classes: int = 100
    num_clips: int = 1000
    hook: Hook = "mlp-input"
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("VisualizeConfig: runs must name a run folder, got none.")
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"VisualizeConfig: runs must differ, got {' '.join(self.runs)}.")
        for name, least in (("num_classes", 1), ("num_clips", 4), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"VisualizeConfig: {name} must be at least {least}, got {getattr(self, name)}.")


def main(argv: Sequence[str]) -> int:
    config = parse_flags(VisualizeConfig, with_runs(argv), prog="vatt visualize")
    paths = visualize(config)
    for path in paths:
        print(path)
    return 0 if len(paths) == 2 else 2


def with_runs(argv: Sequence[str]) -> list[str]:
    """The words before the first flag as the flag --runs."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return ["--runs", *argv] if count else list(argv)


@torch.inference_mode()
def visualize(config: VisualizeConfig) -> list[Path]:
    """Draw one figure; returns the PNG and the CSV, without one that could not be written, which is said.

    Raises:
        ValueError: a run, its checkpoints or the manifest cannot be used, the manifest has not what is drawn, or
            nothing can be written where the figure goes.

    >>> visualize(VisualizeConfig(runs=("run",), data="heldout.jsonl", figure="similarity"))  # doctest: +SKIP
    """
    results = Results(config.out or Path(config.runs[0]) / "plots", "vatt visualize")
    chosen = choose(read_manifest(config.data), config)
    figures = {"tsne-classes": _classes, "tsne-modalities": _modalities, "similarity": _similarity}
    rows, draw = figures.get(config.figure, _activation)(config, chosen)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    table = results.save_text(f"{config.figure}.csv", text.getvalue())
    if table is None:  # the numbers are the work; a picture can be drawn of them
        put(sys.stdout, text.getvalue())
    picture = results.save(f"{config.figure}.png", draw)
    return [path for path in (picture, table) if path is not None]


def choose(samples: Sequence[Sample], config: VisualizeConfig) -> list[Sample]:
    """The clips of a figure: all or of some classes, in manifest order.

    Raises:
        ConfigError: tsne-classes of clips of which none has one label.
    """
    draw = random.Random(config.seed)
    if config.figure == "tsne-classes":
        labelled = [sample for sample in samples if isinstance(sample.label, int | str)]
        if not labelled:
            several = next((sample for sample in samples if sample.label is not None), None)
            found = "none" if several is None else f"several for each, {list(several.label)} on line {several.line}"
            raise ConfigError(f"{config.data}: the manifest must have one label for a clip, got {found}.")
        classes = sorted({sample.label for sample in labelled}, key=str)
        kept = set(draw.sample(classes, min(config.num_classes, len(classes))))
        samples = [sample for sample in labelled if sample.label in kept]
    places = sorted(draw.sample(range(len(samples)), min(config.num_clips, len(samples))))
    return [samples[place] for place in places]


class Run(NamedTuple):
    """A loaded run, and each modality's signals in batches with the samples they are of."""

    title: str
    model: VATT
    batches: Callable[[], Any]


def open_run(run: str, config: VisualizeConfig, samples: Sequence[Sample]) -> Run:
    """A run whose `batches()` yields (modality, signals, samples): a clip's centre, and its first caption."""
    settings, model, vocabulary, step = load_run(Path(run), config.device)
    device, by_id = next(model.parameters()).device, {sample.id: sample for sample in samples}

    def batches():
        data = dataclasses.replace(settings.data, num_windows=1)
        with Loader(samples, data, train=False, batch_size=config.batch_size) as loader:
            for batch in loader:
                found = [by_id[i] for i in batch.sample_id.tolist()]
                yield "video", batch.video.to(device), found
                if batch.audio is not None and batch.audio_mask.any():
                    heard = [sample for sample, has in zip(found, batch.audio_mask.tolist()) if has]
                    yield "audio", batch.audio[batch.audio_mask].to(device), heard
                told = [sample for sample in found if sample.captions] if data.num_candidates else []
                words = vocabulary.encode_batch([sample.captions[0].text for sample in told], data.max_words)
                worded = words.any(1)
                if worded.any():
                    yield "text", words[worded].to(device), [s for s, has in zip(told, worded.tolist()) if has]

    title = textwrap.fill(f"{run} ({settings.model.backbone}, step {step})", 44)
    return Run(title, model, batches)


def embed(run: Run, function: Callable[[VATT, str, Tensor], Tensor]) -> dict[str, dict[int, Tensor]]:
    """`function(model, modality, signals)` of every clip, by modality and sample id."""
    found: dict[str, dict[int, Tensor]] = {}
    for modality, signals, samples in run.batches():
        rows = function(run.model, modality, signals).float().cpu()
        found.setdefault(modality, {}).update(zip((sample.id for sample in samples), rows))
    return found


def pooled(model: VATT, modality: str, signals: Tensor) -> Tensor:
    return getattr(model, f"encode_{modality}")(signals)


def every_token(model: VATT, modality: str, signals: Tensor) -> Tensor:
    """[B, N, D] of the last layer, which `pooled` computes for AGG alone."""
    if model.config.backbone == "agnostic":
        return model.backbone(modality, signals)
    return getattr(model, modality)(signals)


def common(model: VATT, modality: str, signals: Tensor) -> Tensor:
    return common_space(model, modality, pooled(model, modality, signals))


def _classes(config: VisualizeConfig, samples: Sequence[Sample]) -> Figure:
    panels, rows = {}, []
    for name in config.runs:
        tower = {"run": name, "batch_size": config.batch_size, "device": config.device}
        features, shown = Features(ProbeConfig(train=(config.data,), test=(config.data,), **tower))(samples, 1)
        points = tsne([features[:, 0]], seed=config.seed)
        panels[textwrap.fill(name, 44)] = (points, [str(sample.label) for sample in shown])
        for sample, (x, y) in zip(shown, points.tolist()):
            rows.append({"run": name, "clip": str(sample.path), "class": sample.label, "x": x, "y": y})
    return rows, lambda path: plot_points(panels, path, "Video features by class, t-SNE")


def _modalities(config: VisualizeConfig, samples: Sequence[Sample]) -> Figure:
    panels, rows = {}, []
    for name in config.runs:
        run = open_run(name, config, samples)
        for space, function in (("tokens", token_means), ("common space", common)):
            found = embed(run, function)
            points = tsne([torch.stack(list(features.values())) for features in found.values()], seed=config.seed)
            members = [(modality, i) for modality, features in found.items() for i in features]
            panels[f"{space}\n{run.title}"] = (points, [modality for modality, _ in members])
            for (modality, i), (x, y) in zip(members, points.tolist()):
                rows.append({"run": name, "space": space, "modality": modality, "sample": i, "x": x, "y": y})
    return rows, lambda path: plot_points(
        panels, path, "Modalities behind the tokenizers and in the common space, t-SNE"
    )


def _similarity(config: VisualizeConfig, samples: Sequence[Sample]) -> Figure:
    panels, rows = {}, []
    for name in config.runs:
        run = open_run(name, config, samples)
        found = embed(run, common)
        for other in ("text", "audio"):
            ids = [i for i in found["video"] if i in found.get(other, {})]
            if len(ids) < 2:
                continue
            video, partner = (torch.stack([found[modality][i] for i in ids]) for modality in ("video", other))
            cosines = video @ partner.T
            bins = densities(cosines.diagonal(), cosines[~torch.eye(len(ids), dtype=torch.bool)])
            panels[f"video-{other}\n{run.title}"] = bins
            rows += [{"run": name, "pair": f"video-{other}", **row} for row in bins]
    if not rows:
        raise ConfigError(f"{config.data}: the manifest must have two clips with sound or a caption, got fewer.")
    return rows, lambda path: plot_densities(panels, path, "Similarity of positive and random pairs")


def _activation(config: VisualizeConfig, samples: Sequence[Sample]) -> Figure:
    layers, rows = {}, []
    for name in config.runs:
        run, means = open_run(name, config, samples), MeanActivation(config.hook)

        def watched(model: VATT, modality: str, signals: Tensor, means: MeanActivation = means) -> Tensor:
            with means.watch(model, modality, signals):
                return every_token(model, modality, signals)[:, 0]

        embed(run, watched)
        for modality, values in means.layers.items():
            title = modality if len(config.runs) == 1 else f"{modality}, {run.title}"
            layers[title] = values
            for layer, nodes in enumerate(values.tolist()):
                rows += [
                    {"run": name, "modality": modality, "layer": layer, "node": node, "mean": round(value, 6)}
                    for node, value in enumerate(nodes)
                ]
    where = {"mlp-input": "before the MLP", "mlp-output": "behind the MLP"}[config.hook]
    return rows, lambda path: plot_activations(layers, path, f"Mean activation {where}")
