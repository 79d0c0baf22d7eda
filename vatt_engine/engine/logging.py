"""What a run leaves behind and says: config.yaml, env.json, metrics.jsonl, TensorBoard, a progress line."""

from __future__ import annotations

import io
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
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.flops_per_clip, self.peak_flops = flops_per_clip, peak_flops
        self.sinks = [_TensorBoard(self.run_dir / "tb", resume_step)] if tensorboard else []
        self.sinks += [_WandB(self.run_dir)] if wandb else []
        path = self.run_dir / "metrics.jsonl"
        if path.exists():
            _drop_after(path, resume_step)
        self.file = path.open("a", encoding="utf-8")
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
        self.file.write(json.dumps(plain, allow_nan=False) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink.write(record["step"], {key: value for key, value in record.items() if key != "step"})

    def event(self, step: int, what: str, **details: Any) -> None:
        """Record something that happened, a line of JSON in events.jsonl, and say so."""
        with (self.run_dir / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "event": what, **details}) + "\n")
        self.say(f"step {step}: {what}" + "".join(f", {key} {value}" for key, value in details.items()))

    def go_back(self, step: int) -> None:
        """Drop the records after `step`, from which the run goes on again."""
        self.file.close()
        _drop_after(self.run_dir / "metrics.jsonl", step)
        self.file = (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8")

    def progress(self, step: int, values: Mapping[str, float], record: Mapping[str, float]) -> None:
        told = {key: value for key, value in values.items() if value and not MONITORS.search(key)}
        shown = "  ".join(f"{key} {value:.4g}" for key, value in told.items())
        minutes, seconds = divmod(round(record["eta_seconds"]), 60)
        speed = f"{record['clips_per_second']:.1f} clips/s"
        line = f"step {step}/{self.total_steps}  {shown}  {speed}  eta {minutes}:{seconds:02d}"
        if self.stream.isatty():
            self._put("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self._put(line + "\n")

    def say(self, text: str) -> None:
        """A full line, below the progress line where there is one."""
        self._put(("\n" if self.width else "") + text + "\n")
        self.width = 0

    def _put(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # whoever watched has left (`| head`, a closed terminal): the run goes on
            self.stream = io.StringIO()

    def close(self) -> None:
        if self.width:
            self._put("\n")
        self.file.close()
        for sink in self.sinks:
            sink.close()


class _TensorBoard:
    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(_missing("tensorboard")) from error
        self.board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.board.add_scalar(key, value, step)

    def close(self) -> None:
        self.board.close()


class _WandB:
    def __init__(self, run_dir: Path):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(_missing("wandb")) from error
        path = run_dir / "wandb_id"  # a resumed run goes on in the same curves
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        self.run = wandb.init(
            project="vatt_engine", name=run_dir.name, dir=run_dir, id=path.read_text(), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _missing(package: str) -> str:
    return f"engine.{package}: {package} must be installed, got no such package. Run `pip install {package}`."


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


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, so a reader never sees half of it."""
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


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
