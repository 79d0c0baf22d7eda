"""A fine-tuning run's configuration, and the paper's settings for each dataset as recipes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from vatt_engine.data.augment import AugmentConfig
from vatt_engine.data.config import DataConfig
from vatt_engine.engine.config import EngineConfig
from vatt_engine.engine.optim import OptimConfig
from vatt_engine.engine.schedule import ScheduleConfig
from vatt_engine.losses import ClassLossConfig
from vatt_engine.models import EncoderConfig, model_config
from vatt_engine.models.config import AudioConfig, DropTokenConfig, TransformerConfig
from vatt_engine.schema import PathText
from vatt_engine.tasks.config import fitted_noise


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A classifier on one tower of a model, trained with all its weights.

    Args:
        out: run folder, as of `vatt pretrain`; model/ is the classifier, evaluation.json what it reaches.
        init: where the weights come from: a run folder of `vatt pretrain`, or a folder that holds a model; "" trains
            `model` from scratch. The tower is then that model's; from `model` come the number of classes, the
            classifier's dropout, DropToken, and from `data` the size of the clips.
        model: the encoder and its classifier.
        mixup: a of the Beta(a, a) that shares of two sounds and their labels are drawn from; 0 mixes nothing.
        test: manifest to evaluate the last step on; "" does not.
        test_windows, test_crops: views of a clip, whose logits are averaged.
    """

    verb: ClassVar[str] = "finetune"
    out: PathText = "runs/finetune"
    init: PathText = ""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    loss: ClassLossConfig = field(default_factory=ClassLossConfig)
    mixup: float = 0.0
    test: PathText = ""
    test_windows: int = 4
    test_crops: int = 3
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("FinetuneConfig: out must be the name of a folder, got ''.")
        for name in ("test_windows", "test_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"FinetuneConfig: {name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.mixup < math.inf or (self.mixup and self.modality != "audio"):
            text = "be a finite number >= 0, and 0 for video"
            raise ValueError(f"FinetuneConfig: mixup must {text}, got {self.mixup}.")

    def check(self) -> None:
        """Refuse parts that do not fit each other.

        Raises:
            ValueError: with the value.
        """
        classes, several = self.model.num_classes, bool(self.data.num_classes)
        if classes < 2:
            raise ValueError(f"vatt finetune: model.num_classes must be at least 2, got {classes}.")
        if self.data.num_classes not in (0, classes):
            expected = f"be model.num_classes {classes} where samples have several classes, else 0"
            raise ValueError(f"vatt finetune: data.num_classes must {expected}, got {self.data.num_classes}.")
        if several and self.loss.label_smoothing:
            raise ValueError(f"vatt finetune: loss.label_smoothing must be 0 here, got {self.loss.label_smoothing}.")
        for name in ("mixup", "loss.balanced"):
            value = self.mixup if name == "mixup" else self.loss.balanced
            if value and not several:
                raise ValueError(f"vatt finetune: {name} must be off where data.num_classes is 0, got {value}.")
        needed = {"video": "num_frames", "audio": "num_samples"}[self.modality]
        if not getattr(self.data, needed):
            raise ValueError(f"vatt finetune: data.{needed} must be at least 1 for {self.modality}, got 0.")

    @property
    def modality(self) -> str:
        """The tower that is trained."""
        return self.model.modality

    def fitted(self, tower: EncoderConfig) -> FinetuneConfig:
        """This run with that tower, on its own clips, with its own DropToken and classifier.

        A tower's sizes follow the clips, its sample rate too.
        """
        own, part = getattr(self.model, self.modality), getattr(tower, self.modality)
        sizes: dict[str, Any] = {"num_samples": self.data.num_samples}
        if self.modality == "video":
            sizes = {"num_frames": self.data.num_frames, "frame_size": (self.data.frame_size,) * 2}
        else:
            sizes["sample_rate"] = self.data.sample_rate
        transformer = replace(part.transformer, keep_rates=own.transformer.keep_rates)
        part = replace(part, drop_token=own.drop_token, transformer=transformer, **sizes)
        classifier = {name: getattr(self.model, name) for name in ("num_classes", "classifier_dropout")}
        data = self.data if self.modality == "video" else fitted_noise(self.data, part)
        return replace(self, data=data, model=replace(tower, **classifier, **{self.modality: part}))


def _downstream(
    name: str, model: str, data: DataConfig, *, steps: int, warmup: int, lr: float, num_classes: int, **changes: Any
) -> FinetuneConfig:
    """What all of the paper's fine-tuning shares: SGD with Keras' momentum, half a cosine to 0, the clipped backbone.

    Source: official vatt/configs/{video,audio}_finetune; paper appendix A.2. No tokens are dropped.
    """
    tower = model_config(model, num_classes=num_classes)
    keep = {f"{tower.modality}.drop_token.keep_rate": 1.0}
    config = FinetuneConfig(
        out=f"runs/{name.replace('_', '-')}",
        model=model_config(model, num_classes=num_classes, **keep),
        data=data,
        optim=OptimConfig(name="sgd", lr=lr, momentum=0.9, clip_norm=0.75, clip_prefix="model.encoder."),
        schedule=ScheduleConfig(final=0.0, warmup_steps=warmup, total_steps=steps),
        engine=EngineConfig(steps=steps, precision="auto"),
        **changes,
    )
    return config.fitted(config.model)


def _action(name: str, num_classes: int, *, steps: int = 100_000) -> FinetuneConfig:
    """Action recognition: 32 frames of every second one at 25 fps, 320 x 320."""
    data = DataConfig(batch_size=64, num_frames=32, fps=12.5, frame_size=320, num_samples=0, num_candidates=0)
    loss = ClassLossConfig(label_smoothing=0.1)
    return _downstream(name, "vit_base", data, steps=steps, warmup=2_500, lr=0.005, num_classes=num_classes, loss=loss)


def audioset() -> FinetuneConfig:
    """Audio events on AudioSet: 6.4 s at 24 kHz (official: every second sample of 48 kHz; here resampled), mixup."""
    sound = {"num_frames": 0, "num_samples": 153_600, "sample_rate": 24_000, "num_candidates": 0}
    data = DataConfig(batch_size=1024, num_classes=527, **sound)
    more = {"loss": ClassLossConfig(balanced=True), "mixup": 5.0, "test_crops": 1}
    return _downstream("audioset", "wat_base", data, steps=50_000, warmup=5_000, lr=0.2, num_classes=527, **more)


def imagenet() -> FinetuneConfig:
    """Image classification on ImageNet, one image as 4 frames of 384 x 384, 50 epochs; a warm-up is not stated."""
    data = DataConfig(batch_size=512, num_frames=4, frame_size=384, num_samples=0, num_candidates=0)
    more = {"loss": ClassLossConfig(label_smoothing=0.1), "test_windows": 1, "test_crops": 1}
    steps = 50 * (1_281_167 // 512)
    return _downstream("imagenet", "vit_base", data, steps=steps, warmup=2_500, lr=0.08, num_classes=1000, **more)


def demo() -> FinetuneConfig:
    """The eight motions of the demo world, a minute on two cores; --init runs/demo/run gives it a trained tower."""
    tiny, steps = model_config("vatt_tiny"), 200
    encoder = EncoderConfig(name="vatt_tiny", video=tiny.video, num_classes=8, classifier_dropout=0.0)
    keep = replace(tiny.video.drop_token, keep_rate=1.0)
    sizes = {"num_frames": 8, "fps": 10.0, "frame_size": 48, "num_samples": 0, "num_candidates": 0}
    augment = AugmentConfig(flip=0.0, color_jitter=0.0)  # a mirror turns left into right
    return FinetuneConfig(
        out="runs/demo/motions",
        model=replace(encoder, video=replace(tiny.video, drop_token=keep)),
        loss=ClassLossConfig(label_smoothing=0.1),
        test_crops=1,
        data=DataConfig(batch_size=32, cache="memory", augment=augment, **sizes),
        optim=OptimConfig(lr=1e-3, clip_norm=0.75, clip_prefix="model.encoder."),
        schedule=ScheduleConfig(final=0.0, warmup_steps=20, total_steps=steps),
        engine=EngineConfig(steps=steps, log_every=20, save_every=100),
    )


def sounds() -> FinetuneConfig:
    """Sounds of about a second, such as spoken words, from scratch: a small spectrogram tower, minutes on two cores.

    Eleven columns of 85 ms and four bands make 44 tokens of a second. A clip is stretched over the second by being
    repeated, and nothing but dropout changes it from one epoch to the next.
    """
    seconds, rate = 1, 16_000
    transformer = TransformerConfig(num_layers=3, dim=128, ff_dim=256, num_heads=4, head_dim=32)
    audio = AudioConfig(
        input="spectrogram",
        num_samples=seconds * rate,
        sample_rate=rate,
        patch=(4, 20),
        patch_init="dense",
        spectrogram_positions="grid",
        drop_token=DropTokenConfig(keep_rate=1.0),
        transformer=transformer,
    )
    sizes = {"num_frames": 0, "num_samples": seconds * rate, "sample_rate": rate, "num_candidates": 0}
    steps = 1_000
    return FinetuneConfig(
        out="runs/sounds",
        model=EncoderConfig(name="spt_tiny", modality="audio", audio=audio, num_classes=10, classifier_dropout=0.1),
        loss=ClassLossConfig(label_smoothing=0.1),
        test_windows=1,
        test_crops=1,
        data=DataConfig(batch_size=64, cache="memory", **sizes),
        optim=OptimConfig(lr=1e-3, clip_norm=1.0),
        schedule=ScheduleConfig(final=0.0, warmup_steps=100, total_steps=steps),
        engine=EngineConfig(steps=steps, log_every=100, save_every=500),
    )


ACTIONS = {"kinetics400": 400, "kinetics600": 600, "kinetics700": 700}
FINETUNE_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    "demo": demo,
    "sounds": sounds,
    **{name: functools.partial(_action, name, num_classes) for name, num_classes in ACTIONS.items()},
    "moments": functools.partial(_action, "moments", 339, steps=150_000),  # the step of the released checkpoints
    "audioset": audioset,
    "imagenet": imagenet,
}
