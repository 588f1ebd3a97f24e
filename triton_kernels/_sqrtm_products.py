"""Roots of symmetric positive semidefinite matrices beyond 64 x 64, and their adjoint, by batched products.

    forward    A = F^T F, pivoted;   U = polar(F);   A^(1/2) = U^T F,   A^(-1/2) = F^-1 U
    backward   S X + X S = G;   of the inverse root R, X = -R^2 Y R^2 with R Y + Y R = G

The factor F is made in float64 from the correlation matrix, a program a matrix, rows in the order of the pivots,
columns as in A; the largest remaining pivot comes first and the last is above the rounding of A's entries: a matrix of
lower rank has a factor of fewer rows. d^3 / 2 multiply-adds, read from the cache. Everything else is products in the
full precision of the dtype (`_matrix.product`): three a step of the polar iteration (11 steps in float32, 21 in
float64), one for the root. The Lyapunov equation is summed by doubling (Smith 1968): with p = sqrt(lower upper),
N = (S / p + I)^-1, M = I - 2 N and X = 2 / p N G N, repeat X <- X + M X M, M <- M M, three products each, 12 or 20
times, which serves condition numbers of A up to 1e8 and 1e14. Nothing is divided by gaps or sums of eigenvalues.

Matrices that this cannot serve (indefinite; singular in the inverse and in the backward) are computed from eigenvalues,
as the reference does. Whether there are any the host asks the device, one number a call; while a CUDA graph is captured
it does not, and they are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..reference import sqrtm as reference
from ..reference.psd_factor import PIVOT
from ._matrix import COMBINED, SYMMETRIC, batched_product, polar_iterates
from ._runtime import HELD, SIGNATURE_DTYPES, AotCase, empty, jit, power_of_2, scalar, tl

LARGEST = 1024
REST = {torch.float32: 16.0, torch.float64: 128.0}  # units of rounding that may be left beyond the rank
DOUBLINGS = {torch.float32: 12, torch.float64: 20}
LEFT_OUT = {torch.float32: 3e-8, torch.float64: 1e-16}  # |M|^4, what a sum leaves out
DEFINITE, SEMIDEFINITE, INDEFINITE = 0, 1, 2


def factor_tiles(d: int) -> dict[str, int]:
    """Padded size, rows of F at a time, warps. One stage: a load must not overtake the barrier in front of it."""
    size = power_of_2(d, 16)
    return {"N": size, "ROWS": max(1, 4096 // size), "num_warps": 16 if size > 512 else 8, "num_stages": 1}


@jit
def reduced_row(A, F, i, j, rows, d, inverse, N: tl.constexpr, ROWS: tl.constexpr):  # noqa: N803
    """Row i of the correlation matrix less what the first `rows` rows of F make of it."""
    inside = j < d
    upper = tl.load(A + i * d + j, mask=inside, other=0.0).to(tl.float64)
    lower = tl.load(A + j * d + i, mask=inside, other=0.0).to(tl.float64)
    row = (upper / 2 + lower / 2) * tl.sum(tl.where(j == i, inverse, 0.0), 0) * inverse
    for first in range(0, rows, ROWS):
        k = first + tl.arange(0, ROWS)
        weights = tl.load(F + k * d + i, mask=k < rows, other=0.0)
        mask = (k < rows)[:, None] & inside[None, :]
        row -= tl.sum(weights[:, None] * tl.load(F + (k * d)[:, None] + j[None, :], mask=mask, other=0.0), 0)
    return row


@jit(generic=("d",))
def factor_kernel(
    A, F, deviations, order, status, bounds, d, tolerance: tl.float64, rest_most: tl.float64,
    N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """F (d, d) over the deviations (d,), row order[k] of A the pivot of row k; bounds: the smallest pivot's root."""
    batch = tl.program_id(0).to(tl.int64)
    A += batch * d * d  # noqa: N806
    F += batch * d * d  # noqa: N806
    tolerance, rest_most = scalar(tolerance, tl.float64), scalar(rest_most, tl.float64)
    j = tl.arange(0, N)
    variance = tl.load(A + j * d + j, mask=j < d, other=0.0).to(tl.float64)
    positive = variance > 0
    deviation = tl.where(positive, tl.sqrt(tl.where(positive, variance, 1.0)), 0.0)
    inverse = tl.where(positive, 1.0 / tl.where(positive, deviation, 1.0), 0.0)
    rest = tl.where(positive, 1.0, 0.0).to(tl.float64)  # 0 where it has been a pivot
    least, rank = tl.full((), float("inf"), tl.float64), tl.zeros((), tl.int32)
    for k in range(d):
        pivot, p = tl.max(rest, 0), tl.argmax(rest, 0)
        row = tl.zeros((N,), tl.float64)
        if pivot > tolerance:
            root = tl.sqrt(pivot)
            row = tl.where(rest != 0, reduced_row(A, F, p, j, k, d, inverse, N, ROWS), 0.0) / root
            row = tl.where(j == p, root, row)
            rest = tl.where(j == p, 0.0, rest - row * row)
            least = tl.minimum(least, root * tl.sum(tl.where(j == p, deviation, 0.0), 0))
            tl.store(order + batch * d + k, p.to(tl.int64))
            rank += 1
        else:
            tl.store(order + batch * d + k, tl.zeros((), tl.int64))
        tl.store(F + k * d + j, row, mask=j < d)
        tl.debug_barrier()
    most = tl.zeros((), tl.float64)
    if rank < d:
        for i in range(d):
            if tl.sum(tl.where(j == i, rest, 0.0), 0) != 0:
                row = reduced_row(A, F, i, j, rank, d, inverse, N, ROWS)
                most = tl.maximum(most, tl.max(tl.abs(tl.where(rest != 0, row, 0.0)), 0))
    tl.store(deviations + batch * d + j, deviation, mask=j < d)
    tl.store(bounds + batch, tl.where(rank == d, least, 0.0))
    tl.store(status + batch, tl.where(rank == d, 0, tl.where(most <= rest_most, 1, 2)).to(tl.int32))


