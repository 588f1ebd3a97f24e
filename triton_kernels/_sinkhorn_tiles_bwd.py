"""Gradients of ``_sinkhorn_tiles``: the adjoint loop, one launch a half-iteration, then the costs' gradient in one
pass.

The recurrences are those of ``_sinkhorn_small_bwd``; the adjoints of all T iterations are kept, T (n + m) numbers,
and the
gradient of a block of costs is formed on chip from them and the potentials: 2 T exponentials an entry. Points take
its product
with the derivatives of the costs, feature by feature. Nothing of size n m is stored but the gradient of a matrix.
"""

from __future__ import annotations

from ._runtime import jit, scalar, tl
from ._sinkhorn_common import LOG2E, load_masses, log_masses
from ._sinkhorn_small_bwd import normalised
from ._sinkhorn_tiles import L1, L2, cost_block


@jit
def back_half(
    left, right, weights, own, other, adjoint, out, start, steps, step, n, m, stride_p, stride_i, stride_j, d, wide_at,
    stride_kept, factor: tl.float64, epsilon: tl.float64, exponent: tl.float64,
    METRIC: tl.constexpr, DATA: tl.constexpr, GIVEN: tl.constexpr, STARTS: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """out_i = start_i - exponent sum_j 2^(own_i + other'_j - c_ij) adjoint_j, other' being other normalised by its
    masses.

    own (P, n), other (P, m) by stride_kept; adjoint (P, m), out (P, n). Problems with fewer steps are left alone;
    STARTS: where
    this is the last of a problem, start (P, n) is added, else 0.
    """
    p = tl.program_id(0).to(tl.int64)
    last = tl.load(steps + p)
    if step <= last:
        i = tl.program_id(1) * BN + tl.arange(0, BN)
        scale, factor = LOG2E / scalar(epsilon, tl.float64), scalar(factor, tl.float64)
        exponent = scalar(exponent, tl.float64)
        phi = tl.load(own + p * stride_kept + i, mask=i < n, other=float("-inf"))
        total = tl.zeros((BN,), tl.float64)
        for start_j in range(0, m, BM):
            j = start_j + tl.arange(0, BM)
            c = cost_block(left, right, p, i, j, n, m, stride_p, stride_i, stride_j, d, factor, wide_at, METRIC, BN, BM)
            b = load_masses(weights, p * m, j, m, GIVEN)
            gamma = tl.load(other + p * stride_kept + j, mask=j < m, other=float("-inf"))
            gamma = normalised(gamma, log_masses(b, DATA), exponent)
            vector = tl.load(adjoint + p * m + j, mask=j < m, other=0.0).to(DATA)
            plan = tl.exp2((phi[:, None] + gamma[None, :] - c * scale).to(DATA))
            total += tl.sum(plan * vector[None, :], 1).to(tl.float64)
        result = -exponent * total
        if STARTS:
            if step == last:
                result += tl.load(start + p * n + i, mask=i < n, other=0.0)
        result = tl.where(phi == float("-inf"), 0.0, result)
        tl.store(out + p * n + i, result, mask=i < n)


@jit
def gradient_block(
    c, p, i, j, n, m, a_ptr, b_ptr, potentials_n, potentials_m, f_bar, g_bar, by_transport, by_value, steps, problems,
    stride_kept, slot_stride, epsilon, lambda_a, lambda_b,
    DATA: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, CONSTANT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """dC of a block. Slot t of the potentials is after iteration t, slot 0 the start; f_bar, g_bar (T + 1, P, .)."""
    scale = LOG2E / epsilon
    last = tl.load(steps + p)
    phi = tl.load(potentials_n + p * stride_kept + last * slot_stride + i, mask=i < n, other=float("-inf"))
    gamma = tl.load(potentials_m + p * stride_kept + last * slot_stride + j, mask=j < m, other=float("-inf"))
    exponents = -c * scale
    finite = tl.where(c < float("inf"), c, 0.0)
    weight = tl.zeros_like(c) + by_value + by_transport
    if not CONSTANT:
        weight -= finite / epsilon * by_transport
    total = tl.exp2((phi[:, None] + gamma[None, :] + exponents).to(DATA)) * weight.to(DATA)
    if UNROLL:
        log_a = log_masses(load_masses(a_ptr, p * n, i, n, HAS_A), DATA)
        log_b = log_masses(load_masses(b_ptr, p * m, j, m, HAS_B), DATA)
        for back in range(last):
            t = last - back
            row = tl.load(f_bar + (t * problems + p) * n + i, mask=i < n, other=0.0) * lambda_a
            column = tl.load(g_bar + (t * problems + p) * m + j, mask=j < m, other=0.0) * lambda_b
            phi = tl.load(potentials_n + p * stride_kept + t * slot_stride + i, mask=i < n, other=float("-inf"))
            gamma = tl.load(potentials_m + p * stride_kept + t * slot_stride + j, mask=j < m, other=float("-inf"))
            before = tl.load(
                potentials_m + p * stride_kept + (t - 1) * slot_stride + j, mask=j < m, other=float("-inf")
            )
            gamma = normalised(gamma, log_b, lambda_b)
            total += tl.exp2((phi[:, None] + gamma[None, :] + exponents).to(DATA)) * column.to(DATA)[None, :]
            phi = normalised(phi, log_a, lambda_a)
            total += tl.exp2((phi[:, None] + before[None, :] + exponents).to(DATA)) * row.to(DATA)[:, None]
    return total


@jit
def cost_gradient(
    cost, a_ptr, b_ptr, potentials_n, potentials_m, f_bar, g_bar, transport_at, value_at, steps, out, n, m, problems,
    together,
    stride_p, stride_i, stride_j, out_p, out_i, out_j, stride_kept, slot_stride,
    epsilon: tl.float64, lambda_a: tl.float64, lambda_b: tl.float64,
    DATA: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, CONSTANT: tl.constexpr, UNROLL: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """dC, (P, n, m), or with a shared cost its sum over the `together` problems, in their order."""
    first = tl.program_id(0).to(tl.int64) * together
    i, j = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2) * BM + tl.arange(0, BM)
    epsilon = scalar(epsilon, tl.float64)
    lambda_a, lambda_b = scalar(lambda_a, tl.float64), scalar(lambda_b, tl.float64)
    inside = (i < n)[:, None] & (j < m)[None, :]
    place = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    c = tl.load(cost + first * stride_p + place, mask=inside, other=float("inf")).to(tl.float64)
    total = tl.zeros((BN, BM), DATA)
    for k in range(together):
        p = first + k
        total += gradient_block(
            c, p, i, j, n, m, a_ptr, b_ptr, potentials_n, potentials_m, f_bar, g_bar, tl.load(transport_at + p),
            tl.load(value_at + p), steps, problems, stride_kept, slot_stride, epsilon, lambda_a, lambda_b, DATA,
            HAS_A, HAS_B,
            CONSTANT, UNROLL,
        )  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * out_p + i.to(tl.int64)[:, None] * out_i + j.to(tl.int64)[None, :] * out_j
    tl.store(out + place, total, mask=inside)


@jit
def spread(left, right, c, weights, out, i, j, n, m, d, factor, METRIC: tl.constexpr, DATA: tl.constexpr):  # noqa: N803
    """out[k, i] += sum_j weights_ij dc_ij / dx_ik, feature by feature; out (d, n) in float64."""
    if METRIC == L2:
        weights = tl.where(c > 0, weights / tl.where(c > 0, c, 1.0).to(DATA), 0.0)
    elif METRIC != L1:
        weights *= (2.0 * factor).to(DATA)
    for k in range(d):
        x = tl.load(left + k * n + i, mask=i < n, other=0.0)
        y = tl.load(right + k * m + j, mask=j < m, other=0.0)
        delta = (x[:, None] - y[None, :]).to(DATA)
        if METRIC == L1:
            delta = tl.where(delta > 0, 1.0, tl.where(delta < 0, -1.0, 0.0)).to(DATA)
        before = tl.load(out + k * n + i, mask=i < n, other=0.0)
        tl.store(out + k * n + i, before + tl.sum(weights * delta, 1).to(tl.float64), mask=i < n)


@jit
def point_gradient(
    left, right, a_ptr, b_ptr, potentials_n, potentials_m, f_bar, g_bar, transport_at, value_at, steps, out, n, m,
    problems, d,
    wide_at, stride_kept, slot_stride, factor: tl.float64, epsilon: tl.float64, lambda_a: tl.float64,
    lambda_b: tl.float64,
    METRIC: tl.constexpr, DATA: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, CONSTANT: tl.constexpr,
    UNROLL: tl.constexpr, FLIPPED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """dx, (P, d, n), of a block of points x = left. FLIPPED: left are the columns of the problem, right its rows."""
    p = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    epsilon, factor = scalar(epsilon, tl.float64), scalar(factor, tl.float64)
    lambda_a, lambda_b = scalar(lambda_a, tl.float64), scalar(lambda_b, tl.float64)
    n_, m_ = tl.full((), 0, tl.int64) + n, tl.full((), 0, tl.int64) + m
    for start_j in range(0, m, BM):
        j = start_j + tl.arange(0, BM)
        c = cost_block(left, right, p, i, j, n, m, 0, 0, 0, d, factor, wide_at, METRIC, BN, BM)
        if FLIPPED:
            weights = tl.trans(gradient_block(
                tl.trans(c), p, j, i, m, n, a_ptr, b_ptr, potentials_n, potentials_m, f_bar, g_bar,
                tl.load(transport_at + p),
                tl.load(value_at + p), steps, problems, stride_kept, slot_stride, epsilon, lambda_a, lambda_b, DATA,
                HAS_A,
                HAS_B, CONSTANT, UNROLL,
            ))  # fmt: skip
        else:
            weights = gradient_block(
                c, p, i, j, n, m, a_ptr, b_ptr, potentials_n, potentials_m, f_bar, g_bar, tl.load(transport_at + p),
                tl.load(value_at + p), steps, problems, stride_kept, slot_stride, epsilon, lambda_a, lambda_b, DATA,
                HAS_A,
                HAS_B, CONSTANT, UNROLL,
            )  # fmt: skip
        spread(
            left + p * d * n_, right + p * d * m_, c, weights, out + p * d * n_, i, j, n_, m_, d, factor, METRIC, DATA
        )


@jit
def applied_gradient(
    left, right, own, other, v, grad, out, n, m, width, d, wide_at, factor: tl.float64, epsilon: tl.float64,
    METRIC: tl.constexpr, DATA: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """dx, (P, d, n), of <grad, P v>: dC_ij = -P_ij <grad_i, v_j> / epsilon; grad (P, n, width), v (P, m, width)."""
    p = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    epsilon, factor = scalar(epsilon, tl.float64), scalar(factor, tl.float64)
    n_, m_ = tl.full((), 0, tl.int64) + n, tl.full((), 0, tl.int64) + m
    phi = tl.load(own + p * n + i, mask=i < n, other=float("-inf"))
    for start_j in range(0, m, BM):
        j = start_j + tl.arange(0, BM)
        c = cost_block(left, right, p, i, j, n, m, 0, 0, 0, d, factor, wide_at, METRIC, BN, BM)
        gamma = tl.load(other + p * m + j, mask=j < m, other=float("-inf"))
        inner = tl.zeros((BN, BM), DATA)
        for k in range(width):
            row = tl.load(grad + (p * n + i) * width + k, mask=i < n, other=0.0)
            inner += row[:, None] * tl.load(v + (p * m + j) * width + k, mask=j < m, other=0.0)[None, :]
        plan = tl.exp2((phi[:, None] + gamma[None, :] - c * (LOG2E / epsilon)).to(DATA))
        weights = -plan * inner / epsilon.to(DATA)
        spread(
            left + p * d * n_, right + p * d * m_, c, weights, out + p * d * n_, i, j, n_, m_, d, factor, METRIC, DATA
        )
