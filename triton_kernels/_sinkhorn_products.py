"""The host side of ``_sinkhorn_products_kernels``: one cost (n, m), a batch of marginals, a plain loop of fixed length.

Rows are updated first. A history is (B, 4 + slots (n + m)) float64: 1 where the problems were solved on scalings,
else 0; the iterations that ran; the base, a cost that is taken from all others in <P, C>; 0; then slots of what a step
leaves for rows and columns, u and v or phi and gamma. Slots: the last; or all, the start in slot 0; or the last two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _runtime
from . import _sinkhorn_large as large
from ._runtime import cdiv
from ._sinkhorn_products_kernels import adjoint_update, exponentiate, gradient_of_cost, sums_of_plans, update

RANGE = {torch.float32: 60.0, torch.float64: 480.0}  # bits of exponents that scalings hold, see _sinkhorn_common
HEADER = 4  # even: the slots of even sizes begin at addresses that are multiples of 16
BLOCK = 1024
EXPONENTIATE = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
LAST, ALL, LAST_STEP = 1, 2, 3  # what is kept: KEEP of ops.sinkhorn


def slots_of(num_iters: int, keep: int) -> int:
    """Slots of a history."""
    return {0: 0, LAST: 1, ALL: num_iters + 1, LAST_STEP: 2}[keep]


def history_size(n: int, m: int, num_iters: int, keep: int) -> int:
    """Doubles of a problem's history; it differs from that of :func:`.ops.sinkhorn.history_size`."""
    return HEADER + slots_of(num_iters, keep) * (n + m) if keep else 0


def serves(num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float) -> bool:
    """Whether the loop is a plain one of fixed length."""
    return num_iters > 0 and tol == 0 and relaxation == 1 and math.isinf(penalty_a) and math.isinf(penalty_b)


