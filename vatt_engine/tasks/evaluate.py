"""`vatt evaluate MODEL --data MANIFEST`: the paper's evaluation of a classifier, over several views of each clip.

It takes what `vatt finetune` leaves and what `vatt convert` makes of an official checkpoint. A run knows the clips that
it was trained on. A model's folder knows their sizes alone; the official rates are taken then.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vatt_engine.analysis.report import table
from vatt_engine.collectives import rank
from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.config import DataConfig
from vatt_engine.data.manifest import Sample
from vatt_engine.data.shards import read_samples
from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.engine.config import EngineConfig
from vatt_engine.engine.ranks import joined_ranks
from vatt_engine.models import build_model, from_pretrained
from vatt_engine.models.heads import Classifier
from vatt_engine.output import put, say
from vatt_engine.schema import ConfigError, PathText, with_article
from vatt_engine.tasks.finetune import check_label
from vatt_engine.tasks.finetune import evaluate as evaluate_views
from vatt_engine.tasks.finetune_config import FinetuneConfig
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.results import Results
from vatt_engine.tasks.towers import load_run_config

# Official vatt/configs: every second frame of 25 per second; every second sample of 48 kHz.
OFFICIAL_FPS, OFFICIAL_CLASSIFIER_RATE = 12.5, 24_000
OFFICIAL_WINDOWS, OFFICIAL_CROPS = 4, 3
MODEL_RATE = 48_000  # what a model says of which nobody has said anything else


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a classifier. Writes OUT/evaluation.json.

    Args:
        model: run folder of `vatt finetune`, or a folder that holds a classifier, as `vatt convert` makes it.
        data: manifest or shards of labelled clips.
        out: folder for the result; by default the model's.
        num_windows: windows of a clip, spread evenly over it; None: the run's, else the official 4.
        num_crops: squares of a frame, spread over its longer side; None: the run's, else the official 3 (sound: 1).
        fps: frames per second of the clips; None: the run's, else the official 12.5.
        sample_rate: of the clips' sound; None: the run's, else the model's own, else the official 24 kHz of a waveform.
        batch_size: views computed at once.
        bf16: compute under bfloat16 autocast.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    model: PathText
    data: PathText
    out: PathText | None = None
    num_windows: int | None = None
    num_crops: int | None = None
    fps: float | None = None
    sample_rate: int | None = None
    batch_size: int = 16
    bf16: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_windows", "num_crops", "sample_rate", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"EvaluateConfig: {name} must be at least 1, got {value}.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"EvaluateConfig: fps must be above 0, got {self.fps}.")


class Evaluated(NamedTuple):
    """A classifier in evaluation mode, the clips that it takes, and the steps it was trained, where a run says so."""

    model: Classifier
    data: DataConfig
    step: int | None


def main(argv: Sequence[str]) -> int:
    config = parse_flags(EvaluateConfig, argv, prog="vatt evaluate", positional=("model",))
    result = evaluate(config)
    if rank() > 0:
        return 0
    put(sys.stdout, table([result["metrics"]]) + "\n")
    where = f"also in {result['path']}" if result["path"] else "in no file"
    put(sys.stdout, f"{result['samples']} samples, {result['left_out']} left out; {result['clips']}; {where}\n")
    return 2 if result["unwritten"] else 0


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Logits averaged over the views of each sample, and what they reach; all ranks of a launch share the samples.

    Where labels are lists of classes, a sample has several of them and the metrics are AudioSet's: mAP, AUC and d'.
    Else they are top-1 and top-5.

    Returns:
        {"model", "step": of the run, "data", "clips": their form in words, "num_windows", "num_crops", "samples":
        usable ones, "left_out": the others, "metrics": top-1 and top-5 in percent, or see `multi_label_metrics`,
        "path": where it is written, "unwritten": [files that could not be]}.

    Raises:
        ValueError: the folder holds no classifier, the labels do not fit it, or nothing can be written where the result
            goes.

    Source: paper sections 4.2.1 and 4.2.2; official vatt/experiments/finetune.py.

    >>> evaluate(EvaluateConfig(model="models/k400", data="k400/val.jsonl"))["metrics"]  # doctest: +SKIP
    {'top-1': 79.6, 'top-5': 94.9}
    """
    results = Results(config.out or config.model, "vatt evaluate")
    device = EngineConfig(device=config.device).torch_device()
    with joined_ranks(device):
        model, data, step = read_classifier(config)
        samples = read_samples(config.data)
        data = _with_labels_of(samples, data, model)
        found = evaluate_views(model.to(device), samples, data, bf16=config.bf16)
    result = {"model": config.model, "step": step, "data": config.data, "clips": _in_words(model, data), **found}
    path = None
    if rank() == 0:
        path = results.save_json("evaluation.json", result)
    return result | {"path": None if path is None else str(path), "unwritten": results.faults}


