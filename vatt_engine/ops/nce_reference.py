"""What nce_stats and nce_grad mean, in plain PyTorch: all similarities stored."""

from __future__ import annotations

import torch
from torch import Tensor


def nce_stats_reference(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    column_mask: Tensor | None,
    first_sample: int,
    offset: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of the statistics: all similarities stored, masked ones at -inf; `offset` changes nothing."""
    s, _, _ = _similarities(a, b, row_scale, column_scale, column_mask)
    own = _rows_with_own(a, b, first_sample)
    positive = s.new_full((len(a),), -torch.inf)
    positive[own] = s[own, own + first_sample].logsumexp(1)
    return s.flatten(1).logsumexp(1).double(), s.logsumexp((0, 2)).double(), positive.double()


def nce_grad_reference(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    column_mask: Tensor | None,
    first_sample: int,
    offset: float | None,
    row: Tensor,
    column: Tensor,
    positive: Tensor,
    d_row: Tensor,
    d_column: Tensor,
    d_positive: Tensor,
) -> tuple[Tensor, Tensor]:
    """The meaning of the gradient: da, db of <d_row, row> + <d_column, column> + <d_positive, positive>, scales fixed.

    Both are returned in the accumulation dtype.
    """
    s, x, y = _similarities(a, b, row_scale, column_scale, column_mask)
    # An empty sum is -inf and all its members are too: any finite number in its place makes their exp 0.
    row, column, positive = (lse.where(lse > -torch.inf, 0.0).to(s.dtype) for lse in (row, column, positive))
    d_row, d_column, d_positive = (each.to(s.dtype) for each in (d_row, d_column, d_positive))
    g = d_row[:, None, None] * (s - row[:, None, None]).exp()
    g += d_column[:, None] * (s - column[:, None]).exp()
    own = _rows_with_own(a, b, first_sample)
    g[own, own + first_sample] += d_positive[own, None] * (s[own, own + first_sample] - positive[own, None]).exp()
    da = torch.einsum("ijp,jpd->id", g, y) * row_scale[:, None]
    return da, torch.einsum("ijp,id->jpd", g, x) * column_scale[..., None]


def _rows_with_own(a: Tensor, b: Tensor, first_sample: int) -> Tensor:
    """Indices of the rows of `a` whose own sample is in `b`."""
    start = max(0, -first_sample)
    return torch.arange(start, max(start, min(len(a), len(b) - first_sample)), device=a.device)


def _similarities(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    column_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = a.to(row_scale.dtype) * row_scale[:, None]
    y = b.to(column_scale.dtype) * column_scale[..., None]
    s = torch.einsum("id,jpd->ijp", x, y)
    if column_mask is not None:
        s = s.masked_fill(~column_mask[:, None], -torch.inf)
    return s, x, y
