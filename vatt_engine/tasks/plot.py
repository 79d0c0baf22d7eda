"""`vatt plot RUN`: loss curves and monitors of a run, also while it trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vatt_engine.analysis.report import plot_run
from vatt_engine.schema import ConfigError

USAGE = """usage: vatt plot RUN

Draws RUN/plots/loss.png and RUN/plots/monitors.png from RUN/metrics.jsonl."""


def main(argv: Sequence[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if len(argv) > 1 or argv[0].startswith("-"):
        raise ConfigError(f"vatt plot: the argument must be one run folder, got {list(argv)}.")
    paths = plot_run(argv[0])
    if not paths:
        raise ConfigError(f"vatt plot: {argv[0]} must have logged a step, got an empty metrics.jsonl.")
    print(*paths, sep="\n")
    return 0
