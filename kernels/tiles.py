"""Block sizes of the kernels that multiply, and which row of a table suits a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel: rows and columns of the result, and elements (not words) of the sum per step."""

    archs: tuple[int, ...]  # compute capabilities the row is for; 80 serves all that are neither 90 nor 100
    half: bool  # bfloat16 and float16 products, else float32
    words: tuple[int, ...]  # bytes that are read at once: of video 1 or 4, else 1
    min_rows: int  # rows of the output from which on the row is chosen
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def choose_tiles(table: Sequence[Tiles], arch: int, dtype: torch.dtype, word: int, rows: int) -> Tiles:
    """The first row that fits; one that reads single bytes fits whatever lies at addresses that four divides, too."""
    half = dtype != torch.float32
    fits = (tiles for tiles in table if arch in tiles.archs and tiles.half == half and rows >= tiles.min_rows)
    return next(tiles for tiles in fits if word in tiles.words or 1 in tiles.words)


def arch_of(device: torch.device) -> int:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return 10 * major if major in (9, 10) else 80
