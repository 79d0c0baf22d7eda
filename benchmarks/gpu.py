"""`make gpu`: all that needs a GPU, in parts that each fit into nine minutes, on a machine without a network.

test  the GPU tests of every op; compute-sanitizer, where there is one, over every GPU kernel; then the other tests of
      the ops and of the native module
ops   benchmarks of every op
step  whole training steps
data  the loader

Each call builds in place first. What has been done on these very sources is left out, also if only benchmarks/results
holds it, so the same command goes on where the last one stopped. Rows are added to <results>/<machine>/<bench>.jsonl,
what was printed to <part>.log beside them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks import machine, results

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("test", "ops", "step", "data")
TESTS = ("tests/ops", "tests/test_native.py")
RESULTS = ROOT / "benchmarks/results"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
UNSUPPORTED = "Device not supported"  # how compute-sanitizer says that it cannot work here
SPARE = 20.0  # seconds that a bench which has begun may still take


class Run:
    """One call of `make gpu`: where results go, and how much time is left."""

    def __init__(self, folder: Path, device: str, minutes: float, commit: str | None, only: str | None = None):
        self.folder, self.device, self.commit, self.only = folder / machine.slug(), device, commit, only
        self.end = time.monotonic() + 60 * minutes
        self.failed: list[str] = []
        self.unfinished: list[str] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (RESULTS / machine.slug()).glob("*.jsonl"):
            if not (self.folder / path.name).exists():
                shutil.copy(path, self.folder)

    def left(self) -> float:
        return self.end - time.monotonic()

    def execute(self, part: str, command: Sequence[str], **environment: str) -> tuple[int | None, str]:
        """Run, print and log a command; (None, ...) if the time ran out. Returns its exit status and output."""
        lines = [f"$ {' '.join(command)}\n"]
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that what it starts ends with it
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            with suppress(ProcessLookupError):  # it ended just now
                os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(max(self.left(), 1.0), end)
        timer.start()
        with (self.folder / f"{part}.log").open("a") as log:
            log.write(lines[0])
            for line in child.stdout:
                lines.append(line)
                log.write(line)
                print(line, end="", flush=True)
        status = child.wait()
        timer.cancel()
        return None if late.is_set() else status, "".join(lines)

    def pytest(self, part: str, *words: str, **environment: str) -> tuple[int | None, str]:
        return self.execute(part, [sys.executable, "-m", "pytest", "-q", *words], **environment)

    # ------------------------------------------------------------------------------------------ parts

    def build(self, part: str) -> bool:
        """For this GPU alone, unless CUDAARCHS asks for others."""
        command, archs = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], {}
        if self.device == "cuda" and "CUDAARCHS" not in os.environ:
            major, minor = torch.cuda.get_device_capability()
            archs["CUDAARCHS"] = f"{major}{minor}" + "a" * (major == 9)
        status, _ = self.execute(part, command, **archs)
        return self._judge("build", status)

    def test(self) -> None:
        ops, native = TESTS
        here = f"[{self.device} or -{self.device}"  # in the test's parameters; a file's name may hold "cuda" too
        self._stage("gpu tests", lambda: self._tests(ops, "-k", here))
        for tool in SANITIZER_TOOLS if self.device == "cuda" else ():
            self._stage(tool, lambda tool=tool: self._sanitize(tool))
        self._stage("native tests", lambda: self._tests(native))
        self._stage("other tests", lambda: self._tests(ops, "-k", f"not ({here})"))

    def ops(self) -> None:
        others = {"bench_step.py", "bench_data.py"}
        self._bench("ops", *(path for path in (ROOT / "benchmarks").glob("bench_*.py") if path.name not in others))

    def step(self) -> None:
        self._bench("step", ROOT / "benchmarks/bench_step.py")

    def data(self) -> None:
        """The loader decodes on the CPU, whatever the device."""
        self._bench("data", ROOT / "benchmarks/bench_data.py", device="cpu")

    def _bench(self, part: str, *files: Path, device: str | None = None) -> None:
        words = [*sorted(map(str, files)), "--device", device or self.device, "--results", str(self.folder.parent)]
        words += ["--resume", "--stop-after", str(max(self.left() - SPARE, 0.0))]
        words += ["--commit", self.commit] if self.commit else []
        words += ["-k", self.only] if self.only else []
        status, output = self.pytest(part, *words)
        self._judge(part, None if status == 0 and "no time left" in output else status)

    def _tests(self, *words: str) -> tuple[int | None, str]:
        """A process per core, where xdist is installed: most of the time goes to the compilation of kernels."""
        processes = ["-n", "auto"] if importlib.util.find_spec("xdist") else []
        return self.pytest("test", *processes, *words, OMP_NUM_THREADS="1")

    def _stage(self, name: str, stage: Callable[[], tuple[int | None, str]]) -> None:
        """Run a stage of the tests unless it passed on these sources, and keep its outcome as a row."""
        path, sources = self.folder / "test.jsonl", machine.sources_digest("tests")
        row = dict.fromkeys(results.CASE, "") | {"op": "test", "shape": name, "device": self.device}
        if results.is_measured(path, results.case_of(row), sources):
            print(f"{name}: passed on these sources before")
            return
        if self.left() <= 0:
            self.unfinished.append(name)
            return
        status, output = stage()
        if self._judge(name, status):
            stamp = machine.stamp(self.commit) | {"sources": sources}
            results.merge(path, [row | {"provider": output.strip().splitlines()[-1], "baseline": None, "stamp": stamp}])

    def _judge(self, name: str, status: int | None) -> bool:
        if status is None:
            self.unfinished.append(name)
        elif status != 0:
            self.failed.append(name)
        return status == 0

    def _sanitize(self, tool: str) -> tuple[int | None, str]:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(program).exists():
            return 0, "compute-sanitizer is not installed"
        command = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        for name in ("vatt", *triton_kernels()):  # our own, not the library's; the native ones by their namespace
            command += ["--kernel-name", f"kernel_substring={name}"]
        command += [sys.executable, "-m", "benchmarks.sanitize"]
        # Every tensor an allocation of its own, so that the tool sees where it ends and what was written of it.
        status, output = self.execute("test", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        return (0, f"{tool} does not work on this machine") if status and UNSUPPORTED in output else (status, output)


def triton_kernels() -> list[str]:
    """Names of the Triton kernels that are launched."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    return [name for path in files for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS, help="by default all, as far as the time goes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: to try this script")
    parser.add_argument("--only", metavar="EXPRESSION", help="of the benchmarks those that pytest's -k would choose")
    parser.add_argument("--commit", help="commit of the sources, where they come without their repository")
    return parser.parse_args()


def main() -> int:
    given = parse()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: needs a CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    parts = [given.part] if given.part else list(PARTS)
    if "data" in parts and importlib.util.find_spec("av") is None:
        print("data: not measured, since the package av, which decodes media, is not installed", file=sys.stderr)
        parts.remove("data")
        if given.part:
            return 2
    run = Run(given.results.resolve(), given.device, given.minutes, given.commit, given.only)
    if run.build(parts[0]):
        for part in parts:
            getattr(run, part)()
    print(f"results: {run.folder}")
    for text, names in (("failed", run.failed), ("not finished, run the same command again", run.unfinished)):
        if names:
            print(f"{text}: {', '.join(names)}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
