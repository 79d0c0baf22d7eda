"""Installs the package beside the oldest and the newest versions that it declares, and uses it there.

For each Python: two new environments without constraints.txt, `pip install .` as the README tells users to, the main
job on real media with what that installs, then the optional packages and the fast tests. Nothing is imported from the
source tree. The environments are made one after the other and removed, since a CUDA build of torch takes 6 GB.

    python -m tests.versions                                    # three Pythons, both sets; writes docs/versions.md
    python -m tests.versions --pythons python3.12 --sets newest --only job --table ""    # what .ci/run does
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13")
SETS = ("oldest", "newest")
EXTRAS = ("triton", "dali", "deepspeed", "tensorboard", "tasks")  # of what the tests use
FOR_TESTS = ("transformers", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
TESTS = ("tests/data", "tests/tasks", "tests/interop", "tests/engine")
SHOWN = (
    "torch",
    "triton",
    "numpy",
    "av",
    "tokenizers",
    "safetensors",
    "tyro",
    "matplotlib",
    "scikit-learn",
    "openTSNE",
)
SHOWN += ("transformers", "deepspeed", "nvidia-dali-cuda130")
# What a user does, as the README has it: (what, arguments of `vatt`, a file that must be there then).
JOB = (
    ("demo data", "demo-data world --num-train 64 --num-heldout 16", "world/train.jsonl"),
    ("pretrain", "pretrain demo --data.train world/train.jsonl --out run --engine.steps 6 --data.batch-size 16", "run"),
    ("resume", "pretrain --resume run --engine.steps 8", "run/model/model.safetensors"),
    ("prepare", "prepare world/train.jsonl shards", "shards/index.jsonl"),
    ("shards", "pretrain demo --data.train shards --out again --engine.steps 2 --data.batch-size 16", "again/model"),
    ("retrieve", "retrieve run --data world/heldout.jsonl", "run/plots"),
    ("report", "report run", "run/report.html"),
)


@dataclass
class Outcome:
    """What was found in one environment; `job` and `tests` are empty where they were not asked for."""

    python: str
    set: str
    versions: dict[str, str] = field(default_factory=dict)
    job: str = ""
    tests: str = ""
    failed: list[str] = field(default_factory=list)  # what failed, one line each
    day: str = field(default_factory=lambda: date.today().isoformat())


class Environment:
    """A new virtual environment of one Python.

    Args:
        python: its interpreter.
        folder: where it is made, and where commands run.
        pins: versions to hold to; none: whatever is newest.
    """

    def __init__(self, python: str, folder: Path, pins: dict[str, str]):
        self.folder, self.bin = folder, folder / "venv" / "bin"
        self.variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.variables |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.variables.setdefault("VATT_CUDA", "OFF")  # nvcc, where it is there, would take minutes in each of them
        if "PIP_CERT" in os.environ:
            self.variables.setdefault("SSL_CERT_FILE", os.environ["PIP_CERT"])  # uv's name for it
        self.constraints = folder / "constraints.txt"
        self.constraints.write_text("".join(f"{package}=={version}\n" for package, version in pins.items()))
        # Unlike `-c` this also holds for the isolated build; and it replaces what pip may be configured to hold to.
        self.variables["PIP_CONSTRAINT"] = str(self.constraints)
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)

    def run(self, *command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd or self.folder,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def install(self, source: Path, extras: Sequence[str] = (), others: Sequence[str] = ()) -> None:
        """`pip install source[extras] others`; uv, where it is there, fetches the packages first, much faster."""
        if uv := shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"):
            command = [uv, "pip", "install", "-q", "--python", self.bin / "python", "-r", source / "pyproject.toml"]
            command += [word for extra in extras for word in ("--extra", extra)] + list(others)
            self._succeed(*command, "--constraint", self.constraints)
        package = f"{source}[{','.join(extras)}]" if extras else source
        self._succeed(self.bin / "python", "-m", "pip", "install", "-q", "--no-compile", package, *others)

    def _succeed(self, *command: str | Path) -> None:
        done = self.run(*command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}")

    def versions(self) -> dict[str, str]:
        """Of each package that is installed, by its name in lower case; a warning of pip may stand among the lines."""
        done = self.run(self.bin / "python", "-m", "pip", "list", "--format", "freeze")
        return {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", done.stdout, re.MULTILINE)}


def lower_bounds(python: str) -> dict[str, str]:
    """The oldest version that pyproject.toml declares of each package, for a Python such as "3.12"."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = document["project"]["optional-dependencies"]
    lines = [*document["build-system"]["requires"], *document["project"]["dependencies"]]
    lines += [line for extra in (*EXTRAS, "dev") for line in optional[extra]]
    bounds = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            for one in requirement.specifier:
                if one.operator == ">=" and requirement.name not in FOR_TESTS[1:]:
                    bounds[requirement.name] = one.version
    return bounds


