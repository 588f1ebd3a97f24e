"""The costs of a problem and the reductions over them: a matrix, or points, compared a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cost_matrix import cost_matrix, in_chunks

# entries of the costs of a chunk of rows; 32 MiB in float64
_CHUNK_ENTRIES = 1 << 22


class DenseCosts:
    """Costs (..., n, m) in memory; entries may be +inf."""

    def __init__(self, cost: Tensor) -> None:
        self.tensors = (cost,)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> DenseCosts:
        """The same costs of other tensors."""
        return DenseCosts(*map(function, self.tensors))

    def matrix(self) -> Tensor:
        """C, (..., n, m)."""
        return self.tensors[0]

    def over_columns(self, g: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """log sum_j exp((g_j - C_ij) / epsilon), (..., n), 0 for empty sums, and the mask of those."""
        return logsumexp((g.unsqueeze(-2) - self.matrix()) / epsilon, dim=-1)

    def over_rows(self, f: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """log sum_i exp((f_i - C_ij) / epsilon), (..., m), 0 for empty sums, and the mask of those."""
        return logsumexp((f.unsqueeze(-1) - self.matrix()) / epsilon, dim=-2)

    def plan_sums(self, f: Tensor, g: Tensor, epsilon: float, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
        """<P, C> (...), where a forbidden pair counts 0, P 1 (..., n) and P^T 1 (..., m); P `constant` for autograd."""
        return _plan_sums(self.matrix(), f, g, epsilon, constant)


class PointCosts:
    """Costs between points x (..., n, d) and y (..., m, d), computed a chunk of rows at a time whenever they are used.

    Memory O((n + m) d): a backward pass computes each chunk again.
    """

    def __init__(self, x: Tensor, y: Tensor, metric: str) -> None:
        self.tensors = (x, y)
        self.metric = metric

    def mapped(self, function: Callable[[Tensor], Tensor]) -> PointCosts:
        return PointCosts(*map(function, self.tensors), self.metric)

    def matrix(self) -> Tensor:
        return cost_matrix(*self.tensors, metric=self.metric)

    def over_columns(self, g: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        parts = self._chunks(lambda cost: logsumexp((g.unsqueeze(-2) - cost) / epsilon, dim=-1))
        return tuple(torch.cat(part, dim=-1) for part in zip(*parts, strict=True))

    def over_rows(self, f: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        def one(cost: Tensor, f: Tensor) -> Tensor:
            value, empty = logsumexp((f.unsqueeze(-1) - cost) / epsilon, dim=-2)
            return torch.where(empty, -torch.inf, value)

        return logsumexp(torch.stack(self._chunks(one, f.unsqueeze(-1)), dim=-2), dim=-2)

    def plan_sums(self, f: Tensor, g: Tensor, epsilon: float, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
        parts = self._chunks(lambda cost, f: _plan_sums(cost, f, g, epsilon, constant), f.unsqueeze(-1))
        inner, rows, columns = zip(*parts, strict=True)
        return torch.stack(inner).sum(0), torch.cat(rows, dim=-1), torch.stack(columns).sum(0)

    def plan_product(self, f: Tensor, g: Tensor, v: Tensor, epsilon: float) -> Tensor:
        """P v, (..., n, k), for v (..., m, k)."""
        parts = self._chunks(lambda cost, f: plan(cost, f, g, epsilon) @ v, f.unsqueeze(-1))
        return torch.cat(parts, dim=-2)

    def _chunks(self, function: Callable, *rows: Tensor) -> list:
        """function(costs of a chunk of rows, those rows of each (..., n, 1) as (..., n))."""
        x, y = self.tensors

        def one(x: Tensor, *rows: Tensor):
            return function(cost_matrix(x, y, metric=self.metric), *(row.squeeze(-1) for row in rows))

        batch = max(x.shape[:-2].numel(), y.shape[:-2].numel())
        return in_chunks(one, _CHUNK_ENTRIES // max(1, batch * y.shape[-2]), x, *rows)


def logsumexp(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """log sum exp with 0 for slices that are all -inf, and the mask of those slices; gradient 0 there."""
    largest = logits.detach().amax(dim=dim, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0, largest)
    total = (logits - largest).exp().sum(dim=dim)
    empty = total == 0
    return torch.where(empty, 1, total).log() + largest.squeeze(dim), empty


def plan(cost: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """exp((f + g - C) / epsilon), (..., n, m)."""
    return ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon).exp()


def _plan_sums(cost: Tensor, f: Tensor, g: Tensor, epsilon: float, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
    p = plan(cost, f, g, epsilon)
    p = p.detach() if constant else p
    inner = (p * torch.where(cost == torch.inf, 0, cost)).sum((-2, -1))
    return inner, p.sum(-1), p.sum(-2)
