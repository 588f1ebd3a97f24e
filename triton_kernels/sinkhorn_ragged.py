"""``sinkhorn_ragged_fwd`` and ``_bwd`` by Triton (see ``ops/sinkhorn_ragged.py``): a program a problem, a launch for
each size of tile, whatever the sizes of the problems, which the host does not read.

The gradient 'implicit' is the exception: its linear solve is that of the reference, problem by problem, and reads the
offsets. History: 2 + slots (n + m) numbers a problem, packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.sinkhorn import GRADIENTS, KEEP, history_size
from ..ops.sinkhorn_ragged import _history_size
from ..reference import _sinkhorn_implicit
from . import _runtime
from ._sinkhorn_ragged_bwd import differentiate_ragged
from ._sinkhorn_ragged_kernels import solve_ragged
from .cost_matrix_ragged import starts_of
from .sinkhorn import tile_of

# sides of the tiles of problems on chip; beyond, the kernels would spill
CLASSES = {torch.float32: (16, 32, 64), torch.float64: (16, 32)}
WIDE = "the backward in float64: tile, gradient and terms of 32 x 32 doubles in 4 warps; 48 bytes on 120"
ROWS, COLUMNS, WARPS = 16, 64, 4  # of a tile of a problem that does not fit


def _launches(rows: int, columns: int, dtype: torch.dtype, backward: bool) -> Iterator[dict[str, int | bool]]:
    """Constants of each launch, for problems of at most this many rows and columns."""
    least = 0
    for size in CLASSES[dtype]:
        if max(rows, columns) <= least:
            break
        launch = tile_of(size, size, dtype, backward).launch
        if backward and size == 16:
            launch["CHUNK"] = 4
        yield {"CHIP": True, "LN": least, "LM": least} | launch
        least = size
    yield {
        "CHIP": False, "LN": least, "LM": least, "BN": ROWS, "BM": COLUMNS, "CHUNK": 1, "num_warps": WARPS,
        "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip


class _Call:
    """The problems as the kernels take them, rows first."""

    def __init__(self, cost, a, b, initial_f, initial_g, row_offsets, column_offsets, epsilon, penalties, a_first):
        offsets = row_offsets.contiguous(), column_offsets.contiguous()
        self.problems = len(row_offsets) - 1
        self.starts = starts_of(*offsets)
        self.flipped, self.epsilon = not a_first, epsilon
        sides = (a, initial_f, offsets[0], penalties[0]), (b, initial_g, offsets[1], penalties[1])
        (self.a, self.f, self.rows, penalty_a), (self.b, self.g, self.columns, penalty_b) = (
            tuple(value.contiguous() if isinstance(value, Tensor) else value for value in side)
            for side in (sides if a_first else sides[::-1])
        )
        self.cost, self.penalties = cost.contiguous(), (penalty_a, penalty_b)
        self.plain = all(map(math.isinf, self.penalties))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Packed rows, columns and entries."""
        return len(self.a), len(self.b), len(self.cost)

    def damping(self) -> tuple[float, float, float, float]:
        """lambda_a, lambda_b and epsilon / penalty of each side."""
        exponents = (1.0 if math.isinf(p) else p / (p + self.epsilon) for p in self.penalties)
        return *exponents, *(0.0 if math.isinf(p) else self.epsilon / p for p in self.penalties)

    def launches(self, backward: bool) -> Iterator[dict[str, int | bool]]:
        return _launches(*self.sizes[:2], self.cost.dtype, backward)


def _slots(num_iters: int, keep: int) -> int:
    return history_size(1, 0, num_iters, keep) - history_size(0, 0, num_iters, keep)


