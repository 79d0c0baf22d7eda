import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from vatt_engine.engine.schedule import ScheduleConfig, learning_rate

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "g_schedules_optimizers.npz")
PEAK = 1e-4
CASES = {
    "pretrain": (ScheduleConfig(), PEAK),
    "pretrain_paper_warmup10k": (ScheduleConfig(warmup_steps=10_000), PEAK),
    "finetune_video": (ScheduleConfig(final=0.0, warmup_steps=2_500, total_steps=100_000), 0.005),
    "finetune_audio_paper": (ScheduleConfig(final=0.0, warmup_steps=5_000, total_steps=50_000), 0.2),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_the_official_schedule(case):
    config, peak = CASES[case]
    for step, expected in zip(GOLDEN[f"{case}/steps"].tolist(), GOLDEN[f"{case}/lr"].tolist()):
        if math.isnan(expected):  # 0 / 0 in the original, at total_steps itself
            assert step == config.total_steps
            expected = config.final
        # The recorded rates are float32; near the end of a decay to 0 only the peak gives their scale.
        assert learning_rate(step, config, peak) == pytest.approx(expected, rel=1e-6, abs=peak * 1e-7), step


def test_first_update_has_rate_zero_and_the_last_ones_the_final_rate():
    config = ScheduleConfig(warmup_steps=10, total_steps=100)
    assert learning_rate(0, config, PEAK) == 0.0
    assert learning_rate(10, config, PEAK) == PEAK
    assert learning_rate(100, config, PEAK) == learning_rate(10**9, config, PEAK) == config.final
    assert learning_rate(0, ScheduleConfig(warmup_steps=0), PEAK) == PEAK


@pytest.mark.parametrize("shape", ["half_cosine", "quarter_cosine"])
def test_decay_never_rises_and_never_leaves_its_bounds(shape):
    config = ScheduleConfig(warmup_steps=50, total_steps=1_000, shape=shape)
    rates = [learning_rate(step, config, PEAK) for step in range(50, 1_100)]
    assert rates[0] == PEAK
    assert rates[-1] == config.final
    assert all(earlier >= later for earlier, later in itertools.pairwise(rates))


def test_quarter_cosine_is_a_quarter_of_a_period():
    config = ScheduleConfig(final=1.0, warmup_steps=0, total_steps=90, shape="quarter_cosine")
    assert learning_rate(30, config, 3.0) == pytest.approx(1 + 2 * math.cos(math.radians(30)))
    assert learning_rate(60, config, 3.0) == pytest.approx(2.0)
    # It leaves the peak slowly and arrives at full slope, where the half period flattens out again.
    assert learning_rate(0, config, 3.0) - learning_rate(1, config, 3.0) < 0.01
    assert learning_rate(89, config, 3.0) - learning_rate(90, config, 3.0) > 0.03


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"final": -1e-4}, "final must be a finite number >= 0, got -0.0001"),
        ({"final": math.nan}, "final must be a finite number >= 0, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"warmup_steps": 10, "total_steps": 10}, r"total_steps must be greater than warmup_steps \(10\), got 10"),
        ({"shape": "linear"}, "shape must be one of half_cosine, quarter_cosine, got 'linear'"),
    ],
)
def test_rejects_bad_configs(values, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**values)


def test_rejects_a_negative_step():
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        learning_rate(-1, ScheduleConfig(), PEAK)
