"""Costs between packed points of problems of different sizes, (E,), and the points' gradients (`cost_matrix` has the
formulas and the numerics; float32 and float64).

Forward: a program has 64 entries (float64: 32), finds their problems by bisection of where the costs of each begin, and
sums over the features in 32 lanes; 2 E d operations. Backward, a side: a program has a point and 128 of its features
and runs over the points of the other side. What offsets do not cover, or reach without fitting the tensors, is left
out: nothing is read or written out of bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cost_matrix_kernels import COSINE_METRIC, L1, L2, METRICS, _along, _cost, _pair_scale, _weights
from ._runtime import SIGNATURE_DTYPES, AotCase, cdiv, empty, jit, on_device, tl
from .cost_matrix import _Rows

FORWARD = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
BACKWARD = {"BJ": 8, "BK": 128, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def entries_of(dtype: torch.dtype) -> int:
    """Entries of a program."""
    return 32 if dtype == torch.float64 else 64


@jit
def last_before(offsets, count, value):
    """The last of `count` non-decreasing offsets that is at most `value`; 0 without one."""
    low, high = tl.zeros_like(value), tl.zeros_like(value) + count
    step = tl.zeros((), tl.int64) + count
    while step > 0:
        middle = (low + high) // 2
        below = tl.load(offsets + tl.minimum(middle, count - 1)) <= value
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
        step //= 2
    return low


@jit(generic=("problems", "rows", "columns", "entries"))
def packed_costs(
    x, factor_x, norm_x, y, factor_y, norm_y, row_offsets, column_offsets, starts, out, problems, rows, columns,
    entries, d, METRIC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """out (E,), a block of entries."""
    LANES: tl.constexpr = 32  # noqa: N806
    DATA: tl.constexpr = x.dtype.element_ty  # noqa: N806
    DOUBLE: tl.constexpr = DATA == tl.float64  # noqa: N806
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    problem = last_before(starts, problems, e)
    column = tl.load(column_offsets + problem)
    width = tl.maximum(tl.load(column_offsets + problem + 1) - column, 1)
    local = e - tl.load(starts + problem)
    row, column = tl.load(row_offsets + problem) + local // width, column + local % width
    served = (e < entries) & (local >= 0) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    nx, ny, scale = tl.zeros((BE,), tl.float64), tl.zeros((BE,), tl.float64), tl.full((BE,), 1, DATA)
    fx, fy = tl.full((BE,), 1, DATA), tl.full((BE,), 1, DATA)
    if METRIC == COSINE_METRIC:
        nx, ny = tl.load(norm_x + row, mask=served, other=0), tl.load(norm_y + column, mask=served, other=0)
        scale = _pair_scale(nx, ny, DOUBLE).to(DATA)
        fx, fy = tl.load(factor_x + row, mask=served, other=0), tl.load(factor_y + column, mask=served, other=0)
    total = tl.zeros((BE, LANES), DATA)
    for first in range(0, d, LANES):
        k = first + tl.arange(0, LANES)
        mask = served[:, None] & (k < d)[None, :]
        p = tl.load(x + row[:, None] * d + k[None, :], mask=mask, other=0)
        q = tl.load(y + column[:, None] * d + k[None, :], mask=mask, other=0)
        if METRIC == COSINE_METRIC:
            p, q = p * fx[:, None], q * fy[:, None] * scale[:, None]
        delta = p - q
        total += tl.abs(delta) if METRIC == L1 else delta * delta
    cost = _cost(tl.sum(total, 1), nx, scale.to(tl.float64) * ny, METRIC, DOUBLE)
    tl.store(out + e, tl.where(served, cost, float("nan")), mask=e < entries)


@jit(generic=("problems", "rows", "columns", "entries"))
def packed_gradient(
    x, factor_x, norm_x, y, factor_y, norm_y, row_offsets, column_offsets, starts, cost, grad_cost, out, problems, rows,
    columns, entries, d, FLIPPED: tl.constexpr, METRIC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """out (N, d): some features of the gradient of one point of x. FLIPPED: x are the columns of the costs."""
    DATA: tl.constexpr = x.dtype.element_ty  # noqa: N806
    DOUBLE: tl.constexpr = DATA == tl.float64  # noqa: N806
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    problem = last_before(row_offsets, problems, row)
    local = row - tl.load(row_offsets + problem)
    n = tl.load(row_offsets + problem + 1) - tl.load(row_offsets + problem)
    begin = tl.load(column_offsets + problem)
    m = tl.load(column_offsets + problem + 1) - begin
    m = tl.where((local >= 0) & (local < n) & (begin >= 0) & (begin + m <= columns), m, 0)
    base = tl.load(starts + problem)
    m = tl.where((base >= 0) & (base + n * m <= entries), m, 0)
    p = tl.load(x + row * d + k, mask=k < d, other=0)
    nx = tl.zeros((), tl.float64)
    fx = tl.full((), 1, DATA)
    if METRIC == COSINE_METRIC:
        nx, fx = tl.load(norm_x + row), tl.load(factor_x + row)
        p *= fx
    grad, along = tl.zeros((BK,), DATA), tl.zeros((), tl.float64)
    for first in range(0, m, BJ):
        j = first + tl.arange(0, BJ)
        inside = j < m
        at = base + (j.to(tl.int64) * n + local if FLIPPED else local * m + j)
        g = tl.load(grad_cost + at, mask=inside, other=0)
        c, each, ny = g, tl.zeros((BJ,), tl.float64) + nx, tl.zeros((BJ,), tl.float64)
        scale = tl.full((BJ,), 1, DATA)
        if METRIC == L2 or METRIC == COSINE_METRIC:
            c = tl.load(cost + at, mask=inside, other=0)
        q = tl.load(y + (begin + j)[:, None] * d + k[None, :], mask=inside[:, None] & (k < d)[None, :], other=0)
        if METRIC == COSINE_METRIC:
            ny = tl.load(norm_y + begin + j, mask=inside, other=0)
            scale = _pair_scale(each, ny, DOUBLE).to(DATA)
            ny *= scale.to(tl.float64)
            fy = tl.load(factor_y + begin + j, mask=inside, other=0)
            q = q * fy[:, None] * scale[:, None]
            along += tl.sum(_along(g, c, each, ny), 0)
        delta = p[None, :] - q
        w = _weights(g, c, each, ny, METRIC)[:, None]
        if METRIC == L1:
            w = tl.broadcast_to(w, (BJ, BK))
            grad += tl.sum(tl.where(delta > 0, w, tl.where(delta < 0, -w, 0)), 0)
        else:
            grad += tl.sum(w * delta, 0)
    if METRIC == COSINE_METRIC:
        grad = (grad + along.to(DATA) * p) * fx
    tl.store(out + row * d + k, grad, mask=k < d)


def starts_of(row_offsets: Tensor, column_offsets: Tensor) -> Tensor:
    """(K,) where the costs of each problem begin."""
    sizes = row_offsets.diff() * column_offsets.diff()
    starts = empty(sizes.shape, sizes)
    starts[:1] = 0
    starts[1:] = sizes.cumsum(0)[:-1]
    return starts


def _operands(x: Tensor, y: Tensor, metric: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Rows, factors and norms of both sides."""
    sides = (_Rows(rows, 0.0, metric, 0, True) for rows in (x, y))
    return tuple((side.rows, side.factor, side.norm) for side in sides)


