"""sinkhorn_sharded: one problem whose rows are spread over the ranks of a process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._validate import HALF_DTYPES, check_choice, check_same_kind, check_tensor, positive_float, positive_int

GRADIENTS = ("unroll", "detach")


@dataclass(frozen=True, eq=False, repr=False)
class ShardedSinkhornResult:
    """Result of :func:`sinkhorn_sharded`; every field is the same on all ranks but `f` and :meth:`plan`.

    Attributes:
        transport_cost, regularized_cost: () of the whole problem, as in :class:`otkd_fast.SinkhornResult`.
        f: (n_r,) potentials of the own rows.
        g: (m,) potentials of the columns.
        marginal_error: () of the whole problem, without gradient.
    """

    transport_cost: Tensor
    regularized_cost: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    _cost: Tensor
    _epsilon: float

    def plan(self) -> Tensor:
        """The own rows (n_r, m) of the plan, without gradient."""
        return _plan(self._cost, self.f.detach(), self.g.detach(), self._epsilon)


def sinkhorn_sharded(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    num_iters: int,
    update_first: str = "a",
    gradient: str = "unroll",
    group: dist.ProcessGroup | None = None,
    reduced_by: str = "mean",
) -> ShardedSinkhornResult:
    r"""One problem of :func:`otkd_fast.sinkhorn` whose cost matrix is spread over the ranks by its rows.

    An update of the row potentials is local; one of the column potentials combines the ranks' log-sum-exps by two
    all-reductions of m numbers. A rank holds its rows of the cost and, for the backward pass, the potentials of each
    iteration: (n_r + m) num_iters numbers. The backward pass recomputes the plan and needs one all-reduction of m
    numbers an iteration.

    All ranks go on to compute the same loss from what is the same on all ranks. Gradients of `cost` and `a` are those
    of the own rows, times the number of ranks with ``reduced_by="mean"``; that of `b` is complete on every rank,
    divided by the number of ranks with ``reduced_by="sum"``: after the parameters' gradients have been combined, they
    are those of one process with all rows. A gradient through `f` counts for the own rows only.

    Args:
        cost: (n_r, m) the own rows, n_r >= 0, m the same on all ranks; float16, bfloat16, float32 or float64; +inf is
            a forbidden pair.
        a: (n_r,) masses >= 0 of the own rows; None: 1 / n each, n being the number of rows of all ranks.
        b: (m,) masses >= 0, the same on all ranks; None: 1 / m each. Its total is that of `a` over all ranks.
        epsilon: > 0, in units of the cost.
        num_iters: >= 1, exact number of iterations.
        update_first: 'a' or 'b'.
        gradient: 'unroll', the derivative of the loop that ran; or 'detach', of `transport_cost` for a constant plan
            (backward through another output, or to `a` and `b`, raises).
        group: process group; None: the default group.
        reduced_by: 'mean' or 'sum': how the parameters' gradients of the ranks are combined.

    Returns:
        ShardedSinkhornResult in the dtype of `cost`; float32 for half-precision inputs.

    Raises:
        TypeError, ValueError: as :func:`otkd_fast.sinkhorn`; the values of the masses are not checked.
        RuntimeError: backward through an output that the mode does not differentiate, a second derivative.

    >>> import torch
    >>> from otkd_fast.distributed import sinkhorn_sharded
    >>> result = sinkhorn_sharded(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1, num_iters=20)
    >>> print(f"{result.transport_cost:.4e}")  # no process group: all rows are here
    4.5398e-05
    """
    options = _Options(
        positive_float("epsilon", epsilon), positive_int("num_iters", num_iters), update_first, gradient, group
    )
    check_choice("update_first", update_first, ("a", "b"))
    check_choice("gradient", gradient, GRADIENTS)
    check_choice("reduced_by", reduced_by, ("mean", "sum"))
    _check(cost, a, b, gradient)
    if cost.dtype in HALF_DTYPES:
        cost, a, b = (None if x is None else x.float() for x in (cost, a, b))
    if a is None:
        rows = _sum(cost.new_full((1,), cost.shape[0]), group)
        a = (1 / rows).expand(cost.shape[0])
    if b is None:
        b = cost.new_full((cost.shape[1],), 1 / cost.shape[1])
    world = dist.get_world_size(group) if _initialised() else 1
    if world > 1:
        cost, a = (_Scaled.apply(x, world if reduced_by == "mean" else 1) for x in (cost, a))
        b = _Scaled.apply(b, 1 if reduced_by == "mean" else 1 / world)
    transport, mass, f, g = _Sharded.apply(cost, a, b, options)
    with torch.no_grad():
        error = _marginal_error(cost, a, b, f, g, options)
    if gradient == "detach":
        f, g, mass = f.detach(), g.detach(), mass.detach()
    regularized = _regularized(a, b, f, g, mass, options)
    if gradient == "detach" and torch.is_grad_enabled() and cost.requires_grad:
        regularized = _NotDifferentiated.apply(regularized, transport)
    return ShardedSinkhornResult(transport, regularized, f, g, error, cost.detach(), options.epsilon)


class _Options(NamedTuple):
    epsilon: float
    num_iters: int
    update_first: str
    gradient: str
    group: dist.ProcessGroup | None


def _check(cost: Tensor, a: Tensor | None, b: Tensor | None, gradient: str) -> None:
    check_tensor("cost", cost, 2, "(n, m)")
    if cost.dim() != 2 or cost.shape[1] == 0:
        raise ValueError(f"cost: expected shape (n, m) with m >= 1, got {tuple(cost.shape)}")
    for name, weights, size in (("a", a, cost.shape[0]), ("b", b, cost.shape[1])):
        if weights is None:
            continue
        check_tensor(name, weights, 1, "(n,)" if name == "a" else "(m,)")
        check_same_kind(name, weights, "cost", cost)
        if weights.shape != (size,):
            raise ValueError(f"{name}: expected shape ({size},), got {tuple(weights.shape)}")
        if gradient == "detach" and weights.requires_grad:
            raise ValueError(f"{name}: expected a tensor without gradient for gradient 'detach'")


class _Sharded(torch.autograd.Function):
    """<P, C>, sum of P, f, g. The backward pass runs the loop in reverse from the potentials of each iteration."""

    @staticmethod
    def forward(ctx, cost, a, b, options):
        history = _iterate(cost, a, b, options)  # potentials after each update, the start first
        f, g = history[-2:] if options.update_first == "a" else history[:-3:-1]
        plan = _plan(cost, f, g, options.epsilon)
        products = torch.stack([_plan_cost(plan, cost).sum(), plan.sum()])
        transport, mass = _sum(products, options.group)
        if options.gradient == "detach":
            history = [f, g]
        ctx.save_for_backward(cost, a, b, *history)
        ctx.options = options
        return transport.clone(), mass.clone(), f.clone(), g.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_transport, grad_mass, grad_f, grad_g):
        cost, a, b, *history = ctx.saved_tensors
        epsilon, _, first, gradient, group = ctx.options
        f, g = history[-2:] if first == "a" or gradient == "detach" else history[:-3:-1]
        plan = _plan(cost, f, g, epsilon)
        if gradient == "detach":
            return grad_transport * plan, None, None, None
        weighted = (grad_transport * _plan_cost(plan, cost) + grad_mass * plan) / epsilon  # (n, m)
        grad_cost = grad_transport * plan - weighted
        grad_f = grad_f + weighted.sum(1)
        grad_g = grad_g + _sum(weighted.sum(0), group)
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        rows_turn = first == "b"  # whether the last update was that of the rows
        for step in range(len(history) - 1, 0, -1):
            now, before = history[step], history[step - 1]
            if rows_turn:
                # df_i / dg_j = -R_ij, df_i / dC_ij = R_ij with the rows R of the plan of (f, g before), sums 1
                grad_a += torch.where(a > 0, epsilon * grad_f / a, 0)
                shares = _plan(cost, now, before, epsilon) * (_inverse(a) * grad_f).unsqueeze(1)
                grad_f = torch.zeros_like(grad_f)
                grad_g = grad_g - _sum(shares.sum(0), group)
            else:
                grad_b += torch.where(b > 0, epsilon * grad_g / b, 0)
                shares = _plan(cost, before, now, epsilon) * (_inverse(b) * grad_g)
                grad_g = torch.zeros_like(grad_g)
                grad_f = grad_f - shares.sum(1)
            grad_cost += shares
            rows_turn = not rows_turn
        return grad_cost, grad_a, grad_b, None


class _Scaled(torch.autograd.Function):
    """The same tensor, its gradient times a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class _Summed(torch.autograd.Function):
    """Sum over the ranks; every rank computes the same from it, so that its gradient is already complete."""

    @staticmethod
    def forward(ctx, x, group):
        return _sum(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _NotDifferentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, attached):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("sinkhorn_sharded: gradient='detach' differentiates transport_cost only")


