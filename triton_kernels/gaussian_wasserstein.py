"""Squared W2 between the Gaussians fitted to two samples, with both gradients (reference/gaussian.py).

x (B, n, d), y (B, m, d), float32 or float64. n, m <= 64: a program a problem, one launch: a pass over the features for
means, centred rows, K = X Y^T / sqrt(n m) and the squares; the polar factor P of K; a second pass for the gradients
2 (X - P Y) / n + 2 (mean_x - mean_y) / n and that of y. 2 n m d operations for K and each gradient, 6 N^3 a step for P;
x and y are read twice, the second time from the cache. Larger samples: the same in batched products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._matrix import LARGEST, batched_product, polar_batched, polar_factor, product, schedule, staged, tiles, total
from ._runtime import HELD, SIGNATURE_DTYPES, AotCase, empty, jit, on_device, tl


@jit
def _centred(rows, size, d, k, N: tl.constexpr):
    """Mean (1, BK) and centred rows (N, BK) of the features k; masked entries are 0."""
    i = tl.arange(0, N)
    mask = (i < size)[:, None] & (k < d)[None, :]
    raw = tl.load(rows + i[:, None] * d + k[None, :], mask=mask, other=0)
    mean = tl.sum(raw, 0)[None, :] / size
    centred = tl.where(mask, raw - mean, 0)
    rest = tl.sum(centred, 0)[None, :] / size  # what rounding left of the mean
    return mean + rest, tl.where(mask, centred - rest, 0)


@jit
def _image(P, rows, size, d, k, mean, N: tl.constexpr, TRANSPOSE: tl.constexpr):
    """P, or P^T, in memory times centred rows of the features k, 16 rows at a time."""
    i = tl.arange(0, N)
    sum = tl.zeros((N, k.shape[0]), rows.dtype.element_ty)
    for first in range(0, N, 16):
        at = first + tl.arange(0, 16)
        left = tl.load(P + (at[None, :] * N + i[:, None] if TRANSPOSE else i[:, None] * N + at[None, :]))
        mask = (at < size)[:, None] & (k < d)[None, :]
        raw = tl.load(rows + at[:, None] * d + k[None, :], mask=mask, other=0)
        sum += product(left, tl.where(mask, raw - mean, 0))
    return sum


@jit
def _gradient(out, rows, image, offset, size, d, k, factor, divisor, N: tl.constexpr):
    """2 ((rows - image without its mean) / divisor + offset / size) for the features k."""
    i = tl.arange(0, N)
    mask = (i < size)[:, None] & (k < d)[None, :]
    image = tl.where(mask, image * factor, 0)
    image -= tl.sum(image, 0)[None, :] / size  # the adjoint of centring, exactly
    tl.store(out + i[:, None] * d + k[None, :], 2 * ((rows - image) / divisor + offset / size), mask=mask)


@jit(generic=("n", "m", "steps", "divisor_x", "divisor_y"))
def samples_kernel(
    x, y, value, grad_x, grad_y, coefficients, scratch, n, m, d, divisor_x, divisor_y, steps, NEED_X: tl.constexpr,
    NEED_Y: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """One problem."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    batch = tl.program_id(0).to(tl.int64)
    x += batch * n * d
    y += batch * m * d
    scratch += batch * (4 * N * N)
    divisor_x, divisor_y = tl.cast(divisor_x, DTYPE), tl.cast(divisor_y, DTYPE)
    K = tl.zeros((N, N), DTYPE)
    squares_x, squares_y = tl.zeros((N, BK), DTYPE), tl.zeros((N, BK), DTYPE)
    offsets = tl.zeros((1, BK), DTYPE)
    for first in range(0, d, BK):
        k = first + tl.arange(0, BK)
        mean_x, rows_x = _centred(x, n, d, k, N)
        mean_y, rows_y = _centred(y, m, d, k, N)
        K += product(rows_x, tl.trans(rows_y))
        squares_x += rows_x * rows_x
        squares_y += rows_y * rows_y
        offsets += (mean_x - mean_y) * (mean_x - mean_y)
    scale = tl.sqrt(divisor_x.to(tl.float64)) * tl.sqrt(divisor_y.to(tl.float64))
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(scratch + at, K)  # in memory, for the sake of the registers
    P, refined = polar_factor(K, coefficients, steps, scratch + N * N, N, STAGED)
    squares = total(offsets) + total(squares_x) / divisor_x + total(squares_y) / divisor_y
    tl.debug_barrier()
    K = tl.load(scratch + at)
    result = squares - 2 * total(K.to(tl.float64) * refined) / scale
    tl.store(value + batch, tl.where(result < 0, 0, result).to(DTYPE))
    if NEED_X or NEED_Y:
        tl.debug_barrier()
        tl.store(scratch + at, P)
        tl.debug_barrier()
        ratio = tl.sqrt(divisor_x.to(tl.float64) / divisor_y)
        for first in range(0, d, BK):
            k = first + tl.arange(0, BK)
            mean_x, rows_x = _centred(x, n, d, k, N)
            mean_y, rows_y = _centred(y, m, d, k, N)
            if NEED_X:
                image = _image(scratch, y, m, d, k, mean_y, N, False)
                target = grad_x + batch * n * d
                _gradient(target, rows_x, image, mean_x - mean_y, n, d, k, ratio.to(DTYPE), divisor_x, N)
            if NEED_Y:
                image = _image(scratch, x, n, d, k, mean_x, N, True)
                target = grad_y + batch * m * d
                _gradient(target, rows_y, image, mean_y - mean_x, m, d, k, (1 / ratio).to(DTYPE), divisor_y, N)


