"""The kernels of cost_matrix.py, which says what they compute and how they are launched."""

from __future__ import annotations

from ._runtime import constant, jit, scalar, tl

METRICS = {"l1": 0, "l2": 1, "sqeuclidean": 2, "cosine": 3}
L1, L2, COSINE_METRIC = constant(0), constant(1), constant(3)
# as in the reference: squares of rows between 2^-e and 2^e are safe, others are brought there by 2^s
E32, S32, E64, S64 = constant(2.0**50), constant(2.0**80), constant(2.0**400), constant(2.0**600)


@jit
def _value(raw, shift, factor, inverse, SOFTMAX: tl.constexpr, SCALED: tl.constexpr):
    """Entries of rows as they are compared; the masked entries of a softmaxed row are -inf before, 0 behind."""
    if SOFTMAX:
        return tl.exp((raw - shift) * inverse) * factor
    return raw * factor if SCALED else raw


@jit
def _outer_stats(rows, start, served, inverse, d, DTYPE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Largest entry and 1 / sum of exponentials of SIZE rows at offsets `start`."""
    k = tl.arange(0, BLOCK)
    largest = tl.full((SIZE,), float("-inf"), DTYPE)
    for first in range(0, d, BLOCK):
        mask = served[:, None] & (first + k < d)[None, :]
        raw = tl.load(rows + start[:, None] + (first + k)[None, :], mask=mask, other=float("-inf")).to(DTYPE)
        largest = tl.maximum(largest, tl.max(raw, 1))
    largest = tl.where(served, largest, 0)
    total = tl.zeros((SIZE,), DTYPE)
    for first in range(0, d, BLOCK):
        mask = served[:, None] & (first + k < d)[None, :]
        raw = tl.load(rows + start[:, None] + (first + k)[None, :], mask=mask, other=float("-inf")).to(DTYPE)
        total += tl.sum(tl.exp((raw - largest[:, None]) * inverse), 1)
    return largest, tl.where(served, 1 / total, 0)


@jit
def rows_kernel(
    rows, shift, factor, norm, inverse: tl.float64, d, SOFTMAX: tl.constexpr, COSINE: tl.constexpr,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's shift and factor, see `_value`, and, for cosine, its norm in float64."""
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0)
    start = rows + row.to(tl.int64) * d
    inverse = scalar(inverse, DTYPE)
    k = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), DTYPE)
    for first in range(0, d, BLOCK):
        raw = tl.load(start + first + k, mask=first + k < d, other=float("-inf")).to(DTYPE)
        if not SOFTMAX:
            raw = tl.where(first + k < d, tl.abs(raw), 0)
        largest = tl.maximum(largest, raw)
    top = tl.max(largest, 0)
    if SOFTMAX:
        total = tl.zeros((BLOCK,), DTYPE)
        for first in range(0, d, BLOCK):
            raw = tl.load(start + first + k, mask=first + k < d, other=float("-inf")).to(DTYPE)
            total += tl.exp((raw - top) * inverse)
        scale = 1 / tl.sum(total, 0)
        tl.store(shift + row, top)
    else:
        safe, power = (E64, S64) if DOUBLE else (E32, S32)
        small, large = top < 1 / safe, (top > safe) & (top < float("inf"))
        scale = tl.where(small, power, tl.where(large, 1 / power, 1.0)).to(DTYPE)
        tl.store(shift + row, top * 0)
    tl.store(factor + row, scale)
    if COSINE:
        square = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, d, BLOCK):
            other = float("-inf") if SOFTMAX else 0.0
            raw = tl.load(start + first + k, mask=first + k < d, other=other).to(DTYPE)
            value = _value(raw, top, scale, inverse, SOFTMAX, True).to(tl.float64)
            square += value * value
        tl.store(norm + row, tl.sqrt(tl.sum(square, 0)))


@jit
def _pair_scale(nx, ny, DOUBLE: tl.constexpr):
    """Cosine: what brings the rows of a pair to nearly the same length, near 2^k; 1 for pairs that nearly coincide."""
    LARGEST: tl.constexpr = 900.0 if DOUBLE else 100.0
    nx, ny = tl.where(nx > 0, nx, 1), tl.where(ny > 0, ny, 1)
    if not DOUBLE:
        nx, ny = nx.to(tl.float32), ny.to(tl.float32)
    exponent = tl.floor(tl.log2(nx) - tl.log2(ny) + 0.5)
    return tl.exp2(tl.minimum(tl.maximum(exponent, -LARGEST), LARGEST))


