"""Sinkhorn with one cost for a batch of marginals, by products of matrices (reference/sinkhorn.py).

K_ij = 2^(least_i - c_ij), least_i the smallest cost of row i, is taken once, (n, m); an iteration is two products,

    u = a / (V K^T)    (B, n)          v = b / (U K)    (B, m)

each one launch, the division in its epilogue; a program makes a tile of problems x rows from a sweep over the columns.
The adjoint loop has the same two products an iteration, and the gradient of the cost is K times one product of depth
(2 T + 1) B. Products are three TF32 products that add up to full float32, or float64 (`_matrix.product`). Without a
`flag` (the exponents do not fit the scalings: a number on the device, the same for the batch) the same programs go to
the log domain, problem by problem, as `_sinkhorn_tiles` does: nothing is decided on the host.

Layout: cost and K (n, m) contiguous, columns are updated with strides exchanged; masses (B, n) and (B, m); what an
iteration leaves, u and v or the potentials phi and gamma (`_sinkhorn_common`), float64, by a stride a problem. Bytes:
an iteration reads K twice, from L2; operations: 4 B n m multiply-adds an iteration.
"""

from __future__ import annotations

from ._matrix import product
from ._runtime import jit, scalar, tl
from ._sinkhorn_common import LN2, LOG2E, load_masses, log_masses, updated
from ._sinkhorn_small import grow, log_of


@jit(generic=("m",))
def exponentiate(cost, least, flag, out, m, epsilon: tl.float64, BLOCK: tl.constexpr):  # noqa: N803
    """K, if there is a flag: BLOCK entries of a row (grid: rows, blocks)."""
    if tl.load(flag) != 0:
        i, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        c = tl.load(cost + i * m + j, mask=j < m, other=0.0)
        exponent = (tl.load(least + i).to(tl.float64) - c.to(tl.float64)) * (LOG2E / scalar(epsilon, tl.float64))
        high = exponent.to(c.dtype)
        k = tl.exp2(high)
        if c.dtype == tl.float32:  # what rounding took from the exponent
            k *= 1.0 + (exponent - high.to(tl.float64)).to(tl.float32) * LN2
        tl.store(out + i * m + j, k, mask=j < m)


@jit
def load_tile(at, q, i, problems, n, stride):
    """(BP, BN) of a matrix (problems, n), 0 beyond it; q, i: problems and rows."""
    inside = (q < problems)[:, None] & (i < n)[None, :]
    return tl.load(at + q[:, None] * stride + i[None, :], mask=inside, other=0.0)


@jit
def store_tile(at, values, q, i, problems, n, stride):
    inside = (q < problems)[:, None] & (i < n)[None, :]
    tl.store(at + q[:, None] * stride + i[None, :], values, mask=inside)


@jit
def load_mass_tile(weights, q, i, problems, n, GIVEN: tl.constexpr):  # noqa: N803
    """Masses in float64, 1 / n where they are not given, 0 beyond."""
    if GIVEN:
        return load_tile(weights, q, i, problems, n, n).to(tl.float64)
    else:
        inside = (q < problems)[:, None] & (i < n)[None, :]
        return tl.where(inside, 1.0 / (tl.zeros((), tl.float64) + n), 0.0)


@jit
def load_kernel(kernel, i, j, n, m, stride_i, stride_j):
    """K^T as an operand: (DEPTH, BN) entries K_ij, 0 beyond."""
    place = j.to(tl.int64)[:, None] * stride_j + i.to(tl.int64)[None, :] * stride_i
    return tl.load(kernel + place, mask=(j < m)[:, None] & (i < n)[None, :], other=0.0)


