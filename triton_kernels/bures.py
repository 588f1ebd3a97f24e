"""Squared Bures distances between covariances, with both gradients (reference/gaussian.py, bures), all in float64.

    A = F F^T, B = G G^T, P = polar(F^T G):   |F|^2 + |G|^2 - 2 <F^T G, P>;   in B: I - T with T G = F P

A, B (B, d, d), float32 or float64. Up to 64 x 64 three launches. In the first a program factors a matrix: Cholesky with
pivots of its correlation matrix, in registers, while the identity beside it becomes F^-1, d steps of 2 N^2
multiply-adds; or, of a matrix that is not definite, eigenvectors by Jacobi rotations (`sqrtm`), with a pseudo-inverse.
In the second a program has a pair: one product for F^T G, 3 a step for P; in the third, of a gradient, two (4:
singular). Nothing waits for the device.

Beyond, up to 1024 x 1024: the factors of `_sqrtm_products`, products and triangular solves. Pairs that these do not
serve (indefinite; with a gradient, singular) are computed as by the reference, if there are any: the host asks, one
number a call; while a CUDA graph is captured it does not, and they are NaN. Still larger ones are the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import gaussian as reference
from ..reference.polar import STEPS
from . import _sqrtm_products as products
from ._matrix import LARGEST, batched_product, polar_factor, polar_iterates, schedule, staged_product, tiles, total
from ._runtime import SIGNATURE_DTYPES, AotCase, empty, jit, on_device, scalar, tl
from .sqrtm import ROWS, diagonalized, load_symmetric

DEFINITE = {torch.float32: 4.0, torch.float64: 32.0}  # smallest pivot, in units of rounding; below, by eigenvalues


@jit
def cholesky(A, F, X, broken, d, tolerance, N: tl.constexpr):  # noqa: N803
    """Number of pivots above the tolerance. If d: F with A = F F^T, and F^-1 behind it, both (N, N) and 0 beyond d.

    X: the symmetric part of A, in registers.
    """
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)
    variance = tl.load(A + j * d + j, mask=j < d, other=0.0).to(tl.float64)
    positive = tl.where(broken == 0, variance, 0.0) > 0
    deviation = tl.where(positive, tl.sqrt(tl.where(positive, variance, 1.0)), 0.0)
    inverse = tl.where(positive, 1.0 / tl.where(positive, deviation, 1.0), 0.0)
    X = X * inverse[:, None] * inverse[None, :]  # noqa: N806
    Y = tl.where(i == j[None, :], 1.0, 0.0).to(tl.float64)  # noqa: N806
    tl.store(F + i * N + j[None, :], 0.0 * Y)
    tl.store(F + N * N + i * N + j[None, :], 0.0 * Y)
    tl.debug_barrier()
    rest = tl.where(positive, 1.0, 0.0).to(tl.float64)  # 0 where it has been a pivot
    rank, pivot = tl.zeros((), tl.int32), tl.max(rest, 0)
    while (rank < d) & (pivot > tolerance):
        p, root = tl.argmax(rest, 0), tl.sqrt(pivot)
        column = tl.sum(tl.where(i == p, X, 0.0), 0)
        column = tl.where(j == p, root, tl.where(rest != 0, column, 0.0) / root)
        row = tl.sum(tl.where(i == p, Y, 0.0), 0) / root
        tl.store(F + j * N + rank, column * deviation)
        tl.store(F + N * N + rank * N + j, row * inverse)
        X -= column[:, None] * column[None, :]  # noqa: N806
        Y -= tl.where(j == p, 0.0, column)[:, None] * row[None, :]  # noqa: N806
        rest = tl.where(j == p, 0.0, rest - column * column)
        pivot = tl.max(rest, 0)
        rank += 1
    return rank


@jit
def eigenfactor(A, F, X, largest, broken, d, eps, N: tl.constexpr):  # noqa: N803
    """F = V sqrt(max(w, 0)), behind it its pseudo-inverse, of eigenvalues above eps |A|_F. X: 2 N^2 of memory."""
    j = tl.arange(0, N)
    squares = tl.zeros((), tl.float64)
    tl.debug_barrier()
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        at = (i * N)[:, None] + j[None, :]
        rows = tl.where(broken == 0, load_symmetric(A, largest, d, first, N), 0.0)
        squares += tl.sum(tl.sum(rows * rows, 1), 0)
        tl.store(X + at, rows)
        tl.store(F + at, tl.where(i[:, None] == j[None, :], 1.0, 0.0).to(tl.float64))
    tl.debug_barrier()
    last = diagonalized(X, F, squares, d, N) % 2 * N * N
    values = tl.load(X + last + j * N + j)
    roots = tl.sqrt(tl.where(values > 0, values, 0.0)) * tl.sqrt(largest) + broken
    kept = values > eps * tl.sqrt(squares)
    inverse = tl.where(kept, 1.0 / tl.where(kept, roots, 1.0), 0.0) + broken
    inside = j < d
    roots, inverse = tl.where(inside, roots, 0.0), tl.where(inside, inverse, 0.0)
    V = tl.load(F + last + j[:, None] * N + j[None, :])  # noqa: N806
    tl.debug_barrier()
    tl.store(F + j[:, None] * N + j[None, :], V * roots[None, :])
    tl.store(F + N * N + j[None, :] * N + j[:, None], V * inverse[None, :])


@jit(generic=("pairs", "d"))
def covariance_kernel(
    A, B, factors, singular, work, pairs, d, tolerance: tl.float64, eps: tl.float64, N: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """factors (2, B, 2, N, N): F and its inverse, of each A and of each B; singular (2, B); work (2, B, 2, N, N)."""
    index = tl.program_id(0).to(tl.int64)
    factors += index * 2 * N * N
    if index < pairs:
        A += index * d * d  # noqa: N806
    else:
        A = B + (index - pairs) * d * d  # noqa: N806
    tolerance, eps = scalar(tolerance, tl.float64), scalar(eps, tl.float64)
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    mask = (i < d) & (j < d)
    X = tl.load(A + i * d + j, mask=mask, other=0.0).to(tl.float64) / 2  # noqa: N806
    X += tl.load(A + j * d + i, mask=mask, other=0.0).to(tl.float64) / 2  # noqa: N806
    broken = total(X * 0.0)  # NaN where something is not finite
    largest = tl.max(tl.max(tl.abs(X), 1), 0)
    largest = tl.where((largest > 0) & (broken == 0), largest, 1.0)
    rank = cholesky(A, factors, X, broken, d, tolerance, N)
    if rank < d:
        eigenfactor(A, factors, work + index * 2 * N * N, largest, broken, d, eps, N)
    tl.store(singular + index, (rank < d).to(tl.int32))


@jit(generic=("pairs", "d", "steps"))
def distance_kernel(
    factors, value, coefficients, work, pairs, d, steps, N: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """One pair. work (B, 6, N, N): leaves P and its transpose in front."""
    batch = tl.program_id(0).to(tl.int64)
    F, G = factors + batch * 2 * N * N, factors + (pairs + batch) * 2 * N * N  # noqa: N806
    work += batch * 6 * N * N
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = i * N + j
    K = staged_product(F, G, N, True)  # noqa: N806
    tl.store(work + 2 * N * N + at, K)  # in memory, for the sake of the registers
    P, refined = polar_factor(K, coefficients, steps, work + 3 * N * N, N, N > 32)  # noqa: N806
    tl.store(work + at, P)
    tl.store(work + N * N + j * N + i, P)
    tl.debug_barrier()
    result = -2 * total(tl.load(work + 2 * N * N + at) * refined)
    F, G = tl.load(F + at), tl.load(G + at)  # noqa: N806
    result += total(F * F) + total(G * G)
    tl.store(value + batch, tl.where(result < 0, 0.0, result).to(value.dtype.element_ty))


@jit(generic=("pairs", "d"))
def gradient_kernel(
    factors, singular, grad_a, grad_b, work, pairs, d, FIRST: tl.constexpr, N: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """I - T of each pair, in B: N = F P G^-1, T = (N + N^T) / 2; of a singular G that of N + (N - G G^-1 N)^T.

    In A with F and G exchanged, and P^T. FIRST 1: in B only. work: as it was left.
    """
    program = tl.program_id(0)
    side, batch = FIRST + program // pairs, (program % pairs).to(tl.int64)
    own = factors + (side * pairs + batch) * 2 * N * N
    other = factors + ((1 - side) * pairs + batch) * 2 * N * N
    out = grad_a
    if side == 1:
        out = grad_b
    work += batch * 6 * N * N
    P, work = work + (1 - side) * N * N, work + (2 + 2 * side) * N * N  # noqa: N806
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = i * N + j
    image = staged_product(other, P, N, False)
    tl.debug_barrier()
    tl.store(P + at, image)
    tl.debug_barrier()
    T = staged_product(P, own + N * N, N, False)  # noqa: N806
    if tl.load(singular + side * pairs + batch) != 0:
        tl.store(work + at, T)
        tl.debug_barrier()
        tl.store(work + N * N + at, staged_product(own + N * N, work, N, False))
        tl.debug_barrier()
        T = 2 * T - staged_product(own, work + N * N, N, False)  # noqa: N806
    T = T / 2 + tl.trans(T) / 2  # noqa: N806
    T = tl.where(i == j, 1.0, 0.0) - T  # noqa: N806
    tl.store(out + batch * d * d + i * d + j, T.to(out.dtype.element_ty), mask=(i < d) & (j < d))


def bures(A: Tensor, B: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Distances (*B) and the gradients of A and B, (0,) where not needed."""
    *batch, d, _ = A.shape
    count, needs = torch.Size(batch).numel(), (need_a, need_b)
    if count == 0:
        return empty(batch, A), *(empty(A.shape if need else (0,), A) for need in needs)
    A, B = (x.reshape(count, d, d).contiguous() for x in (A, B))
    if d > products.LARGEST:
        results = reference.bures(A, B, need_a=need_a, need_b=need_b)
    else:
        with on_device(A):
            results = (_on_chip if d <= LARGEST else _by_products)(A, B, need_a, need_b)
    value, *grads = results
    shape = (*batch, d, d)
    return value.view(batch), *(
        grad.view(shape) if need else empty((0,), A) for grad, need in zip(grads, needs, strict=True)
    )


