"""NCE and MIL-NCE: contrastive losses of two embedded modalities, with P candidates per sample on the second side.

s[i, j, p]  = <a_i, b_jp> / (|a_i| |b_jp| temperature)
row[i]      = log sum_{j,p} exp s[i, j, p]        column[j] = log sum_{i,p} exp s[i, j, p]
positive[i] = log sum_p exp s[i, i, p]

joint       l_i = log(exp row[i] + exp column[i]) - positive[i]      (official AsymmetricNCE; minimum log 2)
symmetric   l_i = row[i] + column[i] - 2 positive[i]                 (official SymmetricNCE)
one_way     l_i = row[i] - positive[i]                               (paper eq. 4-5)

Every form needs the same three statistics of one block [rows of this rank] x [samples of all ranks], and its gradient
is G = d_row exp(s - row) + d_column exp(s - column) + d_positive exp(s - positive) on that block. So there are two
private ops, nce_stats and nce_grad, which know neither the form nor the ranks; all the rest is arithmetic on vectors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vatt_engine.dispatch import Impl, define_op, native_missing, triton_missing, wgmma_missing
from vatt_engine.ops.nce_reference import nce_grad_reference, nce_stats_reference

FORMS = ("joint", "symmetric", "one_way")
MAX_SPREAD = 80  # of similarities, 2 / temperature, below which exp(s - largest) is a normal float32
_MIN_NORM = 1e-6  # rsqrt(max(sum x^2, 1e-12)), as the official l2_normalize


def _stay(x: Tensor) -> Callable[[], Tensor]:
    return lambda: x


class Ring(NamedTuple):
    """Ranks in a circle: `shift` begins to send a tensor to the next one and returns how to wait for the last one's."""

    first_sample: int  # that of this rank's first row
    rank: int = 0
    size: int = 1
    shift: Callable[[Tensor], Callable[[], Tensor]] = _stay

    def samples(self, step: int, rows: int) -> slice:
        """Of all ranks' samples those whose `rows` of b are here after so many shifts."""
        owner = (self.rank - step) % self.size
        return slice(owner * rows, (owner + 1) * rows)


_ALONE = Ring(0)


class NCEStatistics(NamedTuple):
    """Log-sum-exp of the similarities: row [B], column [N] merged over the candidates, positive [B]; float64.

    A rounding of row[i] is one of the gradient of the whole row, and the temperature's adds up those of all rows.
    """

    row: Tensor
    column: Tensor
    positive: Tensor


def nce(
    a: Tensor, b: Tensor, temperature: float | Tensor, *, mask: Tensor | None = None, form: str = "joint"
) -> Tensor:
    """Contrastive loss of paired rows, mean over the valid samples (see the formulas at the top of this module).

    Args:
        a: [B, D], float32, bfloat16 or float16 (float64 for tests); not normalised, the rows are normalised inside.
        b: [B, D], the partner of each row of `a`; same dtype and device.
        temperature: divides the cosines; a positive float, or a tensor of shape (1,) which gets a gradient.
        mask: [B] bool, False where the sample has no b. Its row of b is no one's negative, its own loss is 0 and the
            mean is taken over the others; its row of a remains a negative of the other b, except in "one_way".
        form: "joint", "symmetric" or "one_way".

    Returns:
        Scalar in float32 (float64 for float64), 0 if no sample is valid. The B x B matrix is never stored, except by
        the reference. Similarities of half-precision inputs are exact sums in float32. Not twice differentiable.

    Raises:
        ValueError: shapes, dtypes, the temperature or the form do not fit.

    Source: paper eq. 4-5; official vatt/utils/train/objectives.py (AsymmetricNCE, SymmetricNCE).
    Implementations: chunked (plain PyTorch by tiles), reference (plain PyTorch, stores the matrix), triton,
        cuda and wgmma (statistics; their gradient is chunked).

    >>> x = torch.eye(4)
    >>> nce(x, x, 0.01, form="one_way").item() < 1e-6
    True
    """
    _check_options("nce", temperature, form)
    check_pair("nce", a, b, mask, names=("a", "b", "mask"))
    return _mean_loss(a, b.unsqueeze(1), temperature, mask, form)


