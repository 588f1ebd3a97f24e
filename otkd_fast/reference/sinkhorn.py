"""Log-domain Sinkhorn iterations in plain PyTorch (Cuturi 2013; Peyre and Cuturi 2019, section 4.4).

Entries that take no part (zero marginals, costs of +inf, rows that cannot be served) are -inf in the potentials.
Each of them is kept out of the differentiated branch, so gradients there are 0 and never NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._guards import first_order_only, uncovered, uncovered_message


class SinkhornOutputs(NamedTuple):
    """What :func:`sinkhorn` returns; the fields of :class:`otkd_fast.SinkhornResult`."""

    transport_cost: Tensor  # (...)
    regularized_cost: Tensor  # (...)
    f: Tensor  # (..., n)
    g: Tensor  # (..., m)
    marginal_error: Tensor  # (...)


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    num_iters: int,
    update_first: str = "a",
    gradient: str = "unroll",
) -> SinkhornOutputs:
    """Entropic optimal transport by `num_iters` Sinkhorn iterations; see :func:`otkd_fast.sinkhorn`.

    Args:
        cost: (..., n, m), float32 or float64; entries may be +inf.
        a: (..., n) row marginals, None for uniform.
        b: (..., m) column marginals, None for uniform.
        epsilon: regularisation strength in units of the cost.
        num_iters: number of iterations.
        update_first: 'a' (rows) or 'b' (columns).
        gradient: 'unroll', 'envelope' or 'detach'.
    """
    n, m = cost.shape[-2:]
    a = cost.new_full(cost.shape[:-1], 1 / n) if a is None else a
    b = cost.new_full(cost.shape[:-2] + (m,), 1 / m) if b is None else b
    if gradient == "unroll":
        f, g = _iterate(cost, a, b, epsilon, num_iters, update_first)
        plan = _plan(cost, f, g, epsilon)
        return SinkhornOutputs(
            _inner(plan, cost), _dual_value(a, b, f, g, plan, epsilon), f, g, _marginal_error(plan, a, b)
        )
    message = (
        f"sinkhorn: gradient='{gradient}' has no second derivative; use gradient='unroll' with backend='reference'"
    )
    with torch.no_grad():
        f, g = _iterate(cost, a, b, epsilon, num_iters, update_first)
    f, g = f.detach(), g.detach()
    inputs = (first_order_only(cost, message), first_order_only(a, message), first_order_only(b, message))
    return _envelope(*inputs, f, g, epsilon) if gradient == "envelope" else _detach(*inputs, f, g, epsilon)


def _served(weights: Tensor, potential: Tensor) -> Tensor:
    """The same masses; those that take no part (no mass, or no way to go) are constants."""
    return torch.where((weights > 0) & (potential != -torch.inf), weights, weights.detach())


def _log(weights: Tensor) -> tuple[Tensor, Tensor]:
    """log(weights) with 0 where there is no mass, and the mask of the mass."""
    mass = weights > 0
    return torch.where(mass, weights, 1).log(), mass


def _logsumexp(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """log sum exp with 0 for slices that are all -inf, and the mask of those slices; gradient 0 there."""
    largest = logits.detach().amax(dim=dim, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0, largest)
    total = (logits - largest).exp().sum(dim=dim)
    empty = total == 0
    return torch.where(empty, 1, total).log() + largest.squeeze(dim), empty


def _iterate(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, num_iters: int, update_first: str):
    log_a, mass_a = _log(a)  # (..., n)
    log_b, mass_b = _log(b)  # (..., m)
    f = torch.where(mass_a, torch.zeros_like(a), -torch.inf)
    g = torch.where(mass_b, torch.zeros_like(b), -torch.inf)

    def update_f(g: Tensor) -> Tensor:
        value, empty = _logsumexp((g.unsqueeze(-2) - cost) / epsilon, dim=-1)
        return torch.where(mass_a & ~empty, epsilon * (log_a - value), -torch.inf)

    def update_g(f: Tensor) -> Tensor:
        value, empty = _logsumexp((f.unsqueeze(-1) - cost) / epsilon, dim=-2)
        return torch.where(mass_b & ~empty, epsilon * (log_b - value), -torch.inf)

    for _ in range(num_iters):
        if update_first == "a":
            f = update_f(g)
            g = update_g(f)
        else:
            g = update_g(f)
            f = update_f(g)
    return f, g


def _plan(cost: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    return ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon).exp()  # (..., n, m)


def _inner(plan: Tensor, cost: Tensor) -> Tensor:
    """<P, C>; a forbidden pair (C = +inf, so P = 0) counts 0."""
    return (plan * torch.where(cost == torch.inf, 0, cost)).sum((-2, -1))


def _dual_value(a: Tensor, b: Tensor, f: Tensor, g: Tensor, plan: Tensor, epsilon: float) -> Tensor:
    """<f, a> + <g, b> - eps <a, log a> - eps <b, log b> - eps sum(P) + eps sum(a) sum(b).

    The gradient of a mass that takes no part is 0.
    """
    a, b = _served(a, f), _served(b, g)

    def inner(weights: Tensor, potential: Tensor) -> Tensor:
        served = potential != -torch.inf
        log, _ = _log(weights)
        return torch.where(served, weights * (torch.where(served, potential, 0) - epsilon * log), 0).sum(-1)

    return inner(a, f) + inner(b, g) + epsilon * (a.sum(-1) * b.sum(-1) - plan.sum((-2, -1)))


def _marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    plan, a, b = plan.detach(), a.detach(), b.detach()
    return (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)


def _anchor(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A scalar that requires grad where one of the three does."""
    return cost.sum() * 0 + a.sum() * 0 + b.sum() * 0


def _envelope(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float) -> SinkhornOutputs:
    """Partial derivatives of the dual value at fixed potentials; only `regularized_cost` is differentiable."""

    def hide(output: str, value: Tensor) -> Tensor:
        return uncovered(value.detach(), anchor, uncovered_message(output, "envelope", "regularized_cost"))

    anchor = _anchor(cost, a, b)
    plan = _plan(cost, f, g, epsilon)
    value = _dual_value(a, b, f, g, plan, epsilon)
    transport_cost = hide("transport_cost", _inner(plan, cost))
    return SinkhornOutputs(transport_cost, value, hide("f", f), hide("g", g), _marginal_error(plan, a, b))


def _detach(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float) -> SinkhornOutputs:
    """The plan is a constant; only `transport_cost` is differentiable."""

    def hide(output: str, value: Tensor) -> Tensor:
        return uncovered(value.detach(), anchor, uncovered_message(output, "detach", "transport_cost"))

    anchor = _anchor(cost, a, b)
    plan = _plan(cost, f, g, epsilon).detach()
    value = hide("regularized_cost", _dual_value(a, b, f, g, plan, epsilon))
    return SinkhornOutputs(_inner(plan, cost), value, hide("f", f), hide("g", g), _marginal_error(plan, a, b))
