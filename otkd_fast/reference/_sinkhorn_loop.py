"""The Sinkhorn loop in the log domain: start, iteration, over-relaxation and the stop on the marginal error.

Entries that take no part (zero marginals, costs of +inf, rows that cannot be served) are -inf in the potentials.
Each of them is kept out of the differentiated branch, so gradients there are 0 and never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._values import values_readable
from ._sinkhorn_costs import DenseCosts, PointCosts


class Problem(NamedTuple):
    """min <P, C> + epsilon KL(P | a b^T) + penalty_a KL(P 1 | a) + penalty_b KL(P^T 1 | b); a penalty of inf is a
    constraint.
    """

    costs: DenseCosts | PointCosts  # (..., n, m)
    a: Tensor  # (..., n)
    b: Tensor  # (..., m)
    epsilon: float
    penalty_a: float
    penalty_b: float

    def detach(self) -> Problem:
        """The same problem without its graph."""
        return self.mapped(Tensor.detach)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a problem may be differentiated by."""
        return *self.costs.tensors, self.a, self.b

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem with `function` applied to each of its tensors."""
        return self._replace(costs=self.costs.mapped(function), a=function(self.a), b=function(self.b))


class Solution(NamedTuple):
    """Potentials after the last iteration of each problem, those before it, and the number of iterations."""

    f: Tensor  # (..., n)
    g: Tensor  # (..., m)
    before_f: Tensor  # (..., n)
    before_g: Tensor  # (..., m)
    num_iters: Tensor  # (...), int64


def damping(penalty: float, epsilon: float) -> float:
    """lambda = penalty / (penalty + epsilon), the exponent of an update; 1 for a constraint."""
    return 1.0 if penalty == torch.inf else penalty / (penalty + epsilon)


def relative(weights: Tensor, potential: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """f' = f - epsilon log a where the mass is served, 0 elsewhere, and the mask of the served masses."""
    served = potential != -torch.inf
    return torch.where(served, potential, 0) - epsilon * _log(weights)[0], served