_FEATURES = 16  # at a time


def from_samples(x: Tensor, y: Tensor, unbiased: bool, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """W2^2 (*B) and the gradients of x and y, (0,) where not needed."""
    x, y = x.contiguous(), y.contiguous()
    *batch, n, d = x.shape
    m, count = y.shape[-2], torch.Size(batch).numel()
    if count == 0:
        return empty(batch, x), *(empty(t.shape if need else (0,), t) for t, need in ((x, need_x), (y, need_y)))
    with on_device(x):
        if max(n, m) > LARGEST:
            value, *grads = _large(x.view(-1, n, d), y.view(-1, m, d), unbiased, need_x, need_y)
            value = value.view(batch)
        else:
            value = empty(batch, x)
            grads = [empty(t.shape if need else (0,), t) for t, need in ((x, need_x), (y, need_y))]
            coefficients, size = schedule(0, x.dtype, x.device), tiles(max(n, m), x.dtype)
            scratch = empty((count, 4, size["N"], size["N"]), x)
            samples_kernel[(count,)](
                x, y, value, *grads, coefficients, scratch, n, m, d, n - unbiased, m - unbiased,
                coefficients.shape[0] - 1, NEED_X=need_x, NEED_Y=need_y, BK=_FEATURES,
                STAGED=staged(size["N"], x.dtype), **size, enable_fp_fusion=True,
            )  # fmt: skip
    return value, *(grad.view(t.shape) if grad.numel() else grad for grad, t in zip(grads, (x, y), strict=True))


def _large(x: Tensor, y: Tensor, unbiased: bool, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of any size; where both are larger than d, P is the polar factor of the d x d product of QR factors."""
    n, m, d = x.shape[-2], y.shape[-2], x.shape[-1]
    mean_x, mean_y = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)
    rows_x, rows_y = (x - mean_x) / (n - unbiased) ** 0.5, (y - mean_y) / (m - unbiased) ** 0.5
    F, G, basis_x, basis_y = rows_x, rows_y, None, None
    if min(n, m) > d:
        (basis_x, F), (basis_y, G) = torch.linalg.qr(rows_x), torch.linalg.qr(rows_y)
    F, G = F.contiguous(), G.contiguous()
    P, norm = polar_batched(batched_product(F, G, transpose_b=True), 0)
    offset = mean_x - mean_y
    squares = sum(t.double().square().sum((-2, -1)) for t in (offset, rows_x, rows_y))
    value = (squares - 2 * norm).clamp(min=0).to(x.dtype)
    none = empty((0,), x)
    grad_x = _points_gradient(rows_x, offset, basis_x, batched_product(P, G), n - unbiased) if need_x else none
    image = batched_product(P, F, transpose_a=True) if need_y else none
    grad_y = _points_gradient(rows_y, -offset, basis_y, image, m - unbiased) if need_y else none
    return value, grad_x, grad_y


def _points_gradient(rows: Tensor, offset: Tensor, basis: Tensor | None, image: Tensor, divisor: int) -> Tensor:
    if basis is not None:
        image = batched_product(basis.contiguous(), image)
    image = image - image.mean(-2, keepdim=True)
    return 2 * ((rows - image) / divisor**0.5 + offset / rows.shape[-2])


def aot_cases() -> list[AotCase]:
    """Each size and dtype, with both gradients."""
    cases = []
    pointers = ("x", "y", "value", "grad_x", "grad_y", "coefficients", "scratch")
    for dtype in (torch.float32, torch.float64):
        kind = f"*{SIGNATURE_DTYPES[dtype]}:16"
        for n in (16, 32, 64):
            size = tiles(n, dtype)
            cases.append(AotCase(
                f"samples {n} {kind[1:5]}", samples_kernel,
                dict.fromkeys(pointers, kind)
                | dict.fromkeys(("n", "m", "d", "divisor_x", "divisor_y", "steps"), "i32"),
                {"NEED_X": True, "NEED_Y": True, "N": size["N"], "BK": _FEATURES, "STAGED": staged(size["N"], dtype)},
                num_warps=size["num_warps"], num_stages=1,
                may_spill=HELD if n == 32 and dtype == torch.float64 else "",
                quick=n == 16 and dtype == torch.float32,
            ))  # fmt: skip
    return cases
