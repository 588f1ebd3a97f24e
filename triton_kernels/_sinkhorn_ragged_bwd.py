"""Gradients of ``_sinkhorn_ragged_kernels``: a program a problem; small ones by ``_sinkhorn_small_bwd``.

The recurrences are those of ``_sinkhorn_small_bwd``. Work memory, float64, of a problem: adjoints and gradients by the
masses of both sides and the start of gamma, 2 n + 3 m. Both passes of a step are one function, with sides exchanged:
out_i = start_i - sum_j T_ij, where T_ij = 2^(own_i + other'_j - c_ij) exponent vector_j is a term of dC.
"""

from __future__ import annotations

from ._runtime import jit, scalar, tl
from ._sinkhorn_common import LOG2E, load_masses, log_masses, side_gradient
from ._sinkhorn_ragged_kernels import costs_at, locate, mass_of, start_side, within
from ._sinkhorn_small_bwd import add_to, differentiate_problem, incoming, incoming_side, inverse, normalised


@jit
def end_side(
    cost, grad_cost, weights, own, other, grad, adjoint, by_mass, n, m, stride_i, stride_j, scale, epsilon, drop,
    by_transport, by_value, other_total, GIVEN: tl.constexpr, MODE: tl.constexpr, STORE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """The derivatives by the final potentials and by the masses at fixed ones; STORE: and by the costs."""
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    for first_i in range(0, n, BN):
        i = first_i + tl.arange(0, BN)
        phi = tl.load(own + i, mask=i < n, other=float("-inf"))
        mass, spent = tl.zeros((BN,), tl.float64), tl.zeros((BN,), tl.float64)
        for first_j in range(0, m, BM):
            j = first_j + tl.arange(0, BM)
            c, place, inside = costs_at(cost, i, j, n, m, stride_i, stride_j)
            gamma = tl.load(other + j, mask=j < m, other=float("-inf"))
            plan = tl.exp2((phi[:, None] + gamma[None, :] - c.to(tl.float64) * scale).to(DATA))
            finite = tl.where(c < float("inf"), c, 0.0)
            mass += tl.sum(plan, 1).to(tl.float64)
            spent += tl.sum(plan * finite, 1).to(tl.float64)
            if STORE:
                factor = tl.zeros_like(finite).to(tl.float64) + by_value + by_transport
                if MODE != 2:
                    factor -= finite.to(tl.float64) / epsilon * by_transport
                tl.store(grad_cost + place, plan * factor.to(DATA), mask=inside)
        masses = load_masses(weights, 0, i, n, True)
        log_mass = log_masses(masses, DATA)
        bar, by = side_gradient(masses, log_mass, phi, mass, other_total, epsilon, drop, DATA)
        bar = by_value * bar if MODE != 4 else tl.zeros_like(bar)
        bar += by_transport * spent / epsilon + incoming_side(grad, 0, i, n, phi, GIVEN)
        by = by_value * by if MODE != 2 else tl.zeros_like(by)
        tl.store(adjoint + i, bar, mask=i < n)
        tl.store(by_mass + i, by, mask=i < n)


@jit
def count_side(weights, adjoint, by_mass, n, epsilon, BLOCK: tl.constexpr):  # noqa: N803
    """by_mass += epsilon adjoint / weights."""
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        masses = load_masses(weights, 0, i, n, True)
        add_to(by_mass + i, epsilon * inverse(masses) * tl.load(adjoint + i, mask=i < n, other=0.0), i < n, True)


@jit
def back_pass(
    cost, grad_cost, other_weights, own, other, vector, out, n, m, stride_i, stride_j, scale, exponent,
    ADD: tl.constexpr, NEED_COST: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """out_i = start_i - sum_j T_ij, the start being what is in out if ADD, else 0; 0 where own_i is -inf. dC += T."""
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    for first_i in range(0, n, BN):
        i = first_i + tl.arange(0, BN)
        phi = tl.load(own + i, mask=i < n, other=float("-inf"))
        total = tl.zeros((BN,), tl.float64)
        for first_j in range(0, m, BM):
            j = first_j + tl.arange(0, BM)
            c, place, inside = costs_at(cost, i, j, n, m, stride_i, stride_j)
            log_mass = log_masses(load_masses(other_weights, 0, j, m, True), DATA)
            gamma = normalised(tl.load(other + j, mask=j < m, other=float("-inf")), log_mass, exponent)
            by = (tl.load(vector + j, mask=j < m, other=0.0) * exponent).to(DATA)
            terms = tl.exp2((phi[:, None] + gamma[None, :] - c.to(tl.float64) * scale).to(DATA)) * by[None, :]
            add_to(grad_cost + place, terms, inside, NEED_COST)
            total += tl.sum(terms, 1).to(tl.float64)
        result = -total
        if ADD:
            result += tl.load(out + i, mask=i < n, other=0.0)
        tl.store(out + i, tl.where(phi == float("-inf"), 0.0, result), mask=i < n)


@jit
def unroll_tiles(
    cost, grad_cost, a_ptr, b_ptr, history, f_bar, by_a, g_bar, by_b, gamma_start, n, m, stride_i, stride_j, epsilon,
    lambda_a, lambda_b, steps, first, NEED_COST: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """The adjoint loop. The potentials after step s are in slot s + first."""
    scale = LOG2E / epsilon
    size = n + m
    for back in range(steps):
        slot = first + steps - 1 - back
        now = history + 2 + slot.to(tl.int64) * size
        tl.debug_barrier()
        count_side(b_ptr, g_bar, by_b, m, epsilon, BM)
        if back == 0:
            back_pass(
                cost, grad_cost, b_ptr, now, now + n, g_bar, f_bar, n, m, stride_i, stride_j, scale, lambda_b,
                True, NEED_COST, BN, BM,
            )  # fmt: skip
        else:
            back_pass(
                cost, grad_cost, b_ptr, now, now + n, g_bar, f_bar, n, m, stride_i, stride_j, scale, lambda_b,
                False, NEED_COST, BN, BM,
            )  # fmt: skip
        tl.debug_barrier()
        count_side(a_ptr, f_bar, by_a, n, epsilon, BM)
        before = gamma_start
        if slot > 0:
            before = now - m
        back_pass(
            cost, grad_cost, a_ptr, before, now, f_bar, g_bar, m, n, stride_j, stride_i, scale, lambda_a,
            False, NEED_COST, BN, BM,
        )  # fmt: skip


@jit
def write_side(source, target, n, BLOCK: tl.constexpr, NEED: tl.constexpr):  # noqa: N803
    if NEED:
        for first in range(0, n, BLOCK):
            i = first + tl.arange(0, BLOCK)
            value = tl.load(source + i, mask=i < n, other=0.0)
            tl.store(target + i, value.to(target.dtype.element_ty), mask=i < n)


@jit
def differentiate_tiles(
    cost, grad_cost, a_ptr, b_ptr, initial_g, history, grad_f, grad_g, grad_a, grad_b, adjoint_f, adjoint_g, work,
    by_transport, by_value, n, m, stride_i, stride_j, epsilon, lambda_a, lambda_b, drop_a, drop_b,
    HAS_G: tl.constexpr, IN_F: tl.constexpr, IN_G: tl.constexpr, MODE: tl.constexpr, NEED_COST: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """One problem, all pointers at its beginning."""
    scale = LOG2E / epsilon
    f_bar, by_a, g_bar, by_b, gamma_start = work, work + n, work + 2 * n, work + 2 * n + m, work + 2 * (n + m)
    steps, first = tl.load(history + 1).to(tl.int32), tl.full((), 0, tl.int32)
    last = steps - 1
    if MODE == 3:
        last, first, steps = tl.full((), 1, tl.int32), tl.full((), 1, tl.int32), tl.full((), 1, tl.int32)
    elif MODE != 0:
        last = first
    final = history + 2 + last.to(tl.int64) * (n + m)
    if MODE == 0:
        start_side(initial_g, b_ptr, gamma_start, m, scale, HAS_G, BM)
    end_side(
        cost, grad_cost, a_ptr, final, final + n, grad_f, f_bar, by_a, n, m, stride_i, stride_j, scale, epsilon, drop_a,
        by_transport, by_value, mass_of(b_ptr, m, BM), IN_F, MODE, NEED_COST, BN, BM,
    )  # fmt: skip
    end_side(
        cost, grad_cost, b_ptr, final + n, final, grad_g, g_bar, by_b, m, n, stride_j, stride_i, scale, epsilon, drop_b,
        by_transport, by_value, mass_of(a_ptr, n, BM), IN_G, MODE, False, BN, BM,
    )  # fmt: skip
    if (MODE == 0) | (MODE == 3):
        unroll_tiles(
            cost, grad_cost, a_ptr, b_ptr, history, f_bar, by_a, g_bar, by_b, gamma_start, n, m, stride_i, stride_j,
            epsilon, lambda_a, lambda_b, steps, first, NEED_COST, BN, BM,
        )  # fmt: skip
    tl.debug_barrier()
    write_side(by_a, grad_a, n, BM, NEED_A)
    write_side(by_b, grad_b, m, BM, NEED_B)
    write_side(f_bar, adjoint_f, n, BM, MODE == 4)
    write_side(g_bar, adjoint_g, m, BM, MODE == 4)


@jit
def differentiate_ragged(
    cost, a_ptr, b_ptr, initial_g, row_offsets, column_offsets, starts, history, grad_transport, grad_regularized,
    grad_f, grad_g, grad_cost, grad_a, grad_b, adjoint_f, adjoint_g, work, packed_n, packed_m, entries, slots,
    epsilon: tl.float64, lambda_a: tl.float64, lambda_b: tl.float64, drop_a: tl.float64, drop_b: tl.float64,
    HAS_G: tl.constexpr, IN_TRANSPORT: tl.constexpr, IN_REGULARIZED: tl.constexpr, IN_F: tl.constexpr,
    IN_G: tl.constexpr, FLIPPED: tl.constexpr, MODE: tl.constexpr, PLAIN: tl.constexpr, NEED_COST: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, CHIP: tl.constexpr, LN: tl.constexpr, LM: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """As `solve_ragged`; MODE as in `differentiate_problem`. work: float64, 2 n + 3 m of a problem."""
    k = tl.program_id(0).to(tl.int64)
    at_n, n, at_m, m, base = locate(row_offsets, column_offsets, starts, k, packed_n, packed_m, entries)
    mine = (within(n, m, LN, LM) == 0) & (n >= 0)
    if CHIP:
        mine = mine & within(n, m, BN, BM)
    if mine:
        history += 2 * k + slots * (at_n + at_m)
        work += 2 * at_n + 3 * at_m
        if NEED_COST:
            grad_cost += base
        stride_i, stride_j = m, 1
        if FLIPPED:
            stride_i, stride_j = 1, n
        if CHIP:
            differentiate_problem(
                cost, base, a_ptr, b_ptr, initial_g, at_n, at_m, k, history, grad_transport, grad_regularized, grad_f,
                grad_g, grad_cost, grad_a, grad_b, adjoint_f, adjoint_g, work, n, m, stride_i, stride_j, stride_i,
                stride_j, epsilon, lambda_a, lambda_b, drop_a, drop_b, True, True, HAS_G, IN_TRANSPORT, IN_REGULARIZED,
                IN_F, IN_G, MODE, PLAIN, NEED_COST, NEED_A, NEED_B, BN, BM, CHUNK,
            )  # fmt: skip
        else:
            by_transport, by_value = (
                incoming(grad_transport, k, IN_TRANSPORT),
                incoming(grad_regularized, k, IN_REGULARIZED),
            )
            if HAS_G:
                initial_g += at_m
            if IN_F:
                grad_f += at_n
            if IN_G:
                grad_g += at_m
            differentiate_tiles(
                cost + base, grad_cost, a_ptr + at_n, b_ptr + at_m, initial_g, history, grad_f, grad_g,
                grad_a + at_n, grad_b + at_m, adjoint_f + at_n, adjoint_g + at_m, work, by_transport, by_value, n, m,
                stride_i, stride_j, scalar(epsilon, tl.float64), scalar(lambda_a, tl.float64),
                scalar(lambda_b, tl.float64), scalar(drop_a, tl.float64), scalar(drop_b, tl.float64),
                HAS_G, IN_F, IN_G, MODE, NEED_COST, NEED_A, NEED_B, BN, BM,
            )  # fmt: skip
