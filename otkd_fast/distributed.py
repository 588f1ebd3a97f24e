"""Losses and transport over the global batch of a process group (torch.distributed).

Every function here is collective: all ranks of the group call it in the same order, and all of them run the backward
pass. Without an initialised process group they work as on a group of one.

What a rank's gradient must be depends on how the training loop combines the parameters' gradients of the ranks:
`reduced_by` is "mean" (DistributedDataParallel and FullyShardedDataParallel) or "sum". docs/distributed.md derives it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .functional._sharded import ShardedSinkhornResult, sinkhorn_sharded
from .functional._validate import check_choice

__all__ = ["GlobalBatch", "ShardedSinkhornResult", "all_gather_rows", "sinkhorn_sharded"]

REDUCTIONS = ("mean", "sum")


def all_gather_rows(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    reduced_by: str = "mean",
    same_loss: bool = True,
    equal_sizes: bool = False,
) -> Tensor:
    """The rows of all ranks, one rank after the other, differentiable.

    With ``same_loss=True`` all ranks go on to compute the same loss from the gathered rows. Its derivative by the own
    rows is then the own part of the incoming gradient: nothing is communicated in the backward pass. Averaging the
    parameters' gradients over W ranks would divide the sum over the ranks, which is the gradient wanted, by W: with
    ``reduced_by="mean"`` the part is multiplied by W, with "sum" it is not.

    With ``same_loss=False`` each rank computes a loss of its own. The gradient of the own rows is then the sum over
    the ranks of their gradients for them, and `reduced_by` does not matter: mean gives the gradient of the mean of the
    ranks' losses, sum that of their sum.

    Args:
        x: (n_r, ...) any dtype; the ranks may have different numbers of rows, also none, but the same other axes.
        group: process group; None: the default group.
        reduced_by: "mean" or "sum", see above.
        same_loss: see above.
        equal_sizes: True promises that all ranks have the same number of rows. The numbers are then not exchanged, and
            the host does not wait for the device.

    Returns:
        (sum of n_r, ...).

    Raises:
        TypeError: `x` is no tensor.
        ValueError: `x` has no axis, an unknown word.

    >>> import torch
    >>> from otkd_fast.distributed import all_gather_rows
    >>> all_gather_rows(torch.ones(2, 3)).shape  # no process group: a group of one
    torch.Size([2, 3])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor (n, ...), got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError("x: expected shape (n, ...), got ()")
    check_choice("reduced_by", reduced_by, REDUCTIONS)
    world = _world(group)
    if world == 1:
        return x
    rows = [x.shape[0]] * world if equal_sizes else _row_counts(x, group, world)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _gather(x, group, rows)
    factor = world if same_loss and reduced_by == "mean" else 1
    return _AllGather.apply(x, group, tuple(rows), factor, same_loss)


class GlobalBatch(nn.Module):
    """A batch-wise loss over the batches of all ranks together.

    ``GlobalBatch(SinKD())(student, teacher)`` is ``SinKD()`` of the rows of all ranks; so is its gradient, once the
    parameters' gradients have been combined as `reduced_by` says. Every rank computes the whole loss.

    Args:
        loss: a module or function of tensors whose first axis is the batch.
        group: process group; None: the default group.
        reduced_by: "mean" or "sum": how the parameters' gradients of the ranks are combined.
        equal_sizes: as in :func:`all_gather_rows`.

    >>> import torch
    >>> from otkd_fast.losses import SinKD
    >>> logits = torch.eye(3)
    >>> torch.equal(GlobalBatch(SinKD())(logits, logits), SinKD()(logits, logits))
    True
    """

    def __init__(
        self,
        loss,
        group: dist.ProcessGroup | None = None,
        *,
        reduced_by: str = "mean",
        equal_sizes: bool = False,
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss: expected a module or a function, got {type(loss).__name__}")
        check_choice("reduced_by", reduced_by, REDUCTIONS)
        self.loss, self.group = loss, group
        self.reduced_by, self.equal_sizes = reduced_by, equal_sizes

    def forward(self, *tensors: Any, **named: Any) -> Any:
        """The loss of the gathered arguments; what is not a tensor with a first axis is passed on as it is."""
        return self.loss(
            *(self._gathered(value) for value in tensors),
            **{name: self._gathered(value) for name, value in named.items()},
        )

    def _gathered(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return all_gather_rows(value, self.group, reduced_by=self.reduced_by, equal_sizes=self.equal_sizes)

    def extra_repr(self) -> str:
        return f"reduced_by={self.reduced_by!r}, equal_sizes={self.equal_sizes}"


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(x, group, rows, factor, same_loss):
        return _gather(x, group, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.group, ctx.rows, ctx.factor, ctx.same_loss = inputs

    @staticmethod
    def backward(ctx, grad):
        if not ctx.same_loss:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        start = sum(ctx.rows[:rank])
        part = grad[start : start + ctx.rows[rank]]
        return part * ctx.factor, None, None, None, None


def _world(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _row_counts(x: Tensor, group: dist.ProcessGroup | None, world: int) -> list[int]:
    own = torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device)
    counts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(counts, own, group=group)
    return torch.cat(counts).tolist()


def _gather(x: Tensor, group: dist.ProcessGroup | None, rows) -> Tensor:
    """Shorter parts travel with padding: not every transport takes parts of different sizes."""
    most = max(rows)
    own = x.detach().to(torch.uint8) if x.dtype is torch.bool else x.detach()
    if own.shape[0] < most:
        own = torch.cat([own, own.new_zeros(most - own.shape[0], *own.shape[1:])])
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in rows]
    dist.all_gather(parts, own.contiguous(), group=group)
    gathered = torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])
    return gathered.bool() if x.dtype is torch.bool else gathered
