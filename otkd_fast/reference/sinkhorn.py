"""Entropic optimal transport in plain PyTorch: the loop in the log domain and the gradient modes.

(Cuturi 2013; Peyre and Cuturi 2019, section 4.4; with penalties Chizat, Peyre, Schmitzer and Vialard 2018.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._guards import first_order_only, uncovered, uncovered_message
from ._sinkhorn_costs import DenseCosts, PointCosts
from ._sinkhorn_implicit import attach
from ._sinkhorn_loop import Iteration, Problem, marginal_error, relative, solve


class SinkhornOutputs(NamedTuple):
    """What :func:`sinkhorn` returns; the fields of :class:`otkd_fast.SinkhornResult`."""

    transport_cost: Tensor  # (...)
    regularized_cost: Tensor  # (...)
    f: Tensor  # (..., n)
    g: Tensor  # (..., m)
    marginal_error: Tensor  # (...)
    num_iters: Tensor  # (...), int64


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    num_iters: int,
    tol: float | None = None,
    update_first: str = "a",
    gradient: str = "unroll",
    initial_potentials: tuple[Tensor | None, Tensor | None] | None = None,
    relaxation: float | str = 1.0,
    marginal_penalty: float | tuple[float | None, float | None] | None = None,
) -> SinkhornOutputs:
    """Entropic optimal transport by Sinkhorn iterations; see :func:`otkd_fast.sinkhorn`. Nothing is validated.

    Every option runs without a synchronisation: all `num_iters` iterations are launched, and with `tol` the problems
    that have finished stand still. On CPU tensors, where looking costs nothing, the loop ends when all have.

    Memory: an iteration holds a few tensors of the broadcast shape (..., n, m), also for a shared cost (n, m);
    'unroll' keeps two of them for each iteration until the backward pass, the other modes keep none.

    Args:
        cost: (..., n, m), float32 or float64; entries may be +inf. Or (n, m), shared by batches of a and b.
        a: (..., n) row marginals, None for uniform.
        b: (..., m) column marginals, None for uniform.
        epsilon: regularisation strength in units of the cost.
        num_iters: number of iterations, with `tol` the largest one.
        tol: None, or the marginal error at which a problem stops.
        update_first: 'a' (rows) or 'b' (columns).
        gradient: 'unroll', 'envelope', 'detach', 'last_step' or 'implicit'.
        initial_potentials: None or (f (..., n), g (..., m)), each may be None.
        relaxation: over-relaxation omega in (0, 2), or 'auto'.
        marginal_penalty: None, or rho, or (rho_a, rho_b), where None and inf stand for a constraint.
    """
    n, m = cost.shape[-2:]
    given = [cost.shape[:-2], *(weights.shape[:-1] for weights in (a, b) if weights is not None)]
    batch = torch.broadcast_shapes(*given)
    a, b = _masses(a, (*batch, n), cost), _masses(b, (*batch, m), cost)
    problem = Problem(DenseCosts(cost.expand(*batch, n, m)), a, b, epsilon, *penalties(marginal_penalty))
    return _solution(problem, num_iters, tol, update_first, gradient, initial_potentials, relaxation)


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str,
    epsilon: float,
    num_iters: int,
    tol: float | None = None,
    update_first: str = "a",
    gradient: str = "unroll",
    initial_potentials: tuple[Tensor | None, Tensor | None] | None = None,
    relaxation: float | str = 1.0,
    marginal_penalty: float | tuple[float | None, float | None] | None = None,
    stored: bool = False,
) -> SinkhornOutputs:
    """:func:`sinkhorn` between points; see :func:`otkd_fast.sinkhorn_points`. Nothing is validated.

    Args:
        x: (..., n, d), float32 or float64; y: (..., m, d), a (..., n), b (..., m), all with the same batch axes.
        stored: make the cost matrix once; else its rows are computed a chunk at a time wherever they are used, also
            in the backward pass (except 'implicit', which makes the matrix there).
    """
    a, b = _masses(a, x.shape[:-1], x), _masses(b, y.shape[:-1], x)
    costs = PointCosts(x, y, metric)
    costs = DenseCosts(costs.matrix()) if stored else costs
    problem = Problem(costs, a, b, epsilon, *penalties(marginal_penalty))
    return _solution(problem, num_iters, tol, update_first, gradient, initial_potentials, relaxation)


def _masses(weights: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`weights` in the shape of the batch (by expansion, without a copy), uniform where they are None."""
    return like.new_full(shape, 1 / shape[-1]) if weights is None else weights.expand(shape)


