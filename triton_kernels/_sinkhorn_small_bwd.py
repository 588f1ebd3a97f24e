"""Gradients of ``_sinkhorn_small``: one program a problem.

Per iteration, backwards, from the adjoints f_ and g_ of its potentials (natural units):

    V_ij = 2^(phi_i - c_ij - log2 sum_i 2^(phi_i - c_ij))     dC += lambda_b V g_    f_ -= lambda_b V g_    db =
    epsilon g_ / b
    W_ij = 2^(gamma'_j - c_ij - log2 sum_j ...)               dC += lambda_a W f_    g_  = -lambda_a W^T f_ da =
    epsilon f_ / a

gamma' being that of the iteration before. On scalings V_ij = u_i K_ij v_j / b_j, so that dC is K times a sum of
products of
vectors, and stays on chip; in the log domain it is added up in memory, a chunk of columns at a time. scratch (B, 2, m),
float64: g_ and db. Operations: 4 multiply-adds (scalings) or 2 exponentials an entry and iteration.
"""

from __future__ import annotations

from ._runtime import jit, scalar, tl
from ._sinkhorn_common import LOG2E, load_masses, log_masses, side_gradient, start
from ._sinkhorn_small import kernel_tile, least_cost, load_costs, logs, plan_tile


@jit
def kept_rows(history, slot, i, n, m, other):
    return tl.load(history + 2 + slot.to(tl.int64) * (n + m) + i, mask=i < n, other=other)


@jit
def kept_columns(history, slot, j, n, m, other):
    return tl.load(history + 2 + slot.to(tl.int64) * (n + m) + n + j, mask=j < m, other=other)


@jit
def normalised(potential, log_mass, exponent):
    """-log2 of the sum that the update took."""
    return tl.where(potential == float("-inf"), float("-inf"), (potential - log_mass) / exponent)


@jit
def inverse(masses):
    return tl.where(masses > 0, 1.0 / tl.where(masses > 0, masses, 1.0), 0.0)


@jit
def add_to(pointer, values, inside, NEEDED: tl.constexpr):  # noqa: N803
    if NEEDED:
        tl.store(pointer, tl.load(pointer, mask=inside, other=0.0) + values, mask=inside)


