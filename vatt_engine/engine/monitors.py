"""Numbers that show trouble before the loss does: collapsed embeddings, memory that grows."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
