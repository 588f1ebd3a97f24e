"""Sinkhorn, one program a problem: the padded n x m tile stays on chip for the whole solve (reference/sinkhorn.py).

Layout: cost (B, n, m) by strides (0 for a shared cost; exchanged for columns first), float32 or float64, everything
else
contiguous. History, float64: (how it was solved, iterations), then for each slot that is kept the n + m potentials or
scalings. Bytes: n m, read thrice; operations: an iteration 2 n m multiply-adds (scalings) or 2 n m exponentials (log
domain).

scratch (B, m), float64: gamma of problems in the log domain, whose costs are read a chunk of CHUNK columns at a time.

A problem iterates on scalings where the range of its exponents is small (`_sinkhorn_common`), which it finds out
itself: u =
a / (K v), v = b / (K^T u) with K = 2^(cmin - c), taken once. Otherwise, with penalties and over-relaxation always, in
the
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
    exp2_of,
    load_masses,
    log_masses,
    relaxation,
    side_error,
    side_value,
    start,
    updated,
)


@jit
def load_costs(cost, base, i, j, n, m, stride_i, stride_j):
    """(BN, BM) costs, +inf beyond the problem. Offsets within a problem are 32 bits wide."""
    inside = (i < n)[:, None] & (j < m)[None, :]
    return tl.load(cost + base + (i[:, None] * stride_i + j[None, :] * stride_j), mask=inside, other=float("inf"))


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
    """2^((least - c) scale); the product is carried to twice the precision of float32."""
    x = least - c
    factor = scale.to(c.dtype)
    high = x * factor
    if c.dtype == tl.float32:
        low = tl.fma(x, factor, -high) + x * (scale - factor.to(tl.float64)).to(tl.float32)
        return tl.exp2(high) * tl.where(high > float("-inf"), 1.0 + low * 0.6931471805599453, 0.0)
    else:
        return tl.exp2(high)


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
def grow(top, total, t):
    """Running maximum and sum of 2^(t - maximum) over the columns, with those of the chunk t."""
    new = tl.maximum(top, tl.max(t, 1))
    safe = tl.where(new > float("-inf"), new, 0.0)
    total = total * tl.exp2((top - safe).to(total.dtype)) + tl.sum(tl.exp2((t - safe[:, None]).to(total.dtype)), 1)
    return new, total


@jit
def log_of(top, total):
    """log2 of 2^top total."""
    empty = total == 0
    return tl.where(
        empty, float("-inf"), tl.where(empty, 0.0, top) + tl.log2(tl.where(empty, 1.0, total)).to(tl.float64)
    )


@jit
def keep_columns(history, slot, values, j, n, m):
    tl.store(history + 2 + slot.to(tl.int64) * (n + m) + n + j, values, mask=j < m)


@jit
def iterate_scalings(
    c, scale, least, a, b, gamma, history, i, j, n, m, num_iters, tol, KEEP: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """u, v, K v, K^T u and the iterations that ran."""
    k = kernel_tile(c, scale, least)
    a, b = a.to(c.dtype), b.to(c.dtype)
    u, v = tl.zeros_like(a), tl.exp2(gamma.to(c.dtype))
    across, down = tl.sum(k * v[None, :], 1), tl.zeros_like(b)
    step, running = tl.full((), 0, tl.int32), tl.full((), 1, tl.int1)
    while (step < num_iters) & running:
        if KEEP == 3:
            keep_both(history, tl.full((), 0, tl.int32), u, v, i, j, n, m)
        u = tl.where(across == 0, 0.0, a / tl.where(across == 0, 1.0, across))
        down = tl.sum(k * u[:, None], 0)
        v = tl.where(down == 0, 0.0, b / tl.where(down == 0, 1.0, down))
        if KEEP == 2:
            keep_both(history, step, u, v, i, j, n, m)
        across = tl.sum(k * v[None, :], 1)
        step += 1
        if STOP:
            error = tl.sum(tl.abs(u * across - a).to(tl.float64)) + tl.sum(tl.abs(v * down - b).to(tl.float64))
            running = (error <= tol) == 0
    if KEEP == 3:
        keep_both(history, tl.full((), 1, tl.int32), u, v, i, j, n, m)
    return u, v, across, down, step


@jit
def keep_both(history, slot, left, right, i, j, n, m):
    place = history + 2 + slot.to(tl.int64) * (n + m)
    tl.store(place + i, left.to(tl.float64), mask=i < n)
    tl.store(place + n + j, right.to(tl.float64), mask=j < m)


@jit
def first_sums(
    cost, base, initial_g, b_ptr, at_m, scratch, scale, i, n, m, stride_i, stride_j, a,
    HAS_B: tl.constexpr, HAS_G: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """The start of gamma, into scratch, and the logarithms of its sums over the columns."""
    top, total = tl.zeros_like(a) + float("-inf"), tl.zeros_like(a).to(cost.dtype.element_ty)
    for k in range(tl.cdiv(m, CHUNK)):
        j = k * CHUNK + tl.arange(0, CHUNK)
        c = load_costs(cost, base, i, j, n, m, stride_i, stride_j)
        b = load_masses(b_ptr, at_m, j, m, HAS_B)
        gamma = start(initial_g, at_m, j, m, b, scale, HAS_G)
        tl.store(scratch + j, gamma, mask=j < m)
        top, total = grow(top, total, gamma[None, :] - c.to(tl.float64) * scale)
    return log_of(top, total)


@jit
def update_columns(
    cost, base, b_ptr, at_m, scratch, history, slot, phi, scale, i, n, m, stride_i, stride_j, omega, lambda_b, drop_b,
    HAS_B: tl.constexpr, KEEP: tl.constexpr, RELAXED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """gamma after phi, in scratch; the logarithms of its sums over the columns; the marginal error of the columns."""
    top, total = tl.zeros_like(phi) + float("-inf"), tl.zeros_like(phi).to(cost.dtype.element_ty)
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    error = tl.zeros((), tl.float64)
    for k in range(tl.cdiv(m, CHUNK)):
        j = k * CHUNK + tl.arange(0, CHUNK)
        c = load_costs(cost, base, i, j, n, m, stride_i, stride_j)
        b = load_masses(b_ptr, at_m, j, m, HAS_B)
        log_b = log_masses(b, DATA)
        down = log_sums(c, scale, phi[:, None], 0)
        old = tl.load(scratch + j, mask=j < m, other=float("-inf"))
        if KEEP == 3:
            keep_columns(history, tl.full((), 0, tl.int32), old, j, n, m)
        gamma = updated(old, b, log_b, down, lambda_b, omega, RELAXED)
        tl.store(scratch + j, gamma, mask=j < m)
        if KEEP == 2:
            keep_columns(history, slot, gamma, j, n, m)
        error += side_error(b, log_b, gamma, exp2_of(gamma + down, DATA), drop_b, DATA)
        top, total = grow(top, total, gamma[None, :] - c.to(tl.float64) * scale)
    return log_of(top, total), error


@jit
def iterate_logs(
    cost, base, b_ptr, initial_g, at_m, scratch, history, scale, a, log_a, phi, i, n, m, stride_i, stride_j, num_iters,
    tol,
    omega, lambda_a, lambda_b, drop_a, drop_b,
    HAS_B: tl.constexpr, HAS_G: tl.constexpr, KEEP: tl.constexpr, STOP: tl.constexpr, AUTO: tl.constexpr,
    RELAXED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """phi, its sums over the columns, the marginal error of the columns, the iterations that ran; gamma in scratch."""
    across = first_sums(
        cost, base, initial_g, b_ptr, at_m, scratch, scale, i, n, m, stride_i, stride_j, a, HAS_B, HAS_G, CHUNK
    )
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    column_error, previous = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    step, running = tl.full((), 0, tl.int32), tl.full((), 1, tl.int1)
    while (step < num_iters) & running:
        tl.debug_barrier()
        if KEEP == 3:
            tl.store(history + 2 + i, phi, mask=i < n)
        phi = updated(phi, a, log_a, across, lambda_a, omega, RELAXED)
        if KEEP == 2:
            tl.store(history + 2 + step.to(tl.int64) * (n + m) + i, phi, mask=i < n)
        across, column_error = update_columns(
            cost, base, b_ptr, at_m, scratch, history, step, phi, scale, i, n, m, stride_i, stride_j, omega, lambda_b,
            drop_b,
            HAS_B, KEEP, RELAXED, CHUNK,
        )  # fmt: skip
        step += 1
        if STOP or AUTO:
            error = column_error + side_error(a, log_a, phi, exp2_of(phi + across, DATA), drop_a, DATA)
            if AUTO:
                omega, previous = relaxation(omega, previous, error, step)
            if STOP:
                running = (error <= tol) == 0
    return phi, exp2_of(phi + across, DATA), column_error, step


@jit
def finish(
    cost, base, b_ptr, at_m, scratch, history, slot, phi, scale, i, n, m, stride_i, stride_j, g, epsilon, drop_b,
    HAS_B: tl.constexpr, KEPT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """<P, C>, the columns' part of the dual value and their mass; g is written, and kept in a slot if KEPT."""
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    inner, value, mass = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for k in range(tl.cdiv(m, CHUNK)):
        j = k * CHUNK + tl.arange(0, CHUNK)
        c = load_costs(cost, base, i, j, n, m, stride_i, stride_j)
        b = load_masses(b_ptr, at_m, j, m, HAS_B)
        gamma = tl.load(scratch + j, mask=j < m, other=float("-inf"))
        plan = plan_tile(c, scale, phi, gamma)
        inner += tl.sum(tl.sum(plan * tl.where(c < float("inf"), c, 0.0), 1).to(tl.float64))
        value += side_value(b, log_masses(b, DATA), gamma, epsilon, drop_b, DATA)
        mass += tl.sum(b)
        tl.store(g + at_m + j, (gamma * (epsilon * LN2)).to(c.dtype), mask=j < m)
        if KEPT:
            keep_columns(history, slot, gamma, j, n, m)
    return inner, value, mass


