"""attention with dropout on a CPU: the library's products on a few heads at a time, native code between them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

PIECE_BYTES = 8 << 20  # of scores


def fwd_cpp(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """y [B, H, N, D] and the log-sum-exps of the scores [B, H, N]; of these no more than a piece exists."""
    from vatt_engine import _C

    seed, _, dropout_p, scale = rest[3:]
    queries, keys, values = map(_by_head, (q, k, v))
    out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:2])
    for piece, scores in _pieces(queries):
        torch.bmm(queries[piece], keys[piece].mT, out=scores)
        how = (to_dlpack(seed), piece.start, dropout_p, scale, torch.get_num_threads())
        _C.attention_softmax(to_dlpack(scores), to_dlpack(lse[piece]), *how)
        torch.bmm(scores, values[piece], out=out[piece])
    y = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    return y.copy_(out.view(q.shape)), lse.view(q.shape[:3])


def bwd_cpp(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    """dqkv [B, N, 3, H, D], and no gradient of a bias; the scores are computed anew."""
    from vatt_engine import _C

    seed, _, dropout_p, scale, _ = rest[3:]
    queries, keys, values, grads = map(_by_head, (q, k, v, grad))
    lse, delta = lse.flatten(0, 1), (grads * _by_head(out)).sum(-1)
    dq, dk, dv = dqkv = queries.new_empty(3, *queries.shape)
    for piece, scores, dscores in _pieces(queries, 2):
        torch.bmm(queries[piece], keys[piece].mT, out=scores)
        torch.bmm(grads[piece], values[piece].mT, out=dscores)
        how = (to_dlpack(seed), piece.start, dropout_p, scale, torch.get_num_threads())
        _C.attention_gradients(*(to_dlpack(x) for x in (scores, dscores, lse[piece], delta[piece])), *how)
        torch.bmm(dscores, keys[piece], out=dq[piece])
        torch.bmm(dscores.mT, queries[piece], out=dk[piece])
        torch.bmm(scores.mT, grads[piece], out=dv[piece])
    dqkv = dqkv.to(q.dtype).view(3, *q.shape).permute(1, 3, 0, 2, 4)
    return dqkv.contiguous(), q.new_empty(0)


def _by_head(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B * H, N, D] float32: on CPUs without AMX halves multiply slower, and scores need the digits."""
    return x.float().reshape(-1, *x.shape[2:])


def _pieces(queries: Tensor, count: int = 1) -> Iterator[tuple[slice, *tuple[Tensor, ...]]]:
    """Heads, as many as have scores that stay in the cache, and room for these, `count` times."""
    total, rows, _ = queries.shape
    step = max(1, min(total, PIECE_BYTES // max(1, 4 * rows**2)))
    room = queries.new_empty(count, step, rows, rows)
    for first in range(0, total, step):
        yield slice(first, first + step), *room[:, : total - first]
