"""Seeds that are functions of integers, and the state of every global generator as JSON values."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def derive_seed(*parts: int) -> int:
    """A 48-bit seed that is a function of integers alone, the same on every machine.

    >>> derive_seed(0, 1) == derive_seed(0, 1) != derive_seed(1, 0)
    True
    """
    digest = hashlib.blake2b(b"".join(part.to_bytes(8, "little") for part in parts), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def random_state() -> dict[str, Any]:
    """The state of Python's, torch's and (where it is loaded) NumPy's global generators, as JSON values."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": _hex(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [_hex(one) for one in torch.cuda.get_rng_state_all()]
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, keys.tolist(), position, has_gauss, cached]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo of `random_state`; generators of GPUs that are not here are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(_unhex(state["torch"]))
    for index, one in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_unhex(one), index)
    if "numpy" in state:
        import numpy as np

        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _unhex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