def sinkhorn_ragged_fwd(
    cost: Tensor, a: Tensor, b: Tensor, initial_f: Tensor | None, initial_g: Tensor | None,
    row_offsets: Tensor, column_offsets: Tensor,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    problems, n, m = len(row_offsets) - 1, len(a), len(b)
    values = [_runtime.empty((problems,), cost) for _ in range(2)]
    f, g = _runtime.empty((n,), cost).fill_(math.nan), _runtime.empty((m,), cost).fill_(math.nan)
    error, count = _runtime.empty((problems,), cost), _runtime.empty((problems,), cost, torch.int64)
    history = _runtime.empty((_history_size(n, m, problems, num_iters, keep),), cost, torch.float64)
    outputs = *values, f, g, error, count, history
    if problems == 0:
        return outputs
    with _runtime.on_device(cost):
        call = _Call(
            cost, a, b, initial_f, initial_g, row_offsets, column_offsets, epsilon, (penalty_a, penalty_b),
            update_a_first,
        )  # fmt: skip
        scratch = _runtime.empty((n + m,), history)
        for launch in call.launches(False):
            solve_ragged[(problems,)](
                call.cost, call.a, call.b, call.f, call.g, call.rows, call.columns, call.starts,
                *values, *((f, g) if update_a_first else (g, f)), error, count, history, scratch,
                *call.sizes, num_iters, _slots(num_iters, keep),
                epsilon, tol, 1.0 if relaxation == 0 else relaxation, *call.damping(),
                HAS_F=call.f is not None, HAS_G=call.g is not None, FLIPPED=call.flipped, KEEP=keep, STOP=tol > 0,
                AUTO=relaxation == 0, RELAXED=relaxation != 1, PLAIN=call.plain and relaxation == 1, **launch,
            )  # fmt: skip
    return outputs


def sinkhorn_ragged_bwd(
    cost: Tensor, a: Tensor, b: Tensor, initial_f: Tensor | None, initial_g: Tensor | None,
    row_offsets: Tensor, column_offsets: Tensor,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problems, keep = len(row_offsets) - 1, KEEP[gradient]
    if history.shape[0] != _history_size(len(a), len(b), problems, num_iters, keep):
        raise ValueError(f"history: expected that of a forward with keep={keep}, got {tuple(history.shape)}")
    grads = tuple(
        _runtime.empty(operand.shape if need else (0,), cost).fill_(math.nan)
        for operand, need in ((cost, need_cost), (a, need_a), (b, need_b))
    )
    if problems == 0:
        return grads
    incoming = [
        None if t is None else t.contiguous() for t in (grad_transport_cost, grad_regularized_cost, grad_f, grad_g)
    ]
    with _runtime.on_device(cost):
        call = _Call(
            cost, a, b, initial_f, initial_g, row_offsets, column_offsets, epsilon, (penalty_a, penalty_b),
            update_a_first,
        )  # fmt: skip
        by_cost, by_a, by_b = grads
        if call.flipped:
            by_a, by_b, incoming = by_b, by_a, [*incoming[:2], incoming[3], incoming[2]]
        n, m, _ = call.sizes
        implicit = gradient == "implicit"
        adjoints = [_runtime.empty((size if implicit else 0,), history) for size in (n, m)]
        work, history = _runtime.empty((2 * n + 3 * m,), history), history.contiguous()
        for launch in call.launches(True):
            differentiate_ragged[(problems,)](
                call.cost, call.a, call.b, call.g, call.rows, call.columns, call.starts, history, *incoming,
                by_cost, by_a, by_b, *adjoints, work, *call.sizes, _slots(num_iters, keep), epsilon, *call.damping(),
                HAS_G=call.g is not None, IN_TRANSPORT=incoming[0] is not None, IN_REGULARIZED=incoming[1] is not None,
                IN_F=incoming[2] is not None, IN_G=incoming[3] is not None, FLIPPED=call.flipped,
                MODE=GRADIENTS[gradient], PLAIN=call.plain, NEED_COST=by_cost.numel() > 0, NEED_A=by_a.numel() > 0,
                NEED_B=by_b.numel() > 0, **launch,
            )  # fmt: skip
        if implicit:
            _solve_implicit(call, history, (by_cost, by_a, by_b), adjoints)
    return grads


def _solve_implicit(call: _Call, history: Tensor, grads, adjoints) -> None:
    """Adds the derivative through the potentials, problem by problem. Waits for the device."""
    unit = call.epsilon * math.log(2)
    places = (call.rows.tolist(), call.columns.tolist(), call.starts.tolist())
    for k in range(call.problems):
        (i, n), (j, m) = ((at[k], at[k + 1] - at[k]) for at in places[:2])
        if not n or not m:
            continue
        at = slice(places[2][k], places[2][k] + n * m)
        shape = (m, n) if call.flipped else (n, m)
        block = call.cost[at].view(shape)
        start = 2 * (k + 1) + i + j
        f, g = history[start : start + n] * unit, history[start + n : start + n + m] * unit
        rows, columns = slice(i, i + n), slice(j, j + m)
        through = _sinkhorn_implicit._gradients(
            (block.mT if call.flipped else block)[None], call.a[rows].double()[None], call.b[columns].double()[None],
            f[None], g[None], adjoints[0][rows][None], adjoints[1][columns][None], call.epsilon, *call.penalties,
        )  # fmt: skip
        by_cost = through[0][0].mT if call.flipped else through[0][0]
        for grad, place, value in zip(
            grads, (at, rows, columns), (by_cost.reshape(-1), through[1][0], through[2][0]), strict=True
        ):
            if grad.numel():
                grad[place] += value


def aot_cases() -> list[_runtime.AotCase]:
    """Each tile, and the problems beyond."""
    from . import _sinkhorn_aot as aot

    cases = []
    forward = {"HAS_F": False, "HAS_G": False, "KEEP": 2, "STOP": False, "AUTO": False, "RELAXED": False}
    backward = {
        "HAS_G": False, "IN_TRANSPORT": True, "IN_REGULARIZED": False, "IN_F": False, "IN_G": False, "MODE": 0,
        "NEED_COST": True, "NEED_A": True, "NEED_B": True,
    }  # fmt: skip
    absent = ("initial_g", "grad_regularized", "grad_f", "grad_g")
    for dtype in (torch.float32, torch.float64):
        for kernel, constants, missing in (
            (solve_ragged, forward, ("initial_f", "initial_g")), (differentiate_ragged, backward, absent),
        ):  # fmt: skip
            for launch in _launches(1000, 1000, dtype, kernel is differentiate_ragged):
                if dtype == torch.float64 and launch["BN"] != 32:
                    continue
                what = f"{launch['BN']} x {launch['BN']}" if launch["CHIP"] else "beyond"
                name = f"{kernel.__name__.split('_')[0]} {what} {_runtime.SIGNATURE_DTYPES[dtype]}"
                given = constants | {"FLIPPED": False, "PLAIN": True}
                why = WIDE if dtype == torch.float64 and kernel is differentiate_ragged else ""
                cases.append(aot.case(name, kernel, dtype, given, launch, missing, may_spill=why))
    return cases
