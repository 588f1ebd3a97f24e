"""Sinkhorn iterations on scalings with guards in their denominators, in plain PyTorch: the loop of released codes.

    K = exp(-C / epsilon);   u = a / (K v + guard_a),   v = b / (K^T u + guard_b);   P = diag(u) K diag(v)

from u = 1, v = 1 on the supports. A guard has the units of K, so it means something only in scalings that are not
absorbed: entries of K below the smallest number are 0, as in those codes. Little is lost by that: a scaling does not
exceed mass / guard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autocast import without_autocast
from ._sinkhorn_costs import DenseCosts
from ._sinkhorn_loop import Problem, marginal_error
from .sinkhorn import SinkhornOutputs, _dual_value, _hide


def sinkhorn_guarded(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    guard: tuple[float, float],
    epsilon: float,
    num_iters: int,
    update_first: str = "a",
    gradient: str = "unroll",
) -> SinkhornOutputs:
    """One cost for a batch of marginals: two products (B, n) x (n, m) an iteration. Nothing is validated.

    Memory: 'unroll' keeps 2 num_iters (n + m) numbers a problem until the backward pass, the other modes nothing.

    Args:
        cost: (n, m), float32 or float64; entries may be +inf.
        a: (B, n) row marginals; b: (B, m) column marginals.
        guard: (guard_a, guard_b), >= 0.
        epsilon: regularisation strength in units of the cost.
        num_iters: their exact number.
        update_first: 'a' (rows) or 'b' (columns).
        gradient: 'unroll', 'last_step', 'envelope' or 'detach'. 'envelope' is that of the dual value at fixed
            potentials, which the guards keep from being the best ones.
    """
    with without_autocast(cost.device):
        loop = _Loop(cost, a, b, guard, epsilon, update_first)
        u, v = (a > 0).to(a.dtype), (b > 0).to(b.dtype)
        if gradient == "unroll":
            for _ in range(num_iters):
                u, v = loop(u, v)
            return loop.outputs(u, v, num_iters)
        constant = _Loop(cost.detach(), a.detach(), b.detach(), guard, epsilon, update_first)
        before = num_iters - (gradient == "last_step")
        with torch.no_grad():
            for _ in range(before):
                u, v = constant(u, v)
        if gradient == "last_step":
            return loop.outputs(*loop(u, v), num_iters)
        outputs = loop.outputs(u, v, num_iters, constant=gradient == "detach")
        covered = "transport_cost" if gradient == "detach" else "regularized_cost"
        return _hide(outputs, loop.problem, gradient, covered)


class _Loop:
    """One iteration as a function of the scalings u (B, n) and v (B, m), and the outputs for such."""

    def __init__(self, cost, a, b, guard, epsilon, update_first) -> None:
        self.problem = Problem(DenseCosts(cost), a, b, epsilon, torch.inf, torch.inf)
        self.rows_first = update_first == "a"
        # so that K does not overflow: the potential that is updated first is epsilon log(scaling) + shift
        self.shift = cost.detach().amin().clamp(max=0)
        self.kernel = torch.exp((self.shift - cost) / epsilon)
        factor = torch.exp(self.shift / epsilon)
        self.guard_a, self.guard_b = (factor * guard[0], guard[1]) if self.rows_first else (guard[0], factor * guard[1])

    def __call__(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows_first:
            u = self._rows(v)
            return u, self._columns(u)
        v = self._columns(u)
        return self._rows(v), v

    def _rows(self, v: Tensor) -> Tensor:
        return self._divide(self.problem.a, v @ self.kernel.mT + self.guard_a)

    def _columns(self, u: Tensor) -> Tensor:
        return self._divide(self.problem.b, u @ self.kernel + self.guard_b)

    @staticmethod
    def _divide(weights: Tensor, sums: Tensor) -> Tensor:
        mass = weights > 0
        return torch.where(mass, weights / torch.where(mass, sums, 1), 0)

    def outputs(self, u: Tensor, v: Tensor, num_iters: int, constant: bool = False) -> SinkhornOutputs:
        """With a plan that is `constant` for autograd or not."""
        problem = self.problem
        cost, kernel = problem.costs.matrix(), self.kernel.detach() if constant else self.kernel
        moved = u @ (kernel * torch.where(cost == torch.inf, 0, cost))  # (B, m)
        columns, rows = v * (u @ kernel), u * (v @ kernel.mT)
        f, g = self._potential(problem.a, u), self._potential(problem.b, v)
        f, g = (f + self.shift, g) if self.rows_first else (f, g + self.shift)
        value = _dual_value(problem, f, g, rows.sum(-1))
        error = marginal_error(problem, f, g, rows, columns)
        count = torch.full_like(error, num_iters, dtype=torch.int64)
        return SinkhornOutputs((moved * v).sum(-1), value, f, g, error, count)

    def _potential(self, weights: Tensor, scaling: Tensor) -> Tensor:
        mass = (weights > 0) & (scaling > 0)
        return torch.where(mass, self.problem.epsilon * torch.where(mass, scaling, 1).log(), -torch.inf)
