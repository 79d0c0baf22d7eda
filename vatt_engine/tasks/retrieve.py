"""`vatt retrieve RUN --data MANIFEST`: zero-shot retrieval between the modalities of held-out clips, against chance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vatt_engine.analysis.report import plot_similarity, table
from vatt_engine.analysis.similarity import retrieval_metrics
from vatt_engine.batch import Batch
from vatt_engine.data.config import DataConfig
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import Sample
from vatt_engine.data.shards import read_samples
from vatt_engine.data.words import Vocabulary
from vatt_engine.engine.checkpoint import CheckpointError, load_latest
from vatt_engine.models import VATT, build_model, from_pretrained
from vatt_engine.output import say
from vatt_engine.refusals import Refusals
from vatt_engine.schema import ConfigError, PathText
from vatt_engine.tasks.config import PretrainConfig
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.results import Results
from vatt_engine.tasks.towers import load_run_config


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig:
    """Zero-shot retrieval with the newest valid checkpoint of a run.

    The text of a clip is its first caption. Writes OUT/retrieval.json and OUT/plots/similarity-*.png.

    Args:
        run: run folder of `vatt pretrain`, or a folder that holds a model and its tokenizer.json.
        data: manifest or shards of clips the run has not seen.
        out: folder for the results; by default the run's.
        num_windows: windows per clip (official: 4).
        average: what is averaged over the windows of a clip: "embeddings", which are normalised afterwards (official,
            and the paper's numbers), or "similarities", the official code's other variant.
        fps: of the clips; None: as the run was trained (official: 12.5).
        batch_size: windows embedded at once.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    run: PathText
    data: PathText
    out: PathText | None = None
    num_windows: int = 4
    average: Literal["embeddings", "similarities"] = "embeddings"
    fps: float | None = None
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_windows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"RetrieveConfig: {name} must be at least 1, got {getattr(self, name)}.")


def main(argv: Sequence[str]) -> int:
    config = parse_flags(RetrieveConfig, argv, prog="vatt retrieve", positional=("run",))
    result = retrieve(config)
    for kind in ("skipped", "noted"):
        for entry in result[kind]:
            print(f"{kind} {entry['path']}: {entry['reason']}")
    rows = [{"task": task, **metrics} for task, metrics in result["tasks"].items()]
    print(table(rows))
    where = f"also in {result['path']}" if result["path"] else "in no file"
    print(f"R@k and chance in percent, MedR from 1; checkpoint of step {result['step']}; {where}")
    return 2 if result["unwritten"] else 0


@torch.inference_mode()
def retrieve(config: RetrieveConfig) -> dict[str, Any]:
    """Embed every clip of a manifest and rank each modality's clips for another's queries.

    Returns:
        {"run", "step", "data", "num_windows", "average", "tasks": {"text -> video": {"R@1", ..., "MedR", "chance R@10",
        "queries", "candidates"}}, "skipped": [quarantine entries], "noted": [those of clips that were used], "path":
        where it is written, "unwritten": [files that could not be]}; a task is there if the run was trained for it.

    Raises:
        ValueError: the run, its checkpoints or the manifest cannot be used, or nothing can be written where the results
            go.

    >>> retrieve(RetrieveConfig(run="runs/demo/run", data="world/heldout.jsonl"))["tasks"]  # doctest: +SKIP
    """
    results, refusals = Results(config.out or config.run, "vatt retrieve"), Refusals()
    loaded, samples = refusals.of(load_run, Path(config.run), config.device), refusals.of(read_samples, config.data)
    refusals.settle()
    run, model, vocabulary, step = loaded
    data = dataclasses.replace(run.data, num_windows=config.num_windows, fps=config.fps or run.data.fps)
    with Loader(samples, data, train=False, batch_size=config.batch_size) as loader:
        found = embed_clips(model, loader, samples, average=config.average)
        faults = {
            kind: [entry for entry in loader.quarantine.entries if entry["skipped"] is skipped]
            for kind, skipped in (("skipped", True), ("noted", False))
        }
    usable = [sample for sample in samples if sample.id in found["video_text"]]
    found["text"] = embed_captions(model, vocabulary, usable, data.max_words, config.batch_size)

    tasks: dict[str, dict[str, float]] = {}
    for query, candidate, space in (
        ("text", "video", "video_text"),
        ("video", "text", "video_text"),
        ("audio", "video", "video_audio"),
        ("video", "audio", "video_audio"),
    ):
        trained = getattr(run.loss, f"{space}_weight") and (
            data.num_samples if "audio" in space else data.num_candidates
        )
        if not trained:
            continue
        queries = found[space if query == "video" else query]
        candidates = found[space if candidate == "video" else candidate]
        ids, targets = pair(queries, candidates)
        if not ids:
            continue
        similarity = torch.stack([queries[i] for i in ids]) @ torch.stack(list(candidates.values())).T
        metrics = retrieval_metrics(similarity, targets)
        metrics["chance R@10"] = metrics.pop("chance")
        tasks[f"{query} -> {candidate}"] = metrics | {"queries": len(ids), "candidates": len(candidates)}
        if candidate == "video":
            title = f"{query} to video, held out"
            draw = functools.partial(plot_similarity, similarity, title=title, query=query, candidate=candidate)
            results.save(f"plots/similarity-{query}-video.png", draw)
    if not tasks:
        raise ConfigError(f"{config.data}: the manifest must have a clip with sound or a caption, got none to compare.")
    result = {"run": config.run, "step": step, "data": config.data, "num_windows": config.num_windows}
    result |= {"average": config.average, "tasks": tasks, **faults}
    path = results.save_json("retrieval.json", result)
    return result | {"path": None if path is None else str(path), "unwritten": results.faults}