@jit
def times_kernel(
    kernel, vectors, q, i, problems, n, m, stride_i, stride_j, stride, BP: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """sum_j K_ij vectors_pj, (BP, BN)."""
    DATA: tl.constexpr = kernel.dtype.element_ty  # noqa: N806
    total = tl.zeros((BP, BN), DATA)
    for first in range(0, m, DEPTH):
        j = first + tl.arange(0, DEPTH)
        left = load_tile(vectors, q, j, problems, m, stride).to(DATA)
        total += product(left, load_kernel(kernel, i, j, n, m, stride_i, stride_j))
    return total


@jit
def block_of_costs(cost, i, j, n, m, stride_i, stride_j):
    """(BN, DEPTH) costs in float64, +inf beyond."""
    place = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    inside = (i < n)[:, None] & (j < m)[None, :]
    return tl.load(cost + place, mask=inside, other=float("inf")).to(tl.float64)


@jit(generic=("problems", "n", "m", "stride_other", "stride_own"))
def update(
    kernel, cost, flag, weights, other, own, problems, n, m, stride_i, stride_j, stride_other, stride_own,
    epsilon: tl.float64, GIVEN: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """own (B, n) after other (B, m)."""
    first = tl.program_id(0).to(tl.int64) * BP
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    DATA: tl.constexpr = kernel.dtype.element_ty  # noqa: N806
    if tl.load(flag) != 0:
        q = first + tl.arange(0, BP)
        sums = times_kernel(kernel, other, q, i, problems, n, m, stride_i, stride_j, stride_other, BP, BN, DEPTH)
        a = load_mass_tile(weights, q, i, problems, n, GIVEN)
        inverse = tl.where(sums == 0, 0.0, 1.0 / tl.where(sums == 0, 1.0, sums)).to(tl.float64)
        store_tile(own, tl.where(a > 0, a * inverse, 0.0), q, i, problems, n, stride_own)
    else:
        scale = LOG2E / scalar(epsilon, tl.float64)
        for p in range(first, tl.minimum(first + BP, problems)):
            top, total = tl.full((BN,), float("-inf"), tl.float64), tl.zeros((BN,), DATA)
            for start in range(0, m, DEPTH):
                j = start + tl.arange(0, DEPTH)
                c = block_of_costs(cost, i, j, n, m, stride_i, stride_j)
                gamma = tl.load(other + p * stride_other + j, mask=j < m, other=float("-inf"))
                top, total = grow(top, total, gamma[None, :] - c * scale)
            a = load_masses(weights, p * n, i, n, GIVEN)
            new = updated(a, a, log_masses(a, DATA), log_of(top, total), 1.0, 1.0, False)
            tl.store(own + p * stride_own + i, new, mask=i < n)


@jit(generic=("problems", "n", "m", "stride_other", "stride_own"))
def sums_of_plans(
    kernel, cost, flag, base, other, own, mass, spent, problems, n, m, stride_i, stride_j, stride_other, stride_own,
    epsilon: tl.float64, MASS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """spent (B, n) = sum_j P_ij (C_ij - base), 0 for C = inf, and if MASS mass = sum_j P_ij, in float64."""
    first = tl.program_id(0).to(tl.int64) * BP
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    DATA: tl.constexpr = kernel.dtype.element_ty  # noqa: N806
    least = tl.load(base)
    if tl.load(flag) != 0:
        q = first + tl.arange(0, BP)
        total, bill = tl.zeros((BP, BN), DATA), tl.zeros((BP, BN), DATA)
        for start in range(0, m, DEPTH):
            j = start + tl.arange(0, DEPTH)
            k = load_kernel(kernel, i, j, n, m, stride_i, stride_j)
            left = load_tile(other, q, j, problems, m, stride_other).to(DATA)
            bill += product(left, k * (load_kernel(cost, i, j, n, m, stride_i, stride_j) - least.to(DATA)))
            if MASS:
                total += product(left, k)
        u = load_tile(own, q, i, problems, n, stride_own)
        store_tile(spent, u * bill.to(tl.float64), q, i, problems, n, n)
        if MASS:
            store_tile(mass, u * total.to(tl.float64), q, i, problems, n, n)
    else:
        scale = LOG2E / scalar(epsilon, tl.float64)
        for p in range(first, tl.minimum(first + BP, problems)):
            phi = tl.load(own + p * stride_own + i, mask=i < n, other=float("-inf"))
            sum, cost_sum = tl.zeros((BN,), tl.float64), tl.zeros((BN,), tl.float64)
            for start in range(0, m, DEPTH):
                j = start + tl.arange(0, DEPTH)
                c = block_of_costs(cost, i, j, n, m, stride_i, stride_j)
                gamma = tl.load(other + p * stride_other + j, mask=j < m, other=float("-inf"))
                plan = tl.exp2((phi[:, None] + gamma[None, :] - c * scale).to(DATA))
                sum += tl.sum(plan, 1).to(tl.float64)
                cost_sum += tl.sum(plan * tl.where(c < float("inf"), c - least, 0.0).to(DATA), 1).to(tl.float64)
            tl.store(spent + p * n + i, cost_sum, mask=i < n)
            if MASS:
                tl.store(mass + p * n + i, sum, mask=i < n)


@jit(generic=("problems", "n", "m", "stride_other", "stride_own"))
def adjoint_update(
    kernel, cost, flag, weights, other, own, vectors, first_adjoint, collected, out, problems, n, m, stride_i, stride_j,
    stride_other, stride_own, epsilon: tl.float64,
    GIVEN: tl.constexpr, STARTS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """Adjoints of own for a unit of mass, X_i = first_i - sum_j P_ij Y_j / a_i: added to `collected`, X_i u_i to `out`.

    vectors (B, m): Y_j v_j; without a flag Y and X themselves. STARTS: first_adjoint (B, n) is given, else 0.
    """
    first = tl.program_id(0).to(tl.int64) * BP
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    DATA: tl.constexpr = kernel.dtype.element_ty  # noqa: N806
    if tl.load(flag) != 0:
        q = first + tl.arange(0, BP)
        sums = times_kernel(kernel, vectors, q, i, problems, n, m, stride_i, stride_j, m, BP, BN, DEPTH)
        a = load_mass_tile(weights, q, i, problems, n, GIVEN)
        u = load_tile(own, q, i, problems, n, stride_own)
        x = -(u / tl.where(a > 0, a, 1.0)) * sums.to(tl.float64)
        if STARTS:
            x += load_tile(first_adjoint, q, i, problems, n, n)
        x = tl.where(u == 0, 0.0, x)
        before = load_tile(collected, q, i, problems, n, n)
        store_tile(collected, before + x, q, i, problems, n, n)
        store_tile(out, (x * u).to(DATA), q, i, problems, n, n)
    else:
        scale = LOG2E / scalar(epsilon, tl.float64)
        for p in range(first, tl.minimum(first + BP, problems)):
            phi = tl.load(own + p * stride_own + i, mask=i < n, other=float("-inf"))
            log_a = log_masses(load_masses(weights, p * n, i, n, GIVEN), DATA)
            x = tl.zeros((BN,), tl.float64)
            for start in range(0, m, DEPTH):
                j = start + tl.arange(0, DEPTH)
                c = block_of_costs(cost, i, j, n, m, stride_i, stride_j)
                gamma = tl.load(other + p * stride_other + j, mask=j < m, other=float("-inf"))
                y = tl.load(vectors + p * m + j, mask=j < m, other=0.0)
                plan = tl.exp2(((phi - log_a)[:, None] + gamma[None, :] - c * scale).to(DATA))
                x -= tl.sum(plan * y[None, :], 1).to(tl.float64)
            if STARTS:
                x += tl.load(first_adjoint + p * n + i, mask=i < n, other=0.0)
            x = tl.where(phi == float("-inf"), 0.0, x)
            before = tl.load(collected + p * n + i, mask=i < n, other=0.0)
            tl.store(collected + p * n + i, before + x, mask=i < n)
            tl.store(out + p * n + i, x.to(DATA), mask=i < n)


@jit
def outer_sum(left, right, i, j, height, n, m, BN: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr):  # noqa: N803
    """left^T right, (BN, BM), for left (height, n) and right (height, m)."""
    total = tl.zeros((BN, BM), left.dtype.element_ty)
    for first in range(0, height, DEPTH):
        r = first + tl.arange(0, DEPTH)
        place = r.to(tl.int64)[None, :] * n + i[:, None]
        x = tl.load(left + place, mask=(r < height)[None, :] & (i < n)[:, None], other=0.0)
        place = r.to(tl.int64)[:, None] * m + j[None, :]
        total += product(x, tl.load(right + place, mask=(r < height)[:, None] & (j < m)[None, :], other=0.0))
    return total


@jit
def log_gradient(
    c, scale, states, left, right, i, j, n, m, p, problems, num_steps, width, by_cost, by_plan, epsilon,
    CONSTANT: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """What problem p adds to a block of dC in the log domain; states: its potentials, the start in slot 0."""
    DATA: tl.constexpr = left.dtype.element_ty  # noqa: N806
    exponents = -c * scale
    at = states + p * width
    total = tl.zeros_like(c).to(DATA)
    for t in range(num_steps):
        phi = tl.load(at + (t + 1) * (n + m) + i, mask=i < n, other=float("-inf"))
        gamma = tl.load(at + (t + 1) * (n + m) + n + j, mask=j < m, other=float("-inf"))
        earlier = tl.load(at + t * (n + m) + n + j, mask=j < m, other=float("-inf"))
        y = tl.load(right + (t * problems + p) * m + j, mask=j < m, other=0.0)
        x = tl.load(left + ((num_steps + t) * problems + p) * n + i, mask=i < n, other=0.0)
        total += tl.exp2((phi[:, None] + gamma[None, :] + exponents).to(DATA)) * y[None, :]
        total += tl.exp2((phi[:, None] + earlier[None, :] + exponents).to(DATA)) * x[:, None]
    phi = tl.load(at + num_steps * (n + m) + i, mask=i < n, other=float("-inf"))
    gamma = tl.load(at + num_steps * (n + m) + n + j, mask=j < m, other=float("-inf"))
    weight = tl.zeros_like(c) + by_plan
    if not CONSTANT:
        weight -= tl.where(c < float("inf"), c, 0.0) / epsilon * by_cost
    return total + tl.exp2((phi[:, None] + gamma[None, :] + exponents).to(DATA)) * weight.to(DATA)


@jit(generic=("problems", "n", "m", "num_steps", "width", "height"))
def gradient_of_cost(
    kernel, cost, flag, base, states, left, right, bill, by_cost, by_plan, out, problems, n, m, num_steps, width,
    height, epsilon: tl.float64,
    CONSTANT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """dC (n, m), the sum over the problems in their order.

    With a flag K (left^T right - (C - base) / epsilon last^T bill), left (height, n), right (height, m), `last` the end
    of left, bill (problems, m); without, from the potentials and adjoints, CHUNK columns at a time. CONSTANT: the plan
    is, no bill. by_cost, by_plan (problems,): of <P, C>, and of P.
    """
    wide = tl.full((), 0, tl.int64)
    problems, n, m = problems + wide, n + wide, m + wide
    i, j = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    epsilon = scalar(epsilon, tl.float64)
    DATA: tl.constexpr = kernel.dtype.element_ty  # noqa: N806
    if tl.load(flag) != 0:
        total = outer_sum(left, right, i, j, height, n, m, BN, BM, DEPTH)
        place = i[:, None] * m + j[None, :]
        inside = (i < n)[:, None] & (j < m)[None, :]
        if not CONSTANT:
            c = tl.load(cost + place, mask=inside, other=0.0)
            excess = (c - tl.load(base).to(DATA)) * (1.0 / epsilon).to(DATA)
            total -= excess * outer_sum(left + (height - problems) * n, bill, i, j, problems, n, m, BN, BM, DEPTH)
        tl.store(out + place, tl.load(kernel + place, mask=inside, other=0.0) * total, mask=inside)
    else:
        for start in range(0, BM, CHUNK):
            k = tl.program_id(1) * BM + start + tl.arange(0, CHUNK)
            c = block_of_costs(cost, i, k, n, m, m, 1)
            chunk = tl.zeros((BN, CHUNK), DATA)
            for p in range(problems):
                chunk += log_gradient(
                    c, LOG2E / epsilon, states, left, right, i, k, n, m, p, problems, num_steps, width,
                    tl.load(by_cost + p), tl.load(by_plan + p), epsilon, CONSTANT,
                )  # fmt: skip
            tl.store(out + i[:, None] * m + k[None, :], chunk, mask=(i < n)[:, None] & (k < m)[None, :])