def read_classifier(config: EvaluateConfig) -> Evaluated:
    """The classifier of a run's newest valid checkpoint, or of a folder that holds a model.

    Raises:
        ValueError: there is none; it says what is there instead, and which command takes it.
    """
    folder = Path(config.model)
    run = _run_of(folder)
    if run is not None and (folder / "config.yaml").is_file():
        checkpoint = load_latest(folder)
        for reason in checkpoint.skipped:
            say(reason)
        model, step = build_model(run.model), checkpoint.step
        model.load_state_dict(checkpoint.tensors["model"])
    else:
        model, step = from_pretrained(folder), None
        if not isinstance(model, Classifier):
            raise ConfigError(f"{folder}: the model must be a classifier, got {_other(model.config)}")
    return Evaluated(model.eval(), _views(config, model, run), step)


def _run_of(folder: Path) -> FinetuneConfig | None:
    """The run that a folder is, or whose model it is; None for a model that stands alone."""
    if (folder / "config.json").is_file():
        run_dir = folder.parent
        if folder.name != "model" or not (run_dir / "config.yaml").is_file():
            return None
    else:
        run_dir = folder
    run = load_run_config(run_dir)
    if not isinstance(run, FinetuneConfig):
        raise ConfigError(f"{folder}: the model must be a classifier, got {_other(run.model)}")
    return run


def _other(config: Any) -> str:
    """What a model is that is no classifier, and what takes it."""
    if hasattr(config, "modality"):
        encoder = with_article(f"{config.modality} encoder")
        return (
            f"{encoder} without classes. `vatt probe` evaluates its features; `vatt finetune --init` trains one on it."
        )
    return f"the pre-trained {config.name}. `vatt retrieve` and `vatt probe` evaluate it."


def _views(config: EvaluateConfig, model: Classifier, run: FinetuneConfig | None) -> DataConfig:
    """The views of a clip: those of the run, else the official ones, and on top what the flags say."""
    modality = model.config.modality
    if run is not None:
        data, windows, crops = run.data, run.test_windows, run.test_crops
    else:
        data, windows = _official_clips(model), OFFICIAL_WINDOWS
        crops = OFFICIAL_CROPS if modality == "video" else 1
    changes: dict[str, Any] = {"fps": config.fps or data.fps, "sample_rate": config.sample_rate or data.sample_rate}
    changes |= {"num_windows": config.num_windows or windows, "num_crops": config.num_crops or crops}
    changes |= {"train": config.data, "weights": (), "batch_size": config.batch_size, "num_classes": 0}
    if modality == "audio":
        audio = model.config.audio
        if audio.input == "spectrogram" and changes["sample_rate"] != audio.sample_rate:
            expected = f"be the {audio.sample_rate} that the model's spectrograms are made for"
            raise ConfigError(f"vatt evaluate: sample_rate must {expected}, got {changes['sample_rate']}.")
    return dataclasses.replace(data, **changes)


def _official_clips(model: Classifier) -> DataConfig:
    """Clips of a model that no run tells of: its sizes, at the official rates."""
    if model.config.modality == "video":
        video = model.config.video
        if video.frame_size[0] != video.frame_size[1]:
            got = f"a model for {list(video.frame_size)}"
            raise ConfigError(f"vatt evaluate: frames must be square, got {got}.")
        sizes = {"num_frames": video.num_frames, "frame_size": video.frame_size[0], "fps": OFFICIAL_FPS}
        return DataConfig(num_samples=0, num_candidates=0, augment=AugmentConfig(), **sizes)
    audio = model.config.audio
    rate = audio.sample_rate
    if audio.input == "waveform" and rate == MODEL_RATE:
        rate = OFFICIAL_CLASSIFIER_RATE
    return DataConfig(num_frames=0, num_candidates=0, num_samples=audio.num_samples, sample_rate=rate)


def _with_labels_of(samples: Sequence[Sample], data: DataConfig, model: Classifier) -> DataConfig:
    """The views with labels as the samples have them, which must be classes of the model."""
    classes = model.config.num_classes
    several = any(isinstance(sample.label, tuple) for sample in samples)
    data = dataclasses.replace(data, num_classes=classes if several else 0)
    for sample in samples:
        check_label(sample, classes, several=several)
    return data


def _in_words(model: Classifier, data: DataConfig) -> str:
    views = f"{data.num_windows} x {data.num_crops} windows x crops"
    if model.config.modality == "video":
        return f"{data.num_frames} frames at {data.fps:g} per second, {data.frame_size} pixels, {views}"
    return f"{data.num_samples} samples at {data.sample_rate} Hz, {views}"
