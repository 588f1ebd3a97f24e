"""``sinkhorn_fwd`` and ``sinkhorn_bwd`` by Triton (see ``ops/sinkhorn.py``): problems that fit in one program by
``_sinkhorn_small``, others by ``_sinkhorn_tiles``. The implicit gradient starts in a kernel; its linear solve is that
of the reference.

Rows are updated first; columns first is the transposed problem, by exchanged strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.sinkhorn import GRADIENTS, KEEP, history_size
from ..reference import _sinkhorn_implicit
from . import _runtime
from . import _sinkhorn_large as large
from ._sinkhorn_small import solve_small
from ._sinkhorn_small_bwd import differentiate_small

SMALL = {torch.float32: 128 * 128, torch.float64: 64 * 128}  # largest padded tile of a problem on chip
LONGEST = 256  # side of it
FULL = "512 threads may have 128 registers each, of which the kernel takes 32, its gradient 32, a product 32"


class Problems(NamedTuple):
    """A batch as the kernels take it, rows updated first."""

    cost: Tensor  # (P, n, m), any strides
    a: Tensor | None  # (P, n)
    b: Tensor | None  # (P, m)
    initial_f: Tensor | None
    initial_g: Tensor | None
    epsilon: float
    penalty_a: float
    penalty_b: float
    flipped: bool  # rows are the caller's columns

    @property
    def sizes(self) -> tuple[int, int, int]:
        return tuple(self.cost.shape)

    def damping(self) -> tuple[float, float, float, float]:
        """lambda_a, lambda_b, the exponents of an update, and epsilon / penalty of each side, 0 for a constraint."""
        pair = (self.penalty_a, self.penalty_b)
        exponents = (1.0 if math.isinf(penalty) else penalty / (penalty + self.epsilon) for penalty in pair)
        return *exponents, *(0.0 if math.isinf(penalty) else self.epsilon / penalty for penalty in pair)

    @property
    def sides(self) -> large.Sides:
        return large.Sides(self.a, self.b, *self.damping(), self.epsilon)

    @property
    def plain(self) -> bool:
        return math.isinf(self.penalty_a) and math.isinf(self.penalty_b)


def flat(tensor: Tensor | None, rank: int) -> Tensor | None:
    """Batch axes as one, contiguous: (P, size), (P,) for rank 0."""
    if tensor is None:
        return None
    shape = tensor.shape[tensor.dim() - rank :]
    return tensor.reshape(-1, *shape).contiguous()


def problems(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float,
    penalty_a: float, penalty_b: float, update_a_first: bool,
) -> Problems:  # fmt: skip
    """The arguments of the op as one batch with rows first."""
    cost = cost.reshape(-1, *cost.shape[-2:])
    a, b, initial_f, initial_g = (flat(t, 1) for t in (a, b, initial_f, initial_g))
    if update_a_first:
        return Problems(cost, a, b, initial_f, initial_g, epsilon, penalty_a, penalty_b, False)
    return Problems(cost.mT, b, a, initial_g, initial_f, epsilon, penalty_b, penalty_a, True)


def compact(cost: Tensor) -> Tensor:
    """The costs (P, n, m) with offsets within a problem below 2^31."""
    span = sum((size - 1) * stride for size, stride in zip(cost.shape[1:], cost.stride()[1:], strict=True))
    return cost if span < 2**31 else cost.contiguous()


class Tile(NamedTuple):
    """Padded sizes, columns a chunk, and warps of a problem on chip."""

    rows: int
    columns: int
    chunk: int
    warps: int

    @property
    def launch(self) -> dict[str, int | bool]:
        return {
            "BN": self.rows, "BM": self.columns, "CHUNK": self.chunk, "num_warps": self.warps, "num_stages": 1,
            "enable_fp_fusion": True,
        }  # fmt: skip


def tile_of(n: int, m: int, dtype: torch.dtype, backward: bool = False) -> Tile:
    """32 registers a thread for the kernel, backward 16 beside those of its gradient; 8 costs a thread in a chunk,
    backward 4, and fewer where ptxas would spill: in one warp, in 16, and in float64.
    """
    rows, columns = _runtime.power_of_2(n), _runtime.power_of_2(m)
    warps = min(16, max(1, rows * columns * dtype.itemsize // (2048 if backward else 4096)))
    if backward and dtype is torch.float64:
        warps = min(8, warps)  # 255 registers a thread, not 128
    each = 4 if backward else 2 if warps == 1 else 8
    if dtype is torch.float64:
        each = 1 if warps == 1 and not backward else 2
    elif warps == 16:
        each = 2
    chunk = max(1, warps * 32 * each // rows)
    return Tile(rows, columns, min(columns, chunk), warps)


def is_small(n: int, m: int, dtype: torch.dtype) -> bool:
    """Whether a problem fits in one program."""
    tile = tile_of(n, m, dtype)
    return tile.rows * tile.columns <= SMALL[dtype] and max(n, m) <= LONGEST


def solve(
    batch: Problems, outputs: tuple[Tensor, ...], num_iters: int, tol: float, relaxation: float, keep: int
) -> None:
    """Fills transport_cost, regularized_cost, f, g, marginal_error, count, history; all (P, ...), rows first."""
    count, n, m = batch.sizes
    if not is_small(n, m, batch.cost.dtype):
        costs, initial = large.matrix(batch.cost), (batch.initial_f, batch.initial_g)
        large.solve(costs, batch.sides, *initial, outputs, num_iters, tol, relaxation, keep)
        return
    history, cost = outputs[6], compact(batch.cost)
    scratch = _runtime.empty((count, m), history)
    solve_small[(count,)](
        cost, batch.a, batch.b, batch.initial_f, batch.initial_g, *outputs,
        scratch, n, m, *cost.stride(), num_iters, history.shape[-1],
        batch.epsilon, tol, 1.0 if relaxation == 0 else relaxation, *batch.damping(),
        HAS_A=batch.a is not None, HAS_B=batch.b is not None,
        HAS_F=batch.initial_f is not None, HAS_G=batch.initial_g is not None,
        KEEP=keep, STOP=tol > 0, AUTO=relaxation == 0, RELAXED=relaxation != 1, PLAIN=batch.plain and relaxation == 1,
        **tile_of(n, m, batch.cost.dtype).launch,
    )  # fmt: skip


def sinkhorn_fwd(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    *axes, n, m = cost.shape
    values = [_runtime.empty(axes, cost) for _ in range(2)]
    f, g = _runtime.empty((*axes, n), cost), _runtime.empty((*axes, m), cost)
    error, count = _runtime.empty(axes, cost), _runtime.empty(axes, cost, torch.int64)
    history = _runtime.empty((*axes, history_size(n, m, num_iters, keep)), cost, torch.float64)
    if error.numel():
        batch = problems(cost, a, b, initial_f, initial_g, epsilon, penalty_a, penalty_b, update_a_first)
        sides = (f, g) if update_a_first else (g, f)
        with _runtime.on_device(cost):
            outputs = [
                tensor.view(error.numel(), *tensor.shape[len(axes) :])
                for tensor in (*values, *sides, error, count, history)
            ]
            solve(batch, outputs, num_iters, tol, relaxation, keep)
    return *values, f, g, error, count, history


def sinkhorn_bwd(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *axes, n, m = cost.shape
    if history.shape[-1] != history_size(n, m, num_iters, KEEP[gradient]):
        raise ValueError(f"history: expected that of a forward with keep={KEEP[gradient]}, got {tuple(history.shape)}")
    grads = (
        _runtime.empty(cost.shape if need_cost else (0,), cost),
        _runtime.empty((*axes, n) if need_a else (0,), cost),
        _runtime.empty((*axes, m) if need_b else (0,), cost),
    )
    if math.prod(axes):
        batch = problems(cost, a, b, initial_f, initial_g, epsilon, penalty_a, penalty_b, update_a_first)
        incoming = (flat(grad_transport_cost, 0), flat(grad_regularized_cost, 0), flat(grad_f, 1), flat(grad_g, 1))
        history = history.reshape(-1, history.shape[-1]).contiguous()
        flat_grads = [grad.view(-1, *grad.shape[len(axes) :]) if grad.numel() else grad for grad in grads]
        with _runtime.on_device(cost):
            differentiate(batch, history, incoming, flat_grads, num_iters, gradient)
    return grads


def differentiate(
    batch: Problems, history: Tensor, incoming: tuple[Tensor | None, ...], grads: Sequence[Tensor], num_iters: int,
    gradient: str,
) -> None:  # fmt: skip
    """Fills the gradients of cost, a and b, all (P, ...), in the caller's order; empty where they are not needed."""
    grad_cost, grad_a, grad_b = grads
    if batch.flipped:
        grad_cost, grad_a, grad_b = grad_cost.mT if grad_cost.numel() else grad_cost, grad_b, grad_a
        incoming = (*incoming[:2], incoming[3], incoming[2])
    _, n, m = batch.sizes
    by = _on_chip if is_small(n, m, batch.cost.dtype) else _in_tiles
    adjoint_f, adjoint_g = by(batch, history, incoming, (grad_cost, grad_a, grad_b), num_iters, gradient)
    if gradient == "implicit":
        _solve_implicit(batch, history, (grad_cost, grad_a, grad_b), adjoint_f, adjoint_g)


