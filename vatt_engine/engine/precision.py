"""Which precision a device is fast at."""

from __future__ import annotations

from typing import Literal

import torch

from vatt_engine.dispatch import amx_missing


def preferred_precision(device: torch.device | str) -> Literal["fp32", "bf16"]:
    """bf16 where its products are faster than float32's: GPUs from compute capability 8.0 on, CPUs with AMX.

    AVX512-BF16 alone does not make a CPU one of these. Measured on a Xeon that has it, without AMX: 0.17 TFLOP/s in
    bf16 against 0.33 in float32 (benchmarks/results, the ceilings of `step`). `ops.linear` multiplies in float32 there,
    and a step in bf16 takes about as long.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    >>> preferred_precision("cpu") in ("fp32", "bf16")
    True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "fp32" if amx_missing() else "bf16"