@jit
def unroll_scalings(
    cost, base, b_ptr, initial_g, at_m, scratch, history, grad_cost, f_, a, by_a, scale, i, j, n, m, stride_i, stride_j,
    epsilon,
    out_i, out_j, steps, first, HAS_B: tl.constexpr, HAS_G: tl.constexpr, NEED_COST: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """by_a after the loop; g_ and by_b in scratch. The scalings after step s are in slot s + first."""
    c = load_costs(cost, base, i, j, n, m, stride_i, stride_j)
    k = kernel_tile(c, scale, least_cost(c))
    b = load_masses(b_ptr, at_m, j, m, HAS_B)
    gamma = start(initial_g, at_m, j, m, b, scale, HAS_G)
    inverse_a, inverse_b = inverse(a).to(c.dtype), inverse(b).to(c.dtype)
    g_ = tl.load(scratch + j, mask=j < m, other=0.0).to(c.dtype)
    by_b = tl.load(scratch + m + j, mask=j < m, other=0.0)
    products = tl.zeros_like(c)
    for back in range(steps):
        slot = first + steps - 1 - back
        u = kept_rows(history, slot, i, n, m, 0.0).to(c.dtype)
        v = kept_columns(history, slot, j, n, m, 0.0).to(c.dtype)
        before = kept_columns(history, tl.maximum(slot - 1, 0), j, n, m, 0.0).to(c.dtype)
        if slot == 0:
            before = tl.exp2(gamma.to(c.dtype))
        g_ = tl.where(v == 0, 0.0, g_)
        by_b += epsilon * (inverse_b * g_).to(tl.float64)
        weighted = v * inverse_b * g_
        products += u[:, None] * weighted[None, :]
        f_ = tl.where(u == 0, 0.0, f_ - u * tl.sum(k * weighted[None, :], 1))
        by_a += epsilon * (inverse_a * f_).to(tl.float64)
        weighted = u * inverse_a * f_
        products += weighted[:, None] * before[None, :]
        g_ = -before * tl.sum(k * weighted[:, None], 0)
        f_ = tl.zeros_like(f_)
    tl.store(scratch + m + j, by_b, mask=j < m)
    inside = (i < n)[:, None] & (j < m)[None, :]
    place = i[:, None] * out_i + j[None, :] * out_j
    add_to(grad_cost + place, tl.where(k == 0, 0.0, k * products), inside, NEED_COST)
    return by_a


@jit
def back_to_rows(
    cost, base, b_ptr, at_m, scratch, history, grad_cost, slot, phi, f_, scale, i, n, m, stride_i, stride_j, out_i,
    out_j, epsilon, lambda_b, HAS_B: tl.constexpr, NEED_COST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """f_ - lambda_b V g_; its terms are added to dC, epsilon g_ / b to db."""
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    for k in range(tl.cdiv(m, CHUNK)):
        j = k * CHUNK + tl.arange(0, CHUNK)
        c = load_costs(cost, base, i, j, n, m, stride_i, stride_j)
        b = load_masses(b_ptr, at_m, j, m, HAS_B)
        gamma = kept_columns(history, slot, j, n, m, float("-inf"))
        g_ = tl.where(gamma == float("-inf"), 0.0, tl.load(scratch + j, mask=j < m, other=0.0))
        add_to(scratch + m + j, epsilon * inverse(b) * g_, j < m, True)
        terms = (
            plan_tile(c, scale, phi, normalised(gamma, log_masses(b, DATA), lambda_b))
            * (g_ * lambda_b).to(c.dtype)[None, :]
        )
        place = i[:, None] * out_i + j[None, :] * out_j
        add_to(grad_cost + place, terms, (i < n)[:, None] & (j < m)[None, :], NEED_COST)
        f_ -= tl.sum(terms, 1)
    return f_


@jit
def back_to_columns(
    cost, base, b_ptr, initial_g, at_m, scratch, history, grad_cost, slot, phi, f_, scale, i, n, m, stride_i, stride_j,
    out_i,
    out_j, lambda_a, HAS_B: tl.constexpr, HAS_G: tl.constexpr, NEED_COST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """g_ = -lambda_a W^T f_, in scratch; its terms are added to dC. phi: less the logarithm of the masses, over
    lambda_a.
    """
    for k in range(tl.cdiv(m, CHUNK)):
        j = k * CHUNK + tl.arange(0, CHUNK)
        c = load_costs(cost, base, i, j, n, m, stride_i, stride_j)
        before = kept_columns(history, tl.maximum(slot - 1, 0), j, n, m, float("-inf"))
        if slot == 0:
            before = start(initial_g, at_m, j, m, load_masses(b_ptr, at_m, j, m, HAS_B), scale, HAS_G)
        terms = plan_tile(c, scale, phi, before) * (f_ * lambda_a.to(c.dtype))[:, None]
        place = i[:, None] * out_i + j[None, :] * out_j
        add_to(grad_cost + place, terms, (i < n)[:, None] & (j < m)[None, :], NEED_COST)
        tl.store(scratch + j, -tl.sum(terms, 0).to(tl.float64), mask=j < m)


@jit
def unroll_logs(
    cost, base, b_ptr, initial_g, at_m, scratch, history, grad_cost, f_, a, log_a, by_a, scale, i, n, m, stride_i,
    stride_j,
    out_i, out_j, epsilon, lambda_a, lambda_b, steps, first,
    HAS_B: tl.constexpr, HAS_G: tl.constexpr, NEED_COST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """As `unroll_scalings`."""
    inverse_a = inverse(a)
    for back in range(steps):
        slot = first + steps - 1 - back
        phi = kept_rows(history, slot, i, n, m, float("-inf"))
        tl.debug_barrier()
        f_ = back_to_rows(
            cost, base, b_ptr, at_m, scratch, history, grad_cost, slot, phi, f_, scale, i, n, m, stride_i, stride_j,
            out_i, out_j,
            epsilon, lambda_b, HAS_B, NEED_COST, CHUNK,
        )  # fmt: skip
        f_ = tl.where(phi == float("-inf"), 0.0, f_)
        by_a += epsilon * inverse_a * f_.to(tl.float64)
        tl.debug_barrier()
        back_to_columns(
            cost, base, b_ptr, initial_g, at_m, scratch, history, grad_cost, slot, normalised(phi, log_a, lambda_a), f_,
            scale, i,
            n, m, stride_i, stride_j, out_i, out_j, lambda_a, HAS_B, HAS_G, NEED_COST, CHUNK,
        )  # fmt: skip
        f_ = tl.zeros_like(f_)
    return by_a


@jit
def incoming(grad, p, GIVEN: tl.constexpr):  # noqa: N803
    if GIVEN:
        return tl.load(grad + p).to(tl.float64)
    else:
        return tl.zeros((), tl.float64)


@jit
def incoming_side(grad, base, index, size, potential, GIVEN: tl.constexpr):  # noqa: N803
    """The gradient of the potentials of one side, 0 where they take no part."""
    if GIVEN:
        value = tl.load(grad + base + index, mask=index < size, other=0.0).to(tl.float64)
        return tl.where(potential == float("-inf"), 0.0, value)
    else:
        return tl.zeros_like(potential)


@jit
def final_columns(history, slot, j, n, m, scalings, DATA: tl.constexpr):  # noqa: N803
    """gamma of a slot that holds it or its scaling."""
    other = tl.where(scalings, 0.0, float("-inf")).to(tl.float64)
    gamma = kept_columns(history, slot, j, n, m, other)
    if scalings:
        gamma = logs(gamma.to(DATA))
    return gamma


@jit
def at_the_end(
    cost, base, b_ptr, at_m, scratch, history, grad_cost, grad_g, by_transport, by_value, last, phi, a, log_a, scale,
    scalings,
    i, n, m, stride_i, stride_j, out_i, out_j, epsilon, drop_a, drop_b,
    HAS_B: tl.constexpr, IN_G: tl.constexpr, MODE: tl.constexpr, NEED_COST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """Derivatives by the final potentials, and by costs and masses at fixed ones: f_ and by_a; g_ and by_b in
    scratch.
    """
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    rows, spent_rows, mass = tl.zeros_like(phi).to(DATA), tl.zeros_like(phi).to(DATA), tl.zeros((), tl.float64)
    for k in range(tl.cdiv(m, CHUNK)):
        j = k * CHUNK + tl.arange(0, CHUNK)
        c = load_costs(cost, base, i, j, n, m, stride_i, stride_j)
        b = load_masses(b_ptr, at_m, j, m, HAS_B)
        gamma = final_columns(history, last, j, n, m, scalings, DATA)
        plan = plan_tile(c, scale, phi, gamma)
        finite = tl.where(c < float("inf"), c, 0.0)
        factor = tl.zeros_like(finite).to(tl.float64) + by_value + by_transport
        if MODE != 2:
            factor -= finite.to(tl.float64) / epsilon * by_transport
        if NEED_COST:
            place = i[:, None] * out_i + j[None, :] * out_j
            tl.store(grad_cost + place, plan * factor.to(DATA), mask=(i < n)[:, None] & (j < m)[None, :])
        spent = plan * finite
        rows += tl.sum(plan, 1)
        spent_rows += tl.sum(spent, 1)
        mass += tl.sum(b)
        g_, by_b = side_gradient(b, log_masses(b, DATA), gamma, tl.sum(plan, 0), tl.sum(a), epsilon, drop_b, DATA)
        g_ = by_value * g_ if MODE != 4 else tl.zeros_like(g_)
        g_ += by_transport * tl.sum(spent, 0).to(tl.float64) / epsilon + incoming_side(grad_g, at_m, j, m, gamma, IN_G)
        tl.store(scratch + j, g_, mask=j < m)
        tl.store(scratch + m + j, by_value * by_b if MODE != 2 else tl.zeros_like(by_b), mask=j < m)
    f_, by_a = side_gradient(a, log_a, phi, rows, mass, epsilon, drop_a, DATA)
    f_ = by_value * f_ if MODE != 4 else tl.zeros_like(f_)
    f_ += by_transport * spent_rows.to(tl.float64) / epsilon
    return f_, by_value * by_a if MODE != 2 else tl.zeros_like(by_a)


@jit
def differentiate_small(
    cost, a_ptr, b_ptr, initial_g, history, grad_transport, grad_regularized, grad_f, grad_g, grad_cost, grad_a, grad_b,
    adjoint_f, adjoint_g, scratch, n, m, stride_p, stride_i, stride_j, out_i, out_j, history_stride,
    epsilon: tl.float64, lambda_a: tl.float64, lambda_b: tl.float64, drop_a: tl.float64, drop_b: tl.float64,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_G: tl.constexpr,
    IN_TRANSPORT: tl.constexpr, IN_REGULARIZED: tl.constexpr, IN_F: tl.constexpr, IN_G: tl.constexpr,
    MODE: tl.constexpr, PLAIN: tl.constexpr, NEED_COST: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """The problem of this program; MODE as in `differentiate_problem`."""
    p = tl.program_id(0).to(tl.int64)
    differentiate_problem(
        cost, p * stride_p, a_ptr, b_ptr, initial_g, p * n, p * m, p, history + p * history_stride, grad_transport,
        grad_regularized, grad_f, grad_g, grad_cost + p * n * m, grad_a, grad_b, adjoint_f, adjoint_g,
        scratch + p * 2 * m, n, m, stride_i, stride_j, out_i, out_j, epsilon, lambda_a, lambda_b, drop_a, drop_b,
        HAS_A, HAS_B, HAS_G, IN_TRANSPORT, IN_REGULARIZED, IN_F, IN_G, MODE, PLAIN, NEED_COST, NEED_A, NEED_B, BN, BM,
        CHUNK,
    )  # fmt: skip


@jit
def differentiate_problem(
    cost, base, a_ptr, b_ptr, initial_g, at_n, at_m, p, history, grad_transport, grad_regularized, grad_f, grad_g,
    grad_cost, grad_a, grad_b, adjoint_f, adjoint_g, scratch, n, m, stride_i, stride_j, out_i, out_j,
    epsilon, lambda_a, lambda_b, drop_a, drop_b,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_G: tl.constexpr,
    IN_TRANSPORT: tl.constexpr, IN_REGULARIZED: tl.constexpr, IN_F: tl.constexpr, IN_G: tl.constexpr,
    MODE: tl.constexpr, PLAIN: tl.constexpr, NEED_COST: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """MODE: 0 unroll, 1 envelope, 2 detach, 3 last_step; 4 implicit: the derivatives at fixed potentials, and in
    adjoint_f and adjoint_g those by the final potentials, where the linear solve starts.
    """
    i, j = tl.arange(0, BN), tl.arange(0, BM)
    epsilon = scalar(epsilon, tl.float64)
    lambda_a, lambda_b = scalar(lambda_a, tl.float64), scalar(lambda_b, tl.float64)
    drop_a, drop_b = scalar(drop_a, tl.float64), scalar(drop_b, tl.float64)
    scale = LOG2E / epsilon
    DATA: tl.constexpr = cost.dtype.element_ty  # noqa: N806
    a = load_masses(a_ptr, at_n, i, n, HAS_A)
    log_a = log_masses(a, DATA)
    scalings = tl.load(history) > 0
    steps = tl.load(history + 1).to(tl.int32)
    last, first = steps - 1, tl.full((), 0, tl.int32)
    if MODE == 3:
        last, first, steps = tl.full((), 1, tl.int32), first + 1, tl.full((), 1, tl.int32)
    elif MODE != 0:
        last = first
    phi = kept_rows(history, last, i, n, m, float("-inf"))
    if scalings:
        c = load_costs(cost, base, i, j, n, m, stride_i, stride_j)
        phi = logs(tl.where(i < n, phi, 0.0).to(DATA)) + least_cost(c).to(tl.float64) * scale
    by_transport, by_value = incoming(grad_transport, p, IN_TRANSPORT), incoming(grad_regularized, p, IN_REGULARIZED)
    f_, by_a = at_the_end(
        cost, base, b_ptr, at_m, scratch, history, grad_cost, grad_g, by_transport, by_value, last, phi, a, log_a,
        scale, scalings, i, n, m, stride_i, stride_j, out_i, out_j, epsilon, drop_a, drop_b, HAS_B, IN_G, MODE,
        NEED_COST, CHUNK,
    )  # fmt: skip
    f_ += incoming_side(grad_f, at_n, i, n, phi, IN_F)
    tl.debug_barrier()
    if (MODE == 0) | (MODE == 3):
        start_f = f_.to(DATA)
        if scalings:
            if PLAIN:
                by_a = unroll_scalings(
                    cost, base, b_ptr, initial_g, at_m, scratch, history, grad_cost, start_f, a, by_a, scale, i, j, n,
                    m, stride_i, stride_j, epsilon, out_i, out_j, steps, first, HAS_B, HAS_G, NEED_COST,
                )  # fmt: skip
        else:
            by_a = unroll_logs(
                cost, base, b_ptr, initial_g, at_m, scratch, history, grad_cost, start_f, a, log_a, by_a, scale, i, n,
                m, stride_i,
                stride_j, out_i, out_j, epsilon, lambda_a, lambda_b, steps, first, HAS_B, HAS_G, NEED_COST, CHUNK,
            )  # fmt: skip
    tl.debug_barrier()
    if MODE == 4:
        tl.store(adjoint_f + at_n + i, f_, mask=i < n)
        tl.store(adjoint_g + at_m + j, tl.load(scratch + j, mask=j < m), mask=j < m)
    if NEED_A:
        tl.store(grad_a + at_n + i, by_a.to(DATA), mask=i < n)
    if NEED_B:
        by_b = tl.load(scratch + m + j, mask=j < m)
        tl.store(grad_b + at_m + j, by_b.to(DATA), mask=j < m)
