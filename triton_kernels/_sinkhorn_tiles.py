"""Sinkhorn of any size, one launch a half-iteration: a program updates a block of rows from a sweep over the columns.

The costs of a block of pairs come from a matrix (any strides: columns are updated by the same kernels with strides
exchanged) or from points, feature by feature, differences formed first: points are stored feature-major, (P, d, n).
Exponents
are formed in float64 from float64 potentials and summed as float32 or float64 exponentials with a running maximum, so
that
the accuracy does not depend on epsilon. Bytes: n m elements a sweep from L2, or (n + m) d; operations: an exponential
and
3 float64 operations an entry and half-iteration, for points 2 d multiply-adds more, in float32 unless `wide`.
Every sum is taken in one program in a fixed order.
"""

from __future__ import annotations

from ._runtime import constant, jit, scalar, tl
from ._sinkhorn_common import LOG2E, load_masses, log_masses, relaxation, side_error, updated
from ._sinkhorn_small import grow, log_of

DENSE, L1, L2, SQUARE = constant(-1), constant(0), constant(1), constant(2)


@jit
def by_features(
    left, right, i, j, n, m, d, METRIC: tl.constexpr, SUM: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """Sums of |x - y| or (x - y)^2 over the features, in SUM."""
    total = tl.zeros((BN, BM), SUM)
    for k in range(d):
        x = tl.load(left + k * n.to(tl.int64) + i, mask=i < n, other=0.0).to(SUM)
        y = tl.load(right + k * m.to(tl.int64) + j, mask=j < m, other=0.0).to(SUM)
        delta = x[:, None] - y[None, :]
        total += tl.abs(delta) if METRIC == L1 else delta * delta
    return total.to(tl.float64)


@jit
def cost_block(
    left, right, p, i, j, n, m, stride_p, stride_i, stride_j, d, factor, wide_at,
    METRIC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """(BN, BM) costs in float64, +inf beyond the problem."""
    inside = (i < n)[:, None] & (j < m)[None, :]
    if METRIC == DENSE:
        place = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
        c = tl.load(left + p * stride_p + place, mask=inside, other=float("inf")).to(tl.float64)
    else:
        n, m = tl.full((), 0, tl.int32) + n, tl.full((), 0, tl.int32) + m
        left += p * d * n
        right += p * d * m
        if tl.load(wide_at + p) != 0:
            c = by_features(left, right, i, j, n, m, d, METRIC, tl.float64, BN, BM)
        else:
            c = by_features(left, right, i, j, n, m, d, METRIC, tl.float32, BN, BM)
        if METRIC == L2:
            c = tl.sqrt(c)
        c = tl.where(inside, c * factor, float("inf"))
    return c


@jit
def half_iteration(
    left, right, weights, own, other, kept, kept_before, running, omega_at, n, m, stride_p, stride_i, stride_j, d,
    wide_at,
    stride_kept, factor: tl.float64, epsilon: tl.float64, exponent: tl.float64, omega: tl.float64,
    METRIC: tl.constexpr, DATA: tl.constexpr, GIVEN: tl.constexpr, KEPT: tl.constexpr, BEFORE: tl.constexpr,
    RUNNING: tl.constexpr, RELAXED: tl.constexpr, AUTO: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """own (P, n), in place, after other (P, m). KEPT: also into kept; BEFORE: the old one into kept_before."""
    p = tl.program_id(0).to(tl.int64)
    active = tl.full((), 1, tl.int1)
    if RUNNING:
        active = tl.load(running + p) != 0
    if active:
        i = tl.program_id(1) * BN + tl.arange(0, BN)
        scale = LOG2E / scalar(epsilon, tl.float64)
        factor, exponent = scalar(factor, tl.float64), scalar(exponent, tl.float64)
        omega = scalar(omega, tl.float64)
        if AUTO:
            omega = tl.load(omega_at + p)
        top, total = tl.full((BN,), float("-inf"), tl.float64), tl.zeros((BN,), DATA)
        for start_j in range(0, m, BM):
            j = start_j + tl.arange(0, BM)
            c = cost_block(left, right, p, i, j, n, m, stride_p, stride_i, stride_j, d, factor, wide_at, METRIC, BN, BM)
            gamma = tl.load(other + p * m + j, mask=j < m, other=float("-inf"))
            top, total = grow(top, total, gamma[None, :] - c * scale)
        a = load_masses(weights, p * n, i, n, GIVEN)
        old = tl.load(own + p * n + i, mask=i < n, other=float("-inf"))
        new = updated(old, a, log_masses(a, DATA), log_of(top, total), exponent, omega, RELAXED)
        tl.store(own + p * n + i, new, mask=i < n)
        if BEFORE:
            tl.store(kept_before + p * stride_kept + i, old, mask=i < n)
        if KEPT:
            tl.store(kept + p * stride_kept + i, new, mask=i < n)


@jit
def plan_sums(
    left, right, own, other, mass, spent, running, n, m, stride_p, stride_i, stride_j, d, wide_at, factor: tl.float64,
    epsilon: tl.float64,
    METRIC: tl.constexpr, DATA: tl.constexpr, SPENT: tl.constexpr, RUNNING: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """sum_j P_ij, and if SPENT sum_j P_ij C_ij where C is finite, (P, n) in float64."""
    p = tl.program_id(0).to(tl.int64)
    active = tl.full((), 1, tl.int1)
    if RUNNING:
        active = tl.load(running + p) != 0
    if active:
        i = tl.program_id(1) * BN + tl.arange(0, BN)
        scale, factor = LOG2E / scalar(epsilon, tl.float64), scalar(factor, tl.float64)
        phi = tl.load(own + p * n + i, mask=i < n, other=float("-inf"))
        total, bill = tl.zeros((BN,), tl.float64), tl.zeros((BN,), tl.float64)
        for start_j in range(0, m, BM):
            j = start_j + tl.arange(0, BM)
            c = cost_block(left, right, p, i, j, n, m, stride_p, stride_i, stride_j, d, factor, wide_at, METRIC, BN, BM)
            gamma = tl.load(other + p * m + j, mask=j < m, other=float("-inf"))
            plan = tl.exp2((phi[:, None] + gamma[None, :] - c * scale).to(DATA))
            total += tl.sum(plan, 1).to(tl.float64)
            if SPENT:
                bill += tl.sum(plan * tl.where(c < float("inf"), c, 0.0).to(DATA), 1).to(tl.float64)
        tl.store(mass + p * n + i, total, mask=i < n)
        if SPENT:
            tl.store(spent + p * n + i, bill, mask=i < n)


@jit
def error_of(weights, potential, mass, p, size, drop, GIVEN: tl.constexpr, DATA: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    error = tl.zeros((), tl.float64)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        a = load_masses(weights, p * size, i, size, GIVEN)
        phi = tl.load(potential + p * size + i, mask=i < size, other=float("-inf"))
        sums = tl.load(mass + p * size + i, mask=i < size, other=0.0)
        error += side_error(a, log_masses(a, DATA), phi, sums, drop, DATA)
    return error


@jit
def decide(
    a, b, phi, gamma, rows, columns, running, count, omega_at, previous_at, n, m, step, tol: tl.float64,
    drop_a: tl.float64,
    drop_b: tl.float64,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, STOP: tl.constexpr, AUTO: tl.constexpr, DATA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """After iteration `step`: counts it, whether the problem goes on, and the omega it goes on with."""
    p = tl.program_id(0).to(tl.int64)
    step = tl.full((), 0, tl.int32) + step
    active = tl.load(running + p) != 0
    if active:
        tl.store(count + p, step.to(tl.int64))
        drop_a, drop_b = scalar(drop_a, tl.float64), scalar(drop_b, tl.float64)
        error = error_of(a, phi, rows, p, n, drop_a, HAS_A, DATA, BLOCK)
        error += error_of(b, gamma, columns, p, m, drop_b, HAS_B, DATA, BLOCK)
        if AUTO:
            omega, previous = relaxation(tl.load(omega_at + p), tl.load(previous_at + p), error, step)
            tl.store(omega_at + p, omega)
            tl.store(previous_at + p, previous)
        if STOP:
            tl.store(running + p, tl.where(error <= scalar(tol, tl.float64), 0, 1).to(tl.int32))


@jit
def apply_plan(
    left, right, own, other, v, out, n, m, width, stride_p, stride_i, stride_j, d, wide_at, factor: tl.float64,
    epsilon: tl.float64, METRIC: tl.constexpr, DATA: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """P v, (P, n, width), for v (P, m, width): BK columns a program (grid: problems, rows, columns)."""
    p = tl.program_id(0).to(tl.int64)
    i, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2) * BK
    scale, factor = LOG2E / scalar(epsilon, tl.float64), scalar(factor, tl.float64)
    phi = tl.load(own + p * n + i, mask=i < n, other=float("-inf"))
    columns = tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float64)
    for start_j in range(0, m, BM):
        j = start_j + tl.arange(0, BM)
        c = cost_block(left, right, p, i, j, n, m, stride_p, stride_i, stride_j, d, factor, wide_at, METRIC, BN, BM)
        gamma = tl.load(other + p * m + j, mask=j < m, other=float("-inf"))
        plan = tl.exp2((phi[:, None] + gamma[None, :] - c * scale).to(DATA))
        for column in tl.static_range(BK):
            place = (p * m + j) * width + k + column
            values = tl.load(v + place, mask=(j < m) & (j * 0 + (k + column) < width), other=0.0)
            product = tl.sum(plan * values[None, :], 1).to(tl.float64)
            total += tl.where((columns == column)[None, :], product[:, None], 0.0)
    place = (p * n + i.to(tl.int64))[:, None] * width + (k + columns)[None, :]
    tl.store(out + place, total.to(DATA), mask=(i < n)[:, None] & (k + columns < width)[None, :])
