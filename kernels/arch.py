"""Which rows of the tables of tiles a device takes."""

import torch


def arch_of(device: torch.device) -> int:
    """90 or 100 for that compute capability, and 80 for all others, whose tensor cores and memory are like it."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return 10 * major if major in (9, 10) else 80
