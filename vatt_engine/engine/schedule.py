"""The learning rate as a pure function of the step: linear warm-up from 0 to the peak, then a cosine to `final`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["half_cosine", "quarter_cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Warm-up and decay of the learning rate.

    The defaults are those of the official pre-training code, whose results are the published ones. The paper (section
    4.2) differs: a warm-up of 10,000 steps and a "quarter-period" cosine, `shape="quarter_cosine"`.

    Args:
        final: learning rate at `total_steps` and ever after.
        warmup_steps: steps of the linear rise from 0; 0 starts at the peak, `OptimConfig.lr`.
        total_steps: the step at which `final` is reached.
        shape: "half_cosine" is flat at both ends (official code); "quarter_cosine" leaves
            the peak flat and arrives at `final` at its steepest.

    Raises:
        ValueError: a rate is negative or not finite, or the steps are out of order.

    >>> ScheduleConfig(total_steps=600, warmup_steps=60).final
    5e-05
    """

    final: float = 5e-5
    warmup_steps: int = 5_000
    total_steps: int = 500_000
    shape: Shape = "half_cosine"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.final) and self.final >= 0):
            raise ValueError(f"schedule: final must be a finite number >= 0, got {self.final}.")
        if self.warmup_steps < 0:
            raise ValueError(f"schedule: warmup_steps must be >= 0, got {self.warmup_steps}.")
        if self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule: total_steps must be greater than warmup_steps ({self.warmup_steps}), "
                f"got {self.total_steps}. A short run needs a short warm-up, for example a tenth of its steps."
            )
        if self.shape not in get_args(Shape):
            raise ValueError(f"schedule: shape must be one of {', '.join(get_args(Shape))}, got {self.shape!r}.")


def learning_rate(step: int, config: ScheduleConfig, peak: float) -> float:
    """Learning rate of the update that follows `step` finished updates; the first one, at step 0, is made with 0.

        step < warmup:   peak * step / warmup
        half_cosine:     final + (peak - final) * (1 + cos(pi * p)) / 2      p = (step - warmup) / (total - warmup)
        quarter_cosine:  final + (peak - final) * cos(pi / 2 * p)
        step >= total:   final

    The paper's quarter period can also be read as peak * cos(theta) with theta from 0 to arccos(final / peak). The
    reading here runs through exactly a quarter of a period for any `final`; the two agree for `final` 0. The official
    code computes 0 / 0 at `total_steps`; here the rate is `final` from there on.

    Args:
        step: number of updates made so far, >= 0.
        config: the schedule.
        peak: learning rate at the end of the warm-up, `OptimConfig.lr`.

    Raises:
        ValueError: `step` is negative.

    Source: official vatt/utils/train/schedules.py (StepCosineLearningRateWithLinearWarmup); paper section 4.2.

    >>> learning_rate(2_500, ScheduleConfig(), 1e-4)
    5e-05
    """
    if step < 0:
        raise ValueError(f"learning_rate: step must be >= 0, got {step}.")
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    if step >= config.total_steps:
        return config.final
    progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
    if config.shape == "half_cosine":
        decay = (1 + math.cos(math.pi * progress)) / 2
    else:
        decay = math.cos(math.pi / 2 * progress)
    return config.final + (peak - config.final) * decay
