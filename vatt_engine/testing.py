"""What tests and benchmarks share: seeded inputs, the implementations to try, and the error budget.

The budget of a fast implementation is not chosen but derived: measured against the fp64 reference its largest error
may be twice that of the plain PyTorch reference run in the same dtype, plus one rounding of the largest value; on a GPU
also what a sum in float32 rounds off that a kernel takes one product after the other, see `sum_noise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vatt_engine import dispatch


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Seeded standard normal values, the same on every device and, up to rounding, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def devices() -> list[str]:
    """The devices this machine can test on."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def impls_of(stem: str) -> list[tuple[str, str]]:
    """Every (implementation, device) of an op that this machine can run, for pytest.mark.parametrize."""
    return [
        (name, device)
        for device in devices()
        for name, reason in dispatch.available_impls(stem, device).items()
        if reason is None
    ]


def sum_noise(terms: int, largest: float) -> float:
    """What adding `terms` products in float32, one after the other, may do to the largest of the sums.

        eps sqrt(terms / 6) largest

    After k of K terms a sum of independent ones is sqrt(k / K) of its size; each addition rounds by eps / 2 / sqrt(3)
    of that in the mean square, all together by eps / 2 sqrt(K / 6) of the size. Twice that, of the largest value, which
    is some deviations itself, is more than any of a few thousand elements meets. (On a GPU the library adds in a tree,
    so that the reference says nothing about it.)
    """
    return torch.finfo(torch.float32).eps * math.sqrt(terms / 6) * largest


def error_budget(reference: Tensor, exact: Tensor) -> float:
    """The largest error allowed: 2 max|reference - exact| + eps(dtype) max|exact|."""
    exact = exact.double()
    band = torch.finfo(reference.dtype).eps * exact.abs().max().item() if exact.numel() else 0.0
    return 2 * _largest(reference, exact)[0] + band


def assert_within_budget(
    actual: Tensor, reference: Tensor, exact: Tensor, *, name: str = "value", noise: float = 0.0
) -> None:
    """Fail unless `actual` is as close to `exact` (fp64) as the budget of the same-dtype `reference` and `noise` allow.

    Raises:
        AssertionError: with the name, the worst index, both values, the error and the budget.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == reference.dtype, f"{name}: dtype {actual.dtype}, expected {reference.dtype}"
    budget = error_budget(reference, exact) + noise
    worst, index = _largest(actual, exact.double())
    if not worst <= budget:
        got, want = actual[index].item(), exact[index].item()
        raise AssertionError(
            f"{name}{list(index)}: got {got:.9g}, expected {want:.9g}, error {worst:.3g} > {budget:.3g}"
        )


def gradients(output: Tensor, inputs: Sequence[Tensor], *, seed: int = 1) -> list[Tensor]:
    """Gradients of <output, fixed random weights> in each of `inputs`."""
    weights = randn(*output.shape, seed=seed, dtype=output.dtype, device=output.device.type)
    return list(torch.autograd.grad((output * weights).sum(), inputs))


def _largest(actual: Tensor, exact: Tensor) -> tuple[float, tuple[int, ...]]:
    """max|actual - exact| and where; NaN counts as the largest."""
    if exact.numel() == 0:
        return 0.0, ()
    error = (actual.double() - exact).abs().nan_to_num(nan=float("inf"))
    flat = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), exact.shape)) if exact.ndim else ()
    return error.flatten()[flat].item(), index