def _solution(
    problem: Problem, num_iters: int, tol: float | None, update_first: str, gradient: str,
    initial_potentials: tuple[Tensor | None, Tensor | None] | None, relaxation: float | str,
) -> SinkhornOutputs:  # fmt: skip
    initial_f, initial_g = initial_potentials or (None, None)

    def run(problem: Problem):
        iteration = Iteration(problem, update_first)
        return solve(iteration, *iteration.start(initial_f, initial_g), num_iters, tol, relaxation)

    if gradient == "unroll":
        f, g, _, _, count = run(problem)
        return _outputs(problem, f, g, count)
    with torch.no_grad():
        f, g, before_f, before_g, count = run(problem.detach())
    message = (
        f"sinkhorn: gradient='{gradient}' has no second derivative; use gradient='unroll' with backend='reference'"
    )
    problem = problem.mapped(lambda tensor: first_order_only(tensor, message))
    if gradient == "last_step":
        f, g = Iteration(problem, update_first)(before_f, before_g)
        return _outputs(problem, f, g, count)
    return _MODES[gradient](problem, f, g, count)


def penalties(marginal_penalty: float | tuple[float | None, float | None] | None) -> tuple[float, float]:
    """(rho_a, rho_b) with inf for a constraint."""
    pair = marginal_penalty if isinstance(marginal_penalty, (tuple, list)) else (marginal_penalty, marginal_penalty)
    penalty_a, penalty_b = (torch.inf if penalty is None else float(penalty) for penalty in pair)
    return penalty_a, penalty_b


def _outputs(problem: Problem, f: Tensor, g: Tensor, count: Tensor, constant: bool = False) -> SinkhornOutputs:
    """The outputs for these potentials, with a plan that is `constant` for autograd or not."""
    inner, rows, columns = problem.costs.plan_sums(f, g, problem.epsilon, constant)
    value = _dual_value(problem, f, g, rows.sum(-1))
    return SinkhornOutputs(inner, value, f, g, marginal_error(problem, f, g, rows, columns), count)


def _dual_value(problem: Problem, f: Tensor, g: Tensor, total: Tensor) -> Tensor:
    """value_a + value_b - epsilon (sum P - sum a sum b), where value_a is <a, f'> for f' = f - epsilon log a, under a
    penalty penalty_a <a, 1 - exp(-f' / penalty_a)>; `total` (...) is sum P.

    A mass that cannot be served has the value of giving it up under a penalty (penalty_a a_i), 0 without one. Masses
    that take no part in the value have gradient 0.
    """
    _, a, b, epsilon, penalty_a, penalty_b = problem
    a, b = _counted(a, f, penalty_a), _counted(b, g, penalty_b)

    def value(weights: Tensor, potential: Tensor, penalty: float) -> Tensor:
        shift, served = relative(weights, potential, epsilon)
        if penalty == torch.inf:
            return torch.where(served, weights * shift, 0).sum(-1)
        return penalty * (weights * torch.where(served, -torch.expm1(-shift / penalty), 1)).sum(-1)

    return value(a, f, penalty_a) + value(b, g, penalty_b) + epsilon * (a.sum(-1) * b.sum(-1) - total)


def _counted(weights: Tensor, potential: Tensor, penalty: float) -> Tensor:
    """The same masses; those that take no part in the dual value (no mass, or no way to go) are constants."""
    counts = weights > 0
    if penalty == torch.inf:
        counts = counts & (potential != -torch.inf)
    return torch.where(counts, weights, weights.detach())


def _envelope(problem: Problem, f: Tensor, g: Tensor, count: Tensor) -> SinkhornOutputs:
    """Partial derivatives of the dual value at fixed potentials; only `regularized_cost` is differentiable."""
    return _hide(_outputs(problem, f, g, count), problem, "envelope", "regularized_cost")


def _detach(problem: Problem, f: Tensor, g: Tensor, count: Tensor) -> SinkhornOutputs:
    """The plan is a constant; only `transport_cost` is differentiable."""
    return _hide(_outputs(problem, f, g, count, constant=True), problem, "detach", "transport_cost")


def _implicit(problem: Problem, f: Tensor, g: Tensor, count: Tensor) -> SinkhornOutputs:
    """The potentials are the fixed point; there the dual value does not change with them, so its gradient is the
    envelope's, which an error in the potentials cannot blow up.
    """
    value = _outputs(problem, f, g, count).regularized_cost
    return _outputs(problem, *attach(problem, f, g), count)._replace(regularized_cost=value)


_MODES = {"envelope": _envelope, "detach": _detach, "implicit": _implicit}


def _hide(outputs: SinkhornOutputs, problem: Problem, gradient: str, covered: str) -> SinkhornOutputs:
    """`outputs` where a backward pass through one that is not covered raises."""
    anchor = sum(tensor.sum() * 0 for tensor in problem.tensors)  # requires grad where one of them does
    hidden = {
        name: uncovered(getattr(outputs, name).detach(), anchor, uncovered_message(name, gradient, covered))
        for name in ("transport_cost", "regularized_cost", "f", "g")
        if name != covered
    }
    return outputs._replace(**hidden)
