"""Sinkhorn on packed problems of different sizes: a program a problem (reference/sinkhorn_ragged.py).

Layout: costs (E,), problem k from starts[k] on, row by row; masses and potentials packed; FLIPPED: rows are the
caller's columns. History, float64: 2 + slots (n + m) numbers a problem, as ``_sinkhorn_small`` has them, packed. A
problem that fits in one of the tiles of ``CLASSES`` is solved on chip by the code of ``_sinkhorn_small``; there is a
launch for each tile, in which a program whose problem has another one ends at once, so that the host need not know
the sizes. The others, and those without rows or columns, are solved here, in the log domain, in tiles of BN x BM read
from the cache: an iteration is 2 n m exponentials and reads the costs twice; the backward as many, its terms being
added up in memory. The vectors of a problem lie in memory; the program's barriers order what its threads write.
Offsets that do not fit the tensors make a problem NaN: nothing is read or written out of bounds.
"""

from __future__ import annotations

from ._runtime import jit, scalar, tl
from ._sinkhorn_common import (
    LN2,
    LOG2E,
    exp2_of,
    load_masses,
    log_masses,
    relaxation,
    side_error,
    side_value,
    start,
    updated,
)
from ._sinkhorn_small import grow, log_of, solve_problem


@jit
def locate(row_offsets, column_offsets, starts, k, packed_n, packed_m, entries):
    """at_n, n, at_m, m, where the costs begin; n = m = -1 for offsets that do not fit."""
    at_n, at_m = tl.load(row_offsets + k), tl.load(column_offsets + k)
    n, m = tl.load(row_offsets + k + 1) - at_n, tl.load(column_offsets + k + 1) - at_m
    base = tl.load(starts + k)
    fits = (at_n >= 0) & (n >= 0) & (at_n + n <= packed_n) & (at_m >= 0) & (m >= 0) & (at_m + m <= packed_m)
    fits = fits & (base >= 0) & (base + n * m <= entries)
    n, m = tl.where(fits, n, -1).to(tl.int32), tl.where(fits, m, -1).to(tl.int32)
    return at_n, n, at_m, m, base


@jit
def within(n, m, BN: tl.constexpr, BM: tl.constexpr):  # noqa: N803
    return (n > 0) & (m > 0) & (n <= BN) & (m <= BM)


@jit
def costs_at(cost, i, j, n, m, stride_i, stride_j):
    """(BN, BM) costs, +inf beyond the problem, and where they are."""
    inside = (i < n)[:, None] & (j < m)[None, :]
    place = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    return tl.load(cost + place, mask=inside, other=float("inf")), place, inside


@jit
def log_row_sums(cost, other, i, n, m, stride_i, stride_j, scale, BN: tl.constexpr, BM: tl.constexpr):  # noqa: N803
    """log2 sum_j 2^(other_j - c_ij) of a block of rows."""
    top = tl.full((BN,), float("-inf"), tl.float64)
    total = tl.zeros((BN,), cost.dtype.element_ty)
    for first in range(0, m, BM):
        j = first + tl.arange(0, BM)
        c, _, _ = costs_at(cost, i, j, n, m, stride_i, stride_j)
        gamma = tl.load(other + j, mask=j < m, other=float("-inf"))
        top, total = grow(top, total, gamma[None, :] - c.to(tl.float64) * scale)
    return log_of(top, total)


