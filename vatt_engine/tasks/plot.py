"""`vatt plot RUN`: loss curves and monitors of a run, also while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vatt_engine.analysis.report import plot_run
from vatt_engine.schema import ConfigError, PathText
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.results import check_writable


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draws OUT/plots/loss.png and OUT/plots/monitors.png from RUN/metrics.jsonl.

    Args:
        run: run folder of `vatt pretrain` or `vatt finetune`.
        out: folder for the pictures; by default the run's.
    """

    run: PathText
    out: PathText | None = None


def main(argv: Sequence[str]) -> int:
    config = parse_flags(PlotConfig, argv, prog="vatt plot", positional=("run",))
    check_writable(config.out or config.run, "vatt plot")
    paths = plot_run(config.run, config.out)
    if not paths:
        raise ConfigError(f"vatt plot: {config.run} must have logged a step, got an empty metrics.jsonl.")
    print(*paths, sep="\n")
    return 0
