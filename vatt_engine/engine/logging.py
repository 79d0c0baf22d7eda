"""What a run leaves behind and says: config.yaml, env.json, metrics.jsonl, TensorBoard, a progress line.

A log that cannot be written is a matter of the log: it is said, and training goes on.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from vatt_engine.cpus import usable_cpus
from vatt_engine.output import LogFile, is_terminal, put, say, write_text

MONITORS = re.compile(r"seconds|temperature|_(std|rank|mb)$")  # in metrics.jsonl, too many for the progress line
PACKAGES = ("vatt_engine", "torch", "triton", "numpy", "av", "tokenizers", "safetensors", "tyro", "PyYAML")


class RunLog:
    """The records of one run folder: one JSON object per logged step, and a line a person can watch.

    Args:
        run_dir: run folder, made if missing.
        total_steps: length of the run, for the percentage and the time left.
        resume_step: step the run continues from; records of later steps, of a process that died, are dropped.
        tensorboard: write `run_dir/tb` too; needs the tensorboard package.
        wandb: log to Weights & Biases too, under the run folder's name; needs the wandb package.
        flops_per_clip, peak_flops: FLOPs of a training step per clip, and of the device per second; with both there is
            `mfu`, the share of the device's FLOPs that the model uses.
        stream: where the progress line goes; rewritten in place on a terminal, else one line per record.

    >>> with RunLog("run", total_steps=100) as log:
    ...     log.write(10, {"total": 5.2}, clips=640)["step"]
    step 10/100  total 5.2  ... clips/s  eta 0:00
    10
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        *,
        resume_step: int = 0,
        tensorboard: bool = False,
        wandb: bool = False,
        flops_per_clip: float = 0.0,
        peak_flops: float = 0.0,
        stream: TextIO | None = None,
    ):
        self.run_dir, self.total_steps, self.stream = Path(run_dir), total_steps, stream or sys.stdout
        require_log_packages(tensorboard=tensorboard, wandb=wandb)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.flops_per_clip, self.peak_flops = flops_per_clip, peak_flops
        self.sinks = [_TensorBoard(self.run_dir / "tb", resume_step)] if tensorboard else []
        self.sinks += [_WandB(self.run_dir)] if wandb else []
        path = self.run_dir / "metrics.jsonl"
        if path.exists():
            _drop_after(path, resume_step)
        self.records, self.events = LogFile(path), LogFile(self.run_dir / "events.jsonl")
        self.start = self.last = time.perf_counter()
        self.first_step = resume_step
        self.width = 0

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float], *, clips: int) -> dict[str, Any]:
        """Record `values` after `step` steps; `clips` were trained on since the last record.

        Adds step, clips_per_second, mfu, eta_seconds and seconds; a value that is not finite is written as null.
        """
        now = time.perf_counter()
        record: dict[str, Any] = {"step": step, **values}
        record["clips_per_second"] = clips / max(now - self.last, 1e-9)
        if self.flops_per_clip and self.peak_flops:
            record["mfu"] = record["clips_per_second"] * self.flops_per_clip / self.peak_flops
        record["eta_seconds"] = (now - self.start) / max(step - self.first_step, 1) * (self.total_steps - step)
        record["seconds"] = now - self.start
        self.last = now
        self._record(record)
        self.progress(step, values, record)
        return record

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record what was found after `step` steps, and say so; the time that it took is no part of the throughput."""
        self._record({"step": step, **values})
        self.say(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
        self.last = time.perf_counter()

    def _record(self, record: Mapping[str, Any]) -> None:
        plain = {key: _finite(value) for key, value in record.items()}
        self.records.add(json.dumps(plain, allow_nan=False))
        values = {key: value for key, value in record.items() if key != "step"}
        for sink in list(self.sinks):
            try:
                sink.write(record["step"], values)
            except sink.faults as error:
                self.sinks.remove(sink)
                self.say(f"warning: {sink.name} must take the records, got: {error}. It gets no more of this start.")

    def event(self, step: int, what: str, **details: Any) -> None:
        """Record something that happened, a line of JSON in events.jsonl, and say so."""
        self.events.add(json.dumps({"step": step, "event": what, **details}))
        self.say(f"step {step}: {what}" + "".join(f", {key} {value}" for key, value in details.items()))

    def go_back(self, step: int) -> None:
        """Drop the records after `step`, from which the run goes on again."""
        self.records.flush()
        try:
            _drop_after(self.records.path, step)
        except OSError as error:
            self.say(f"warning: {self.records.path} must be written, got: {error.strerror}. It keeps later records.")

    def progress(self, step: int, values: Mapping[str, float], record: Mapping[str, float]) -> None:
        told = {key: value for key, value in values.items() if value and not MONITORS.search(key)}
        shown = "  ".join(f"{key} {value:.4g}" for key, value in told.items())
        minutes, seconds = divmod(round(record["eta_seconds"]), 60)
        speed = f"{record['clips_per_second']:.1f} clips/s"
        line = f"step {step}/{self.total_steps}  {shown}  {speed}  eta {minutes}:{seconds:02d}"
        if is_terminal(self.stream):
            put(self.stream, "\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            put(self.stream, line + "\n")

    def say(self, text: str) -> None:
        """A full line, below the progress line where there is one."""
        put(self.stream, ("\n" if self.width else "") + text + "\n")
        self.width = 0

    def close(self) -> None:
        if self.width:
            put(self.stream, "\n")
        self.records.flush()
        self.events.flush()
        for sink in self.sinks:
            try:
                sink.close()
            except sink.faults as error:
                say(f"warning: {sink.name} must take the records, got: {error}.")


class _TensorBoard:
    name, faults = "TensorBoard", (OSError,)

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.board.add_scalar(key, value, step)

    def close(self) -> None:
        self.board.close()


class _WandB:
    name = "Weights & Biases"

    def __init__(self, run_dir: Path):
        import wandb

        self.faults = (OSError, getattr(wandb, "Error", OSError))
        path = run_dir / "wandb_id"  # a resumed run goes on in the same curves
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        self.run = wandb.init(
            project="vatt_engine", name=run_dir.name, dir=run_dir, id=path.read_text(encoding="utf-8"), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def require_log_packages(*, tensorboard: bool, wandb: bool) -> None:
    """Refuse logs whose packages are not installed.

    Raises:
        ValueError: with the command that installs one.
    """
    modules = {"tensorboard": ("torch.utils.tensorboard", tensorboard), "wandb": ("wandb", wandb)}
    for package, (module, asked) in modules.items():
        try:
            if asked:
                importlib.import_module(module)
        except ImportError as error:
            hint = f"Run `pip install {package}`."
            raise ValueError(f"engine.{package}: {package} must be installed, got no such package. {hint}") from error


class NoLog:
    """Stands for `RunLog` on the ranks that have nothing to say, all but the first: each of its calls does nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        getattr(RunLog, name)  # a name that it has not is an error on every rank
        return lambda *args, **kwargs: None


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a run ran on: an allow-list of versions and hardware, never the process's environment variables."""
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "versions": versions(*PACKAGES),
        "commit": _commit(),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Installed version of each package, None where there is none."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    """Commit of the source tree this package runs from, or None when it is installed without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole records up to `step`; a torn last line, or any later record, came from a process that died."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