@jit
def update_side(
    cost, weights, own, other, kept, n, m, stride_i, stride_j, scale, exponent, omega, drop,
    KEPT: tl.constexpr, RELAXED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """own (n) after other (m), in place, KEPT: and in `kept`; the marginal error of the side then."""
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    error = tl.zeros((), tl.float64)
    for first in range(0, n, BN):
        i = first + tl.arange(0, BN)
        masses = load_masses(weights, 0, i, n, True)
        log_mass = log_masses(masses, DATA)
        sums = log_row_sums(cost, other, i, n, m, stride_i, stride_j, scale, BN, BM)
        old = tl.load(own + i, mask=i < n, other=float("-inf"))
        new = updated(old, masses, log_mass, sums, exponent, omega, RELAXED)
        tl.store(own + i, new, mask=i < n)
        if KEPT:
            tl.store(kept + i, new, mask=i < n)
        error += side_error(masses, log_mass, new, exp2_of(new + sums, DATA), drop, DATA)
    return error


@jit
def error_of_side(
    cost, weights, own, other, n, m, stride_i, stride_j, scale, drop, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    error = tl.zeros((), tl.float64)
    for first in range(0, n, BN):
        i = first + tl.arange(0, BN)
        masses = load_masses(weights, 0, i, n, True)
        sums = log_row_sums(cost, other, i, n, m, stride_i, stride_j, scale, BN, BM)
        phi = tl.load(own + i, mask=i < n, other=float("-inf"))
        error += side_error(masses, log_masses(masses, DATA), phi, exp2_of(phi + sums, DATA), drop, DATA)
    return error


@jit
def start_side(initial, weights, own, n, scale, GIVEN: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        masses = load_masses(weights, 0, i, n, True)
        tl.store(own + i, start(initial, 0, i, n, masses, scale, GIVEN), mask=i < n)


@jit
def copy_side(source, target, n, BLOCK: tl.constexpr):  # noqa: N803
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(target + i, tl.load(source + i, mask=i < n), mask=i < n)


@jit
def mass_of(weights, n, BLOCK: tl.constexpr):  # noqa: N803
    total = tl.zeros((), tl.float64)
    for first in range(0, n, BLOCK):
        total += tl.sum(load_masses(weights, 0, first + tl.arange(0, BLOCK), n, True))
    return total


@jit
def row_plans(cost, own, other, i, n, m, stride_i, stride_j, scale, BN: tl.constexpr, BM: tl.constexpr):  # noqa: N803
    """sum_j P_ij and sum_j P_ij C_ij of a block of rows, float64."""
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    phi = tl.load(own + i, mask=i < n, other=float("-inf"))
    mass, spent = tl.zeros((BN,), tl.float64), tl.zeros((BN,), tl.float64)
    for first in range(0, m, BM):
        j = first + tl.arange(0, BM)
        c, _, _ = costs_at(cost, i, j, n, m, stride_i, stride_j)
        gamma = tl.load(other + j, mask=j < m, other=float("-inf"))
        plan = tl.exp2((phi[:, None] + gamma[None, :] - c.to(tl.float64) * scale).to(DATA))
        mass += tl.sum(plan, 1).to(tl.float64)
        spent += tl.sum(plan * tl.where(c < float("inf"), c, 0.0), 1).to(tl.float64)
    return phi, mass, spent


@jit
def finish_side(
    cost, weights, own, other, out, kept, n, m, stride_i, stride_j, scale, epsilon, drop, KEPT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """<P, C>, the side's part of the dual value, the plan's mass, the marginal error; potentials are written."""
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    inner, value = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    total, error = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for first in range(0, n, BN):
        i = first + tl.arange(0, BN)
        phi, mass, spent = row_plans(cost, own, other, i, n, m, stride_i, stride_j, scale, BN, BM)
        masses = load_masses(weights, 0, i, n, True)
        log_mass = log_masses(masses, DATA)
        inner += tl.sum(spent)
        total += tl.sum(mass)
        value += side_value(masses, log_mass, phi, epsilon, drop, DATA)
        error += side_error(masses, log_mass, phi, mass, drop, DATA)
        tl.store(out + i, (phi * (epsilon * LN2)).to(DATA), mask=i < n)
        if KEPT:
            tl.store(kept + i, phi, mask=i < n)
    return inner, value, total, error


@jit
def solve_tiles(
    cost, a_ptr, b_ptr, initial_f, initial_g, f, g, history, phi, gamma, n, m, stride_i, stride_j, num_iters,
    epsilon, tol, omega, lambda_a, lambda_b, drop_a, drop_b,
    HAS_F: tl.constexpr, HAS_G: tl.constexpr, KEEP: tl.constexpr, STOP: tl.constexpr, AUTO: tl.constexpr,
    RELAXED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """One problem, all pointers at its beginning; <P, C>, the dual value, the error, the iterations."""
    scale = LOG2E / epsilon
    start_side(initial_f, a_ptr, phi, n, scale, HAS_F, BM)
    start_side(initial_g, b_ptr, gamma, m, scale, HAS_G, BM)
    previous = tl.zeros((), tl.float64)
    step, running = tl.full((), 0, tl.int32), tl.full((), 1, tl.int1)
    size = n + m
    while (step < num_iters) & running:
        slot = history + 2 + step.to(tl.int64) * size
        tl.debug_barrier()
        if KEEP == 3:
            copy_side(phi, history + 2, n, BM)
            copy_side(gamma, history + 2 + n, m, BM)
            slot = history + 2 + size
            tl.debug_barrier()
        update_side(
            cost, a_ptr, phi, gamma, slot, n, m, stride_i, stride_j, scale, lambda_a, omega, drop_a,
            KEEP >= 2, RELAXED, BN, BM,
        )  # fmt: skip
        tl.debug_barrier()
        error = update_side(
            cost, b_ptr, gamma, phi, slot + n, m, n, stride_j, stride_i, scale, lambda_b, omega, drop_b,
            KEEP >= 2, RELAXED, BN, BM,
        )  # fmt: skip
        step += 1
        if STOP or AUTO:
            tl.debug_barrier()
            error += error_of_side(cost, a_ptr, phi, gamma, n, m, stride_i, stride_j, scale, drop_a, BN, BM)
            if AUTO:
                omega, previous = relaxation(omega, previous, error, step)
            if STOP:
                running = (error <= tol) == 0
    tl.debug_barrier()
    inner, value, total, error = finish_side(
        cost, a_ptr, phi, gamma, f, history + 2, n, m, stride_i, stride_j, scale, epsilon, drop_a, KEEP == 1, BN, BM
    )
    _, by_columns, _, column_error = finish_side(
        cost, b_ptr, gamma, phi, g, history + 2 + n, m, n, stride_j, stride_i, scale, epsilon, drop_b, KEEP == 1, BN, BM
    )
    value += by_columns + epsilon * (mass_of(a_ptr, n, BM) * mass_of(b_ptr, m, BM) - total)
    return inner, value, error + column_error, step


@jit
def solve_ragged(
    cost, a_ptr, b_ptr, initial_f, initial_g, row_offsets, column_offsets, starts, transport_cost, regularized_cost, f,
    g, marginal_error, count, history, scratch, packed_n, packed_m, entries, num_iters, slots,
    epsilon: tl.float64, tol: tl.float64, omega: tl.float64, lambda_a: tl.float64, lambda_b: tl.float64,
    drop_a: tl.float64, drop_b: tl.float64,
    HAS_F: tl.constexpr, HAS_G: tl.constexpr, FLIPPED: tl.constexpr, KEEP: tl.constexpr, STOP: tl.constexpr,
    AUTO: tl.constexpr, RELAXED: tl.constexpr, PLAIN: tl.constexpr, CHIP: tl.constexpr, LN: tl.constexpr,
    LM: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """CHIP: the problems that fit in BN x BM and not in LN x LM; else those that do not fit in LN x LM, in tiles.

    scratch: (N + M,) float64, of which a problem has n + m.
    """
    k = tl.program_id(0).to(tl.int64)
    at_n, n, at_m, m, base = locate(row_offsets, column_offsets, starts, k, packed_n, packed_m, entries)
    mine = within(n, m, LN, LM) == 0
    if CHIP:
        mine = mine & within(n, m, BN, BM)
    if mine:
        history += 2 * k + slots * (at_n + at_m)
        scratch += at_n + at_m
        stride_i, stride_j = m, 1
        if FLIPPED:
            stride_i, stride_j = 1, n
        if CHIP:
            solve_problem(
                cost, base, a_ptr, b_ptr, initial_f, initial_g, at_n, at_m, k, transport_cost, regularized_cost, f, g,
                marginal_error, count, history, scratch, n, m, stride_i, stride_j, num_iters, epsilon, tol, omega,
                lambda_a, lambda_b, drop_a, drop_b, True, True, HAS_F, HAS_G, KEEP, STOP, AUTO, RELAXED, PLAIN, BN, BM,
                CHUNK,
            )  # fmt: skip
        elif n < 0:
            store_values(transport_cost, regularized_cost, marginal_error, count, k, float("nan"), float("nan"),
                         float("nan"), 0)  # fmt: skip
        else:
            if HAS_F:
                initial_f += at_n
            if HAS_G:
                initial_g += at_m
            inner, value, error, step = solve_tiles(
                cost + base, a_ptr + at_n, b_ptr + at_m, initial_f, initial_g, f + at_n, g + at_m, history, scratch,
                scratch + n, n, m, stride_i, stride_j, num_iters, scalar(epsilon, tl.float64), scalar(tol, tl.float64),
                scalar(omega, tl.float64), scalar(lambda_a, tl.float64), scalar(lambda_b, tl.float64),
                scalar(drop_a, tl.float64), scalar(drop_b, tl.float64),
                HAS_F, HAS_G, KEEP, STOP, AUTO, RELAXED, BN, BM,
            )  # fmt: skip
            if KEEP != 0:
                tl.store(history, 0.0)
                tl.store(history + 1, step.to(tl.float64))
            solved = tl.where((n > 0) & (m > 0), step, 0)
            store_values(transport_cost, regularized_cost, marginal_error, count, k, inner, value, error, solved)


@jit
def store_values(transport_cost, regularized_cost, marginal_error, count, k, inner, value, error, steps):
    tl.store(transport_cost + k, inner)
    tl.store(regularized_cost + k, value)
    tl.store(marginal_error + k, error)
    tl.store(count + k, steps)
