"""`vatt evaluate`: official classifiers and our own over their views, against logits averaged by hand; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from media_files import write_media

from vatt_engine.analysis.metrics import multi_label_metrics
from vatt_engine.cli import main
from vatt_engine.data.config import DataConfig
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import read_manifest
from vatt_engine.models import create_model, from_pretrained, save_pretrained
from vatt_engine.schema import ConfigError
from vatt_engine.tasks.evaluate import EvaluateConfig, evaluate

OFFICIAL = Path(__file__).parents[1] / "interop" / "tf_checkpoints"
SECONDS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The official checkpoints of a video and of an audio classifier, converted."""
    folder = tmp_path_factory.mktemp("models")
    for name, width in (("vit", "6"), ("wat", "8")):
        assert main(["convert", str(OFFICIAL / name), str(folder / name), "--head-dim", width]) == 0
    return folder


def manifest(folder: Path, labels: list) -> Path:
    """Clips of two seconds with noise to see and to hear."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, label in enumerate(labels):
        frames = torch.randint(0, 256, (10 * SECONDS, 24, 32, 3), dtype=torch.uint8, generator=generator)
        sound = torch.rand(8_000 * SECONDS, generator=generator) - 0.5
        write_media(folder / f"{number}.mkv", frames, fps=10, waveform=sound, sample_rate=8_000)
        rows.append(json.dumps({"path": f"{number}.mkv", "label": label}) + "\n")
    path = folder / "clips.jsonl"
    path.write_text("".join(rows))
    return path


def logits(model_dir: Path, path: Path, **views) -> tuple[torch.Tensor, list]:
    """Of each clip, the mean over its views, taken one by one."""
    model, samples = from_pretrained(model_dir), read_manifest(path)
    with Loader(samples, DataConfig(num_candidates=0, **views), train=False, batch_size=1) as loader, torch.no_grad():
        seen = [
            (batch.sample_id.item(), model(batch.audio if batch.video is None else batch.video)[0]) for batch in loader
        ]
    rows = [torch.stack([x for one, x in seen if one == sample.id]).mean(0) for sample in samples]
    return torch.stack(rows), [sample.label for sample in samples]


def test_a_converted_video_classifier_over_the_official_views(models, tmp_path, capsys):
    path = manifest(tmp_path / "set", [0, 3, 7])
    assert main(["evaluate", str(models / "vit"), "--data", str(path), "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    views = {"num_windows": 4, "num_crops": 3, "fps": 12.5, "num_frames": 6, "frame_size": 20, "num_samples": 0}
    expected, labels = logits(models / "vit", path, **views)
    order = expected.argsort(1, descending=True)
    for k in (1, 5):
        share = sum(label in row[:k] for label, row in zip(labels, order.tolist())) / len(labels)
        assert result["metrics"][f"top-{k}"] == pytest.approx(100 * share)
    assert result["clips"] == "6 frames at 12.5 per second, 20 pixels, 4 x 3 windows x crops"
    assert result["samples"] == 3
    assert "6 frames at 12.5 per second" in capsys.readouterr().out


def test_a_converted_sound_classifier_of_several_classes(models, tmp_path):
    path = manifest(tmp_path / "set", [[0], [1, 2], [0, 2], [1]])
    result = evaluate(EvaluateConfig(model=str(models / "wat"), data=str(path), device="cpu"))
    views = {"num_windows": 4, "sample_rate": 24_000, "num_frames": 0, "num_samples": 750}
    expected, labels = logits(models / "wat", path, num_classes=5, **views)
    targets = torch.zeros(len(labels), 5)
    for row, classes in enumerate(labels):
        targets[row, list(classes)] = 1
    wanted = multi_label_metrics(expected, targets)
    assert result["metrics"] == pytest.approx(wanted, nan_ok=True)
    assert result["clips"] == "750 samples at 24000 Hz, 4 x 1 windows x crops"
    told = json.loads((models / "wat" / "evaluation.json").read_text())  # strict: an infinite d' is null
    assert told["metrics"]["mAP"] == pytest.approx(wanted["mAP"])


def test_flags_change_the_views(models, tmp_path):
    path = manifest(tmp_path / "set", [0, 1])
    flags = {"num_windows": 1, "sample_rate": 8_000}
    result = evaluate(EvaluateConfig(model=str(models / "wat"), data=str(path), device="cpu", **flags))
    assert result["clips"] == "750 samples at 8000 Hz, 1 x 1 windows x crops"


def test_refuses_what_is_no_classifier_or_has_other_classes(models, tmp_path):
    path = manifest(tmp_path / "set", [0, 9])
    for name, message in {
        "vit_base": r"must be a classifier, got a video encoder without classes\. `vatt probe`",
        "vatt_tiny": r"must be a classifier, got the pre-trained vatt_tiny\. `vatt retrieve`",
    }.items():
        small = {"video.transformer.num_layers": 1, "video.transformer.dim": 12, "video.transformer.num_heads": 2}
        save_pretrained(create_model(name, **small), tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            evaluate(EvaluateConfig(model=str(tmp_path / name), data=str(path), device="cpu"))
    with pytest.raises(ConfigError, match=r"1\.mkv: label must be a class number in 0\.\.7 .*got 9"):
        evaluate(EvaluateConfig(model=str(models / "vit"), data=str(path), device="cpu"))