def _in_tiles(batch: Problems, history, incoming, grads, num_iters, gradient) -> tuple[Tensor, Tensor]:
    costs, sides = large.matrix(batch.cost), batch.sides
    adjoint = large.differentiate(costs, sides, batch.initial_g, history, incoming, num_iters, gradient)
    if grads[0].numel():
        large.gradient_of_costs(costs, sides, adjoint, grads[0])
    for grad, value in zip(grads[1:], (adjoint.by_a, adjoint.by_b), strict=True):
        if grad.numel():
            grad.copy_(value)
    return adjoint.f_bar[0], adjoint.g_bar[0]


def _solve_implicit(batch: Problems, history: Tensor, grads, adjoint_f: Tensor, adjoint_g: Tensor) -> None:
    """Adds the derivative through the potentials."""
    _, n, m = batch.sizes
    unit = batch.epsilon * math.log(2)
    f, g = history[:, 2 : 2 + n] * unit, history[:, 2 + n :] * unit
    a, b = large.masses(batch.a, f), large.masses(batch.b, g)
    through = _sinkhorn_implicit._gradients(
        batch.cost, a, b, f, g, adjoint_f, adjoint_g, batch.epsilon, batch.penalty_a, batch.penalty_b
    )
    for grad, value in zip(grads, through, strict=True):
        if grad.numel():
            grad.add_(value)