@jit
def _cost(total, norm_x, norm_y, METRIC: tl.constexpr, DOUBLE: tl.constexpr):
    """Cost from the sum of (squared) differences; norms (BI, 1), (1, BJ) or as `total`, float64."""
    if METRIC == L2:
        return tl.sqrt(total) if DOUBLE else tl.sqrt_rn(total)
    if METRIC == COSINE_METRIC:
        gap = norm_x - norm_y
        cost = (total.to(tl.float64) - gap * gap) / (2 * norm_x * norm_y)
        cost = tl.where((norm_x == 0) | (norm_y == 0), 1.0, tl.where(cost < 0, 0.0, cost))
        return cost.to(total.dtype)
    return total


@jit(generic=("problems", "n", "m", "length"))
def forward_kernel(
    x, shift_x, factor_x, norm_x, inverse_x: tl.float64, y, shift_y, factor_y, norm_y, inverse_y: tl.float64,
    out, problems, n, m, d, length, SHARED_X: tl.constexpr, SHARED_Y: tl.constexpr, SOFTMAX_X: tl.constexpr,
    SOFTMAX_Y: tl.constexpr, KNOWN: tl.constexpr, METRIC: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Costs of a tile of pairs over `length` features; WHOLE: all, else parts (splits, B, n, m) for the next kernel."""
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    LANES: tl.constexpr = 32
    program = tl.program_id(0)
    columns, rows = tl.cdiv(m, BJ), tl.cdiv(n, BI)
    j = (program % columns) * BJ + tl.arange(0, BJ)
    program //= columns
    i = (program % rows) * BI + tl.arange(0, BI)
    program //= rows
    b = (program % problems).to(tl.int64)
    split = program // problems
    row_x = i if SHARED_X else b * n + i
    row_y = j if SHARED_Y else b * m + j
    start_x, start_y = row_x.to(tl.int64) * d, row_y.to(tl.int64) * d
    inverse_x, inverse_y = scalar(inverse_x, DTYPE), scalar(inverse_y, DTYPE)
    mx, fx = tl.zeros((BI,), DTYPE), tl.zeros((BI,), DTYPE)
    my, fy = tl.zeros((BJ,), DTYPE), tl.zeros((BJ,), DTYPE)
    if KNOWN and (SOFTMAX_X or METRIC == COSINE_METRIC):
        mx, fx = tl.load(shift_x + row_x, mask=i < n, other=0), tl.load(factor_x + row_x, mask=i < n, other=0)
    if KNOWN and (SOFTMAX_Y or METRIC == COSINE_METRIC):
        my, fy = tl.load(shift_y + row_y, mask=j < m, other=0), tl.load(factor_y + row_y, mask=j < m, other=0)
    if not KNOWN and SOFTMAX_X:
        mx, fx = _outer_stats(x, start_x, i < n, inverse_x, d, DTYPE, BI, 64)
    if not KNOWN and SOFTMAX_Y:
        my, fy = _outer_stats(y, start_y, j < m, inverse_y, d, DTYPE, BJ, 64)
    other_x: tl.constexpr = float("-inf") if SOFTMAX_X else 0.0
    other_y: tl.constexpr = float("-inf") if SOFTMAX_Y else 0.0
    nx, ny, scale = tl.zeros((BI,), tl.float64), tl.zeros((BJ,), tl.float64), tl.full((1, 1), 1, DTYPE)
    if METRIC == COSINE_METRIC:
        nx, ny = tl.load(norm_x + row_x, mask=i < n, other=0), tl.load(norm_y + row_y, mask=j < m, other=0)
        scale = _pair_scale(nx[:, None], ny[None, :], DOUBLE)
    total = tl.zeros((BI, BJ, LANES), DTYPE)
    begin = split * length
    for first in range(begin, tl.minimum(begin + length, d), LANES):
        k = first + tl.arange(0, LANES)
        p = tl.load(x + start_x[:, None] + k[None, :], mask=(i < n)[:, None] & (k < d)[None, :], other=other_x)
        q = tl.load(y + start_y[:, None] + k[None, :], mask=(j < m)[:, None] & (k < d)[None, :], other=other_y)
        p = _value(p.to(DTYPE), mx[:, None], fx[:, None], inverse_x, SOFTMAX_X, METRIC == COSINE_METRIC)
        q = _value(q.to(DTYPE), my[:, None], fy[:, None], inverse_y, SOFTMAX_Y, METRIC == COSINE_METRIC)
        if METRIC == COSINE_METRIC:
            delta = p[:, None, :] - scale[:, :, None] * q[None, :, :]
        else:
            delta = p[:, None, :] - q[None, :, :]
        total += tl.abs(delta) if METRIC == L1 else delta * delta
    cost = tl.sum(total, 2)
    served = (i < n)[:, None] & (j < m)[None, :]
    if WHOLE:
        cost = _cost(cost, nx[:, None], scale.to(tl.float64) * ny[None, :], METRIC, DOUBLE)
    at = ((split * problems + b) * n + i[:, None]) * m + j[None, :]
    tl.store(out + at, cost, mask=served)


@jit(generic=("size", "n", "m", "splits"))
def finish_kernel(
    parts, norm_x, norm_y, out, size, n, m, splits, SHARED_X: tl.constexpr, SHARED_Y: tl.constexpr,
    METRIC: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Costs from the sums over parts of the features."""
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    served = at < size
    total = tl.zeros((BLOCK,), DTYPE)
    for split in range(splits):
        total += tl.load(parts + tl.cast(split, tl.int64) * size + at, mask=served, other=0)
    nx, ny = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    if METRIC == COSINE_METRIC:
        row = at // m  # of all problems
        column = at % m
        nx = tl.load(norm_x + (row % n if SHARED_X else row), mask=served, other=0)
        ny = tl.load(norm_y + (column if SHARED_Y else row // n * m + column), mask=served, other=0)
        ny *= _pair_scale(nx, ny, DOUBLE).to(tl.float64)
    tl.store(out + at, _cost(total, nx, ny, METRIC, DOUBLE), mask=served)


@jit
def _weights(g, c, nx, ny, METRIC: tl.constexpr):
    """What multiplies the sign of a difference or the difference itself; norms are float64 and only for cosine."""
    if METRIC == L1:
        return g
    if METRIC == L2:
        return tl.where(c == 0, 0, g / tl.where(c == 0, 1, c))
    if METRIC == COSINE_METRIC:
        product = nx * ny
        return tl.where(product == 0, 0, g / tl.where(product == 0, 1, product)).to(g.dtype)
    return 2 * g


@jit
def _along(g, c, nx, ny):
    """Cosine: what multiplies the row itself, (BJ, BI) float64."""
    served = (nx != 0) & (ny != 0)
    nx, ny = tl.where(served, nx, 1), tl.where(served, ny, 1)
    return tl.where(served, g.to(tl.float64) * ((1 / nx - 1 / ny) - c.to(tl.float64) / nx) / nx, 0)


@jit(generic=("problem", "row", "rows", "n", "m", "step_i", "step_j"))
def backward_kernel(
    x, shift_x, factor_x, norm_x, inverse_x: tl.float64, y, shift_y, factor_y, norm_y, inverse_y: tl.float64, cost,
    grad_cost, out, problem, row, rows, n, m, d, step_i, step_j, SHARED_X: tl.constexpr, SHARED_Y: tl.constexpr,
    SOFTMAX_X: tl.constexpr, SOFTMAX_Y: tl.constexpr, METRIC: tl.constexpr, DOUBLE: tl.constexpr, FUSED: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of x: `rows` rows from `row` on, of problems from `problem` on; out is (., rows, d)."""
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    KNOWN: tl.constexpr = METRIC == COSINE_METRIC
    program = tl.program_id(0)
    columns, blocks = tl.cdiv(d, BK), tl.cdiv(rows, BI)
    k = (program % columns) * BK + tl.arange(0, BK)
    program //= columns
    local = (program % blocks) * BI + tl.arange(0, BI)
    i = row + local
    offset = (program // blocks).to(tl.int64)
    b = problem + offset
    mine = local < rows
    row_x = i if SHARED_X else b * n + i
    inverse_x, inverse_y = scalar(inverse_x, DTYPE), scalar(inverse_y, DTYPE)
    mx, fx = tl.zeros((BI,), DTYPE), tl.zeros((BI,), DTYPE)
    if KNOWN or SOFTMAX_X:
        mx, fx = tl.load(shift_x + row_x, mask=mine, other=0), tl.load(factor_x + row_x, mask=mine, other=0)
    nx = tl.zeros((BI,), tl.float64)
    if METRIC == COSINE_METRIC:
        nx = tl.load(norm_x + row_x, mask=mine, other=0)
    other_x: tl.constexpr = float("-inf") if SOFTMAX_X else 0.0
    other_y: tl.constexpr = float("-inf") if SOFTMAX_Y else 0.0
    tile = mine[:, None] & (k < d)[None, :]
    p = tl.load(x + row_x.to(tl.int64)[:, None] * d + k[None, :], mask=tile, other=other_x).to(DTYPE)
    p = _value(p, mx[:, None], fx[:, None], inverse_x, SOFTMAX_X, KNOWN)
    grad = tl.zeros((BI, BK), DTYPE)
    along = tl.zeros((BI,), tl.float64)
    for first in range(0, m, BJ):
        j = first + tl.arange(0, BJ)
        row_y = j if SHARED_Y else b * m + j
        my, fy = tl.zeros((BJ,), DTYPE), tl.zeros((BJ,), DTYPE)
        if KNOWN or SOFTMAX_Y:
            my, fy = tl.load(shift_y + row_y, mask=j < m, other=0), tl.load(factor_y + row_y, mask=j < m, other=0)
        ny = tl.zeros((BJ,), tl.float64)
        if METRIC == COSINE_METRIC:
            ny = tl.load(norm_y + row_y, mask=j < m, other=0)
        at = b * n * m + i[None, :].to(tl.int64) * step_i + j[:, None].to(tl.int64) * step_j
        pair = mine[None, :] & (j < m)[:, None]
        g = tl.load(grad_cost + at, mask=pair, other=0)
        c = g
        if METRIC == L2 or METRIC == COSINE_METRIC:
            c = tl.load(cost + at, mask=pair, other=0)
        scale = tl.full((1, 1), 1, DTYPE)
        if METRIC == COSINE_METRIC:
            scale = _pair_scale(nx[None, :], ny[:, None], DOUBLE)
        scaled_ny = scale.to(tl.float64) * ny[:, None]
        w = _weights(g, c, nx[None, :], scaled_ny, METRIC)
        q = tl.load(
            y + row_y.to(tl.int64)[:, None] * d + k[None, :], mask=(j < m)[:, None] & (k < d)[None, :], other=other_y
        )
        q = _value(q.to(DTYPE), my[:, None], fy[:, None], inverse_y, SOFTMAX_Y, KNOWN)
        if METRIC == COSINE_METRIC:
            delta = p[None, :, :] - scale[:, :, None] * q[:, None, :]  # (BJ, BI, BK)
        else:
            delta = p[None, :, :] - q[:, None, :]
        w = tl.broadcast_to(w[:, :, None], (BJ, BI, BK))
        if METRIC == L1:
            grad += tl.sum(tl.where(delta > 0, w, tl.where(delta < 0, -w, 0)), 0)
        else:
            grad += tl.sum(w * delta, 0)
        if METRIC == COSINE_METRIC:
            along += tl.sum(_along(g, c, nx[None, :], scaled_ny), 0)
    if METRIC == COSINE_METRIC:
        grad += along.to(DTYPE)[:, None] * p
        if not SOFTMAX_X:
            grad *= fx[:, None]
    if FUSED:
        dot = tl.sum(tl.where(k < d, grad * p, 0), 1)
        grad = p * (grad - dot[:, None]) * inverse_x
    target = (offset * rows + local[:, None]) * d + k[None, :]
    tl.store(out + target, grad.to(out.dtype.element_ty), mask=tile)


@jit(generic=("problem", "row", "rows", "n"))
def softmax_kernel(
    x, shift, factor, inverse: tl.float64, grad, out, problem, row, rows, n, d, SHARED: tl.constexpr,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The softmax's derivative of a row: grad (., rows, d) as `backward_kernel` left it, into out (., n, d)."""
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = tl.program_id(0)
    i = row + program % rows
    b = problem + (program // rows).to(tl.int64)
    row_x = i.to(tl.int64) if SHARED else b * n + i
    inverse = scalar(inverse, DTYPE)
    top, scale = tl.load(shift + row_x), tl.load(factor + row_x)
    source, target = grad + program.to(tl.int64) * d, out + (b * n + i) * d
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), DTYPE)
    for first in range(0, d, BLOCK):
        mask = first + k < d
        raw = tl.load(x + row_x * d + first + k, mask=mask, other=float("-inf")).to(DTYPE)
        total += tl.load(source + first + k, mask=mask, other=0) * _value(raw, top, scale, inverse, True, True)
    dot = tl.sum(total, 0)
    for first in range(0, d, BLOCK):
        mask = first + k < d
        raw = tl.load(x + row_x * d + first + k, mask=mask, other=float("-inf")).to(DTYPE)
        value = tl.load(source + first + k, mask=mask, other=0)
        value = _value(raw, top, scale, inverse, True, True) * (value - dot) * inverse
        tl.store(target + first + k, value.to(out.dtype.element_ty), mask=mask)
