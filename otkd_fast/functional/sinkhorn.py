"""sinkhorn: entropic optimal transport between discrete measures, for a dense cost matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import reference
from .._dispatch import resolve
from .._values import values_readable
from . import _sinkhorn_function as compiled
from ._sinkhorn_options import (
    Options,
    check_constant,
    check_initial_potentials,
    check_options,
    check_path,
    check_schedule,
    follow_schedule,
)
from ._validate import HALF_DTYPES, check_masses, check_same_kind, check_tensor
from .sinkhorn_result import SinkhornResult


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
    epsilon_schedule: Sequence[float | tuple[float, int]] | None = None,
    relaxation: float | str = 1.0,
    marginal_penalty: float | tuple[float | None, float | None] | None = None,
    backend: str | None = None,
) -> SinkhornResult:
    r"""Entropic optimal transport by Sinkhorn iterations, with the accuracy of the log domain.

    Approaches the plan P that minimises ``<P, C> + epsilon KL(P | a b^T)`` among those with row sums `a` and column
    sums `b`. From potentials that are 0 where their marginal has mass and -inf elsewhere, each iteration sets
    (``update_first='a'``)

        f_i = epsilon log a_i - epsilon log sum_j exp((g_j - C_ij) / epsilon)
        g_j = epsilon log b_j - epsilon log sum_i exp((f_i - C_ij) / epsilon)

    and the plan is ``P_ij = exp((f_i + g_j - C_ij) / epsilon)``. 'b' updates g first. `cost` entries may be +inf (a
    forbidden pair). Entries of `a` and `b` may be 0: that row or column takes no mass. A row with mass but without any
    column that it may go to gets f = -inf and no mass; `marginal_error` shows it. docs/numerics.md has the exact
    definition of every option.

    Gradients, chosen by `gradient` (docs/numerics.md compares them; backward through another output raises):

        'unroll'     the exact derivative of the loop that ran, of every output but `marginal_error`
        'envelope'   of `regularized_cost` at fixed potentials: P for the cost, f - epsilon log a + constant for a
        'detach'     of `transport_cost` for a constant plan: P for the cost, nothing for a and b
        'last_step'  of the last iteration, the potentials before it being constants; every output
        'implicit'   by the implicit function theorem, as if the potentials had converged; every output

    Args:
        cost: (..., n, m), n, m >= 1, float16, bfloat16, float32 or float64. Or (n, m) with a batch of marginals that
            share it.
        a: (..., n) masses >= 0, or (n,) shared by the batch; None: 1/n each. Same dtype and device as `cost`.
        b: (..., m) masses >= 0, or (m,) shared by the batch; None: 1/m each. The totals of `a` and `b` are equal,
            unless `marginal_penalty` lets them differ.
        epsilon: > 0, in units of the cost.
        num_iters: >= 1; the largest number of iterations if `tol` is given, else their exact number.
        tol: None, or > 0: each problem of the batch stops after its first iteration with ``marginal_error <= tol``.
        update_first: 'a' or 'b': the marginal whose potential each iteration updates first.
        gradient: 'unroll', 'envelope', 'detach', 'last_step' or 'implicit'.
        initial_potentials: None, or (f, g) to start from, (..., n) or (n,) and (..., m) or (m,), each may be None; in
            the dtype of the result. Constants for the gradient. Entries that are not finite start at 0.
        epsilon_schedule: None, or numbers (one iteration each) and pairs (epsilon, iterations) that are run before the
            `num_iters` iterations, without gradient and without `tol` and `relaxation`, to start from.
        relaxation: over-relaxation in (0, 2), or 'auto', which observes the rate of convergence. Not 1 only with the
            gradients 'implicit', 'envelope' and 'detach', or where no gradient is asked for.
        marginal_penalty: None, or rho > 0, or (rho_a, rho_b), in units of the cost; None and inf stand for a
            constraint. Adds ``rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b)`` to the problem in place of the constraints.
        backend: 'auto', 'reference', 'cpu', 'cuda' or 'triton'; None: see :func:`otkd_fast.backend`.

    Returns:
        SinkhornResult in the dtype of `cost`; float32 for half-precision inputs, which are computed in float32.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: wrong rank, sizes, dtypes or devices that do not match, a number out of its range, an unknown word,
            `a` or `b` that requires a gradient with 'detach', `relaxation` with 'unroll' or 'last_step' where a
            gradient is asked for, or under torch.func. On CPU tensors, outside torch.compile and torch.func, also
            masses that are negative or not finite, and totals that are 0 or differ.
        RuntimeError: the named backend is not available. In the backward pass: an output that the mode does not
            differentiate, or a second derivative that is not available.

    Sources: Cuturi, Sinkhorn Distances (NeurIPS 2013); Peyre and Cuturi, Computational Optimal Transport (2019),
    section 4; Chizat, Peyre, Schmitzer and Vialard, Scaling Algorithms for Unbalanced Optimal Transport (2018).

    >>> import torch, otkd_fast
    >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> result = otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=20)
    >>> result.plan()
    tensor([[4.9998e-01, 2.2699e-05],
            [2.2699e-05, 4.9998e-01]])
    >>> print(f"{result.transport_cost:.4e}")
    4.5398e-05
    >>> otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=20, tol=1e-6).num_iters
    tensor(1)
    """
    options = check_options(epsilon, num_iters, tol, update_first, gradient, relaxation, marginal_penalty)
    a, b, batch = _check_problem(cost, a, b, gradient, options)
    check_path(options, gradient, cost, a, b)
    if cost.dtype in HALF_DTYPES:
        cost = cost.float()
        a, b = None if a is None else a.float(), None if b is None else b.float()
    initial = check_initial_potentials(initial_potentials, batch, *cost.shape[-2:], cost)
    shared = len(batch) + 2 > cost.dim()
    op = "sinkhorn_shared" if shared else "sinkhorn"
    backend = resolve(op, cost.device, backend, "gradient='implicit'" if gradient == "implicit" else None)
    if backend == "reference":
        solve = _reference
    else:
        solve = partial(_shared if shared else _dense, backend)
    if epsilon_schedule is not None:
        initial = _after_schedule(epsilon_schedule, options, cost, a, b, initial, solve)
    outputs = solve(cost, a, b, *initial, options, gradient)
    return SinkhornResult(*outputs, (cost,), options.epsilon)


def _dense(backend, cost, a, b, f, g, options, gradient):
    return compiled.solve("dense", backend, cost, a, b, f, g, options, gradient)


def _shared(backend, cost, a, b, f, g, options, gradient):
    """The op takes one batch axis."""
    batch = (b if a is None else a).shape[:-1]
    if len(batch) == 1:
        return compiled.solve("shared", backend, cost, a, b, f, g, options, gradient)
    a, b, f, g = (None if x is None else x.reshape(-1, x.shape[-1]) for x in (a, b, f, g))
    outputs = compiled.solve("shared", backend, cost, a, b, f, g, options, gradient)
    return tuple(output.reshape(batch + output.shape[1:]) for output in outputs)


def _reference(cost, a, b, f, g, options, gradient):
    return reference.sinkhorn(cost, a, b, gradient=gradient, initial_potentials=(f, g), **options.for_reference())


def _after_schedule(epsilon_schedule, options, cost, a, b, initial, solve):
    """The potentials after the iterations of the schedule."""
    stages = check_schedule(epsilon_schedule)
    cost, a, b = cost.detach(), None if a is None else a.detach(), None if b is None else b.detach()
    return follow_schedule(
        stages, options, a, b, *initial, lambda stage, f, g: solve(cost, a, b, f, g, stage, "envelope")[2:4]
    )


def _check_problem(
    cost: Tensor, a: Tensor | None, b: Tensor | None, gradient: str, options: Options
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """Raise for problems that cannot be solved; the marginals, expanded to the batch, and the batch."""
    check_tensor("cost", cost, 2, "(..., n, m)")
    n, m = cost.shape[-2:]
    if n == 0 or m == 0:
        raise ValueError(f"cost: expected at least one row and one column, got shape {tuple(cost.shape)}")
    batch = cost.shape[:-2]
    return check_marginals(a, b, n, m, batch, ("cost", cost), ("cost's rows", "cost's columns"), gradient, options)


def check_marginals(
    a: Tensor | None, b: Tensor | None, n: int, m: int, batch: tuple[int, ...], like: tuple[str, Tensor],
    axes: tuple[str, str], gradient: str, options: Options,
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:  # fmt: skip
    """Raise for marginals that do not fit; both expanded to the batch, which is theirs where `batch` is empty.

    like: name and value of the argument with their dtype and device; axes: what each mass of `a` and of `b` stands for.
    """
    if a is None and b is None:
        return None, None, batch
    if not batch:
        batch = _batch_of(a) or _batch_of(b)
    given_a, given_b = a, b
    a = None if a is None else _check_marginal("a", a, "n", n, like, axes[0], batch, gradient)
    b = None if b is None else _check_marginal("b", b, "m", m, like, axes[1], batch, gradient)
    if values_readable(given_a, given_b):
        check_masses(given_a, given_b, same_total=options.penalty_a == options.penalty_b == torch.inf)
    return a, b, batch


def _batch_of(weights: Tensor | None) -> tuple[int, ...]:
    return tuple(weights.shape[:-1]) if isinstance(weights, Tensor) else ()


def _check_marginal(
    name: str, weights: Tensor, letter: str, size: int, like: tuple[str, Tensor], axis: str, batch: tuple[int, ...],
    gradient: str,
) -> Tensor:  # fmt: skip
    check_tensor(name, weights, 1, f"(..., {letter})")
    check_same_kind(name, weights, *like)
    if weights.shape[-1] != size:
        raise ValueError(f"{name}: expected {size} masses, one for each of {axis}, got shape {tuple(weights.shape)}")
    if gradient == "detach":
        check_constant(name, weights)
    if weights.dim() == 1:
        return weights if len(batch) == 0 else weights.expand(*batch, size)
    if weights.shape[:-1] != batch:
        raise ValueError(f"{name}: expected shape {(*batch, size)} or ({size},), got {tuple(weights.shape)}")
    return weights