def _on_chip(batch: Problems, history, incoming, grads, num_iters, gradient) -> tuple[Tensor, Tensor]:
    grad_cost, grad_a, grad_b = grads
    grad_transport, grad_regularized, grad_f, grad_g = incoming
    count, n, m = batch.sizes
    out_i, out_j = grad_cost.stride()[1:] if grad_cost.numel() else (m, 1)
    cost, scratch = compact(batch.cost), _runtime.empty((count, 2, m), history)
    adjoint_f, adjoint_g = _runtime.empty((count, n), history), _runtime.empty((count, m), history)
    differentiate_small[(count,)](
        cost, batch.a, batch.b, batch.initial_g, history, grad_transport, grad_regularized, grad_f, grad_g,
        grad_cost, grad_a, grad_b, adjoint_f, adjoint_g, scratch, n, m, *cost.stride(), out_i, out_j, history.shape[-1],
        batch.epsilon, *batch.damping(),
        HAS_A=batch.a is not None, HAS_B=batch.b is not None, HAS_G=batch.initial_g is not None,
        IN_TRANSPORT=grad_transport is not None, IN_REGULARIZED=grad_regularized is not None,
        IN_F=grad_f is not None, IN_G=grad_g is not None,
        MODE=GRADIENTS[gradient], PLAIN=batch.plain,
        NEED_COST=grad_cost.numel() > 0, NEED_A=grad_a.numel() > 0, NEED_B=grad_b.numel() > 0,
        **tile_of(n, m, batch.cost.dtype, backward=True).launch,
    )  # fmt: skip
    return adjoint_f, adjoint_g


def aot_cases() -> list[_runtime.AotCase]:
    """Small problems of the published sizes, and the half-iterations of a large one."""
    from . import _sinkhorn_aot as aot

    cases = []
    for n, dtype, keep, quick in (
        (16, torch.float32, 2, True), (64, torch.float32, 2, False), (128, torch.float32, 2, False),
        (16, torch.float64, 2, False), (64, torch.float64, 2, False),
    ):  # fmt: skip
        launch, what = tile_of(n, n, dtype).launch, f"{n} x {n} {_runtime.SIGNATURE_DTYPES[dtype]}"
        spills = {"may_spill": FULL if n == 128 else "", "quick": quick}
        given = {"HAS_A": True, "HAS_B": True, "HAS_G": False, "PLAIN": True}
        forward = given | {"HAS_F": False, "KEEP": keep, "STOP": False, "AUTO": False, "RELAXED": False}
        cases.append(
            aot.case(f"solve {what}", solve_small, dtype, forward, launch, ("initial_f", "initial_g"), **spills)
        )
        backward = given | {
            "IN_TRANSPORT": True, "IN_REGULARIZED": False, "IN_F": False, "IN_G": False, "MODE": 0, "NEED_COST": True,
            "NEED_A": True, "NEED_B": True,
        }  # fmt: skip
        absent = ("initial_g", "grad_regularized", "grad_f", "grad_g")
        launch = tile_of(n, n, dtype, backward=True).launch
        cases.append(aot.case(f"unroll {what}", differentiate_small, dtype, backward, launch, absent, **spills))
    for dtype in (torch.float32, torch.float64):
        half = {
            "GIVEN": True, "KEPT": True, "BEFORE": False, "RUNNING": False, "RELAXED": False, "AUTO": False,
        }  # fmt: skip
        absent = ("kept_before", "running", "omega_at")
        cases.append(aot.tiles("half iteration", large.half_iteration, dtype, -1, half, absent))
        back = {"GIVEN": True, "STARTS": True}
        cases.append(aot.tiles("adjoint half", large.back_half, dtype, -1, back))
        gradient = {"HAS_A": True, "HAS_B": True, "CONSTANT": False, "UNROLL": True}
        cases.append(aot.tiles("cost gradient", large.cost_gradient, dtype, aot.NO_METRIC, gradient))
        sums = {"SPENT": True, "RUNNING": False}
        cases.append(aot.tiles("plan sums", large.plan_sums, dtype, -1, sums, ("running",)))
        constants = {"HAS_A": True, "HAS_B": True, "STOP": True, "AUTO": True, "DATA": _runtime.TL_DTYPES[dtype]}
        constants |= {"BLOCK": large.BLOCK}
        name = f"decide {_runtime.SIGNATURE_DTYPES[dtype]}"
        cases.append(aot.case(name, large.decide, dtype, constants, large.LAUNCH))
    return cases
