"""Numbers that show trouble before the loss does: collapsed embeddings, memory that grows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Dense bfloat16 products with float32 sums, FLOP per second, from NVIDIA's data sheets (SXM where there are several).
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float:
    """What MFU is measured against: the bfloat16 peak of a GPU by its name, 0 where it is not known.

    >>> peak_flops(torch.device("cpu"))
    0.0
    """
    words = torch.cuda.get_device_name(device).replace("-", " ").split() if device.type == "cuda" else []
    return max((PEAK_FLOPS.get(word, 0.0) for word in words), default=0.0)


@torch.no_grad()
def spread(x: Tensor) -> dict[str, float]:
    """How much of its space a set of embeddings uses: 0 and 1 where all are equal (collapse).

        std = mean_d(std_n(x_nd)) of the rows scaled to length 1;   about 1 / sqrt(D) where they point everywhere
        rank = exp(-sum_k p_k log p_k),  p_k = s_k / sum(s);        s the singular values of the scaled rows

    Args:
        x: [..., D], the embeddings; not normalised, any float dtype.

    Source: the effective rank of Roy and Vetterli (2007), on embeddings as in RankMe (arXiv 2210.02885).

    >>> spread(torch.eye(8))["rank"]
    8.0
    """
    rows = torch.nn.functional.normalize(x.flatten(0, -2).float(), dim=-1)
    if not rows.isfinite().all():
        return {"std": math.nan, "rank": math.nan}
    values = torch.linalg.svdvals(rows)
    share = values / values.sum().clamp_min(1e-12)
    entropy = -torch.special.xlogy(share, share).sum()
    return {"std": rows.std(dim=0, correction=0).mean().item(), "rank": round(entropy.exp().item(), 3)}


def memory(device: torch.device) -> dict[str, float]:
    """Memory in MB: `rss_mb`, what the process holds, and on a GPU `gpu_peak_mb`, the most that torch has held.

    >>> memory(torch.device("cpu"))["rss_mb"] > 1
    True
    """
    with open("/proc/self/status") as file:
        resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    found = {"rss_mb": resident / 1024}
    if device.type == "cuda":
        found["gpu_peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found