def load_run(run_dir: Path, device: str = "auto") -> tuple[PretrainConfig, VATT, Vocabulary, int]:
    """Config, model in evaluation mode, vocabulary and step of a run's newest valid checkpoint; or a model's, step 0.

    Raises:
        ValueError: the folder is no run, or no checkpoint is valid and fits its config.
    """
    if (run_dir / "config.json").is_file():
        config, model = _of_model(run_dir)
        return config, model.to(_target(config, device)), Vocabulary.load(run_dir / "tokenizer.json"), 0
    config = load_run_config(run_dir)
    if not isinstance(config, PretrainConfig):
        raise ConfigError(
            f"{run_dir}: the run must be one of `vatt pretrain`, got one of `vatt {config.verb}`: a classifier on one "
            "tower, without a common space. `vatt probe` and `vatt visualize --figure tsne-classes` take it."
        )
    checkpoint = load_latest(run_dir)
    for reason in checkpoint.skipped:
        say(reason)
    model = build_model(config.model)
    try:
        model.load_state_dict(checkpoint.tensors.get("model", {}))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"{checkpoint.path}: the weights must fit {run_dir / 'config.yaml'}, got: {reason}"
        ) from error
    return (
        config,
        model.to(_target(config, device)).eval(),
        Vocabulary.load(run_dir / "tokenizer.json"),
        checkpoint.step,
    )


def _target(config: PretrainConfig, device: str) -> torch.device:
    return dataclasses.replace(config.engine, device=device).torch_device()


def _of_model(folder: Path) -> tuple[PretrainConfig, VATT]:
    """A model's folder as if a run had trained it on clips of its size, at the paper's rates."""
    model = from_pretrained(folder)
    if not isinstance(model, VATT):
        raise ConfigError(f"{folder}: the model must be a VATT, got {model.config.name}, which has one tower alone.")
    video, audio, text = model.config.video, model.config.audio, model.config.text
    sizes = {"num_frames": video.num_frames, "frame_size": video.frame_size[0], "num_samples": audio.num_samples}
    return PretrainConfig(model=model.config, data=DataConfig(max_words=text.max_words, **sizes)), model


def embed_clips(
    model: VATT, loader: Loader, samples: Sequence[Sample], *, average: str = "embeddings"
) -> dict[str, dict[int, Tensor]]:
    """Embeddings of the clips that could be decoded, by sample id, whose products are the similarities of clips.

    They are the mean over a clip's windows, normalised; or, to average similarities, the mean of the normalised ones: a
    product with that mean is the mean of the products, since nothing is done to it afterwards.

    Returns:
        "video_text" and "video_audio": the videos in both spaces; "audio": the sounds of clips that have any.
    """
    device = next(model.parameters()).device
    windows: dict[str, dict[int, list[Tensor]]] = {"video_text": {}, "video_audio": {}, "audio": {}}
    for batch in loader:
        outputs = model(batch.to(device))
        for index, sample_id in enumerate(batch.sample_id.tolist()):
            rows = {"video_text": outputs.video_text, "video_audio": outputs.video_audio}
            if batch.audio_mask is not None and batch.audio_mask[index]:
                rows["audio"] = outputs.audio_video
            for name, values in rows.items():
                if values is not None:
                    windows[name].setdefault(sample_id, []).append(values[index].float().cpu())

    def one(rows: list[Tensor]) -> Tensor:
        if average == "similarities":
            return F.normalize(torch.stack(rows), dim=1).mean(0)
        return F.normalize(torch.stack(rows).sum(0), dim=0)

    order = [sample.id for sample in samples]
    return {name: {i: one(rows[i]) for i in order if i in rows} for name, rows in windows.items()}


def embed_captions(
    model: VATT, vocabulary: Vocabulary, samples: Sequence[Sample], max_words: int, batch_size: int
) -> dict[int, Tensor]:
    """Unit embedding of the first caption of each sample that has one with a word in it, by sample id."""
    device = next(model.parameters()).device
    captioned = [sample for sample in samples if sample.captions]
    found: dict[int, Tensor] = {}
    for start in range(0, len(captioned), batch_size):
        part = captioned[start : start + batch_size]
        words = vocabulary.encode_batch([sample.captions[0].text for sample in part], max_words)
        rows = model(Batch(text=words[:, None].to(device))).text_video[:, 0].float().cpu()
        rows = F.normalize(rows, dim=1)
        found |= {sample.id: row for sample, row, worded in zip(part, rows, words.any(dim=1)) if worded}
    return found


def pair(queries: dict[int, Tensor], candidates: dict[int, Tensor]) -> tuple[list[int], Tensor]:
    """Ids of the queries that have a right answer, and its place among the candidates [Nq]."""
    places = {sample_id: place for place, sample_id in enumerate(candidates)}
    ids = [sample_id for sample_id in queries if sample_id in places]
    return ids, torch.tensor([places[i] for i in ids], dtype=torch.int64)
