"""Derivative of converged Sinkhorn potentials by the implicit function theorem.

The potentials are the fixed point of the updates, with lambda = penalty / (penalty + epsilon) or 1,

    f_i = epsilon log a_i - lambda_a epsilon log sum_j exp((g_j - C_ij) / epsilon)        (g likewise)

Linearised at the potentials that the loop returned, with the row sums r and the column sums c of their plan P,

    [ r / lambda_a      P        ] [ df ]   [ (P o dC) 1   + epsilon r / (lambda_a a) da ]
    [     P^T       c / lambda_b ] [ dg ] = [ (P o dC)^T 1 + epsilon c / (lambda_b b) db ]

on the rows and columns that take mass. Without penalties the symmetric matrix is singular: (1, -1) on each connected
component of the plan's support is the gauge. Its pseudo-inverse is taken, which projects the gauge out on both sides.
It is applied through its Schur complement on the columns by preconditioned conjugate gradients, in float64: no inverse,
and no matrix of that size but the plan. (Luise et al. 2018; Eisenberger et al. 2022; Cuturi et al. 2022.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._values import values_readable
from ._sinkhorn_costs import plan
from ._sinkhorn_loop import Problem, damping

MAX_STEPS = 1000
RELATIVE_RESIDUAL = {torch.float64: 1e-13, torch.float32: 1e-7}
_ROUNDING = 1e-15  # of a residual, relative to the terms it is the difference of


def attach(problem: Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The potentials `f` and `g`, which have no graph, with the implicit derivative by cost, a and b."""
    costs, a, b, *options = problem
    return _Implicit.apply(costs.matrix(), a, b, f, g, *options)


class _Implicit(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(cost, a, b, f, g, epsilon, penalty_a, penalty_b):
        return f.clone(), g.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx, grad_f, grad_g):
        with torch.no_grad():
            grads = _gradients(*ctx.saved_tensors, grad_f, grad_g, *ctx.options)
        return *grads, *(None,) * 5


