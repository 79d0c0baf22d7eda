"""What tests and benchmarks share: seeded inputs, the implementations to try, and the error budget.

The budget of a fast implementation is not chosen but derived. Against float64 it may err twice as much as the plain
PyTorch reference run in the same dtype, and by what the operation's own sums round off, in whatever order a library, an
instruction set or a GPU adds them up. A test says how long these sums are, see `Sum`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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


class Sum(NamedTuple):
    """A sum that an operation takes on the way to each of its results.

    tokenize: a token adds up a patch, a bias and a position, a parameter's gradient all rows. attention: a score adds
    up D products, and its rounding scales a probability; an output adds up N of these; where a row sees one key the
    gradients of q and k are 0, a difference of two sums of D products. nce: a similarity is a sum of D products of size
    1 / t, a loss has four, a gradient is off in proportion; its size is that before ones or copies cancel. A layer adds
    up its width, a whole model what lies on the way, `transformer_terms`, once more in backward, and then rows, on
    however many ranks. An optimiser rounds a weight once in every update.

    Args:
        terms: how many terms are added to make one result. Sums of the same size that follow each other, such as the
            layers of a model, are one `Sum` with the terms of all, see `transformer_terms`.
        size: what the sum comes to before anything cancels, in units of the result: sqrt(terms) m for terms of either
            sign and magnitude m, terms m for terms of one sign. None: the largest result, which is right wherever
            nothing cancels. Where something does (the gradient of one key's score, a loss near 0), give it.
        dtype: what rounds; None: float32, or float64 where the result is float64. Terms that are stored in a half on
            the way are a `Sum` of their own: one term for each time they are rounded.
    """

    terms: int
    size: float | None = None
    dtype: torch.dtype | None = None


def sum_budget(*sums: Sum, largest: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """What rounding may leave of results of `dtype` up to `largest` that are made by `sums`: the same on every machine.

        sqrt(sum over sums of (eps sqrt(terms) size)^2)

    One addition rounds by at most u = eps / 2 of the partial sum, with a mean square of u^2 / 3 of it. Roundings are as
    good as independent, so that their squares add up. After k of K terms of either sign a sum has sqrt(k / K) of its
    size, which makes u sqrt(K / 6) size in the root mean square; of one sign it has k / K, which makes u sqrt(K) / 3
    size. 2 u sqrt(K) size is five and six deviations of these: more than any of some million results meets. Products,
    their scale and what is added last are a few roundings more, of which the deviations leave room. Trees, lanes and
    blocks round less than one sum after the other does, fused products too; nothing here knows which is at work.

    It is not the worst case, K u (sum of the absolute terms): with the 3,072 products of a patch that is a percent of
    the result, and operands rounded to bfloat16 would pass. Against this bound one bfloat16 product among the thousands
    of a sum stands out, and so does every product in TF32.

    Raises:
        ValueError: without any sum. A test must say what its operation adds up.
    """
    if not sums:
        raise ValueError("sum_budget: sums must hold a Sum at least, got none. What does the operation add up?")
    accumulator = torch.promote_types(dtype, torch.float32)
    squares = 0.0
    for terms, size, rounds in sums:
        size = largest if size is None else size
        squares += terms * (torch.finfo(rounds or accumulator).eps * size) ** 2
    return math.sqrt(squares)


def error_budget(reference: Tensor, exact: Tensor, *sums: Sum) -> float:
    """The largest error allowed: 2 max|reference - exact| + sum_budget + eps(dtype) max|exact|.

    The first is what a result costs that is rounded as the reference rounds it, and in halves the largest. It depends
    on the machine: a library that happens to be exact leaves nothing. The second does not, and is always allowed. The
    last is one rounding of the result itself.
    """
    exact = exact.double()
    largest = exact.abs().max().item() if exact.numel() else 0.0
    rounded = torch.finfo(reference.dtype).eps * largest
    added = sum_budget(*sums, largest=largest, dtype=reference.dtype)
    return 2 * _largest(reference, exact)[0] + added + rounded


def assert_within_budget(actual: Tensor, reference: Tensor, exact: Tensor, *sums: Sum, name: str = "value") -> None:
    """Fail unless `actual` is as close to `exact` (fp64) as `reference`, of its dtype, and the operation's sums allow.

    Raises:
        AssertionError: with the name, the worst index, both values, the error and the budget.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == reference.dtype, f"{name}: dtype {actual.dtype}, expected {reference.dtype}"
    budget = error_budget(reference, exact, *sums)
    worst, index = _largest(actual, exact.double())
    if not worst <= budget:
        got, want = actual[index].item(), exact[index].item()
        raise AssertionError(
            f"{name}{list(index)}: got {got:.9g}, expected {want:.9g}, error {worst:.3g} > {budget:.3g}"
        )


def assert_same_sums(actual: Tensor, expected: Tensor, *sums: Sum, name: str = "value") -> None:
    """Fail unless two results of the same `sums` in the same dtype differ by their order alone: both of them round.

    For compiled against eager code, a batch against its parts, one rank against many. Bits are compared only where the
    code promises bits: another shape, thread or instruction set adds up in another order.
    """
    assert_within_budget(actual, expected, expected, *(s._replace(terms=2 * s.terms) for s in sums), name=name)


def assert_same_formula(actual: Tensor, expected: Tensor, *, size: float = 0.0, name: str = "value") -> None:
    """Fail unless two ways to compute the same in float64 agree in half of its digits, sqrt(eps) of the largest value.

    For whole models, where norms over few samples and products of many layers multiply roundings by what no `Sum` says:
    they reach 1e-11 there, a mistake in a formula 1e-3. `size` is the largest value of all that is compared together,
    for a result that is 0 but for rounding, as the gradient of a bias before BatchNorm.
    """
    assert actual.dtype == expected.dtype == torch.float64, f"{name}: dtypes {actual.dtype} and {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        size = max(size, expected.abs().max().item())
    worst, index = _largest(actual, expected)
    allowed = torch.finfo(torch.float64).eps ** 0.5 * size
    assert worst <= allowed, f"{name}{list(index)}: off by {worst:.3g} of {size:.3g}, allowed {allowed:.3g}"


def product_size(a: Tensor, b: Tensor) -> float:
    """The `Sum.size` of a @ b: the largest root of a sum of squared products, which is what it is if none cancel."""
    if not a.numel() or not b.numel():
        return 0.0
    return (a.detach().double().square() @ b.detach().double().square()).max().sqrt().item()


def transformer_terms(*, layers: int, dim: int, ff_dim: int, tokens: int) -> int:
    """The terms of the sums that follow each other in a transformer: a layer has two norms, q k^T, p v, four products.

    Each part has a norm before it, and so adds roundings of its own size. A backward pass takes as many again.
    """
    return layers * (6 * dim + tokens + ff_dim)


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
