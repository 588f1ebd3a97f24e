"""sinkhorn_ragged: many problems of different sizes in one call, packed one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from .._dispatch import resolve
from .._values import values_readable
from . import _sinkhorn_ragged_function as compiled
from ._ragged import check_last, check_offsets, check_packed_masses, number_of_entries, packed_indices
from ._sinkhorn_options import (
    check_constant,
    check_initial_potentials,
    check_options,
    check_path,
    check_schedule,
    follow_schedule,
)
from ._validate import HALF_DTYPES, check_choice, check_same_kind, check_tensor
from .cost_matrix import METRICS
from .sinkhorn_result import SinkhornResult, register_result


def sinkhorn_ragged(
    cost: Tensor | tuple[Tensor, Tensor],
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    row_offsets: Tensor,
    column_offsets: Tensor,
    metric: str | None = None,
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
    r"""K problems of different sizes, each solved as :func:`otkd_fast.sinkhorn` solves it: no padding, no masks.

    Problem k has the rows ``row_offsets[k] .. row_offsets[k + 1]`` and the columns ``column_offsets[k] ..
    column_offsets[k + 1]``, as ``cu_seqlens`` has it in attention. A problem without rows or without columns has
    transport cost 0 and runs no iteration; mass on its other side cannot be served.

    Args:
        cost: (E,) the (n_k, m_k) costs one after the other, each row by row; or a pair (x, y) of packed points,
            x (N, d) and y (M, d), whose costs are taken by `metric` within each problem.
        a: (N,) masses >= 0; None: 1 / n_k each.
        b: (M,) masses >= 0; None: 1 / m_k each. In each problem the totals are equal, unless `marginal_penalty` lets
            them differ or the problem has no rows or no columns.
        row_offsets: (K + 1,) int32 or int64, on the device of `cost`: 0 first, non-decreasing, N last.
        column_offsets: (K + 1,), likewise, M last.
        metric: with points: 'l1', 'l2', 'sqeuclidean' or 'cosine', as in :func:`otkd_fast.cost_matrix`.
        initial_potentials: None, or (f (N,), g (M,)), each may be None.
        epsilon, num_iters, tol, update_first, gradient, epsilon_schedule, relaxation, marginal_penalty, backend: as in
            :func:`otkd_fast.sinkhorn`; the stop and 'auto' are decided for each problem.

    Returns:
        SinkhornResult with values (K,), f (N,), g (M,); ``plan()`` is packed, (E,), like the cost, and ``plan_apply``
        takes (M,) or (M, k), with `transpose` (N,) or (N, k).

    Nothing waits for the device where the marginals are given with packed costs. What the offsets must tell otherwise
    (N without `a`, M without `b`, E with points) is read on the host, which torch.compile does not permit.

    Raises:
        TypeError, ValueError: as :func:`otkd_fast.sinkhorn`; offsets of the wrong rank, dtype, device or number;
            `metric` without points or points without `metric`. On CPU tensors, outside torch.compile and torch.func,
            also offsets whose values are wrong and packed costs of another length than they say.
        RuntimeError: as :func:`otkd_fast.sinkhorn`.

    >>> import torch, otkd_fast
    >>> x, y = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [4.0], [6.0]])
    >>> offsets = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 3])
    >>> result = otkd_fast.sinkhorn_ragged(
    ...     (x, y), row_offsets=offsets[0], column_offsets=offsets[1], metric="l1", epsilon=0.1, num_iters=5
    ... )
    >>> result.transport_cost
    tensor([0.5000, 1.0000])
    >>> result.plan()
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    options = check_options(epsilon, num_iters, tol, update_first, gradient, relaxation, marginal_penalty)
    points = _check_cost(cost, metric)
    operand = points[0] if points else cost
    row_offsets, column_offsets = _check_offsets(row_offsets, column_offsets, operand)
    offsets = {"row_offsets": row_offsets, "column_offsets": column_offsets}
    rows, columns = _size(points and points[0], a, row_offsets), _size(points and points[1], b, column_offsets)
    check_last("row_offsets", row_offsets, rows)
    check_last("column_offsets", column_offsets, columns)
    a = _masses("a", a, rows, row_offsets, operand, gradient)
    b = _masses("b", b, columns, column_offsets, operand, gradient)
    if values_readable(a, b, operand, row_offsets, column_offsets):
        check_packed_masses(a, b, **offsets, same_total=options.penalty_a == options.penalty_b == torch.inf)
        _check_entries(cost, points, **offsets)
    if operand.dtype in HALF_DTYPES:
        a, b = a.float(), b.float()
        points, cost = points and tuple(x.float() for x in points), cost if points else cost.float()
    check_path(options, gradient, *(points or (cost,)), a, b)
    initial = check_initial_potentials(initial_potentials, (), rows, columns, a)
    asks = "gradient='implicit'" if gradient == "implicit" else None
    solver = resolve("sinkhorn_ragged", operand.device, backend, asks)
    backend = resolve("sinkhorn_ragged", operand.device, backend)
    if points and backend == "reference":
        cost = reference.cost_matrix_ragged(*points, **offsets, metric=metric)
    elif points:
        entries = number_of_entries(row_offsets, column_offsets)
        cost = compiled.costs(backend, *points, row_offsets, column_offsets, entries, metric)

    def solve(cost, a, b, f, g, options, gradient):
        if solver != "reference":
            return compiled.solve(solver, cost, a, b, f, g, row_offsets, column_offsets, options, gradient)
        keywords = {"gradient": gradient, "initial_potentials": (f, g), **offsets, **options.for_reference()}
        return reference.sinkhorn_ragged(cost, a, b, **keywords)

    if epsilon_schedule is not None:
        constants = cost.detach(), a.detach(), b.detach()
        initial = follow_schedule(
            check_schedule(epsilon_schedule), options, *constants[1:], *initial,
            lambda stage, f, g: solve(*constants, f, g, stage, "envelope")[2:4],
        )  # fmt: skip
    outputs = solve(cost, a, b, *initial, options, gradient)
    return RaggedSinkhornResult(*outputs, (cost, row_offsets, column_offsets), options.epsilon)


