"""A safetensors file written tensor by tensor, for models that would not fit into memory twice.

The `safetensors` library wants all tensors at once. The format is a length, a JSON header of types, shapes and places,
and the bytes, so the header can be written first, from shapes alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

FLOAT = 4  # bytes of a float32


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write float32 tensors as they come; the file is there when all are.

    Args:
        path: of the file; what stood there stays until the end.
        shapes: of all tensors by name, in the order in which they come.
        arrays: pairs of a name and an array, which becomes float32.

    Raises:
        ValueError: another tensor comes than `shapes` tells of.
        OSError: the disk is full or not writable.

    >>> write_safetensors(Path("one.safetensors"), {"x": (2,)}, [("x", np.ones(2))])
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + FLOAT * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of eight
    partial, expected = path.with_name(f"{path.name}.tmp"), iter(shapes.items())
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, array in arrays:
                wanted = next(expected, None)
                if wanted != (name, array.shape):
                    raise ValueError(f"{path}: the next tensor must be {wanted}, got {name} of shape {array.shape}.")
                # torch, since weights come as transposed views, and NumPy takes three times as long to copy one.
                plain = torch.from_numpy(np.require(array, np.float32, "W")).contiguous().numpy()
                file.write(plain.astype("<f4", copy=False).data)
        if (left := next(expected, None)) is not None:
            raise ValueError(f"{path}: the next tensor must be {left}, got none.")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # gives a full disk its room back
        raise
