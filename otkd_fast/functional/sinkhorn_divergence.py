"""sinkhorn_divergence: regularised transport between points without its entropic bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._validate import check_choice
from .sinkhorn_points import sinkhorn_points

GRADIENTS = ("envelope", "unroll", "last_step", "implicit")


def sinkhorn_divergence(
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
    gradient: str = "envelope",
    epsilon_schedule: Sequence[float | tuple[float, int]] | None = None,
    relaxation: float | str = 1.0,
    marginal_penalty: float | None = None,
    storage: str = "auto",
    backend: str | None = None,
) -> Tensor:
    r"""Sinkhorn divergence between weighted points: ``OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2``.

    OT is the `regularized_cost` of :func:`otkd_fast.sinkhorn_points`, ``min <P, C> + epsilon KL(P | a b^T)``. The self
    terms take away its bias: the divergence of points with themselves is 0 with gradient 0. For the costs 'l1', 'l2'
    and 'sqeuclidean' it is positive otherwise, once the iterations have converged. With `marginal_penalty` the totals
    of `a` and `b` may differ, and ``epsilon / 2 (sum(a) - sum(b))^2`` is added (Sejourne et al. 2019).

    'envelope' and 'implicit' are gradients of the converged value. There a self term changes with its first and with
    its second argument alike, so its gradient is computed for one of them and counted twice; the gradient of points
    with themselves is then 0 after any number of iterations. 'unroll' and 'last_step' differentiate the three loops
    as they ran.

    Args:
        x: (..., n, d) points, a: (..., n) masses; y: (..., m, d) points, b: (..., m) masses: as in
            :func:`otkd_fast.sinkhorn_points`.
        gradient: 'envelope', 'unroll', 'last_step' or 'implicit'.
        marginal_penalty: None, or rho > 0 for both marginals.
        metric, epsilon, num_iters, tol, update_first, epsilon_schedule, relaxation, storage, backend: as there.

    Returns:
        (...) in the dtype of `x`; float32 for half-precision inputs.

    Raises:
        TypeError, ValueError: as :func:`otkd_fast.sinkhorn_points`; `gradient` 'detach', which does not cover the
            regularized cost; a pair of penalties.
        RuntimeError: as :func:`otkd_fast.sinkhorn_points`.

    Sources: Genevay, Peyre and Cuturi (2018); Feydy et al., Interpolating between Optimal Transport and MMD using
    Sinkhorn Divergences (AISTATS 2019); Sejourne et al., Sinkhorn Divergences for Unbalanced Optimal Transport (2019).

    >>> import torch, otkd_fast
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> options = {"metric": "sqeuclidean", "epsilon": 0.05, "num_iters": 20}
    >>> print(f"{otkd_fast.sinkhorn_divergence(x, x + torch.tensor([0.0, 3.0]), **options):.4f}")
    9.0000
    >>> otkd_fast.sinkhorn_divergence(x, x.clone(), **options)
    tensor(0.)
    """
    check_choice("gradient", gradient, GRADIENTS)
    if isinstance(marginal_penalty, (tuple, list)):
        raise TypeError("marginal_penalty: expected None or one number for both marginals, got a pair")
    options = {
        "metric": metric, "epsilon": epsilon, "num_iters": num_iters, "tol": tol, "update_first": update_first,
        "gradient": gradient, "epsilon_schedule": epsilon_schedule, "relaxation": relaxation,
        "marginal_penalty": marginal_penalty, "storage": storage, "backend": backend,
    }  # fmt: skip

    def cost(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        return sinkhorn_points(x, y, a, b, **options).regularized_cost

    def self_cost(points: Tensor, weights: Tensor | None, first: bool) -> Tensor:
        """Half of OT of the points with themselves."""
        if gradient in ("unroll", "last_step"):
            return cost(points, points, weights, weights) / 2
        fixed, fixed_weights = points.detach(), None if weights is None else weights.detach()
        if first:
            value = cost(points, fixed, weights, fixed_weights)
        else:
            value = cost(fixed, points, fixed_weights, weights)
        return value - value.detach() / 2

    value = cost(x, y, a, b) - self_cost(x, a, True) - self_cost(y, b, False)
    return value if marginal_penalty is None else value + epsilon / 2 * (_total(a, value) - _total(b, value)).square()


def _total(weights: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if weights is None else weights.to(like.dtype).sum(-1)