def mil_nce(
    video: Tensor, text: Tensor, temperature: float | Tensor, *, mask: Tensor | None = None, form: str = "joint"
) -> Tensor:
    """`nce` with P candidates per sample, all of them positives: log sum_p exp s[i, i, p] stands for the positive.

    Args:
        video: [B, D], float32, bfloat16 or float16 (float64 for tests); rows are normalised inside.
        text: [B, P, D], the candidates of each sample; same dtype and device.
        temperature, mask, form: as in `nce`; the mask is per sample and covers its P candidates together.

    Returns:
        Scalar in float32 (float64 for float64), 0 if no sample is valid.

    Raises:
        ValueError: shapes, dtypes, the temperature or the form do not fit.

    Source: paper eq. 5; Miech et al. 2020; official vatt/utils/train/objectives.py.
    Implementations: chunked (plain PyTorch by tiles), reference (plain PyTorch, stores the matrix), triton,
        cuda and wgmma (statistics; their gradient is chunked).

    >>> mil_nce(torch.eye(4), torch.eye(4).unsqueeze(1).expand(4, 5, 4), 0.01, form="one_way").item() < 1e-6
    True
    """
    _check_options("mil_nce", temperature, form)
    check_pair("mil_nce", video, text, mask, names=("video", "text", "mask"), candidates=True)
    return _mean_loss(video, text, temperature, mask, form)


def nce_statistics(
    a: Tensor, b: Tensor, temperature: float | Tensor, *, column_mask: Tensor | None = None, ring: Ring = _ALONE
) -> NCEStatistics:
    """The three log-sum-exps of one block, differentiable in a, b and the temperature; what `losses` builds on.

    Args:
        a: [B, D], the rows of this rank.
        b: [N, P, D], the candidates of all ranks; or, of a ring of several, this rank's [N / size, P, D]. They travel
            around it, and in the backward pass once more with their gradients: never more than two blocks are here.
        temperature: positive float or tensor of shape (1,).
        column_mask: [N] bool, False where a sample has no b; None is all valid.
        ring: which sample the first row belongs to, and the ranks that b travels around.

    Returns:
        NCEStatistics; -inf where nothing is left to sum, and the positive of a row whose own sample is not among the N.
    """
    # The largest cosine is 1: an offset known beforehand lets one exp serve the rows and the columns, where exp(-2/t)
    # is far from underflow. A whole number is the same in float32 and float64; a difference would be in every row, and
    # the temperature's gradient adds them up. Without an offset the gradient of a single sample is exactly 0.
    known = _known_temperature(temperature) if ring.size * len(b) > 1 else None
    offset = float(math.ceil(1 / known)) if known is not None and 2 / known < MAX_SPREAD else None
    return NCEStatistics(*_Statistics.apply(a, b, temperature, column_mask, ring, offset))


def _known_temperature(temperature: float | Tensor) -> float | None:
    """Its value, where that is known without waiting for a device and without a break of the graph."""
    if not isinstance(temperature, Tensor):
        return temperature
    hidden = temperature.device.type != "cpu" or torch.compiler.is_compiling()
    return None if hidden else temperature.item()


def sample_losses(form: str, row: Tensor, column: Tensor, positive: Tensor, mask: Tensor | None) -> Tensor:
    """The loss of each sample from its own statistics, [B] each; exactly 0, with gradient 0, where `mask` is False."""
    if mask is not None:
        row, column, positive = (x.where(mask, 0.0) for x in (row, column, positive))
    if form == "joint":
        loss = torch.logaddexp(row, column) - positive
    elif form == "symmetric":
        loss = row + column - 2 * positive
    else:
        loss = row - positive
    return loss if mask is None else loss.where(mask, 0.0)


_SHARED_ARGUMENTS = (
    "Tensor a, Tensor b, Tensor row_scale, Tensor column_scale, Tensor? column_mask, SymInt first_sample, float? offset"
)