@torch.library.custom_op("otkd_fast::sinkhorn_implicit_reference", mutates_args=())
def _gradients(
    cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, grad_f: Tensor, grad_g: Tensor,
    epsilon: float, penalty_a: float, penalty_b: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of cost, a and b for the incoming `grad_f` (..., n) and `grad_g` (..., m).

    An operator, so that a compiler takes its loop as one node; every tensor has the axes of the batch.
    """
    p = plan(cost.double(), f.double(), g.double(), epsilon)  # (..., n, m)
    rows, columns = p.sum(-1), p.sum(-2)  # (..., n), (..., m)
    has_row, has_column = rows > 0, columns > 0
    diagonal_a = torch.where(has_row, rows / damping(penalty_a, epsilon), 1)
    diagonal_b = torch.where(has_column, columns / damping(penalty_b, epsilon), 1)
    w, x = torch.where(has_row, grad_f.double(), 0), torch.where(has_column, grad_g.double(), 0)
    gauge = Gauge(*components(p > 0), has_row, has_column) if penalty_a == penalty_b == torch.inf else None
    if gauge:
        w, x = gauge.project(w, x)
    products = (lambda w: (p.mT @ w.unsqueeze(-1)).squeeze(-1)), (lambda x: (p @ x.unsqueeze(-1)).squeeze(-1))
    w, x = solve(*products, diagonal_a, diagonal_b, w, x, RELATIVE_RESIDUAL[cost.dtype])
    if gauge:
        w, x = gauge.project(w, x)
    grad_cost = p * (w.unsqueeze(-1) + x.unsqueeze(-2))
    grad_a = torch.where(has_row, epsilon * diagonal_a / torch.where(has_row, a.double(), 1) * w, 0)
    grad_b = torch.where(has_column, epsilon * diagonal_b / torch.where(has_column, b.double(), 1) * x, 0)
    return grad_cost.to(cost.dtype), grad_a.to(cost.dtype), grad_b.to(cost.dtype)


@_gradients.register_fake
def _(cost, a, b, *_):
    return cost.new_empty(cost.shape), a.new_empty(a.shape), b.new_empty(b.shape)


@_gradients.register_vmap
def _(info, in_dims, *arguments):
    size, tensors = info.batch_size, zip(arguments[:7], in_dims[:7], strict=True)
    tensors = (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in tensors)
    return _gradients(*tensors, *arguments[7:]), (0, 0, 0)


def solve(
    down: Callable[[Tensor], Tensor], across: Callable[[Tensor], Tensor],
    diagonal_a: Tensor, diagonal_b: Tensor, u: Tensor, v: Tensor, tol: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """w, x with diagonal_a w + P x = u and P^T w + diagonal_b x = v; a problem that has converged stands still.

    down: P^T w (..., m) of w (..., n); across: P x (..., n) of x (..., m).
    """

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(-1, keepdim=True)  # (..., 1)

    residual = v - down(u / diagonal_a)
    terms = v.abs() + down(u.abs() / diagonal_a)
    size, rounding = (inner(t, t / diagonal_b).sqrt() for t in (residual, terms))
    target = (tol * size + _ROUNDING * rounding).square()  # (..., 1)
    x = torch.zeros_like(v)
    direction = z = residual / diagonal_b
    square = inner(residual, z)
    running = square > target
    for _ in range(MAX_STEPS):
        if values_readable(running) and not running.any():
            break
        image = diagonal_b * direction - down(across(direction) / diagonal_a)
        curvature = inner(direction, image)
        running = running & (curvature > 0)
        step = torch.where(running, square / torch.where(running, curvature, 1), 0)
        x = x + step * direction
        residual = residual - step * image
        z = residual / diagonal_b
        previous, square = square, inner(residual, z)
        direction = z + torch.where(running, square / torch.where(running, previous, 1), 0) * direction
        running = running & (square > target)
    return (u - across(x)) / diagonal_a, x


class Gauge:
    """Projection on the complement of (1, -1) on each connected component of the plan's support.

    row_label (..., n), column_label (..., m): the component of each, a number up to m; has_row, has_column: which of
    them take part.
    """

    def __init__(self, row_label: Tensor, column_label: Tensor, has_row: Tensor, has_column: Tensor) -> None:
        self.row_label, self.column_label = row_label, column_label
        self.has_row, self.has_column = has_row.double(), has_column.double()
        self.count = self._sums(self.has_row, self.has_column).clamp(min=1)  # (..., m + 1)

    def _sums(self, w: Tensor, x: Tensor) -> Tensor:
        """Of each component."""
        total = w.new_zeros(*x.shape[:-1], x.shape[-1] + 1)
        return total.scatter_add(-1, self.row_label, w).scatter_add(-1, self.column_label, x)

    def project(self, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(w, x) minus its part along the gauge."""
        shift = self._sums(w * self.has_row, -x * self.has_column) / self.count
        return (
            w - shift.gather(-1, self.row_label) * self.has_row,
            x + shift.gather(-1, self.column_label) * self.has_column,
        )


def components(linked: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of rows (..., n) and columns (..., m): the smallest column of their connected component.

    linked (..., n, m): which row touches which column. Each round passes the smallest label to the neighbours, to the
    column that was the label before, and shortens the chains of labels.
    """
    m = linked.shape[-1]
    label = torch.arange(m, device=linked.device).expand(linked.shape[:-2] + (m,))
    for _ in range(m.bit_length() + 1):
        rows = torch.where(linked, label.unsqueeze(-2), m).amin(-1)
        new = torch.minimum(label, torch.where(linked, rows.unsqueeze(-1), m).amin(-2))
        new = new.scatter_reduce(-1, label, new, "amin")
        label = new.gather(-1, new)
    return torch.where(linked, label.unsqueeze(-2), m).amin(-1), label
