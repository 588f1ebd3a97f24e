"""Sinkhorn, one program a problem: the padded n x m tile stays on chip for the whole solve (reference/sinkhorn.py).

Layout: cost (B, n, m) by strides (0 for a shared cost; exchanged for columns first), float32 or float64, everything else
contiguous. History, float64: (how it was solved, iterations), then for each slot that is kept the n + m potentials or
scalings. Bytes: n m read once; operations: an iteration 2 n m multiply-adds and 2 reductions (scalings), or 2 n m
exponentials and 4 reductions (log domain).

A problem iterates on scalings where the range of its exponents is small (`_sinkhorn_common`), which it finds out itself: u =
a / (K v), v = b / (K^T u) with K = 2^(cmin - c), taken once. Otherwise, with penalties and over-relaxation always, in the
log domain, exponents in float64.
"""

from __future__ import annotations

from ._runtime import jit, scalar, tl
from ._sinkhorn_common import (
    LN2,
    LOG2E,
    RANGE_32,
    RANGE_64,
    WIDE_32,
    WIDE_64,
    load_masses,
    log_masses,
    relaxation,
    side_error,
    side_gradient,
    side_value,
    start,
    updated,
)


@jit
def load_costs(cost, base, i, j, n, m, stride_i, stride_j):
    """(BN, BM) costs, +inf beyond the problem."""
    inside = (i < n)[:, None] & (j < m)[None, :]
    place = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    return tl.load(cost + base + place, mask=inside, other=float("inf"))


@jit
def log_sums(c, scale, potential, AXIS: tl.constexpr):  # noqa: N803
    """log2 sum over AXIS of 2^(potential - c scale), float64; potential as a row (AXIS 1) or a column (AXIS 0)."""
    t = potential - c.to(tl.float64) * scale
    top = tl.max(t, AXIS)
    top = tl.where(top > float("-inf"), top, 0.0)
    wide = top[:, None] if AXIS == 1 else top[None, :]
    total = tl.sum(tl.exp2((t - wide).to(c.dtype)), AXIS)
    return tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)).to(tl.float64))


@jit
def plan_tile(c, scale, phi, gamma):
    """P, in the dtype of the costs."""
    return tl.exp2((phi[:, None] + gamma[None, :] - c.to(tl.float64) * scale).to(c.dtype))


@jit
def least_cost(c):
    return tl.min(tl.min(c, 1), 0)


@jit
def kernel_tile(c, scale, least):
    """2^((least - c) scale), rounded once."""
    t = (tl.zeros((), tl.float64) + least - c.to(tl.float64)) * scale
    high = t.to(c.dtype)
    low = tl.where(high > float("-inf"), t - high.to(tl.float64), 0.0).to(c.dtype)
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@jit
def fits_scalings(c, scale, least, a, b, gamma):
    """Whether scalings of the dtype of the costs hold all that a solve meets."""
    top = tl.max(tl.max(tl.where(c < float("inf"), c, float("-inf")), 1), 0)
    span = (top.to(tl.float64) - least.to(tl.float64)) * scale
    span += tl.max(tl.where(gamma > float("-inf"), tl.abs(gamma), 0.0), 0)
    lightest = tl.minimum(tl.min(tl.where(a > 0, a, 1.0), 0), tl.min(tl.where(b > 0, b, 1.0), 0))
    wide = span - tl.log2(lightest)
    if c.dtype == tl.float32:
        fits = (span <= RANGE_32) & (wide <= WIDE_32)
    else:
        fits = (span <= RANGE_64) & (wide <= WIDE_64)
    return fits  # False for a span that is not a number


@jit
def keep(history, slot, left, right, i, j, n, m):
    place = history + 2 + slot.to(tl.int64) * (n + m)
    tl.store(place + i, left.to(tl.float64), mask=i < n)
    tl.store(place + n + j, right.to(tl.float64), mask=j < m)


@jit
def iterate_scalings(c, scale, least, a, b, gamma, history, i, j, n, m, num_iters, tol, KEEP: tl.constexpr, STOP: tl.constexpr):  # noqa: N803
    """u, v, K v, K^T u and the iterations that ran."""
    k = kernel_tile(c, scale, least)
    a, b = a.to(c.dtype), b.to(c.dtype)
    u, v = tl.zeros_like(a), tl.exp2(gamma.to(c.dtype))
    across, down = tl.sum(k * v[None, :], 1), tl.zeros_like(b)
    step, running = tl.full((), 0, tl.int32), tl.full((), 1, tl.int1)
    while (step < num_iters) & running:
        if KEEP == 3:
            keep(history, tl.full((), 0, tl.int32), u, v, i, j, n, m)
        u = tl.where(across == 0, 0.0, a / tl.where(across == 0, 1.0, across))
        down = tl.sum(k * u[:, None], 0)
        v = tl.where(down == 0, 0.0, b / tl.where(down == 0, 1.0, down))
        if KEEP == 2:
            keep(history, step, u, v, i, j, n, m)
        across = tl.sum(k * v[None, :], 1)
        step += 1
        if STOP:
            error = tl.sum(tl.abs(u * across - a).to(tl.float64)) + tl.sum(tl.abs(v * down - b).to(tl.float64))
            running = (error <= tol) == 0
    if KEEP == 3:
        keep(history, tl.full((), 1, tl.int32), u, v, i, j, n, m)
    return u, v, across, down, step