def cost_matrix_ragged_fwd(
    x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, entries: int, metric: str
) -> Tensor:
    cost = empty((entries,), x)
    if entries == 0 or x.shape[1] == 0:
        return cost.zero_()  # the sum over no features
    with on_device(x):
        offsets = row_offsets.contiguous(), column_offsets.contiguous()
        left, right = _operands(x, y, metric)
        packed_costs[(cdiv(entries, entries_of(x.dtype)),)](
            *left, *right, *offsets, starts_of(*offsets), cost, len(row_offsets) - 1, len(x), len(y), entries,
            x.shape[1], METRIC=METRICS[metric], BE=entries_of(x.dtype), **FORWARD,
        )  # fmt: skip
    return cost


def cost_matrix_ragged_bwd(
    x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, cost: Tensor, grad_cost: Tensor, metric: str,
    need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grads = tuple(empty(rows.shape if need else (0,), x) for rows, need in ((x, need_x), (y, need_y)))
    problems, entries, d = len(row_offsets) - 1, len(cost), x.shape[1]
    with on_device(x):
        offsets = row_offsets.contiguous(), column_offsets.contiguous()
        starts, cost, grad_cost = starts_of(*offsets), cost.contiguous(), grad_cost.contiguous()
        sides = _operands(x, y, metric) if problems and d else ()
        for grad, flipped in zip(grads, (False, True), strict=True):
            if not grad.numel():
                continue
            if not problems:
                grad.zero_()
                continue
            (left, right), (ours, theirs) = ((s[::-1] if flipped else s) for s in (sides, offsets))
            packed_gradient[(grad.shape[0], cdiv(d, BACKWARD["BK"]))](
                *left, *right, ours, theirs, starts, cost, grad_cost, grad, problems, grad.shape[0], len(right[0]),
                entries, d, FLIPPED=flipped, METRIC=METRICS[metric], **BACKWARD,
            )  # fmt: skip
    return grads


def aot_cases() -> list[AotCase]:
    """l1 and cosine, forward and backward."""
    cases = []
    for metric, dtype in (("l1", torch.float32), ("cosine", torch.float32), ("cosine", torch.float64)):
        kind = f"*{SIGNATURE_DTYPES[dtype]}:16"
        for kernel, launch, extra in (
            (packed_costs, FORWARD, {"BE": entries_of(dtype)}), (packed_gradient, BACKWARD, {"FLIPPED": False}),
        ):  # fmt: skip
            tiles = {key: value for key, value in launch.items() if key.isupper()}
            signature = {
                name: "*i64:16" if name in ("row_offsets", "column_offsets", "starts")
                else "*fp64:16" if name.startswith("norm") else kind
                for name in kernel.arg_names if not name.isupper()
            }  # fmt: skip
            signature |= dict.fromkeys(("problems", "rows", "columns", "entries", "d"), "i32")
            cases.append(AotCase(
                f"{kernel.__name__} {metric} {kind[1:5]}", kernel, signature,
                {"METRIC": METRICS[metric]} | tiles | extra, num_warps=launch["num_warps"], num_stages=1,
            ))  # fmt: skip
    return cases