@jit
def solve_small(
    cost, a_ptr, b_ptr, initial_f, initial_g, transport_cost, regularized_cost, f, g, marginal_error, count, history,
    scratch, n, m, stride_p, stride_i, stride_j, num_iters, history_stride,
    epsilon: tl.float64, tol: tl.float64, omega: tl.float64, lambda_a: tl.float64, lambda_b: tl.float64,
    drop_a: tl.float64, drop_b: tl.float64,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_F: tl.constexpr, HAS_G: tl.constexpr,
    KEEP: tl.constexpr, STOP: tl.constexpr, AUTO: tl.constexpr, RELAXED: tl.constexpr, PLAIN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """The problem of this program. PLAIN: no penalties, no over-relaxation, so that it may run on scalings."""
    p = tl.program_id(0).to(tl.int64)
    solve_problem(
        cost, p * stride_p, a_ptr, b_ptr, initial_f, initial_g, p * n, p * m, p, transport_cost, regularized_cost, f, g,
        marginal_error, count, history + p * history_stride, scratch + p * m, n, m, stride_i, stride_j, num_iters,
        epsilon, tol, omega, lambda_a, lambda_b, drop_a, drop_b,
        HAS_A, HAS_B, HAS_F, HAS_G, KEEP, STOP, AUTO, RELAXED, PLAIN, BN, BM, CHUNK,
    )  # fmt: skip


@jit
def solve_problem(
    cost, base, a_ptr, b_ptr, initial_f, initial_g, at_n, at_m, p, transport_cost, regularized_cost, f, g,
    marginal_error, count, history, scratch, n, m, stride_i, stride_j, num_iters,
    epsilon, tol, omega, lambda_a, lambda_b, drop_a, drop_b,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_F: tl.constexpr, HAS_G: tl.constexpr,
    KEEP: tl.constexpr, STOP: tl.constexpr, AUTO: tl.constexpr, RELAXED: tl.constexpr, PLAIN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """Problem p: costs begin at `base`, rows at `at_n`, columns at `at_m`; history and scratch are its own."""
    i, j = tl.arange(0, BN), tl.arange(0, BM)
    epsilon, tol, omega = scalar(epsilon, tl.float64), scalar(tol, tl.float64), scalar(omega, tl.float64)
    lambda_a, lambda_b = scalar(lambda_a, tl.float64), scalar(lambda_b, tl.float64)
    drop_a, drop_b = scalar(drop_a, tl.float64), scalar(drop_b, tl.float64)
    scale = LOG2E / epsilon
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    a = load_masses(a_ptr, at_n, i, n, HAS_A)
    log_a = log_masses(a, DATA)
    phi = start(initial_f, at_n, i, n, a, scale, HAS_F)
    fits = tl.full((), 0, tl.int1)
    if PLAIN:
        c = load_costs(cost, base, i, j, n, m, stride_i, stride_j)
        least = least_cost(c)
        b = load_masses(b_ptr, at_m, j, m, HAS_B)
        gamma = start(initial_g, at_m, j, m, b, scale, HAS_G)
        fits = fits_scalings(c, scale, least, a, b, gamma)
    if fits:
        if PLAIN:
            u, v, across, down, step = iterate_scalings(
                c, scale, least, a, b, gamma, history, i, j, n, m, num_iters, tol, KEEP, STOP
            )
            rows = (u * across).to(tl.float64)
            column_error = tl.sum(tl.abs((v * down).to(tl.float64) - b))
            phi = logs(u) + least.to(tl.float64) * scale
            tl.store(scratch + j, logs(v), mask=j < m)
        else:
            rows, column_error, step = phi, epsilon, tl.full((), 0, tl.int32)
    else:
        phi, rows, column_error, step = iterate_logs(
            cost, base, b_ptr, initial_g, at_m, scratch, history, scale, a, log_a, phi, i, n, m, stride_i, stride_j,
            num_iters,
            tol, omega, lambda_a, lambda_b, drop_a, drop_b, HAS_B, HAS_G, KEEP, STOP, AUTO, RELAXED, CHUNK,
        )  # fmt: skip
    tl.debug_barrier()
    last = tl.full((), 1 if KEEP == 3 else 0, tl.int32)
    inner, value, mass = finish(
        cost, base, b_ptr, at_m, scratch, history, last, phi, scale, i, n, m, stride_i, stride_j, g, epsilon, drop_b,
        HAS_B,
        KEEP == 1, CHUNK,
    )  # fmt: skip
    if KEEP == 3:
        if fits == 0:
            keep_last(history, scratch, phi, i, n, m, CHUNK)
    if KEEP == 1:
        tl.store(history + 2 + i, phi, mask=i < n)
    if KEEP != 0:
        tl.store(history, tl.where(fits & (KEEP != 1), 1.0, 0.0).to(tl.float64))
        tl.store(history + 1, step.to(tl.float64))
    value += side_value(a, log_a, phi, epsilon, drop_a, DATA) + epsilon * (tl.sum(a) * mass - tl.sum(rows))
    error = side_error(a, log_a, phi, rows, drop_a, DATA) + column_error
    tl.store(transport_cost + p, inner.to(DATA))
    tl.store(regularized_cost + p, value.to(DATA))
    tl.store(marginal_error + p, error.to(DATA))
    tl.store(count + p, step.to(tl.int64))
    tl.store(f + at_n + i, (phi * (epsilon * LN2)).to(DATA), mask=i < n)


@jit
def keep_last(history, scratch, phi, i, n, m, CHUNK: tl.constexpr):  # noqa: N803
    """Slot 1: the potentials after the last iteration."""
    tl.store(history + 2 + (n + m) + i, phi, mask=i < n)
    for k in range(tl.cdiv(m, CHUNK)):
        j = k * CHUNK + tl.arange(0, CHUNK)
        tl.store(history + 2 + (n + m) + n + j, tl.load(scratch + j, mask=j < m), mask=j < m)


@jit
def logs(scalings):
    """log2 of scalings, -inf for 0."""
    return tl.where(scalings == 0, float("-inf"), tl.log2(tl.where(scalings == 0, 1.0, scalings)).to(tl.float64))