@jit
def iterate_logs(
    c, scale, a, b, log_a, log_b, phi, gamma, history, i, j, n, m, num_iters, tol, omega, lambda_a, lambda_b, drop_a, drop_b,
    KEEP: tl.constexpr, STOP: tl.constexpr, AUTO: tl.constexpr, RELAXED: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """phi, gamma, the logarithms of the sums over the columns and over the rows, and the iterations that ran."""
    across, down = log_sums(c, scale, gamma[None, :], 1), tl.zeros_like(b)
    step, running = tl.full((), 0, tl.int32), tl.full((), 1, tl.int1)
    previous = tl.zeros((), tl.float64)
    while (step < num_iters) & running:
        if KEEP == 3:
            keep(history, tl.full((), 0, tl.int32), phi, gamma, i, j, n, m)
        phi = updated(phi, a, log_a, across, lambda_a, omega, RELAXED)
        down = log_sums(c, scale, phi[:, None], 0)
        gamma = updated(gamma, b, log_b, down, lambda_b, omega, RELAXED)
        if KEEP == 2:
            keep(history, step, phi, gamma, i, j, n, m)
        across = log_sums(c, scale, gamma[None, :], 1)
        step += 1
        if STOP or AUTO:
            error = side_error(a, log_a, phi, tl.exp2(phi + across), drop_a)
            error += side_error(b, log_b, gamma, tl.exp2(gamma + down), drop_b)
            if AUTO:
                omega, previous = relaxation(omega, previous, error, step)
            if STOP:
                running = (error <= tol) == 0
    if KEEP == 3:
        keep(history, tl.full((), 1, tl.int32), phi, gamma, i, j, n, m)
    return phi, gamma, across, down, step


@jit
def solve_small(
    cost, a_ptr, b_ptr, initial_f, initial_g, transport_cost, regularized_cost, f, g, marginal_error, count, history,
    n, m, stride_p, stride_i, stride_j, num_iters, history_stride,
    epsilon: fp64, tol: fp64, omega: fp64, lambda_a: fp64, lambda_b: fp64, drop_a: fp64, drop_b: fp64,  # noqa: F821
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_F: tl.constexpr, HAS_G: tl.constexpr,
    KEEP: tl.constexpr, STOP: tl.constexpr, AUTO: tl.constexpr, RELAXED: tl.constexpr, PLAIN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """The problem of this program. PLAIN: no penalties, no over-relaxation, so that it may run on scalings."""
    p = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BN), tl.arange(0, BM)
    epsilon, tol, omega = scalar(epsilon, tl.float64), scalar(tol, tl.float64), scalar(omega, tl.float64)
    lambda_a, lambda_b = scalar(lambda_a, tl.float64), scalar(lambda_b, tl.float64)
    drop_a, drop_b = scalar(drop_a, tl.float64), scalar(drop_b, tl.float64)
    scale = LOG2E / epsilon
    history += p * history_stride
    c = load_costs(cost, p * stride_p, i, j, n, m, stride_i, stride_j)
    a, b = load_masses(a_ptr, p * n, i, n, HAS_A), load_masses(b_ptr, p * m, j, m, HAS_B)
    phi = start(initial_f, p * n, i, n, a, scale, HAS_F)
    gamma = start(initial_g, p * m, j, m, b, scale, HAS_G)
    log_a, log_b = log_masses(a), log_masses(b)
    least = least_cost(c)
    fits = tl.full((), 0, tl.int1)
    if PLAIN:
        fits = fits_scalings(c, scale, least, a, b, gamma)
    if fits:
        u, v, across, down, step = iterate_scalings(
            c, scale, least, a, b, gamma, history, i, j, n, m, num_iters, tol, KEEP, STOP
        )
        rows, columns = (u * across).to(tl.float64), (v * down).to(tl.float64)
        u, v = u.to(tl.float64), v.to(tl.float64)
        shift = least.to(tl.float64) * scale
        phi = tl.where(u == 0, float("-inf"), tl.log2(tl.where(u == 0, 1.0, u)) + shift)
        gamma = tl.where(v == 0, float("-inf"), tl.log2(tl.where(v == 0, 1.0, v)))
    else:
        phi, gamma, across_log, down_log, step = iterate_logs(
            c, scale, a, b, log_a, log_b, phi, gamma, history, i, j, n, m, num_iters, tol, omega, lambda_a, lambda_b, drop_a,
            drop_b, KEEP, STOP, AUTO, RELAXED,
        )  # fmt: skip
        rows, columns = tl.exp2(phi + across_log), tl.exp2(gamma + down_log)
    if KEEP == 1:
        keep(history, tl.full((), 0, tl.int32), phi, gamma, i, j, n, m)
    if KEEP != 0:
        tl.store(history, tl.where(fits & (KEEP != 1), 1.0, 0.0).to(tl.float64))
        tl.store(history + 1, step.to(tl.float64))
    plan = plan_tile(c, scale, phi, gamma)
    inner = tl.sum(tl.sum(plan * tl.where(c < float("inf"), c, 0.0), 1).to(tl.float64))
    value = side_value(a, log_a, phi, epsilon, drop_a) + side_value(b, log_b, gamma, epsilon, drop_b)
    value += epsilon * (tl.sum(a) * tl.sum(b) - tl.sum(rows))
    error = side_error(a, log_a, phi, rows, drop_a) + side_error(b, log_b, gamma, columns, drop_b)
    tl.store(transport_cost + p, inner.to(c.dtype))
    tl.store(regularized_cost + p, value.to(c.dtype))
    tl.store(marginal_error + p, error.to(c.dtype))
    tl.store(count + p, step.to(tl.int64))
    tl.store(f + p * n + i, (phi * (epsilon * LN2)).to(c.dtype), mask=i < n)
    tl.store(g + p * m + j, (gamma * (epsilon * LN2)).to(c.dtype), mask=j < m)
