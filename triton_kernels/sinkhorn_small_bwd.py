"""Gradients of ``sinkhorn_small``: one program a problem, the costs, the adjoint and the gradient of the costs on chip.

Per iteration, backwards, from the adjoints f_ and g_ of its potentials (natural units):

    V_ij = 2^(phi_i - c_ij - log2 sum_i 2^(phi_i - c_ij))     dC += lambda_b V g_    f_ -= lambda_b V g_    db = epsilon g_ / b
    W_ij = 2^(gamma'_j - c_ij - log2 sum_j ...)               dC += lambda_a W f_    g_  = -lambda_a W^T f_ da = epsilon f_ / a

gamma' being that of the iteration before. On scalings V_ij = u_i K_ij v_j / b_j, so that dC is K times a sum of products of
vectors. Operations: 4 multiply-adds (scalings) or 2 exponentials and 4 multiply-adds an entry and iteration.
"""

from __future__ import annotations

from ._runtime import jit, scalar, tl
from ._sinkhorn_common import LOG2E, load_masses, log_masses, side_gradient, start
from .sinkhorn_small import kernel_tile, least_cost, load_costs, plan_tile


@jit
def kept(history, slot, i, j, n, m):
    """Both vectors of a slot; -inf beyond the problem."""
    place = history + 2 + slot.to(tl.int64) * (n + m)
    left = tl.load(place + i, mask=i < n, other=float("-inf"))
    return left, tl.load(place + n + j, mask=j < m, other=float("-inf"))


@jit
def kept_scalings(history, slot, i, j, n, m):
    left, right = kept(history, slot, i, j, n, m)
    return tl.where(i < n, left, 0.0), tl.where(j < m, right, 0.0)


@jit
def logs(scalings):
    return tl.where(scalings == 0, float("-inf"), tl.log2(tl.where(scalings == 0, 1.0, scalings)))


@jit
def normalised(potential, log_mass, exponent):
    """-log2 of the sum that the update took."""
    return tl.where(potential == float("-inf"), float("-inf"), (potential - log_mass) / exponent)


@jit
def unroll_scalings(
    c, scale, least, a, b, gamma, f_, g_, by_cost, by_a, by_b, history, i, j, n, m, epsilon, steps, first
):  # fmt: skip
    """The gradients after the loop. The scalings after step s are in slot s + first; `gamma` is before step 0."""
    k = kernel_tile(c, scale, least)
    a, b = a.to(c.dtype), b.to(c.dtype)
    inverse_a, inverse_b = tl.where(a > 0, 1.0 / tl.where(a > 0, a, 1.0), 0.0), tl.where(b > 0, 1.0 / tl.where(b > 0, b, 1.0), 0.0)
    products = tl.zeros_like(c)
    for back in range(steps):
        step = steps - 1 - back
        u, v = kept_scalings(history, step + first, i, j, n, m)
        _, before = kept_scalings(history, tl.maximum(step + first - 1, 0), i, j, n, m)
        if step + first == 0:
            before = tl.exp2(gamma)
        u, v, before = u.to(c.dtype), v.to(c.dtype), before.to(c.dtype)
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
    return by_cost + tl.where(k == 0, 0.0, k * products), by_a, by_b


