"""`vatt report RUN...`: one self-contained HTML page that sets runs side by side."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vatt_engine.analysis.ablation import shown
from vatt_engine.analysis.report import read_records, table
from vatt_engine.analysis.report_page import Answer, RunReport, page, thumbnail
from vatt_engine.batch import Batch
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import Sample, read_manifest
from vatt_engine.output import put
from vatt_engine.schema import ConfigError, PathText
from vatt_engine.tasks.config import PretrainConfig
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.results import Results
from vatt_engine.tasks.retrieve import embed_captions, embed_clips, load_run
from vatt_engine.tasks.towers import load_run_config
from vatt_engine.tasks.visualize import with_runs

NEAREST = 5


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Writes one HTML page: settings, loss curves, results, retrieval examples, and the pictures in RUN/plots.

    Args:
        runs: folders of `vatt pretrain`, `vatt finetune` or `vatt ablate`; also as words before the flags.
        data: manifest for retrieval examples; without it the page has none.
        out: the page; by default report.html in the first run.
        num_queries: captions drawn at random as examples.
        num_clips: clips drawn at random that are searched.
        batch_size: clips embedded at once.
        seed: of the draws.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    runs: tuple[PathText, ...]
    data: PathText | None = None
    out: PathText | None = None
    num_queries: int = 8
    num_clips: int = 500
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.runs or len(set(self.runs)) < len(self.runs):
            raise ValueError(
                f"ReportConfig: runs must name different run folders, got {' '.join(self.runs) or 'none'}."
            )
        for name, least in (("num_queries", 1), ("num_clips", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"ReportConfig: {name} must be at least {least}, got {getattr(self, name)}.")


def main(argv: Sequence[str]) -> int:
    path = report(parse_flags(ReportConfig, with_runs(argv), prog="vatt report"))
    if path is None:
        return 2
    print(path)
    return 0


def report(config: ReportConfig) -> Path | None:
    """Write the page; returns its path, or None where it could not be written: then its tables are printed.

    Raises:
        ValueError: a run, one of its files or the manifest cannot be used, or nothing can be written where the page
            goes.

    >>> report(ReportConfig(runs=("run",)))  # doctest: +SKIP
    """
    place = Path(config.out or Path(config.runs[0]) / "report.html")
    results = Results(place.parent, "vatt report")
    samples = read_manifest(config.data) if config.data else []
    draw = random.Random(config.seed)
    samples = draw.sample(samples, min(config.num_clips, len(samples)))
    told = list({sample.captions[0].text: sample for sample in samples if sample.captions}.values())  # a query once
    if config.data and not told:
        raise ConfigError(f"{config.data}: the manifest must have captions for examples, got none.")
    queries = draw.sample(told, min(config.num_queries, len(told)))
    runs = [_read_run(run, config, samples, queries) for run in config.runs]
    path = results.save_text(place.name, page("vatt_engine: " + ", ".join(config.runs), runs))
    if path is None:
        for run in runs:
            for title, rows in run.results.items():
                put(sys.stdout, f"{run.name}: {title}\n{table(rows)}\n")
    return path


def _read_run(run: str, config: ReportConfig, samples: Sequence[Sample], queries: Sequence[Sample]) -> RunReport:
    folder = Path(run)
    if ablation := _json(folder / "ablation.json"):
        facts = {"model": ablation.get("config", {}).get("config"), "commit": ablation.get("env", {}).get("commit")}
        picture = {"ablation": (folder / "ablation.png").read_bytes()}
        return RunReport(run, facts, [], {"Ablation": shown(ablation.get("rows", ()))}, {}, picture)
    settings = load_run_config(folder)
    is_pretraining = isinstance(settings, PretrainConfig)
    part = settings.model.video if is_pretraining else getattr(settings.model, settings.modality)
    records = read_records(folder / "metrics.jsonl")
    last = records[-1] if records else {}
    facts = {"model": settings.model.name, "step": last.get("step")}
    facts |= {"backbone": settings.model.backbone} if is_pretraining else {"init": settings.init or "from scratch"}
    facts |= {"batch size": settings.data.batch_size, "peak learning rate": f"{settings.optim.lr:g}"}
    facts |= {f"DropToken keeps{', video' if is_pretraining else ''}": f"{part.drop_token.keep_rate:g}"}
    facts |= {"clips per second": last.get("clips_per_second"), "commit": _json(folder / "env.json").get("commit")}
    tasks = _json(folder / "retrieval.json").get("tasks", {})
    probes = [
        {"task": found.get("modality"), "weights": "random" if found.get("untrained") else "trained", **row}
        for found in map(_json, sorted(folder.glob("probe-*.json")))
        for row in found.get("rows", ())
    ]
    results = {"Zero-shot retrieval": [{"task": task, **metrics} for task, metrics in tasks.items()], "Probes": probes}
    if found := _json(folder / "evaluation.json"):
        results["Fine-tuning"] = [
            {k: found.get(k) for k in ("data", "step", "num_windows", "num_crops")} | found.get("metrics", {})
        ]
    answers = _answers(folder, config, samples, queries) if queries and is_pretraining else {}
    plots = {path.stem: path.read_bytes() for path in sorted((folder / "plots").glob("*.png"))}
    return RunReport(run, facts, records, {title: rows for title, rows in results.items() if rows}, answers, plots)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder, empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path}: the file must be JSON, got {error}.") from None
    return found if isinstance(found, dict) else {}


@torch.inference_mode()
def _answers(
    run: Path, config: ReportConfig, samples: Sequence[Sample], queries: Sequence[Sample]
) -> dict[str, list[Answer]]:
    """The clips nearest to each query's caption."""
    settings, model, vocabulary, _ = load_run(run, config.device)
    data, images = dataclasses.replace(settings.data, num_windows=1), {}
    with Loader(samples, data, train=False, batch_size=config.batch_size) as loader:
        videos = embed_clips(model, _watched(loader, images), samples)["video_text"]
    texts = embed_captions(model, vocabulary, queries, data.max_words, config.batch_size)
    ids, captions = list(videos), {sample.id: sample.captions[0].text for sample in samples if sample.captions}
    matrix, found = torch.stack(list(videos.values())), {}
    for query in queries:
        if query.id in texts:
            best = (matrix @ texts[query.id]).topk(min(NEAREST, len(ids)))
            found[captions[query.id]] = [
                Answer(images[i], captions.get(i, ""), cosine, i == query.id)
                for i, cosine in zip((ids[place] for place in best.indices.tolist()), best.values.tolist())
            ]
    return found


def _watched(batches: Iterable[Batch], images: dict[int, bytes]) -> Iterator[Batch]:
    """The same batches; the middle frame of every clip goes into `images`."""
    for batch in batches:
        for sample_id, clip in zip(batch.sample_id.tolist(), batch.video):
            images[sample_id] = thumbnail(clip[len(clip) // 2])
        yield batch