def factors(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F (B, d, d), float64; the order of its pivots (B, d); status (B,); bounds (B, 2) of its singular values."""
    count, d, _ = A.shape
    F, deviations = (empty(shape, A, torch.float64) for shape in ((count, d, d), (count, d)))
    order, status = empty((count, d), A, torch.int64), empty((count,), A, torch.int32)
    least = empty((count,), A, torch.float64)
    eps = torch.finfo(A.dtype).eps
    factor_kernel[(count,)](
        A, F, deviations, order, status, least, d, PIVOT[A.dtype] * eps, REST[A.dtype] * eps, **factor_tiles(d),
        enable_fp_fusion=True,
    )  # fmt: skip
    F.mul_(deviations.unsqueeze(-2))
    size = A.abs()
    without = deviations == 0
    beside = torch.where(without.unsqueeze(-1) | without.unsqueeze(-2), size, 0).amax((-2, -1))
    status = torch.where(beside > REST[A.dtype] * eps * size.amax((-2, -1)), INDEFINITE, status)
    upper = torch.minimum(size.double().sum(-1).amax(-1), F.square().sum((-2, -1))).sqrt()
    return F, order, status, torch.stack((upper, least), -1)


def symmetric(X: Tensor) -> Tensor:
    """(X + X^T) / 2."""
    return X / 2 + X.mT / 2


def root(A: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Roots of (B, d, d) and, float64 (B, 2), an upper and a lower bound of those of their eigenvalues, or near it.

    The lower is 0 where the backward needs eigenvalues.
    """
    F, order, status, bounds = factors(A)
    _, U = polar_iterates(F.to(A.dtype), 0)
    if inverse:
        R = F.take_along_dim(order.unsqueeze(-2), -1)  # upper triangular
        Z = torch.linalg.solve_triangular(R, U.double(), upper=True)
        S = torch.empty_like(Z).scatter_(-2, order.unsqueeze(-1).expand_as(Z), Z)
        bad = status != DEFINITE
    else:
        S = batched_product(U, F.to(A.dtype), transpose_a=True, mode=SYMMETRIC)
        bad = status == INDEFINITE
    broken = (0 * A).sum((-2, -1))  # NaN where something is not finite
    S = symmetric(S).to(A.dtype)
    S = torch.where(bad[:, None, None], torch.nan, S) + broken[:, None, None]
    bounds[:, 1] = torch.where(status == DEFINITE, bounds[:, 1], 0)
    bounds += broken[:, None]
    from_eigenvalues(bad, (S,), lambda some: reference.sqrtm_fwd(A[some], inverse, "eigh")[:1])
    return S, bounds


def from_eigenvalues(bad: Tensor, outputs: Sequence[Tensor | None], solve: Callable) -> None:
    """out[bad] = answer for the outputs and answers of solve(bad), if there are any, and if the host may ask."""
    if bad.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if bool(bad.any()):
        some = bad.nonzero().squeeze(-1)
        for out, answer in zip(outputs, solve(some), strict=True):
            if out is not None:
                out[some] = answer


def adjoint(A: Tensor, S: Tensor, bounds: Tensor, grad: Tensor, inverse: bool) -> Tensor:
    """Gradient (B, d, d) of A, symmetric, for the gradient `grad` of S."""
    scale = bounds.log().mean(-1).exp()[:, None, None]  # sqrt(lower upper), of the root itself
    p = 1 / scale if inverse else scale
    X, size = _lyapunov(S, p, symmetric(grad))
    if inverse:
        square = batched_product(S, S, mode=SYMMETRIC)
        X = -batched_product(square, batched_product(X, square), mode=SYMMETRIC)
    X = symmetric(X)
    bad = (bounds[:, 1] == 0) | (size > LEFT_OUT[A.dtype])
    X = torch.where(bad[:, None, None], torch.nan, X)

    def by_eigenvalues(some: Tensor) -> tuple[Tensor]:
        return (reference.sqrtm_bwd(A[some], S[some], A.new_empty(0), grad[some], inverse, "polar"),)

    from_eigenvalues(bad, (X,), by_eigenvalues)
    return X


def _lyapunov(S: Tensor, p: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """X with S X + X S = G, and |M|^4 of the last step."""
    dtype = S.dtype
    identity = torch.eye(S.shape[-1], dtype=torch.float64, device=S.device)
    N, _ = torch.linalg.inv_ex(S.double() / p + identity)
    M = (identity - 2 * N).to(dtype)
    N = N.to(dtype)
    X = batched_product(N, batched_product(G, N), mode=SYMMETRIC)
    both = {"mode": COMBINED, "coefficients": torch.ones(3, dtype=dtype, device=S.device)}
    for k in range(DOUBLINGS[dtype]):
        if k:
            M = batched_product(M, M, mode=SYMMETRIC)
        X = batched_product(M, batched_product(X, M), c=X, **both)
    size = M.double().square().sum((-2, -1)).square()
    return (X * (2 / p)).to(dtype), size


def factor_cases() -> list[AotCase]:
    """The factor, to compile ahead of time; the products are those of `polar`."""
    cases = []
    for dtype, sizes in ((torch.float32, (128, 512)), (torch.float64, (256, 1024))):
        kind = f"*{SIGNATURE_DTYPES[dtype]}:16"
        for d in sizes:
            tiles = factor_tiles(d)
            signature = {"A": kind} | dict.fromkeys(("F", "deviations", "bounds"), "*fp64:16")
            signature |= {"order": "*i64:16", "status": "*i32:16", "d": "i32", "tolerance": "fp64", "rest_most": "fp64"}
            cases.append(AotCase(
                f"factor {d} {kind[1:5]}", factor_kernel, signature, {"N": tiles["N"], "ROWS": tiles["ROWS"]},
                num_warps=tiles["num_warps"], num_stages=1, may_spill=HELD if d == 1024 else "",
            ))  # fmt: skip
    return cases
