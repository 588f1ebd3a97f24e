"""The host side of ``_sinkhorn_tiles``: the loop of launches, and the vectors around it. Nothing waits for the device.

A history is (P, 2 + slots (n + m)) float64: 0, the iterations that ran, then phi and gamma of each slot
(`_sinkhorn_common`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _runtime
from ._runtime import TL_DTYPES, cdiv
from ._sinkhorn_tiles import decide, half_iteration, plan_sums
from ._sinkhorn_tiles_bwd import back_half, cost_gradient, point_gradient

LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
GRADIENT_LAUNCH = LAUNCH | {"num_warps": 8}
BLOCK = 512  # entries of a vector at a time, in `decide`


class Costs(NamedTuple):
    """What the kernels take the costs of P problems from; rows are updated first."""

    left: Tensor  # a matrix (P, n, m), P of stride 0 where it is shared, or points (P, d, n)
    right: Tensor  # the same matrix, or points (P, d, m)
    n: int
    m: int
    strides: tuple[int, int, int]
    d: int
    metric: int  # of the kernels; -1 for a matrix
    factor: float
    wide: Tensor  # (P,): whether points are compared in float64

    @property
    def shared(self) -> bool:
        return self.metric == DENSE_CODE and self.strides[0] == 0

    def swapped(self) -> Costs:
        """Rows and columns exchanged."""
        stride_p, stride_i, stride_j = self.strides
        return self._replace(
            left=self.right, right=self.left, n=self.m, m=self.n, strides=(stride_p, stride_j, stride_i)
        )


DENSE_CODE = -1


def block_of(n: int, m: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a block of costs: rows few enough that a problem occupies the device, 16 entries a thread."""
    rows = _runtime.power_of_2(n, 1, 16 if n <= 2048 else 64)
    return rows, _runtime.power_of_2(m, 1, 1024 // rows * (2 if dtype is torch.float32 else 1))


def matrix(cost: Tensor) -> Costs:
    """cost (P, n, m) of any strides."""
    return Costs(cost, cost, *cost.shape[1:], tuple(cost.stride()), 0, DENSE_CODE, 1.0, cost)


class Sides(NamedTuple):
    """Masses (P, n) and (P, m) or None, and what the options make of them; rows first."""

    a: Tensor | None
    b: Tensor | None
    lambda_a: float
    lambda_b: float
    drop_a: float
    drop_b: float
    epsilon: float

    def swapped(self) -> Sides:
        return Sides(self.b, self.a, self.lambda_b, self.lambda_a, self.drop_b, self.drop_a, self.epsilon)


def masses(weights: Tensor | None, like: Tensor) -> Tensor:
    """Float64 masses in the shape of `like`."""
    return torch.full_like(like, 1 / like.shape[-1]) if weights is None else weights.double()


def relative(weights: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
    """potential - log2 weights where it is finite, else 0; and where that is."""
    served = potential > -torch.inf
    return torch.where(served, potential - torch.where(weights > 0, weights, 1).log2(), 0), served


def start(
    initial: Tensor | None, weights: Tensor | None, shape: tuple[int, int], like: Tensor, epsilon: float
) -> Tensor:
    """phi before the first iteration, (P, n) float64."""
    value = _runtime.empty(shape, like, torch.float64).zero_()
    if initial is not None:
        finite = torch.where(initial.isfinite(), initial, 0).double()
        value.copy_(finite * (math.log2(math.e) / epsilon))
    return value if weights is None else value.masked_fill_(weights <= 0, -torch.inf)


def _half(costs: Costs, sides: Sides, own, other, relaxation, state, kept=None, before=None) -> None:
    """`own` after `other`; state: running and omega, or None."""
    rows, columns = block_of(costs.n, costs.m, dtype_of(costs))
    running, omega_at = state
    half_iteration[(own.shape[0], cdiv(costs.n, rows))](
        costs.left, costs.right, sides.a, own, other, kept, before, running, omega_at, costs.n, costs.m, *costs.strides,
        costs.d, costs.wide, 0 if kept is None else kept.stride(0), costs.factor, sides.epsilon, sides.lambda_a,
        relaxation or 1.0,
        METRIC=costs.metric, DATA=TL_DTYPES[dtype_of(costs)], GIVEN=sides.a is not None, KEPT=kept is not None,
        BEFORE=before is not None, RUNNING=running is not None, RELAXED=relaxation != 1, AUTO=relaxation == 0,
        BN=rows, BM=columns, **LAUNCH,
    )  # fmt: skip


def sums(costs: Costs, epsilon: float, own, other, mass, spent=None, running=None) -> None:
    """P 1 into mass, and the costs of the rows into spent."""
    rows, columns = block_of(costs.n, costs.m, dtype_of(costs))
    plan_sums[(own.shape[0], cdiv(costs.n, rows))](
        costs.left, costs.right, own, other, mass, spent, running, costs.n, costs.m, *costs.strides, costs.d,
        costs.wide,
        costs.factor, epsilon,
        METRIC=costs.metric, DATA=TL_DTYPES[dtype_of(costs)], SPENT=spent is not None, RUNNING=running is not None,
        BN=rows, BM=columns, **LAUNCH,
    )  # fmt: skip


def dtype_of(costs: Costs) -> torch.dtype:
    """Of the exponentials."""
    return costs.right.dtype if costs.metric == DENSE_CODE else DATA_OF[costs.wide.dtype]


DATA_OF = {torch.int32: torch.float32, torch.int64: torch.float64}  # the type of Costs.wide tells that of the points


def solve(
    costs: Costs, sides: Sides, initial_f, initial_g, outputs: tuple[Tensor, ...], num_iters: int, tol: float,
    relaxation: float, keep: int,
) -> None:  # fmt: skip
    """Fills transport_cost, regularized_cost, f, g, marginal_error, count, history; all (P, ...), rows first."""
    transport_cost, regularized_cost, f, g, marginal_error, count, history = outputs
    problems, (n, m) = len(count), (costs.n, costs.m)
    phi = start(initial_f, sides.a, (problems, n), f, sides.epsilon)
    gamma = start(initial_g, sides.b, (problems, m), f, sides.epsilon)
    rows, spent = (_runtime.empty((problems, n), f, torch.float64) for _ in range(2))
    columns = _runtime.empty((problems, m), f, torch.float64)
    watched = tol > 0 or relaxation == 0
    running = omega = previous = None
    if watched:
        running = _runtime.empty((problems,), f, torch.int32).fill_(1)
        omega, previous = (_runtime.empty((problems,), f, torch.float64).fill_(value) for value in (1.0, 0.0))
    else:
        count.fill_(num_iters)
    other_way, other_sides = costs.swapped(), sides.swapped()
    slots = history[:, 2:]
    for k in range(num_iters):
        at, before = (k if keep == 2 else 1), (0 if keep == 3 else None)
        kept = [None] * 4
        if keep in (2, 3):
            kept[:2] = slots[:, at * (n + m) :], slots[:, at * (n + m) + n :]
        if before is not None:
            kept[2:] = slots, slots[:, n:]
        _half(costs, sides, phi, gamma, relaxation, (running, omega), kept[0], kept[2])
        _half(other_way, other_sides, gamma, phi, relaxation, (running, omega), kept[1], kept[3])
        if watched and (tol > 0 or k + 1 == 9 or (k + 1) % 10 == 0 or k + 1 == num_iters):
            sums(costs, sides.epsilon, phi, gamma, rows, None, running)
            sums(other_way, sides.epsilon, gamma, phi, columns, None, running)
            decide[(problems,)](
                sides.a, sides.b, phi, gamma, rows, columns, running, count, omega, previous, n, m, k + 1, tol,
                sides.drop_a,
                sides.drop_b, HAS_A=sides.a is not None, HAS_B=sides.b is not None, STOP=tol > 0, AUTO=relaxation == 0,
                DATA=TL_DTYPES[dtype_of(costs)], BLOCK=BLOCK, **LAUNCH,
            )  # fmt: skip
    sums(costs, sides.epsilon, phi, gamma, rows, spent)
    sums(other_way, sides.epsilon, gamma, phi, columns)
    if keep:
        history[:, 0] = 0
        history[:, 1] = count
    if keep == 1:
        slots[:, :n], slots[:, n:] = phi, gamma
    _finish(sides, phi, gamma, rows, columns, spent, outputs)


def _finish(sides: Sides, phi, gamma, rows, columns, spent, outputs) -> None:
    transport_cost, regularized_cost, f, g, marginal_error, *_ = outputs
    unit = sides.epsilon * math.log(2)
    transport_cost.copy_(spent.sum(-1))
    value = error = 0
    totals = []
    for weights, potential, mass, drop in ((sides.a, phi, rows, sides.drop_a), (sides.b, gamma, columns, sides.drop_b)):
        weights = masses(weights, potential)
        shift, served = relative(weights, potential)
        totals.append(weights.sum(-1))
        if drop:
            exponent = -shift * (drop * math.log(2))
            value = value + sides.epsilon / drop * (weights * torch.where(served, -exponent.expm1(), 1)).sum(-1)
            error = error + (mass - torch.where(served, weights * exponent.exp(), 0)).abs().sum(-1)
        else:
            value = value + unit * (weights * shift).sum(-1)
            error = error + (mass - weights).abs().sum(-1)
    regularized_cost.copy_(value + sides.epsilon * (totals[0] * totals[1] - rows.sum(-1)))
    marginal_error.copy_(error)
    f.copy_(phi * unit)
    g.copy_(gamma * unit)


class Adjoint(NamedTuple):
    """What the gradient of the costs is formed from."""

    potentials: Tensor  # (P, S, n + m), slot t after step t
    steps: Tensor  # (P,) int32
    f_bar: Tensor  # (S, P, n), of each step
    g_bar: Tensor  # (S, P, m)
    transport: Tensor  # (P,) float64
    value: Tensor  # (P,)
    by_a: Tensor  # (P, n)
    by_b: Tensor  # (P, m)
    unroll: bool
    constant: bool  # the plan is


def differentiate(
    costs: Costs,
    sides: Sides,
    initial_g,
    history: Tensor,
    incoming: tuple[Tensor | None, ...],
    num_iters: int,
    gradient: str,
) -> Adjoint:
    """The adjoint loop; with 'implicit' only the derivatives by the final potentials, in slot 0 of f_bar and g_bar."""
    problems, (n, m) = len(history), (costs.n, costs.m)
    slots = history[:, 2:].unflatten(1, (-1, n + m))
    steps = _runtime.empty((problems,), history, torch.int32).fill_(1 if gradient == "last_step" else 0)
    if gradient == "unroll":
        steps.copy_(history[:, 1])
        before = _runtime.empty((problems, 1, n + m), history).fill_(-torch.inf)
        before[:, 0, n:] = start(initial_g, sides.b, (problems, m), history, sides.epsilon)
        slots = torch.cat([before, slots], 1)
    potentials = slots.contiguous()
    last = steps.long().view(-1, 1, 1).expand(-1, 1, n + m)
    final = potentials.gather(1, last).squeeze(1)
    phi, gamma = final[:, :n].contiguous(), final[:, n:].contiguous()
    transport, value = (
        _runtime.empty((problems,), history).zero_() if grad is None else grad.double() for grad in incoming[:2]
    )
    rows, spent = _runtime.empty((problems, n), history), _runtime.empty((problems, n), history)
    columns, spent_columns = _runtime.empty((problems, m), history), _runtime.empty((problems, m), history)
    sums(costs, sides.epsilon, phi, gamma, rows, spent)
    sums(costs.swapped(), sides.epsilon, gamma, phi, columns, spent_columns)
    weights = masses(sides.a, phi), masses(sides.b, gamma)
    to_f, by_a = _end(weights[0], phi, rows, weights[1].sum(-1), sides.drop_a, sides.epsilon)
    to_g, by_b = _end(weights[1], gamma, columns, weights[0].sum(-1), sides.drop_b, sides.epsilon)
    factor = value if gradient in ("unroll", "last_step") else torch.zeros_like(value)
    last_f = factor[:, None] * to_f + transport[:, None] * spent / sides.epsilon
    last_g = factor[:, None] * to_g + transport[:, None] * spent_columns / sides.epsilon
    if incoming[2] is not None:
        last_f = last_f + torch.where(phi > -torch.inf, incoming[2].double(), 0)
    if incoming[3] is not None:
        last_g = last_g + torch.where(gamma > -torch.inf, incoming[3].double(), 0)
    by_a, by_b = value[:, None] * by_a, value[:, None] * by_b
    unroll = gradient in ("unroll", "last_step")
    count = potentials.shape[1] if unroll else 1
    f_bar = _runtime.empty((count, problems, n), history).zero_()
    g_bar = _runtime.empty((count, problems, m), history).zero_()
    adjoint = Adjoint(potentials, steps, f_bar, g_bar, transport, value, by_a, by_b, unroll, gradient == "detach")
    if unroll:
        last_f, last_g = last_f.contiguous(), last_g.contiguous()
        g_bar.scatter_(0, steps.long().view(1, -1, 1).expand(1, -1, m), last_g.unsqueeze(0))
        return _unrolled(costs, sides, adjoint, last_f, weights)
    f_bar[0], g_bar[0] = last_f, last_g
    return adjoint


def _end(weights, potential, mass, other_total, drop, epsilon) -> tuple[Tensor, Tensor]:
    """Of the dual value at fixed costs: by the potential, and by the masses at a fixed potential."""
    shift, served = relative(weights, potential)
    other = epsilon * other_total[:, None]
    if drop:
        exponent = -shift * (drop * math.log(2))
        by_mass = (
            torch.where(served, -epsilon / drop * exponent.expm1() - epsilon * exponent.exp(), epsilon / drop) + other
        )
        counted = weights > 0
    else:
        exponent = torch.zeros_like(shift)
        by_mass = epsilon * (shift * math.log(2) - 1) + other
        counted = (weights > 0) & served
    return torch.where(served, weights * exponent.exp() - mass, 0), torch.where(counted, by_mass, 0)


def _unrolled(costs: Costs, sides: Sides, adjoint: Adjoint, last_f: Tensor, weights) -> Adjoint:
    potentials, steps, f_bar, g_bar = adjoint[:4]
    n = costs.n
    for t in range(potentials.shape[1] - 1, 0, -1):
        now = potentials[:, t]
        _back(costs, sides.b, sides.lambda_b, now, now[:, n:], g_bar[t], f_bar[t], last_f, steps, t, sides.epsilon)
        if t > 1:
            # g_bar[t - 1] of problems whose last step is t - 1 is there already
            columns = potentials[:, t - 1, n:]
            _back(
                costs.swapped(),
                sides.a,
                sides.lambda_a,
                columns,
                now,
                f_bar[t],
                g_bar[t - 1],
                None,
                steps,
                t,
                sides.epsilon,
            )
    by = []
    for weight, bar, direct in zip(weights, (f_bar, g_bar), (adjoint.by_a, adjoint.by_b), strict=True):
        inverse = torch.where(weight > 0, 1 / torch.where(weight > 0, weight, 1), 0)
        by.append(direct + sides.epsilon * inverse * bar.sum(0))
    return adjoint._replace(by_a=by[0], by_b=by[1])


def _back(costs: Costs, weights, exponent, own, other, vector, out, first, steps, step, epsilon) -> None:
    rows, columns = block_of(costs.n, costs.m, dtype_of(costs))
    back_half[(len(steps), cdiv(costs.n, rows))](
        costs.left, costs.right, weights, own, other, vector, out, first, steps, step, costs.n, costs.m,
        *costs.strides, costs.d,
        costs.wide, own.stride(0), costs.factor, epsilon, exponent,
        METRIC=costs.metric, DATA=TL_DTYPES[dtype_of(costs)], GIVEN=weights is not None, STARTS=first is not None,
        BN=rows, BM=columns, **LAUNCH,
    )  # fmt: skip


def _operands(sides: Sides, adjoint: Adjoint, n: int) -> tuple:
    return (
        sides.a, sides.b, adjoint.potentials, adjoint.potentials[:, :, n:], adjoint.f_bar, adjoint.g_bar,
        adjoint.transport,
        adjoint.value, adjoint.steps,
    )  # fmt: skip


def _constexprs(costs: Costs, sides: Sides, adjoint: Adjoint, rows: int, columns: int) -> dict:
    return {
        "DATA": TL_DTYPES[dtype_of(costs)], "HAS_A": sides.a is not None, "HAS_B": sides.b is not None,
        "CONSTANT": adjoint.constant, "UNROLL": adjoint.unroll, "BN": rows, "BM": columns, **GRADIENT_LAUNCH,
    }  # fmt: skip


def gradient_of_costs(costs: Costs, sides: Sides, adjoint: Adjoint, out: Tensor) -> None:
    """Fills out (P, n, m) of any strides; (1, n, m), the sum over the problems, where the cost is shared."""
    problems = len(adjoint.steps)
    together = problems // len(out)
    rows, columns = block_of(costs.n, costs.m, dtype_of(costs))
    rows, columns = min(rows, 16), max(1, columns // 2)
    cost_gradient[(len(out), cdiv(costs.n, rows), cdiv(costs.m, columns))](
        costs.left, *_operands(sides, adjoint, costs.n), out, costs.n, costs.m, problems, together, *costs.strides,
        *out.stride(), adjoint.potentials.stride(0), costs.n + costs.m, sides.epsilon, sides.lambda_a, sides.lambda_b,
        **_constexprs(costs, sides, adjoint, rows, columns),
    )  # fmt: skip


def gradient_of_points(costs: Costs, sides: Sides, adjoint: Adjoint, flipped: bool) -> Tensor:
    """(P, d, n) float64 for the rows' points; `flipped`: (P, d, m) for those of the columns."""
    view = costs.swapped() if flipped else costs
    problems = len(adjoint.steps)
    rows, columns = block_of(view.n, view.m, dtype_of(costs))
    columns = max(1, columns // 2)
    out = _runtime.empty((problems, costs.d, view.n), adjoint.by_a).zero_()
    point_gradient[(problems, cdiv(view.n, rows))](
        view.left, view.right, *_operands(sides, adjoint, costs.n), out, view.n, view.m, problems, costs.d, costs.wide,
        adjoint.potentials.stride(0), costs.n + costs.m, costs.factor, sides.epsilon, sides.lambda_a, sides.lambda_b,
        METRIC=costs.metric, FLIPPED=flipped, **_constexprs(costs, sides, adjoint, rows, columns),
    )  # fmt: skip
    return out
