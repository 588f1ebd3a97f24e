"""``sinkhorn_points_fwd``, ``_bwd``, ``_apply`` and ``_apply_bwd`` by Triton (see ``ops/sinkhorn_points.py``): no
cost matrix.

The kernels of ``_sinkhorn_tiles`` take the costs of a block from the points, feature by feature, differences first;
float32
points are compared in float32 where a bound of the largest cost over epsilon allows it, else in float64, decided on the
device a problem. Cosine distances are half the squared distances of unit rows, held in float64; a row of zeros gets a
feature
of its own, at distance 1 from everything. The gradients of the unit rows are taken to the rows outside of the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.cost_matrix import METRICS
from ..ops.sinkhorn import KEEP, history_size
from ..reference import _sinkhorn_implicit
from . import _runtime
from . import _sinkhorn_large as large
from ._runtime import TL_DTYPES, cdiv
from ._sinkhorn_tiles import apply_plan
from ._sinkhorn_tiles_bwd import applied_gradient
from .sinkhorn import flat

FLOAT_RANGE = 120.0  # bound of max C / epsilon up to which float32 differences are summed in float32
_COSINE = METRICS["cosine"]
_SQUARE = METRICS["sqeuclidean"]


def _unit_rows(x: Tensor, first: bool) -> tuple[Tensor, Tensor]:
    """(P, n, d + 2) float64: rows of length 1, those without one at a corner of their own; and the lengths, 0 for
    those.
    """
    wide = x.double()
    largest = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)
    scaled = wide / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    unit = scaled / torch.where(norm > 0, norm, 1)
    zero = (norm == 0).double()
    extra = (zero, torch.zeros_like(zero)) if first else (torch.zeros_like(zero), zero)
    return torch.cat([unit, *extra], -1), norm * largest


def _reach(x: Tensor, centre: Tensor, kind: int) -> Tensor:
    """(P,) largest distance from the centre (P, 1, d), L1 or Euclidean."""
    delta = (x - centre).double()
    size = delta.abs().sum(-1) if kind == METRICS["l1"] else delta.square().sum(-1).sqrt()
    return size.amax(-1)


def costs_of(x: Tensor, y: Tensor, metric: str, epsilon: float) -> large.Costs:
    """x (P, n, d), y (P, m, d), contiguous."""
    problems, n, _ = x.shape
    m, kind, code = y.shape[1], METRICS[metric], torch.int64 if x.dtype == torch.float64 else torch.int32
    wide = _runtime.empty((problems,), x, code).fill_(1)
    factor = 1.0
    if kind == _COSINE:
        x, y, kind, factor = _unit_rows(x, True)[0], _unit_rows(y, False)[0], _SQUARE, 0.5
    elif x.dtype == torch.float32 and x.shape[-1]:
        centre = y.mean(1, keepdim=True)
        bound = _reach(x, centre, kind) + _reach(y, centre, kind)
        bound = bound.square() if kind == _SQUARE else bound
        wide.copy_(~(bound <= FLOAT_RANGE * epsilon))
    left, right = x.mT.contiguous(), y.mT.contiguous()
    return large.Costs(left, right, n, m, (0, 0, 0), x.shape[-1], kind, factor, wide)


def _arranged(x, y, a, b, initial_f, initial_g, penalty_a, penalty_b, update_a_first) -> tuple:
    """Batch axes as one, rows first."""
    x, y = flat(x, 2), flat(y, 2)
    a, b, initial_f, initial_g = (flat(t, 1) for t in (a, b, initial_f, initial_g))
    if update_a_first:
        return x, y, a, b, initial_f, initial_g, penalty_a, penalty_b
    return y, x, b, a, initial_g, initial_f, penalty_b, penalty_a


def _sides(a, b, epsilon, penalty_a, penalty_b) -> large.Sides:
    pair = penalty_a, penalty_b
    exponents = (1.0 if math.isinf(penalty) else penalty / (penalty + epsilon) for penalty in pair)
    drops = (0.0 if math.isinf(penalty) else epsilon / penalty for penalty in pair)
    return large.Sides(a, b, *exponents, *drops, epsilon)


def sinkhorn_points_fwd(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    metric: str, epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int, stored: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    *axes, n, _ = x.shape
    m = y.shape[-2]
    values = [_runtime.empty(axes, x) for _ in range(2)]
    f, g = _runtime.empty((*axes, n), x), _runtime.empty((*axes, m), x)
    error, count = _runtime.empty(axes, x), _runtime.empty(axes, x, torch.int64)
    history = _runtime.empty((*axes, history_size(n, m, num_iters, keep)), x, torch.float64)
    if error.numel():
        x, y, a, b, initial_f, initial_g, *penalties = _arranged(
            x, y, a, b, initial_f, initial_g, penalty_a, penalty_b, update_a_first
        )
        results = (*values, *((f, g) if update_a_first else (g, f)), error, count, history)
        results = [tensor.view(error.numel(), *tensor.shape[len(axes) :]) for tensor in results]
        with _runtime.on_device(x):
            costs, sides = costs_of(x, y, metric, epsilon), _sides(a, b, epsilon, *penalties)
            large.solve(costs, sides, initial_f, initial_g, results, num_iters, tol, relaxation, keep)
    return *values, f, g, error, count, history


def _to_rows(grad: Tensor, x: Tensor, metric: str, first: bool) -> Tensor:
    """(P, d, n) by the kernels' points -> (P, n, d) by the rows."""
    grad = grad.mT
    if metric != "cosine":
        return grad.to(x.dtype)
    unit, norm = _unit_rows(x, first)
    grad, unit = grad[..., :-2], unit[..., :-2]
    across = grad - unit * (unit * grad).sum(-1, keepdim=True)
    return torch.where(norm > 0, across / torch.where(norm > 0, norm, 1), 0).to(x.dtype)