def _on_chip(A: Tensor, B: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    count, d, _ = A.shape
    value = empty((count,), A)
    grads = [empty(A.shape if need else (0,), A) for need in (need_a, need_b)]
    size = tiles(d, torch.float64)
    N = size["N"]
    factors, work = (empty((count, slots, N, N), A, torch.float64) for slots in (4, 6))
    singular = empty((2, count), A, torch.int32)
    eps = torch.finfo(A.dtype).eps
    covariance_kernel[(2 * count,)](
        A, B, factors, singular, work, count, d, DEFINITE[A.dtype] * eps, eps, **size, enable_fp_fusion=True
    )
    coefficients = schedule(STEPS[A.dtype], torch.float64, A.device)
    distance_kernel[(count,)](
        factors, value, coefficients, work, count, d, coefficients.shape[0] - 1, **size, enable_fp_fusion=True
    )
    if need_a or need_b:
        gradient_kernel[(count * (need_a + need_b),)](
            factors, singular, *grads, work, count, d, FIRST=0 if need_a else 1, **size, enable_fp_fusion=True
        )
    return value, *grads


def _by_products(A: Tensor, B: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same for matrices of any size; in here rows of F are columns above: A = F^T F."""
    both = torch.cat((A, B))
    factor, order, status, _ = products.factors(both)
    F, G = factor.chunk(2)
    K = batched_product(F, G, transpose_b=True)
    P, refined = polar_iterates(K, STEPS[A.dtype])
    squares = factor.square().sum((-2, -1)).view(2, -1).sum(0)
    value = (squares - 2 * (K * refined).sum((-2, -1))).clamp(min=0)
    bad, grads = status == products.INDEFINITE, [None, None]
    if need_a or need_b:
        bad |= _smallest_pivot(both, factor, order) <= DEFINITE[A.dtype] * torch.finfo(A.dtype).eps
    if need_a:
        grads[0] = _less_map(batched_product(G, P, transpose_a=True, transpose_b=True), F, order.chunk(2)[0])
    if need_b:
        grads[1] = _less_map(batched_product(F, P, transpose_a=True), G, order.chunk(2)[1])
    bad = bad.view(2, -1).any(0)
    broken = (0 * A + 0 * B).sum((-2, -1)).double()  # NaN where something is not finite
    spoilt = torch.where(bad, torch.nan, broken)
    outputs = [value + spoilt] + [None if grad is None else grad + spoilt[:, None, None] for grad in grads]
    outputs = [None if out is None else out.to(A.dtype) for out in outputs]
    products.from_eigenvalues(
        bad, outputs, lambda some: reference.bures(A[some], B[some], need_a=need_a, need_b=need_b)
    )
    return outputs


def _smallest_pivot(A: Tensor, F: Tensor, order: Tensor) -> Tensor:
    """In units of the variance it belongs to; 0 where there are fewer than d."""
    pivots = F.gather(-1, order.unsqueeze(-1)).squeeze(-1).square()
    variances = A.diagonal(dim1=-2, dim2=-1).double().gather(-1, order)
    return (pivots / variances).nan_to_num(0).amin(-1)


def _less_map(image: Tensor, G: Tensor, order: Tensor) -> Tensor:
    """I - T from image = T G^T, for a triangular G with columns in this order."""
    R = G.take_along_dim(order.unsqueeze(-2), -1)
    solved = torch.linalg.solve_triangular(R, image.mT, upper=True)  # rows of T in the order of the pivots
    T = products.symmetric(torch.empty_like(solved).scatter_(-2, order.unsqueeze(-1).expand_as(solved), solved))
    return torch.eye(T.shape[-1], dtype=T.dtype, device=T.device) - T


def aot_cases() -> list[AotCase]:
    """Each size, with both gradients."""
    cases = []
    for dtype in (torch.float32, torch.float64):
        kind, wide = f"*{SIGNATURE_DTYPES[dtype]}:16", "*fp64:16"
        for n in (16, 32, 64) if dtype == torch.float32 else (64,):
            size = tiles(n, torch.float64)
            common = {"num_warps": size["num_warps"], "num_stages": 1}
            counts, singular = {"pairs": "i32", "d": "i32"}, {"singular": "*i32:16"}
            memory = dict.fromkeys(("factors", "work"), wide) | counts
            covariance = {"A": kind, "B": kind, "tolerance": "fp64", "eps": "fp64"} | singular | memory
            distance = {"value": kind, "coefficients": wide, "steps": "i32"} | memory
            gradient = {"grad_a": kind, "grad_b": kind} | singular | memory
            for name, kernel, signature, more in (
                ("covariance", covariance_kernel, covariance, {}),
                ("distance", distance_kernel, distance, {}),
                ("gradient", gradient_kernel, gradient, {"FIRST": 0}),
            ):
                constants = {"N": size["N"]} | more
                cases.append(AotCase(f"{name} {n} {kind[1:5]}", kernel, signature, constants, **common))
    return cases