def marginal_error(problem: Problem, f: Tensor, g: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """sum_i |rows_i - a_i exp(-f'_i / penalty_a)| + sum_j |columns_j - b_j exp(-g'_j / penalty_b)|, (...), for the sums
    P 1 (..., n) and P^T 1 (..., m) of the plan.

    The targets of a constraint are a and b. A mass that cannot be served is given up under a penalty: target 0.
    """
    problem, f, g, rows, columns = problem.detach(), *(tensor.detach() for tensor in (f, g, rows, columns))

    def target(weights: Tensor, potential: Tensor, penalty: float) -> Tensor:
        if penalty == torch.inf:
            return weights
        shift, served = relative(weights, potential, problem.epsilon)
        return weights * torch.where(served, (-shift / penalty).exp(), 0)

    error = (rows - target(problem.a, f, problem.penalty_a)).abs().sum(-1)
    return error + (columns - target(problem.b, g, problem.penalty_b)).abs().sum(-1)


class Iteration:
    """One iteration as a function of the potentials: both updates, in the order of `update_first`."""

    def __init__(self, problem: Problem, update_first: str) -> None:
        self.problem = problem
        self.rows_first = update_first == "a"
        self.log_a, self.mass_a = _log(problem.a)
        self.log_b, self.mass_b = _log(problem.b)

    def start(self, initial_f: Tensor | None, initial_g: Tensor | None) -> tuple[Tensor, Tensor]:
        """0 or the given potential (where it is finite) on the support of the marginal, -inf off it."""

        def one(weights: Tensor, mass: Tensor, initial: Tensor | None) -> Tensor:
            zero = torch.zeros_like(weights.detach())
            value = zero if initial is None else torch.where(initial.isfinite(), initial.detach(), zero)
            return torch.where(mass, value, -torch.inf)

        return one(self.problem.a, self.mass_a, initial_f), one(self.problem.b, self.mass_b, initial_g)

    def __call__(self, f: Tensor, g: Tensor, omega: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        if self.rows_first:
            f = _relaxed(f, self._rows(g), omega)
            return f, _relaxed(g, self._columns(f), omega)
        g = _relaxed(g, self._columns(f), omega)
        return _relaxed(f, self._rows(g), omega), g

    def _rows(self, g: Tensor) -> Tensor:
        costs, _, _, epsilon, penalty, _ = self.problem
        value, empty = costs.over_columns(g, epsilon)
        new = epsilon * (self.log_a - damping(penalty, epsilon) * value)
        return torch.where(self.mass_a & ~empty, new, -torch.inf)

    def _columns(self, f: Tensor) -> Tensor:
        costs, _, _, epsilon, _, penalty = self.problem
        value, empty = costs.over_rows(f, epsilon)
        new = epsilon * (self.log_b - damping(penalty, epsilon) * value)
        return torch.where(self.mass_b & ~empty, new, -torch.inf)


class _AutoRelaxation:
    """omega from the observed convergence: 1 for 10 iterations, then near-optimal for their ratio (Lehmann, von
    Renesse, Sambale and Uschmajew, Optim. Lett. 2022), given up where the error has grown over 10 iterations.

    A ratio of small errors magnifies their rounding: omega is rounded to multiples of 1 / STEPS, so that none of it
    enters the potentials.
    """

    PERIOD, MAX_RATIO, MAX_OMEGA, STEPS = 10, 0.9999, 1.95, 1024

    def __init__(self) -> None:
        self.omega: Tensor | float = 1.0
        self.error = torch.empty(0)

    def wants(self, k: int) -> bool:
        return k == self.PERIOD - 1 or k % self.PERIOD == 0

    def observe(self, k: int, error: Tensor) -> None:
        """`error` (...) is that of the plans after iteration k, one of those wanted."""
        if k == self.PERIOD:
            ratio = torch.where(self.error > 0, error / self.error, 0).clamp(max=self.MAX_RATIO)
            omega = (2 / (1 + (1 - ratio).sqrt()) * self.STEPS + 0.5).floor() / self.STEPS
            self.omega = omega.clamp(max=self.MAX_OMEGA).unsqueeze(-1)  # (..., 1)
        elif k > self.PERIOD:
            self.omega = torch.where((error > self.error).unsqueeze(-1), 1, self.omega)
        self.error = error


def solve(
    iteration: Iteration, f: Tensor, g: Tensor, num_iters: int, tol: float | None, relaxation: float | str
) -> Solution:
    """`num_iters` iterations from f, g; with `tol` each problem is frozen after the first iteration that meets it."""
    problem = iteration.problem
    auto = _AutoRelaxation() if relaxation == "auto" else None
    before_f, before_g = f, g
    running = torch.ones_like(f[..., 0], dtype=torch.bool)  # (...)
    count = torch.zeros_like(running, dtype=torch.int64)
    for k in range(1, num_iters + 1):
        new_f, new_g = iteration(f, g, auto.omega if auto else relaxation)
        if tol is None:
            before_f, before_g, f, g = f, g, new_f, new_g
        else:
            moving = running.unsqueeze(-1)
            before_f, before_g = torch.where(moving, f, before_f), torch.where(moving, g, before_g)
            f, g = torch.where(moving, new_f, f), torch.where(moving, new_g, g)
        count = count + running
        if tol is not None or auto and auto.wants(k):
            _, *sums = problem.costs.plan_sums(f, g, problem.epsilon, True)
            error = marginal_error(problem, f, g, *sums)
        if auto and auto.wants(k):
            auto.observe(k, error)
        if tol is not None:
            running = running & ~(error <= tol)
            if values_readable(running) and not running.any():
                break
    return Solution(f, g, before_f, before_g, count)


def _relaxed(old: Tensor, new: Tensor, omega: Tensor | float) -> Tensor:
    """(1 - omega) old + omega new, where both are finite."""
    if isinstance(omega, float) and omega == 1.0:
        return new
    infinite = (old == -torch.inf) | (new == -torch.inf)
    return torch.where(infinite, new, (1 - omega) * old + omega * new)


def _log(weights: Tensor) -> tuple[Tensor, Tensor]:
    """log(weights) with 0 where there is no mass, and the mask of the mass."""
    mass = weights > 0
    return torch.where(mass, weights, 1).log(), mass