def sinkhorn_points_bwd(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, metric: str, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float,
    update_a_first: bool, gradient: str, stored: bool, need_x: bool, need_y: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, m = x.shape[-2], y.shape[-2]
    if history.shape[-1] != history_size(n, m, num_iters, KEEP[gradient]):
        raise ValueError(f"history: expected that of a forward with keep={KEEP[gradient]}, got {tuple(history.shape)}")
    shapes = x.shape, y.shape, (*x.shape[:-2], n), (*x.shape[:-2], m)
    needs = need_x, need_y, need_a, need_b
    grads = [_runtime.empty(shape if need else (0,), x) for shape, need in zip(shapes, needs, strict=True)]
    if not math.prod(x.shape[:-2]):
        return tuple(grads)
    x, y, a, b, initial_f, initial_g, *penalties = _arranged(
        x, y, a, b, initial_f, initial_g, penalty_a, penalty_b, update_a_first
    )
    incoming = flat(grad_transport_cost, 0), flat(grad_regularized_cost, 0), flat(grad_f, 1), flat(grad_g, 1)
    history = history.reshape(-1, history.shape[-1]).contiguous()
    grad_x, grad_y, grad_a, grad_b = grads
    if not update_a_first:
        incoming = (*incoming[:2], incoming[3], incoming[2])
        grad_x, grad_y, grad_a, grad_b = grad_y, grad_x, grad_b, grad_a
    with _runtime.on_device(x):
        costs, sides = costs_of(x, y, metric, epsilon), _sides(a, b, epsilon, *penalties)
        adjoint = large.differentiate(costs, sides, initial_g, history, incoming, num_iters, gradient)
        if gradient == "implicit":
            sides, adjoint = _through_potentials(costs, sides, adjoint, penalties)
        for grad, value in ((grad_a, adjoint.by_a), (grad_b, adjoint.by_b)):
            if grad.numel():
                grad.copy_(value.view(grad.shape))
        for grad, points, flipped in ((grad_x, x, False), (grad_y, y, True)):
            if grad.numel():
                by = large.gradient_of_points(costs, sides, adjoint, flipped)
                grad.copy_(_to_rows(by, points, metric, not flipped).view(grad.shape))
    return tuple(grads)


def _through_potentials(costs: large.Costs, sides: large.Sides, adjoint: large.Adjoint, penalties) -> tuple:
    """The implicit gradient dC = P (w_i + x_j) as one step of an unrolled loop, for the kernels: masses 1, exponents 1.

    The linear solve for w and x is that of the reference, on the plan (P, n, m) in float64.
    """
    phi, gamma = adjoint.potentials[:, 0, : costs.n], adjoint.potentials[:, 0, costs.n :]
    plan = _plan(costs, sides.epsilon, phi, gamma)
    rows, columns = plan.sum(-1), plan.sum(-2)
    served = rows > 0, columns > 0
    diagonals = [
        torch.where(mask, total / exponent, 1)
        for mask, total, exponent in zip(served, (rows, columns), (sides.lambda_a, sides.lambda_b), strict=True)
    ]
    w, x = (torch.where(mask, bar[0], 0) for mask, bar in zip(served, (adjoint.f_bar, adjoint.g_bar), strict=True))
    gauge = None
    if all(map(math.isinf, penalties)):
        gauge = _sinkhorn_implicit.Gauge(*_sinkhorn_implicit.components(plan > 0), *served)
    if gauge:
        w, x = gauge.project(w, x)
    products = (lambda w: (plan.mT @ w.unsqueeze(-1)).squeeze(-1)), (lambda x: (plan @ x.unsqueeze(-1)).squeeze(-1))
    tol = _sinkhorn_implicit.RELATIVE_RESIDUAL[large.dtype_of(costs)]
    w, x = _sinkhorn_implicit.solve(*products, *diagonals, w, x, tol)
    if gauge:
        w, x = gauge.project(w, x)
    by = []
    for weights, vector, mask, diagonal, direct in zip(
        (sides.a, sides.b), (w, x), served, diagonals, (adjoint.by_a, adjoint.by_b), strict=True
    ):
        mass = torch.where(mask, large.masses(weights, vector), 1)
        by.append(direct + torch.where(mask, sides.epsilon * diagonal / mass * vector, 0))
    ones = [torch.ones_like(vector, dtype=large.dtype_of(costs)) for vector in (w, x)]
    potentials = adjoint.potentials.expand(-1, 2, -1).contiguous()
    bars = [torch.stack([torch.zeros_like(vector), vector]) for vector in (w, x)]
    step = adjoint._replace(
        potentials=potentials, steps=torch.ones_like(adjoint.steps), f_bar=bars[0], g_bar=bars[1], by_a=by[0],
        by_b=by[1],
        unroll=True,
    )  # fmt: skip
    return large.Sides(*ones, 1.0, 1.0, 0.0, 0.0, sides.epsilon), step


def _plan(costs: large.Costs, epsilon: float, phi: Tensor, gamma: Tensor) -> Tensor:
    """(P, n, m), float64, one column of the identity after the other through `apply_plan`."""
    unit = torch.eye(costs.m, dtype=large.dtype_of(costs), device=phi.device).expand(len(phi), -1, -1).contiguous()
    return _product(costs, phi.contiguous(), gamma.contiguous(), unit, epsilon).double()


def _product(costs: large.Costs, own: Tensor, other: Tensor, v: Tensor, epsilon: float) -> Tensor:
    """P v, (P, n, width)."""
    width, data = v.shape[-1], large.dtype_of(costs)
    out = _runtime.empty((len(own), costs.n, width), v, data)
    rows, columns = large.block_of(costs.n, costs.m, data)
    block = _runtime.power_of_2(width, 1, 8)
    apply_plan[(len(own), cdiv(costs.n, rows), cdiv(width, block))](
        costs.left, costs.right, own, other, v, out, costs.n, costs.m, width, *costs.strides, costs.d, costs.wide,
        costs.factor, epsilon, METRIC=costs.metric, DATA=TL_DTYPES[data], BN=rows, BM=columns, BK=block, **large.LAUNCH,
    )  # fmt: skip
    return out


def sinkhorn_points_apply(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, metric: str, epsilon: float, transpose: bool
) -> Tensor:
    axes, width = x.shape[:-2], v.shape[-1]
    size = (*axes, (y if transpose else x).shape[-2], width)
    if not math.prod(size):
        return _runtime.empty(size, x)
    with _runtime.on_device(x):
        return _product(*_pair(x, y, f, g, metric, epsilon, transpose), flat(v, 2), epsilon).view(size)


def _pair(x, y, f, g, metric, epsilon, transpose) -> tuple[large.Costs, Tensor, Tensor]:
    """Costs and potentials, rows being those of the result."""
    unit = math.log2(math.e) / epsilon
    costs = costs_of(flat(x, 2), flat(y, 2), metric, epsilon)
    phi, gamma = flat(f, 1).double() * unit, flat(g, 1).double() * unit
    return (costs.swapped(), gamma, phi) if transpose else (costs, phi, gamma)


def sinkhorn_points_apply_bwd(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, grad_out: Tensor, metric: str, epsilon: float,
    transpose: bool, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    results = []
    for points, need, first in ((x, need_x, True), (y, need_y, False)):
        grad = _runtime.empty(points.shape if need else (0,), x)
        if grad.numel() and v.numel():
            with _runtime.on_device(x):
                costs, own, other = _pair(x, y, f, g, metric, epsilon, not first)
                ours, theirs = (v, grad_out) if first == transpose else (grad_out, v)
                by = _applied(costs, own, other, flat(theirs, 2), flat(ours, 2), epsilon)
                grad.copy_(_to_rows(by, flat(points, 2), metric, first).view(grad.shape))
        else:
            grad.zero_()
        results.append(grad)
    return tuple(results)


def _applied(costs: large.Costs, own, other, v: Tensor, grad: Tensor, epsilon: float) -> Tensor:
    rows, columns = large.block_of(costs.n, costs.m, large.dtype_of(costs))
    out = _runtime.empty((len(own), costs.d, costs.n), own).zero_()
    applied_gradient[(len(own), cdiv(costs.n, rows))](
        costs.left, costs.right, own, other, v, grad, out, costs.n, costs.m, v.shape[-1], costs.d, costs.wide,
        costs.factor,
        epsilon, METRIC=costs.metric, DATA=TL_DTYPES[large.dtype_of(costs)], BN=rows, BM=columns,
        **large.GRADIENT_LAUNCH,
    )  # fmt: skip
    return out


def aot_cases() -> list[_runtime.AotCase]:
    """A half-iteration of each metric, and the points' gradients."""
    from . import _sinkhorn_aot as aot

    cases = []
    half = {"GIVEN": True, "KEPT": True, "BEFORE": False, "RUNNING": False, "RELAXED": False, "AUTO": False}
    for metric in (METRICS["l1"], _SQUARE):
        absent = ("kept_before", "running", "omega_at")
        cases.append(aot.tiles("half iteration", large.half_iteration, torch.float32, metric, half, absent))
    gradient = {"HAS_A": True, "HAS_B": True, "CONSTANT": False, "UNROLL": True}
    for flipped in (True,):
        name = "columns' gradient" if flipped else "rows' gradient"
        constants = gradient | {"FLIPPED": flipped}
        cases.append(aot.tiles(name, large.point_gradient, torch.float32, _SQUARE, constants))
    cases.append(aot.tiles("half iteration", large.half_iteration, torch.float64, _SQUARE, half, absent))
    for dtype in (torch.float32, torch.float64):
        cases.append(aot.tiles("plan product", apply_plan, dtype, _SQUARE, {"BK": 8}))
        found = aot.tiles("gradient of a plan product", applied_gradient, dtype, _SQUARE, {})
        cases.append(found._replace(may_spill=_runtime.HELD if dtype == torch.float32 else ""))
    return cases