def _refuses(dtypes: Sequence[torch.dtype]) -> Callable[..., str | None]:
    def refuses(a: Tensor, *_: Any) -> str | None:
        return None if a.dtype in dtypes else f"multiplies {', '.join(map(str, dtypes))}, got {a.dtype}"

    return refuses


def _impls(name: str, reference: Callable[..., Any]) -> list[Impl]:
    """The table of both ops, on a GPU as an H200 ranks large batches of bfloat16, forward and backward.

    The CUDA kernels have the statistics only; the gradient is the library's, by tiles.
    """
    tiles = "vatt_engine.ops.nce_chunked"
    low = (torch.bfloat16, torch.float16)
    every, cuda = (torch.float32, *low), functools.partial(native_missing, cuda=True)
    mma, wgmma = ("stats_mma", "stats_wgmma") if name == "stats" else (name, name)

    def fused(impl: str, target: str, missing: Callable[[], str | None], dtypes: Sequence[torch.dtype]) -> Impl:
        return Impl(impl, "cuda", f"{tiles}:{target}", missing=missing, refuses=_refuses(dtypes))

    return [
        fused("triton", f"{name}_triton", triton_missing, every),
        fused("wgmma", wgmma, wgmma_missing, low),
        fused("cuda", mma, cuda, every),
        Impl("chunked", "any", f"{tiles}:{name}"),
        Impl("reference", "any", reference),
    ]


_stats = define_op(
    "nce",
    f"nce_stats({_SHARED_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda a, b, *_: tuple(a.new_empty(n, dtype=torch.float64) for n in (len(a), len(b), len(a))),
    impls=_impls("stats", nce_stats_reference),
    flops=lambda a, b, *_, **__: 2 * a.numel() * b[:2].numel(),
)
_grad = define_op(
    "nce",
    f"nce_grad({_SHARED_ARGUMENTS}, Tensor row, Tensor column, Tensor positive, "
    "Tensor d_row, Tensor d_column, Tensor d_positive) -> (Tensor, Tensor)",
    fake=lambda a, b, row_scale, *_: (row_scale.new_empty(a.shape), row_scale.new_empty(b.shape)),
    impls=_impls("grad", nce_grad_reference),
    flops=lambda a, b, *_, **__: 6 * a.numel() * b[:2].numel(),  # the similarities once more, and a product per side
)


class _Statistics(torch.autograd.Function):
    """Normalisation, temperature and the two ops, block by block as b comes by; saves its inputs and vectors only."""

    @staticmethod
    def forward(ctx, a, b, temperature, column_mask, ring, offset):
        row_scale = 1 / (_norm(a) * temperature)
        row = row_scale.new_full((len(a),), -torch.inf, dtype=torch.float64)
        column, positive = row.new_empty(ring.size * len(b)), row.clone()
        with torch.autocast(a.device.type, enabled=False):
            for samples, shared in _blocks(a, b, row_scale, column_mask, ring):
                row_part, column[samples], own = _stats(*shared, offset)
                row, positive = torch.logaddexp(row, row_part), torch.maximum(positive, own)
        learnable = isinstance(temperature, Tensor)
        ctx.save_for_backward(a, b, column_mask, row, column, positive, temperature if learnable else None)
        ctx.ring, ctx.offset, ctx.fixed_temperature = ring, offset, None if learnable else temperature
        return row, column, positive

    @staticmethod
    @once_differentiable
    def backward(ctx, d_row, d_column, d_positive):
        a, b, column_mask, row, column, positive, temperature = ctx.saved_tensors
        temperature = ctx.fixed_temperature if temperature is None else temperature
        row_scale = 1 / (_norm(a) * temperature)
        da = db = None
        with torch.autocast(a.device.type, enabled=False):
            for samples, shared in _blocks(a, b, row_scale, column_mask, ctx.ring):
                vectors = (row, column[samples], positive, d_row, d_column[samples], d_positive)
                da_part, db_part = _grad(*shared, ctx.offset, *vectors)
                da = da_part if da is None else da.add_(da_part)
                db = db_part if db is None else db.add_(db_part)
                db = ctx.ring.shift(db)()  # along with its block, and at the end to whom it belongs
        return *_through_norms(a, b, row_scale, 1 / _norm(b), temperature, da, db), None, None, None