def copy_tree(folder: Path) -> Path:
    """What git has of the source tree, so that a build leaves nothing behind in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in listed.stdout.decode().strip("\0").split("\0"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def do_job(environment: Environment, outcome: Outcome) -> None:
    """The main job, on real media; stops at the first command that fails."""
    outcome.job = "ok"
    for what, arguments, file in JOB:
        done = environment.run(environment.bin / "vatt", *arguments.split())
        missing = "" if (environment.folder / file).exists() else f"{file} is missing"
        if done.returncode or missing:
            outcome.job = f"failed at {what}"
            outcome.failed.append(f"{what}: {missing or done.stdout.strip()[-400:]}")
            return
    blamed = [line for run in ("run", "again") for line in _lines(environment.folder / run / "quarantine.jsonl")]
    if blamed:
        outcome.job = "files quarantined"
        outcome.failed += blamed[:3]


def do_tests(environment: Environment, source: Path, outcome: Outcome) -> None:
    """The fast tests of what touches libraries, from a folder in which only tests and benchmarks lie."""
    place = environment.folder / "outside"
    for name in ("tests", "benchmarks"):
        shutil.copytree(source / name, place / name)
    shutil.copy2(source / "pyproject.toml", place)
    options = (
        "-q",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "-m",
        "not slow and not soak",
        "--timeout",
        "180",
        "-p",
        "no:cacheprovider",
    )
    done = environment.run(environment.bin / "python", "-m", "pytest", *options, *TESTS, cwd=place)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)}
    outcome.tests = ", ".join(f"{number} {word}" for word, number in counts.items()) or f"exit code {done.returncode}"
    outcome.failed += re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE) or (
        [done.stdout[-400:]] if done.returncode else []
    )


def examine(python: str, which: str, only: Sequence[str]) -> Outcome:
    """One environment, from its making to its removal."""
    version = subprocess.run([python, "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    outcome, begin = Outcome(version, which), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="versions-") as name:
        folder = Path(name)
        source = copy_tree(folder / "source")
        pins = lower_bounds(".".join(version.split(".")[:2])) if which == "oldest" else {}
        try:
            environment = Environment(python, folder, pins)
            environment.install(source)
            if "job" in only:
                do_job(environment, outcome)
            if "tests" in only:
                environment.install(source, EXTRAS, FOR_TESTS)
                do_tests(environment, source, outcome)
            outcome.versions = environment.versions()
        except RuntimeError as error:  # of the installers
            outcome.failed.append(str(error))
    print(f"{version} {which}: job {outcome.job}, tests {outcome.tests} ({time.monotonic() - begin:.0f} s)", flush=True)
    print(*outcome.failed, sep="\n", flush=True)
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """docs/versions.md."""
    lines = [
        "# Versions",
        "",
        "```bash",
        "make versions",
        "```",
        "",
        "What that found: for each Python an environment of the oldest versions that `pyproject.toml`",
        "declares and one of the newest on the day, both without `constraints.txt`. `pip install .`, the main job on",
        "real media (demo data, six steps, resume, prepare, training from shards, retrieval, report), then the fast",
        f"tests of {', '.join(f'`{name}`' for name in TESTS)}, outside the source tree, on a CPU.",
        "",
        "| Python | set | day | main job | tests |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {o.python} | {o.set} | {o.day} | {o.job or 'not run'} | {o.tests or 'not run'} |" for o in outcomes]
    lines += ["", "The versions of the main packages in each:", ""]
    lines += ["| package | " + " | ".join(f"{o.python} {o.set}" for o in outcomes) + " |"]
    lines += ["|---|" + "---|" * len(outcomes)]
    for package in SHOWN:
        cells = [o.versions.get(package.lower(), "-") for o in outcomes]
        lines.append(f"| {package} | " + " | ".join(cells) + " |")
    failed = [f"- {o.python} {o.set}: {' '.join(line.split())}" for o in outcomes for line in o.failed]
    return "\n".join(lines + (["", "Failed:", "", *failed] if failed else [])) + "\n"


def interpreters(names: Sequence[str]) -> list[str]:
    """Those that can be started; the commands of pyenv, where that is used, are let start all that it has."""
    if shutil.which("pyenv"):
        versions = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True).stdout.split()
        os.environ.setdefault("PYENV_VERSION", ":".join(versions))
    found = [name for name in names if shutil.which(name) and not subprocess.run([name, "-c", ""]).returncode]
    for name in names:
        if name not in found:
            print(f"{name}: not found, so not run. Give its path with --pythons.")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="interpreters, on PATH or as paths")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--only", nargs="+", default=("job", "tests"), choices=("job", "tests"))
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "versions", help="folder of what was found")
    parser.add_argument("--one", action="store_true", help="the first of these Pythons that is there, and no more")
    parser.add_argument(
        "--table", default=ROOT / "docs" / "versions.md", help="of all that the folder has; empty: none"
    )
    arguments = parser.parse_args()
    pythons = interpreters(arguments.pythons)
    arguments.results.mkdir(parents=True, exist_ok=True)
    failed = not pythons
    for python in pythons[:1] if arguments.one else pythons:
        for which in arguments.sets:
            outcome = examine(python, which, arguments.only)
            failed = failed or bool(outcome.failed)
            (arguments.results / f"{outcome.python}-{which}.json").write_text(json.dumps(asdict(outcome), indent=1))
    if arguments.table:
        found = [Outcome(**json.loads(path.read_text())) for path in arguments.results.glob("*.json")]
        found.sort(key=lambda one: (tuple(map(int, one.python.split("."))), SETS.index(one.set)))
        Path(arguments.table).write_text(table(found))
    return int(failed)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