@jit
def unroll_logs(
    c, scale, a, b, log_a, log_b, gamma, f_, g_, by_cost, by_a, by_b, history, i, j, n, m, epsilon, lambda_a, lambda_b, steps, first
):  # fmt: skip
    """As `unroll_scalings`."""
    for back in range(steps):
        step = steps - 1 - back
        phi, after = kept(history, step + first, i, j, n, m)
        _, before = kept(history, tl.maximum(step + first - 1, 0), i, j, n, m)
        if step + first == 0:
            before = gamma
        g_ = tl.where(after == float("-inf"), 0.0, g_)
        by_b += tl.where(b > 0, epsilon * g_.to(tl.float64) / tl.where(b > 0, b, 1.0), 0.0)
        weights = plan_tile(c, scale, phi, normalised(after, log_b, lambda_b)) * (g_ * lambda_b.to(c.dtype))[None, :]
        by_cost += weights
        f_ = tl.where(phi == float("-inf"), 0.0, f_ - tl.sum(weights, 1))
        by_a += tl.where(a > 0, epsilon * f_.to(tl.float64) / tl.where(a > 0, a, 1.0), 0.0)
        weights = plan_tile(c, scale, normalised(phi, log_a, lambda_a), before) * (f_ * lambda_a.to(c.dtype))[:, None]
        by_cost += weights
        g_ = -tl.sum(weights, 0)
        f_ = tl.zeros_like(f_)
    return by_cost, by_a, by_b


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
def differentiate_small(
    cost, a_ptr, b_ptr, initial_g, history, grad_transport, grad_regularized, grad_f, grad_g, grad_cost, grad_a, grad_b,
    n, m, stride_p, stride_i, stride_j, out_i, out_j, history_stride,
    epsilon: fp64, lambda_a: fp64, lambda_b: fp64, drop_a: fp64, drop_b: fp64,  # noqa: F821
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_G: tl.constexpr,
    IN_TRANSPORT: tl.constexpr, IN_REGULARIZED: tl.constexpr, IN_F: tl.constexpr, IN_G: tl.constexpr,
    MODE: tl.constexpr, PLAIN: tl.constexpr, NEED_COST: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """MODE: 0 unroll, 1 envelope, 2 detach, 3 last_step, 4 implicit, where grad_a and grad_b receive the adjoints of the
    final potentials and grad_cost the derivative at fixed potentials.
    """
    p = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BN), tl.arange(0, BM)
    epsilon = scalar(epsilon, tl.float64)
    lambda_a, lambda_b = scalar(lambda_a, tl.float64), scalar(lambda_b, tl.float64)
    drop_a, drop_b = scalar(drop_a, tl.float64), scalar(drop_b, tl.float64)
    scale = LOG2E / epsilon
    history += p * history_stride
    c = load_costs(cost, p * stride_p, i, j, n, m, stride_i, stride_j)
    a, b = load_masses(a_ptr, p * n, i, n, HAS_A), load_masses(b_ptr, p * m, j, m, HAS_B)
    log_a, log_b = log_masses(a), log_masses(b)
    least = least_cost(c)
    scalings = tl.load(history) > 0
    steps = tl.load(history + 1).to(tl.int32)
    last = steps - 1
    if MODE == 3:
        last = tl.full((), 1, tl.int32)
    elif MODE != 0:
        last = tl.full((), 0, tl.int32)
    phi, gamma = kept(history, last, i, j, n, m)
    if scalings:
        phi, gamma = tl.where(i < n, phi, 0.0), tl.where(j < m, gamma, 0.0)
        phi, gamma = logs(phi) + least.to(tl.float64) * scale, logs(gamma)
    plan = plan_tile(c, scale, phi, gamma)
    finite = tl.where(c < float("inf"), c, 0.0)
    by_transport, by_value = incoming(grad_transport, p, IN_TRANSPORT), incoming(grad_regularized, p, IN_REGULARIZED)
    by_cost = tl.zeros_like(c)
    if IN_REGULARIZED:
        by_cost += plan * by_value.to(c.dtype)
    if IN_TRANSPORT:
        if MODE == 2:
            by_cost += plan * by_transport.to(c.dtype)
        else:
            by_cost += plan * ((1.0 - finite.to(tl.float64) / epsilon) * by_transport).to(c.dtype)
    by_a, by_b = tl.zeros_like(a), tl.zeros_like(b)
    if MODE != 2:
        rows, columns = tl.sum(plan, 1), tl.sum(plan, 0)
        f_, at_a = side_gradient(a, log_a, phi, rows, tl.sum(b), epsilon, drop_a)
        g_, at_b = side_gradient(b, log_b, gamma, columns, tl.sum(a), epsilon, drop_b)
        by_a += by_value * at_a
        by_b += by_value * at_b
    if (MODE == 0) | (MODE == 3) | (MODE == 4):
        spent = plan * finite
        by_f, by_g = tl.sum(spent, 1).to(tl.float64) / epsilon, tl.sum(spent, 0).to(tl.float64) / epsilon
        f_ = by_transport * by_f + incoming_side(grad_f, p * n, i, n, phi, IN_F) + (by_value * f_ if MODE != 4 else 0.0)
        g_ = by_transport * by_g + incoming_side(grad_g, p * m, j, m, gamma, IN_G) + (by_value * g_ if MODE != 4 else 0.0)
        if MODE == 4:
            by_a, by_b = f_, g_
        else:
            first = tl.full((), 0, tl.int32)
            if MODE == 3:
                first, steps = first + 1, tl.full((), 1, tl.int32)
            gamma = start(initial_g, p * m, j, m, b, scale, HAS_G)
            f_, g_ = f_.to(c.dtype), g_.to(c.dtype)
            if scalings:
                by_cost, by_a, by_b = unroll_scalings(
                    c, scale, least, a, b, gamma, f_, g_, by_cost, by_a, by_b, history, i, j, n, m, epsilon, steps, first
                )
            else:
                by_cost, by_a, by_b = unroll_logs(
                    c, scale, a, b, log_a, log_b, gamma, f_, g_, by_cost, by_a, by_b, history, i, j, n, m, epsilon, lambda_a,
                    lambda_b, steps, first,
                )  # fmt: skip
    if NEED_COST:
        place = p * n * m + i.to(tl.int64)[:, None] * out_i + j.to(tl.int64)[None, :] * out_j
        tl.store(grad_cost + place, by_cost, mask=(i < n)[:, None] & (j < m)[None, :])
    if NEED_A:
        tl.store(grad_a + p * n + i, by_a.to(c.dtype), mask=i < n)
    if NEED_B:
        tl.store(grad_b + p * m + j, by_b.to(c.dtype), mask=j < m)