def _blocks(
    a: Tensor, b: Tensor, row_scale: Tensor, column_mask: Tensor | None, ring: Ring
) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Each rank's b as it comes by: its samples, and what both ops share."""
    for step in range(ring.size):
        following = ring.shift(b) if step + 1 < ring.size else None  # on its way while this one is worked on
        samples = ring.samples(step, len(b))
        mask = None if column_mask is None else column_mask[samples]
        yield samples, (a, b, row_scale, 1 / _norm(b), mask, ring.first_sample - samples.start)
        if following is not None:
            b = following()


def _through_norms(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    temperature: float | Tensor,
    da: Tensor,
    db: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients in a, b and a learnable temperature from `da` and `db` at fixed scales."""
    da, radial = _through_norm(a, da, row_scale * temperature)
    db, _ = _through_norm(b, db, column_scale)
    d_temperature = None
    if isinstance(temperature, Tensor):
        d_temperature = (-radial.sum() / temperature).to(temperature.dtype)
    return da.to(a.dtype), db.to(b.dtype), d_temperature


def _norm(x: Tensor) -> Tensor:
    """max(|x|, 1e-6) of the last dim, accumulated in float32 at least, with no copy of x in it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).clamp_min(_MIN_NORM)


def _through_norm(x: Tensor, dx: Tensor, inverse_norm: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient through x / max(|x|, 1e-6), from `dx` taken at a fixed norm; and <x, dx>, by which |x| scales."""
    radial = (x * dx).sum(-1)
    weight = radial * inverse_norm.square() * (inverse_norm < 1 / _MIN_NORM)
    return dx - x * weight.unsqueeze(-1), radial


def _mean_loss(a: Tensor, b: Tensor, temperature: float | Tensor, mask: Tensor | None, form: str) -> Tensor:
    statistics = nce_statistics(a, b, temperature, column_mask=mask)
    losses = sample_losses(form, *statistics, mask)
    mean = losses.mean() if mask is None else losses.sum() / mask.sum().clamp_min(1)
    return mean.to(torch.promote_types(a.dtype, torch.float32))


def check_pair(
    where: str,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    *,
    names: tuple[str, str, str],
    candidates: bool = False,
) -> None:
    """Raise ValueError unless a [B, D], b [B, D] (or [B, P, D] with `candidates`) and mask [B] fit one another."""
    first, second, third = names
    if a.ndim != 2 or a.numel() == 0:
        raise ValueError(f"{where}: {first} must be [B, D] with rows, got shape {list(a.shape)}.")
    if a.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{where}: {first} must be float32, bfloat16, float16 or float64, got {a.dtype}.")
    rows, dim = a.shape
    if candidates and (b.ndim != 3 or (b.shape[0], b.shape[2]) != (rows, dim) or b.shape[1] == 0):
        raise ValueError(f"{where}: {second} must be [{rows}, P, {dim}], got shape {list(b.shape)}.")
    if not candidates and b.shape != a.shape:
        raise ValueError(f"{where}: {second} must have the shape of {first} {list(a.shape)}, got {list(b.shape)}.")
    for what, wanted, got in (("dtype", a.dtype, b.dtype), ("device", a.device, b.device)):
        if wanted != got:
            raise ValueError(f"{where}: {second} must have the {what} of {first} ({wanted}), got {got}.")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (rows,)):
        raise ValueError(f"{where}: {third} must be bool [{rows}], got {mask.dtype} {list(mask.shape)}.")


def _check_options(where: str, temperature: float | Tensor, form: str) -> None:
    if isinstance(temperature, Tensor):
        if tuple(temperature.shape) != (1,):
            raise ValueError(f"{where}: temperature must be a float or of shape (1,), got {list(temperature.shape)}.")
    elif not 0 < temperature < math.inf:
        raise ValueError(f"{where}: temperature must be positive, got {temperature}.")
    if form not in FORMS:
        raise ValueError(f"{where}: form must be one of {', '.join(FORMS)}, got {form!r}.")