def tiles_of(problems: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Problems and rows of a tile, columns at a time: small ones, so that few problems occupy the device."""
    launch = {"BN": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 4, "enable_fp_fusion": True}
    return {"BP": 16 if problems <= 64 or dtype is torch.float64 else 32} | launch


def gradient_tiles(dtype: torch.dtype) -> dict[str, int | bool]:
    """Tile of the cost's gradient, problems at a time, columns at a time in the log domain."""
    launch = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    if dtype is torch.float64:
        return {"BN": 32, "BM": 32, "DEPTH": 16, "CHUNK": 8} | launch
    return {"BN": 64, "BM": 32, "DEPTH": 32, "CHUNK": 8} | launch


class Shared(NamedTuple):
    """A batch, and what the kernels take the costs from; rows first."""

    cost: Tensor  # (n, m), contiguous
    kernel: Tensor  # K
    flag: Tensor  # (1,) int32: whether K is there and scalings hold
    least: Tensor  # (n,), the smallest cost of each row
    base: Tensor  # (1,) float64: the smallest cost, 0 without a flag
    sides: large.Sides
    problems: int

    def operands(self, swapped: bool) -> tuple:
        """What `update` and others take of one side: weights, then n, m and the strides of the cost."""
        n, m = self.cost.shape
        return (self.sides.b, m, n, 1, m) if swapped else (self.sides.a, n, m, m, 1)


def prepare(cost: Tensor, sides: large.Sides, start: Tensor, flag: Tensor | None = None) -> Shared:
    """K of the cost (n, m); start (B, m): gamma before the first iteration. flag: of the forward."""
    cost = cost.contiguous()
    n, m = cost.shape
    least = cost.amin(1)
    smallest = least.amin().double()
    if flag is None:
        span = (cost.amax().double() - smallest) * (math.log2(math.e) / sides.epsilon)
        span = span + torch.where(start > -torch.inf, start.abs(), 0).amax()
        flag = span <= RANGE[cost.dtype]  # not for infinite costs, nor for those that are not numbers
    flag = flag.view(1).int()
    base = torch.where(flag != 0, smallest, 0)
    kernel = _runtime.empty(cost.shape, cost)
    exponentiate[(n, cdiv(m, BLOCK))](cost, least, flag, kernel, m, sides.epsilon, BLOCK=BLOCK, **EXPONENTIATE)
    return Shared(cost, kernel, flag, least, base, sides, len(start))


def _grid(shared: Shared, size: int, tiles: dict) -> tuple[int, int]:
    return cdiv(shared.problems, tiles["BP"]), cdiv(size, tiles["BN"])


def _update(shared: Shared, own: Tensor, other: Tensor, swapped: bool) -> None:
    weights, *sizes = shared.operands(swapped)
    tiles = tiles_of(shared.problems, shared.cost.dtype)
    update[_grid(shared, sizes[0], tiles)](
        shared.kernel, shared.cost, shared.flag, weights, other, own, shared.problems, *sizes, other.stride(0),
        own.stride(0), shared.sides.epsilon, GIVEN=weights is not None, **tiles,
    )  # fmt: skip


def sums(shared: Shared, own: Tensor, other: Tensor, spent: Tensor, mass: Tensor | None, swapped: bool) -> None:
    """spent = (P o (C - base)) 1 and mass = P 1 of the rows; swapped: of the columns."""
    _, *sizes = shared.operands(swapped)
    tiles = tiles_of(shared.problems, shared.cost.dtype)
    sums_of_plans[_grid(shared, sizes[0], tiles)](
        shared.kernel, shared.cost, shared.flag, shared.base, other, own, mass, spent, shared.problems, *sizes,
        other.stride(0), own.stride(0), shared.sides.epsilon, MASS=mass is not None, **tiles,
    )  # fmt: skip


def potentials(shared: Shared, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """phi (B, n) and gamma (B, m) of what a step left."""
    shift = shared.least.double() * (math.log2(math.e) / shared.sides.epsilon)
    scaled = shared.flag != 0
    return torch.where(scaled, rows.log2() + shift, rows), torch.where(scaled, columns.log2(), columns)


def first_columns(shared: Shared, start: Tensor) -> Tensor:
    """What the columns begin with."""
    return torch.where(shared.flag != 0, start.exp2(), start)


def start_of(sides: large.Sides, initial_g: Tensor | None, problems: int, m: int, like: Tensor) -> Tensor:
    """gamma before the first iteration, (B, m) float64."""
    return large.start(initial_g, sides.b, (problems, m), like, sides.epsilon)


def solve(cost: Tensor, sides: large.Sides, initial_g, outputs: tuple[Tensor, ...], num_iters: int, keep: int) -> None:
    """Fills transport_cost, regularized_cost, f, g, marginal_error, count, history; all (B, ...), rows first."""
    count, history = outputs[5:]
    problems, (n, m) = len(count), cost.shape
    start = start_of(sides, initial_g, problems, m, cost)
    shared = prepare(cost, sides, start)
    columns = first_columns(shared, start)
    count.fill_(num_iters)
    rows, own = (_runtime.empty((problems, size), cost, torch.float64) for size in (n, m))
    slots = history[:, HEADER:].unflatten(1, (-1, n + m)) if keep else None
    if keep in (ALL, LAST_STEP):
        first = 0 if keep == ALL else (num_iters + 1) % 2
        slots[:, first, :n], slots[:, first, n:] = -torch.inf, columns
    for t in range(num_iters):
        if keep:
            slot = {LAST: 0, ALL: t + 1, LAST_STEP: (num_iters - t) % 2}[keep]
            rows, own = slots[:, slot, :n], slots[:, slot, n:]
        _update(shared, rows, columns, False)
        _update(shared, own, rows, True)
        columns = own
    if keep:
        history[:, 0], history[:, 1], history[:, 2], history[:, 3] = shared.flag, num_iters, shared.base, 0
    _finish(shared, rows, columns, outputs)


def _finish(shared: Shared, rows: Tensor, columns: Tensor, outputs: tuple[Tensor, ...]) -> None:
    """The columns of a plan are exact after their update."""
    like = torch.float64
    mass, spent = (_runtime.empty(rows.shape, shared.cost, like) for _ in range(2))
    sums(shared, rows, columns, spent, mass, False)
    spent += shared.base * mass
    phi, gamma = potentials(shared, rows, columns)
    exact = torch.where(gamma > -torch.inf, large.masses(shared.sides.b, gamma), 0)
    large._finish(shared.sides, phi, gamma, mass, exact, spent, outputs)


class Incoming(NamedTuple):
    """Gradients of the outputs, (B, ...) or None."""

    transport: Tensor | None
    value: Tensor | None
    f: Tensor | None
    g: Tensor | None


def differentiate(
    cost: Tensor, sides: large.Sides, initial_g, history: Tensor, incoming: Incoming, grads: tuple[Tensor, ...],
    num_iters: int, gradient: str,
) -> None:  # fmt: skip
    """Fills the gradients of cost (n, m), a and b; empty where they are not needed. Rows first."""
    n, m = cost.shape
    start = start_of(sides, initial_g, len(history), m, cost)
    shared = prepare(cost, sides, start, history[0, 0] != 0)
    slots = history[:, HEADER:].unflatten(1, (-1, n + m))
    steps = {"unroll": num_iters, "last_step": 1}.get(gradient, 0)
    transport, value = (
        _runtime.empty((shared.problems,), cost, torch.float64).zero_() if grad is None else grad.double()
        for grad in incoming[:2]
    )
    left, right = _adjoint_memory(shared, slots, steps, bool(grads[0].numel()))
    by_a = by_b = 0
    if steps:
        by_a, by_b = _adjoints(shared, slots, steps, incoming, transport, value, left, right)
        by_b = by_b + shared.base * transport[:, None]
    if grads[0].numel():
        plan = transport + value  # of 'envelope' and 'detach' one of them is 0
        _gradient_of_cost(shared, slots, steps, transport, plan, left, right, grads[0], steps == 0)
    last = slots[:, steps]
    pairs = zip(grads[1:], (by_a, by_b), _dual_gradients(shared, last[:, :n], last[:, n:], value), strict=True)
    for grad, collected, (direct, served) in pairs:
        if grad.numel():
            grad.copy_(torch.where(served, collected + direct, 0))


def _adjoint_memory(shared: Shared, slots: Tensor, steps: int, every: bool) -> tuple[Tensor, Tensor]:
    """Left and right operands of the cost's gradient, (2 S + 1, B, n) and (2 S + 1, B, m), without the adjoints yet.

    Left: u of each step, u with the adjoints of the rows, u of the last step. Right: v with the adjoints of the
    columns, v of the step before, v of the last. Without `every` step's, only memory for the adjoints of one.
    """
    n, m = shared.cost.shape
    count = 2 * steps + 1 if every else 2
    left, right = (_runtime.empty((count, shared.problems, size), shared.cost) for size in (n, m))
    if every:
        states = slots.movedim(1, 0)  # (S + 1, B, n + m)
        left[:steps], left[-1] = states[1:, :, :n], states[-1, :, :n]
        right[steps : 2 * steps] = states[:-1, :, n:]
    return left, right


def _adjoints(shared, slots, steps, incoming, transport, value, left, right) -> tuple[Tensor, Tensor]:
    """Gradients of a and b by the potentials, float64; left and right get the adjoints of each step."""
    n, m = shared.cost.shape
    every = len(left) > 2
    rows, columns = slots[:, steps, :n], slots[:, steps, n:]
    first_rows, vector, by_rows, by_columns = _first_adjoints(shared, rows, columns, incoming, transport, value)
    (right[steps - 1] if every else right[0]).copy_(vector)
    tiles = tiles_of(shared.problems, shared.cost.dtype)
    for t in range(steps, 0, -1):
        w = right[t - 1] if every else right[0]
        z = left[steps + t - 1] if every else left[0]
        for swapped in (False, True) if t > 1 else (False,):
            weights, *sizes = shared.operands(swapped)
            own, other = slots[:, t, :n], slots[:, t, n:]
            vectors, collected, out = w, by_rows, z
            if swapped:
                own, other = slots[:, t - 1, n:], own
                vectors, collected, out = z, by_columns, right[t - 2] if every else right[0]
            starts = t == steps and not swapped
            adjoint_update[_grid(shared, sizes[0], tiles)](
                shared.kernel, shared.cost, shared.flag, weights, other, own, vectors, first_rows if starts else None,
                collected, out, shared.problems, *sizes, other.stride(0), own.stride(0), shared.sides.epsilon,
                GIVEN=weights is not None, STARTS=starts, **tiles,
            )  # fmt: skip
    return shared.sides.epsilon * by_rows, shared.sides.epsilon * by_columns


def _first_adjoints(shared, rows, columns, incoming, transport, value) -> tuple[Tensor, ...]:
    """Of the last potentials: the rows', for a unit of mass; a vector of `adjoint_update`; the first of the sums."""
    epsilon, like = shared.sides.epsilon, shared.cost
    mass, spent = (_runtime.empty(rows.shape, like, torch.float64) for _ in range(2))
    spent_columns = _runtime.empty(columns.shape, like, torch.float64)
    sums(shared, rows, columns, spent, mass, False)
    sums(shared, columns, rows, spent_columns, None, True)
    sides = []
    for state, given, weights, cost, excess in (
        (rows, incoming.f, shared.sides.a, spent, mass), (columns, incoming.g, shared.sides.b, spent_columns, None),
    ):  # fmt: skip
        weights = large.masses(weights, state)
        adjoint = transport[:, None] * cost / epsilon
        if excess is not None:  # the columns of a plan are exact
            adjoint = adjoint + value[:, None] * (weights - excess)
        if given is not None:
            adjoint = adjoint + given.double()
        served = (weights > 0) & torch.where(shared.flag != 0, state != 0, state != -torch.inf)
        sides.append(torch.where(served, adjoint / torch.where(weights > 0, weights, 1), 0))
    vector = torch.where(shared.flag != 0, sides[1] * columns, sides[1])
    return sides[0], vector, _runtime.empty(rows.shape, like, torch.float64).zero_(), sides[1]


def _dual_gradients(shared: Shared, rows: Tensor, columns: Tensor, value: Tensor):
    """Of a and b at fixed potentials in the dual value, and where they are served."""
    phi, gamma = potentials(shared, rows, columns)
    weights = large.masses(shared.sides.a, phi), large.masses(shared.sides.b, gamma)
    for own, other, potential in ((*weights, phi), (*weights[::-1], gamma)):
        shift, served = large.relative(own, potential)
        direct = shared.sides.epsilon * (shift * math.log(2) - 1 + other.sum(-1, keepdim=True))
        yield value[:, None] * direct, served & (own > 0)


def _gradient_of_cost(shared, slots, steps, transport, plan, left, right, out, constant: bool) -> None:
    n, m = shared.cost.shape
    last = slots[:, steps, n:]
    right[-1] = last * plan[:, None]
    bill = _runtime.empty((shared.problems, m), shared.cost)
    bill.copy_(last * transport[:, None])
    tiles = gradient_tiles(shared.cost.dtype)
    gradient_of_cost[(cdiv(n, tiles["BN"]), cdiv(m, tiles["BM"]))](
        shared.kernel, shared.cost, shared.flag, shared.base, slots, left, right, bill, transport, plan, out,
        shared.problems, n, m, steps, slots.stride(0), len(left) * shared.problems, shared.sides.epsilon,
        CONSTANT=constant, **tiles,
    )  # fmt: skip
