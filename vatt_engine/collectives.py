"""Gather and reduce over ranks, with gradients; the identity where there is one process.

Convention: a backward pass here gives each rank the gradient of the SUM over ranks of what each rank calls backward on.
Averaging the parameters' gradients over ranks afterwards, as DDP does, therefore gives the gradient of the MEAN over
ranks of the losses; and where all ranks return one global loss, exactly its gradient.

All ranks must make the same calls, in the same order, with tensors of equal shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in `group` (default: all of them); 1 where torch.distributed is not initialised.

    >>> world_size()
    1
    """
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's number in `group`; 0 where torch.distributed is not initialised.

    >>> rank()
    0
    """
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate every rank's `x` along its first dim, in the dtype of `x`.

    The gradient of a rank's part is the sum over ranks of the gradients of that part (a reduce-scatter).

    Args:
        x: [n, ...], any dtype (also bool), of one shape on all ranks.
        group: the processes that take part.

    Returns:
        [world_size * n, ...], in the order of the ranks.

    >>> all_gather(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return x if world_size(group) == 1 else _AllGather.apply(x, group)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of every rank's `x`; the gradient is the sum of every rank's gradient. `x` is left as it is.

    Args:
        x: any shape, the same on all ranks.
        group: the processes that take part.

    >>> all_reduce_sum(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return x if world_size(group) == 1 else _AllReduceSum.apply(x, group)


def all_reduce_max(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Largest of every rank's `x`, element by element, without gradient.

    >>> all_reduce_max(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    x = x.detach()
    return x if world_size(group) == 1 else _reduced(x, dist.ReduceOp.MAX, group)


def ring_shift(x: Tensor, group: dist.ProcessGroup | None = None) -> Callable[[], Tensor]:
    """Begin to send `x` to the next rank; the function returned waits for the one before and gives what it sent.

    Without gradient. `x` must stay as it is until then, and be of one shape on all ranks.

    >>> ring_shift(torch.ones(2))().tolist()
    [1.0, 1.0]
    """
    size, x = world_size(group), x.detach()
    if size == 1:
        return lambda: x
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    sent, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    onwards = dist.P2POp(dist.isend, sent, ranks[(rank(group) + 1) % size], group)
    arriving = dist.P2POp(dist.irecv, received, ranks[(rank(group) - 1) % size], group)
    requests = dist.batch_isend_irecv([onwards, arriving])

    def wait() -> Tensor:
        for request in requests:
            request.wait()
        return received

    return wait


def _reduced(x: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, operation, group)
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        out = x.new_empty(world_size(group) * x.shape[0], *x.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
        gather(out, x.contiguous(), group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        if grad.device.type == "cpu":  # gloo has no reduce-scatter in every version of torch that we support
            return _reduced(grad, dist.ReduceOp.SUM, ctx.group).chunk(world_size(ctx.group))[rank(ctx.group)], None
        part = grad.new_empty(grad.shape[0] // world_size(ctx.group), *grad.shape[1:])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(part, grad.contiguous(), group=ctx.group)
        return part, None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _reduced(x, dist.ReduceOp.SUM, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, dist.ReduceOp.SUM, ctx.group), None