def _iterate(cost: Tensor, a: Tensor, b: Tensor, options: _Options) -> list[Tensor]:
    """Potentials in the order of the updates: before the first one that of the other side, 0 where it has mass."""
    epsilon, num_iters, first, _, group = options
    log_a, log_b = epsilon * a.log(), epsilon * b.log()  # -inf: no mass
    start = b if first == "a" else a
    history = [torch.where(start > 0, 0.0, -torch.inf).to(cost.dtype)]
    rows_turn = first == "a"
    for _ in range(2 * num_iters):
        if rows_turn:
            sums = ((history[-1] - cost) / epsilon).logsumexp(1)
            history.append(_potential(log_a, sums, epsilon))
        else:
            sums = _columns_logsumexp((history[-1].unsqueeze(1) - cost) / epsilon, group)
            history.append(_potential(log_b, sums, epsilon))
        rows_turn = not rows_turn
    return history


def _potential(log_mass: Tensor, sums: Tensor, epsilon: float) -> Tensor:
    """-inf for an entry without mass, and for one that nothing can serve."""
    return torch.where(sums > -torch.inf, log_mass - epsilon * sums, -torch.inf)


def _columns_logsumexp(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x (n_r, m): log-sum-exp over the rows of all ranks, (m,)."""
    largest = x.amax(0) if x.shape[0] else x.new_full((x.shape[1],), -torch.inf)
    if _initialised():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shift = torch.where(largest > -torch.inf, largest, 0)
    return shift + _sum((x - shift).exp().sum(0), group).log()


def _plan(cost: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    return ((f.unsqueeze(1) + g - cost) / epsilon).exp()


def _plan_cost(plan: Tensor, cost: Tensor) -> Tensor:
    """P C; a pair that is forbidden counts 0."""
    return torch.where(plan > 0, plan * cost, 0)


def _inverse(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, 1 / mass, 0)


def _regularized(a: Tensor, b: Tensor, f: Tensor, g: Tensor, mass: Tensor, options: _Options) -> Tensor:
    """The dual value, as SinkhornResult defines it."""
    epsilon, group = options.epsilon, options.group
    total_a, total_b = (torch.where(x > 0, x, 0).sum() for x in (a, b))  # a mass of 0 gets gradient 0
    value_a, total_a = _Summed.apply(torch.stack([_product(a, f, epsilon), total_a]), group)
    return value_a + _product(b, g, epsilon) - epsilon * (mass - total_a * total_b)


def _product(mass: Tensor, potential: Tensor, epsilon: float) -> Tensor:
    """<f - epsilon log a, a> over what is served."""
    served = potential > -torch.inf
    safe = torch.where(served, mass, 1)
    return torch.where(served, mass * (torch.where(served, potential, 0) - epsilon * safe.log()), 0).sum()


def _marginal_error(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, options: _Options) -> Tensor:
    plan = _plan(cost, f, g, options.epsilon)
    rows = (plan.sum(1) - a).abs().sum().unsqueeze(0)
    total = _sum(torch.cat([rows, plan.sum(0)]), options.group)  # one reduction for both
    return total[0] + (total[1:] - b).abs().sum()


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A new tensor: the sum over the ranks."""
    x = x.clone(memory_format=torch.contiguous_format)
    if _initialised():
        dist.all_reduce(x, group=group)
    return x
