"""L1 costs between the softmaxes of long rows (a language model's logits), without a softmaxed copy of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._dispatch import resolve
from ..ops._library import operators
from ._autograd import apply
from ._value_and_gradients import only_first_derivative

__all__ = ["softmax_l1"]

_FORWARD = operators("cost_matrix_fwd")
_BACKWARD = operators("cost_matrix_bwd")

# Entries of the pieces that exist at a time: some columns of all rows (4 MiB in float32, to stay in a cache), and, in
# the backward pass, some whole rows (64 MiB), each of which takes all columns of the other side once more.
_PIECE, _LEAST_COLUMNS = 1 << 20, 256
_ROWS_PIECE, _LEAST_ROWS = 1 << 24, 16


class _Side(NamedTuple):
    """Rows of logits and what makes probabilities of them."""

    logits: Tensor  # (rows, d), any floating dtype
    index: Tensor | None  # (n,) the rows that are there; None: all
    mask: Tensor | None  # bool (n, 1): rows that are False are taken as zeros
    temperature: float
    peak: Tensor  # (n, 1), the largest logit of each row
    total: Tensor  # (n, 1), sum of exp((z - peak) / temperature)

    def probabilities(self, columns: slice, rows: slice = slice(None)) -> Tensor:
        """softmax(logits / temperature) (rows, columns) in the dtype of `peak`."""
        z = _part(self.logits, self.index, self.mask, columns, rows, self.peak.dtype)
        return z.sub_(self.peak[rows]).div_(self.temperature).exp_().div_(self.total[rows])


def softmax_l1(
    x: Tensor,
    y: Tensor,
    temperature_x: float,
    temperature_y: float,
    *,
    index: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """``sum_k |softmax(x / temperature_x)_ik - softmax(y / temperature_y)_jk|`` (n, m), in `dtype`.

    x (rows, d) and y (rows, d) have any floating dtype, and stay as they are: pieces of a few columns, in the backward
    pass of a few rows, are softmaxed where they are needed. index (n,): those rows of both; mask bool (rows,): rows
    that are False hold anything and count as zeros. Differentiable once. The callers in otkd_fast.losses have validated
    the arguments: nothing is checked here.
    """
    backend = resolve("cost_matrix", x.device, backend)
    return apply(_SoftmaxL1, x, y, temperature_x, temperature_y, index, mask, dtype, backend)


class _SoftmaxL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, temperature_x, temperature_y, index, mask, dtype, backend):
        mask = None if mask is None else mask.unsqueeze(-1)
        sides = tuple(
            _Side(z, index, mask, t, *_normaliser(z, index, mask, t, dtype))
            for z, t in ((x, temperature_x), (y, temperature_y))
        )
        n, m, d = len(sides[0].peak), len(sides[1].peak), x.shape[-1]
        cost = torch.zeros(n, m, dtype=torch.float64, device=x.device)
        for columns in _pieces(d, max(_LEAST_COLUMNS, _PIECE // max(n + m, 1))):
            cost += _cost(*(side.probabilities(columns) for side in sides), backend)
        cost = cost.to(dtype)
        ctx.sides, ctx.backend = sides, backend
        ctx.save_for_backward(x, y, cost)
        return cost

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise only_first_derivative("softmax_l1")
        x, y, cost = ctx.saved_tensors
        side_x, side_y = ctx.sides
        need_x, need_y = ctx.needs_input_grad[:2]
        grad_x = _gradient(side_x, side_y, cost, grad, ctx.backend) if need_x else None
        grad_y = _gradient(side_y, side_x, cost.mT, grad.mT, ctx.backend) if need_y else None
        return grad_x, grad_y, *(None,) * 6


def _pieces(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _part(logits, index, mask, columns: slice, rows: slice, dtype: torch.dtype) -> Tensor:
    """A new tensor with these rows and columns; zeros in the rows that the mask leaves out."""
    part = logits[:, columns]
    part = part[rows].to(dtype, copy=True) if index is None else part.index_select(0, index[rows]).to(dtype)
    return part if mask is None else part.masked_fill_(~mask[rows], 0)


def _normaliser(logits, index, mask, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Largest logit and sum of the exponentials (n, 1) of each row."""
    d = logits.shape[-1]
    n = logits.shape[0] if index is None else index.shape[0]
    peaks, totals = [], []
    for rows in _pieces(n, max(1, _PIECE // d)):
        z = _part(logits, index, mask, slice(None), rows, dtype)
        peak = z.amax(-1, keepdim=True)
        peaks.append(peak)
        totals.append(z.sub_(peak).div_(temperature).exp_().sum(-1, keepdim=True, dtype=torch.float64))
    if not peaks:
        return logits.new_zeros(0, 1, dtype=dtype), logits.new_ones(0, 1, dtype=dtype)
    return torch.cat(peaks), torch.cat(totals).to(dtype)


def _cost(p: Tensor, q: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return reference.cost_matrix(p, q, metric="l1")
    return _FORWARD[backend](p, q, "l1", 0.0, 0.0)


def _gradient(side: _Side, other: _Side, cost: Tensor, grad: Tensor, backend: str) -> Tensor:
    """The gradient of the side's logits for `grad` (n, m), a block of its rows at a time."""
    d = side.logits.shape[-1]
    result = torch.zeros_like(side.logits) if side.index is not None else torch.empty_like(side.logits)
    step = max(_LEAST_COLUMNS, _PIECE // max(grad.shape[1], 1))
    for rows in _pieces(grad.shape[0], max(_LEAST_ROWS, _ROWS_PIECE // d)):
        p = side.probabilities(slice(None), rows)  # (block, d)
        grad_p = torch.empty_like(p)
        for columns in _pieces(d, step):
            q = other.probabilities(columns)
            grad_p[:, columns] = _cost_gradient(p[:, columns], q, cost[rows], grad[rows], backend)
        inner = (p * grad_p).sum(-1, keepdim=True, dtype=torch.float64).to(p.dtype)
        block = grad_p.sub_(inner).mul_(p).div_(side.temperature).to(result.dtype)
        if side.index is None:
            result[rows] = block
        else:
            result.index_copy_(0, side.index[rows], block)
    return result


def _cost_gradient(p: Tensor, q: Tensor, cost: Tensor, grad: Tensor, backend: str) -> Tensor:
    """sum_j grad_ij sign(p_ik - q_jk)."""
    if backend == "reference":
        with torch.enable_grad():
            p = p.detach().requires_grad_()
            return torch.autograd.grad(reference.cost_matrix(p, q, metric="l1"), p, grad)[0]
    return _BACKWARD[backend](p, q, cost, grad, "l1", 0.0, 0.0, True, False)[0]
