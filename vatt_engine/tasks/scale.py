"""`vatt scale MODEL --gpus N --batch B`: memory, traffic and speed of a run on paper, before renting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vatt_engine.analysis.report import table
from vatt_engine.analysis.scale import STRATEGIES, Rate, measured_rate, memory, sizes, step_seconds, traffic
from vatt_engine.models import VATTConfig, model_config
from vatt_engine.schema import PathText
from vatt_engine.tasks.flags import parse_flags

UNMEASURED = "needs `make gpu` results"


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Memory per GPU and traffic per step of every strategy, and clips per second; see docs/scale.md.

    Args:
        model: name of a whole model.
        gpus: how many.
        batch: clips of a step on all GPUs together.
        precision: "bf16" (autocast, weights and moments in float32) or "fp32".
        checkpointing: keep the inputs of layers alone and compute the rest again in the backward pass.
        candidates: sentences per clip.
        memory: GiB of one GPU.
        results: folder of benchmark results that the products' speed is read from.
        tflops: products' speed per GPU by assumption, in 10^12 FLOP/s, instead of a measured one.
        bandwidth: GB/s (10^9) that one GPU sends to others, an assumption: no benchmark of ours measures it.
        json: print JSON, in bytes and seconds.
    """

    model: str
    gpus: int = 8
    batch: int = 2048
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpointing: bool = False
    candidates: int = 5
    memory: float = 80.0
    results: PathText = "benchmarks/results"
    tflops: float | None = None
    bandwidth: float | None = None
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "batch", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"ScaleConfig: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("memory", "tflops", "bandwidth"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"ScaleConfig: {name} must be above 0, got {value}.")
        if self.batch % self.gpus:
            raise ValueError(f"ScaleConfig: batch must be a multiple of gpus {self.gpus}, got {self.batch}.")


def main(argv: Sequence[str]) -> int:
    config = parse_flags(ScaleConfig, argv, prog="vatt scale", positional=("model",))
    found = scale(config)
    print(json.dumps(found, indent=1) if config.json else text(config, found))
    return 0


def scale(config: ScaleConfig) -> dict[str, Any]:
    """{"model", "trained", "frozen", "rate", "strategies": {name: {"memory", "traffic", "clips per second"}}}.

    "rate" is {"flops", "memory_bytes", "source"} or None; "clips per second" are [communication after the products,
    hidden behind them], None without a rate, or without a bandwidth on several GPUs.

    Raises:
        ValueError: not the name of a whole model.

    >>> scale(ScaleConfig(model="vatt_bbs", gpus=1, batch=32))["strategies"].keys()
    dict_keys(['single'])
    """
    model = model_config(config.model.replace("-", "_"))
    if not isinstance(model, VATTConfig):
        raise ValueError(f"vatt scale: model must be a whole model, vatt_*, got {config.model!r}.")
    clips, counted = config.batch // config.gpus, sizes(model)
    options = {"precision": config.precision, "candidates": config.candidates}
    rate = _rate(config, model)
    bandwidth = None if config.bandwidth is None else config.bandwidth * 1e9
    strategies = {}
    for name in STRATEGIES[:1] if config.gpus == 1 else STRATEGIES[1:]:
        place = (model, name, config.gpus, clips)
        speed = None
        if rate is not None and (bandwidth or config.gpus == 1):
            run = {**options, "checkpointing": config.checkpointing}
            speed = [
                config.batch / step_seconds(*place, rate, bandwidth, overlap=hides, **run) for hides in (False, True)
            ]
        strategies[name] = {
            "memory": memory(*place, checkpointing=config.checkpointing, **options)._asdict(),
            "traffic": traffic(*place, **options)._asdict(),
            "clips per second": speed,
        }
    found = {"model": config.model, "trained": counted.trained, "frozen": counted.frozen}
    return found | {"rate": rate and rate._asdict(), "strategies": strategies}


def _rate(config: ScaleConfig, model: VATTConfig) -> Rate | None:
    if config.tflops is not None:
        return Rate(config.tflops * 1e12, None, "--tflops, an assumption")
    transformer = model.shared if model.backbone == "agnostic" else model.video.transformer
    return measured_rate(config.results, config.precision, transformer.dim)


def text(config: ScaleConfig, found: dict[str, Any]) -> str:
    rows = []
    for name, strategy in found["strategies"].items():
        bytes_of = strategy["memory"]
        total = sum(bytes_of.values()) / 2**30
        parts = {part: value / 2**30 for part, value in bytes_of.items()}
        fits = {"sum GiB": total, f"of {config.memory:g}": "fits" if total <= config.memory else "too large"}
        sent = {"sent MB/step": sum(strategy["traffic"].values()) / 1e6}
        rows.append({"strategy": name} | parts | fits | sent | {"clips/s": _speed(config, found, strategy)})
    clips = config.batch // config.gpus
    lines = [
        f"{config.model}: {found['trained'] / 1e6:.1f} M parameters trained; {config.gpus} x {clips} clips, "
        f"{config.precision}" + (", layers checkpointed" if config.checkpointing else ""),
        table(rows),
        "GiB per GPU; CUDA's context, temporaries and what the allocator wastes come on top.",
    ]
    if found["rate"]:
        lines.append(f"clips/s from {found['rate']['flops'] / 1e12:.0f} TFLOP/s ({found['rate']['source']})")
        if config.gpus > 1 and config.bandwidth:
            lines[-1] += f", {config.bandwidth:g} GB/s between GPUs (an assumption); communication after - behind"
        lines[-1] += ". An upper bound: loss, loading and launches are left out."
    return "\n".join(lines)


def _speed(config: ScaleConfig, found: dict[str, Any], strategy: dict[str, Any]) -> str:
    if strategy["clips per second"]:
        low, high = strategy["clips per second"]
        return f"{low:.0f}" if config.gpus == 1 else f"{low:.0f} - {high:.0f}"
    return UNMEASURED if found["rate"] is None else "needs --bandwidth"