@register_result
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RaggedSinkhornResult(SinkhornResult):
    """Result of :func:`otkd_fast.sinkhorn_ragged`: values (K,), f (N,), g (M,), and a packed plan (E,)."""

    def plan(self) -> Tensor:
        """The plans ``P_ij = exp((f_i + g_j - C_ij) / epsilon)`` packed like the costs, (E,)."""
        cost, row_offsets, column_offsets = self._operands
        row, column = packed_indices(row_offsets, column_offsets, cost.shape[0])
        return ((self.f[row] + self.g[column] - cost) / self._epsilon).exp()

    def plan_apply(self, v: Tensor, transpose: bool = False) -> Tensor:
        """``P v`` (N,) or (N, k) for v (M,) or (M, k), problem by problem; with `transpose` ``P^T v`` for v (N, ...).

        Raises:
            TypeError, ValueError: as :meth:`SinkhornResult.plan_apply`.
        """
        v, vector = self._applied(v, transpose)
        cost, row_offsets, column_offsets = self._operands
        row, column = packed_indices(row_offsets, column_offsets, cost.shape[0])
        plan = ((self.f[row] + self.g[column] - cost) / self._epsilon).exp()
        n, m = row_offsets.diff(), column_offsets.diff()
        if transpose:  # entries in the order of the columns
            order = column.argsort(stable=True)
            terms, lengths = (plan.unsqueeze(-1) * v[row])[order], n.repeat_interleave(m, output_size=self.g.shape[0])
        else:
            terms, lengths = plan.unsqueeze(-1) * v[column], m.repeat_interleave(n, output_size=self.f.shape[0])
        applied = torch.segment_reduce(terms, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
        return applied.squeeze(-1) if vector else applied

    def _batch(self) -> tuple[int, ...]:
        return ()


def _check_cost(cost: Tensor | tuple[Tensor, Tensor], metric: str | None) -> tuple[Tensor, Tensor] | None:
    """The pair of points, or None for packed costs."""
    if isinstance(cost, Tensor):
        check_tensor("cost", cost, 1, "(E,)")
        if cost.dim() != 1:
            raise ValueError(f"cost: expected packed costs (E,), got shape {tuple(cost.shape)}")
        if metric is not None:
            raise ValueError(f"metric: expected None with packed costs, got {metric!r}")
        return None
    if not isinstance(cost, (tuple, list)) or len(cost) != 2:
        raise TypeError(f"cost: expected a tensor (E,) or a pair (x, y) of points, got {type(cost).__name__}")
    x, y = cost
    for name, value, axes in (("cost[0]", x, "(N, d)"), ("cost[1]", y, "(M, d)")):
        check_tensor(name, value, 2, axes)
        if value.dim() != 2:
            raise ValueError(f"{name}: expected packed points {axes}, got shape {tuple(value.shape)}")
    check_same_kind("cost[1]", y, "cost[0]", x)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"cost[1]: expected points of {x.shape[1]} features like cost[0], got shape {tuple(y.shape)}")
    if metric is None:
        raise ValueError(f"metric: expected one of {', '.join(map(repr, METRICS))} with points, got None")
    check_choice("metric", metric, METRICS)
    if x.shape[1] == 0 and metric == "cosine":
        raise ValueError(f"cost[0]: expected at least one feature for metric 'cosine', got shape {tuple(x.shape)}")
    return x, y


def _check_offsets(row_offsets: Tensor, column_offsets: Tensor, operand: Tensor) -> tuple[Tensor, Tensor]:
    row_offsets = check_offsets("row_offsets", row_offsets, operand)
    column_offsets = check_offsets("column_offsets", column_offsets, operand)
    if row_offsets.shape != column_offsets.shape:
        expected, got = row_offsets.shape[0] - 1, column_offsets.shape[0] - 1
        raise ValueError(f"column_offsets: expected {expected} problems like row_offsets, got {got}")
    return row_offsets, column_offsets


def _check_entries(cost: Tensor, points: tuple[Tensor, Tensor] | None, row_offsets: Tensor, column_offsets: Tensor):
    entries = number_of_entries(row_offsets, column_offsets)
    if not points and cost.shape[0] != entries:
        raise ValueError(f"cost: expected the {entries} entries that the offsets tell, got shape {tuple(cost.shape)}")


def _size(points: Tensor | None, weights: Tensor | None, offsets: Tensor) -> int:
    """Number of packed rows or columns; waits for the device where nothing but the offsets tells it."""
    if points is not None:
        return points.shape[0]
    return weights.shape[0] if isinstance(weights, Tensor) and weights.dim() else int(offsets[-1])


def _masses(name: str, weights: Tensor | None, size: int, offsets: Tensor, operand: Tensor, gradient: str) -> Tensor:
    """Checked masses (size,) of a side, at least float32; uniform ones in each problem for None."""
    dtype = torch.promote_types(operand.dtype, torch.float32)
    if weights is None:
        counts = offsets.diff()
        return (1 / counts.to(dtype)).repeat_interleave(counts, output_size=size)
    check_tensor(name, weights, 1, "(N,)" if name == "a" else "(M,)")
    check_same_kind(name, weights, "cost", operand)
    if weights.shape != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(weights.shape)}")
    if gradient == "detach":
        check_constant(name, weights)
    return weights
