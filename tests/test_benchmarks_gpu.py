"""`make gpu`: it goes on where it stopped, ends what takes too long, and needs little of a machine."""

import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, results

ROOT = Path(__file__).resolve().parents[1]
# What a machine with a GPU has of the packages that pyproject.toml names.
THERE = {"torch", "triton", "numpy", "pytest", "pytest_benchmark", "pybind11", "cmake", "ninja", "setuptools"}
IMPORTED_AS = {"pyyaml": "yaml"}


def not_there():
    """All others, by the name they are imported as."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[\w-]+", text)[0].replace("-", "_") for text in wanted} - {"vatt_engine"}
    return sorted({IMPORTED_AS.get(name, name) for name in names} - THERE)


def run(*words, **environment):
    words = [sys.executable, *words]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


BLOCKED = f"""
import sys
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
@classmethod
def find_what_is_there(cls, name, path=None, target=None):
    return None if name.partition('.')[0] in {not_there()!r} else find_spec(name, path, target)
PathFinder.find_spec = find_what_is_there
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_gpu_tests_and_benchmarks_import_little():
    """Collecting is importing: what `make gpu` runs must come with what a GPU machine has, pytest's plugins too."""
    assert {"av", "hypothesis", "pytest_timeout", "safetensors", "tokenizers", "tyro", "yaml"} <= set(not_there())
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    options = ["-p", "pytest_benchmark.plugin", "-q", "--collect-only"]
    found = run("-c", BLOCKED, *options, *gpu.TESTS, "benchmarks", **plugins)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "Unknown config option" not in found.stdout + found.stderr
    assert "benchmarks/bench_step.py::test_step" in found.stdout
    assert "tests/ops/test_tokenize.py::" in found.stdout


def gpu_run(tmp_path, minutes=1.0):
    return gpu.Run(tmp_path, "cpu", minutes, None)


def test_gpu_goes_on_where_it_stopped(tmp_path):
    ran = []

    def stage(status):
        return lambda: (ran.append(status), (status, "3 passed"))[1]

    first = gpu_run(tmp_path)
    first._stage("good", stage(0))
    first._stage("bad", stage(1))
    first._stage("late", stage(None))
    assert (first.failed, first.unfinished) == (["bad"], ["late"])
    second = gpu_run(tmp_path)
    for name, status in (("good", 0), ("bad", 0), ("late", 0)):
        second._stage(name, stage(status))
    assert (second.failed, second.unfinished) == ([], [])
    assert ran == [0, 1, None, 0, 0]
    third = gpu_run(tmp_path, minutes=0.0)
    third._stage("new", stage(0))
    assert (third.unfinished, len(ran)) == (["new"], 5)


def test_gpu_counts_what_the_repository_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "repository")
    kept = gpu_run(tmp_path / "repository")
    kept._stage("good", lambda: (0, "3 passed"))
    fresh = gpu_run(tmp_path / "fresh")
    fresh._stage("good", lambda: (1, "must not run again"))
    assert fresh.failed == []
    assert results.read(fresh.folder / "test.jsonl") == results.read(kept.folder / "test.jsonl") != []


def test_gpu_logs_what_it_runs_and_ends_what_takes_too_long(tmp_path):
    here = gpu_run(tmp_path)
    assert here.execute("ops", [sys.executable, "-c", "print('seen'); raise SystemExit(3)"])[0] == 3
    assert "seen" in (here.folder / "ops.log").read_text()
    here.end = 0.0
    status, _ = here.execute("ops", [sys.executable, "-c", "print('begun', flush=True); import signal; signal.pause()"])
    assert status is None
    assert "begun" not in (here.folder / "ops.log").read_text().partition("seen")[0]


def test_the_sanitizer_watches_our_kernels():
    assert {"tokenize_fwd_kernel", "tokenize_bwd_kernel", "drop_token_fwd_kernel"} <= set(gpu.triton_kernels())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_gpu_says_what_is_missing():
    found = run("-m", "benchmarks.gpu", "test")
    assert (found.returncode, found.stderr) == (
        2,
        "make gpu: needs a CUDA device: torch.cuda.is_available() is False\n",
    )
