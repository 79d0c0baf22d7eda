"""Options of `pytest benchmarks`, the `measure` fixture, and the table at the end."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, report

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("vatt_engine benchmarks")
    group.addoption("--results", type=Path, help="folder to add the results to; by default none are kept")
    group.addoption("--resume", action="store_true", help="leave out what --results holds of these very sources")
    group.addoption("--device", choices=("cpu", "cuda"), help="measure on this device only")
    group.addoption("--seconds", type=float, default=1.0, help="timed seconds per case, within 7 to 200 rounds")
    group.addoption("--stop-after", type=float, metavar="SECONDS", help="begin no case later than this")
    group.addoption("--commit", help="commit of the sources, where they come without their repository")


def pytest_configure(config):
    config.stash[ROWS] = []
    config.stop_benchmarks_at = time.monotonic() + (config.getoption("--stop-after") or float("inf"))
    # "fp32" means one precision for all: cuDNN's convolutions alone would use TF32 by default.
    torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device")
    chosen = [item for item in items if device in (None, getattr(case_of(item), "device", device))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def case_of(item):
    return item.callspec.params.get("case") if hasattr(item, "callspec") else None


@pytest.fixture
def measure(benchmark, request):
    """measure(bench, case): harness.measure with the options of the command line."""
    config = request.config
    options = harness.Options(
        results=config.getoption("--results"),
        resume=config.getoption("--resume"),
        stop_at=config.stop_benchmarks_at,
        seconds=config.getoption("--seconds"),
        commit=config.getoption("--commit"),
    )

    def run(bench, case):
        rows = harness.measure(bench, case, benchmark, options)
        config.stash[ROWS] += rows
        failed = [f"{row['provider']}: {row['error']}" for row in rows if "error" in row]
        if failed:
            pytest.fail("not timed, since wrong:\n" + "\n".join(failed), pytrace=False)

    return run


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.write_line(report.page(config.stash[ROWS]))
