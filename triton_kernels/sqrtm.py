"""``sqrtm_fwd`` and ``sqrtm_bwd`` by Triton (reference/sqrtm.py): roots of symmetric positive semidefinite matrices.

Up to 64 x 64: a program a matrix, one launch each way, by cyclic Jacobi rotations in float64, whatever the dtype: small
eigenvalues keep their digits, and negative and singular matrices need no other way. In a round each row has a partner,
d / 2 disjoint pairs, chosen as in a round-robin tournament; an entry of J^T A J is formed from the four entries of both
pairs, so that a round is one pass from one copy of A and V to another, in memory that stays in the first cache. A sweep
is d - 1 rounds, 8 d^2 multiply-adds each, 16 entries read and 2 written; 6 to 10 sweeps, until what is off the diagonal
is below rounding. The adjoint solves S X + X S = G in the eigenbasis that the forward left, five products.
Beyond, up to 1024 x 1024, by products of matrices: `_sqrtm_products`. For the algorithms 'eigh', 'polar' and
'newton_schulz', and for still larger ones, the reference runs on the device of the matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import sqrtm as reference
from . import _sqrtm_products as products
from ._matrix import LARGEST, staged_product
from ._runtime import HELD, SIGNATURE_DTYPES, AotCase, constant, empty, jit, on_device, power_of_2, scalar, tl

SWEEPS = constant(16)
RESIDUE = constant(1e-30)  # of the squares of A off the diagonal
ROWS = constant(16)  # of a matrix at a time


def tiles(d: int) -> dict[str, int]:
    """Padded size and warps. One stage: a load must not overtake the barrier in front of it."""
    size = power_of_2(d, 16)
    return {"N": size, "num_warps": {16: 2, 32: 4, 64: 8}[size], "num_stages": 1}


@jit
def partner_of(i, round, players):
    """Whom i plays in this round of a tournament of an even number of players; itself beyond them."""
    last = players - 1
    p = (round + last - i % last) % last
    alone = round * (players // 2) % last  # it would play itself
    p = tl.where(i == alone, last, p)
    p = tl.where(i == last, alone, p)
    return tl.where(i < players, p, i)


@jit
def rotation(X, i, p, N: tl.constexpr):  # noqa: N803
    """(c, t): row i becomes c row_i + t row_p by the rotation that zeroes entry (i, p)."""
    low, high = tl.minimum(i, p), tl.maximum(i, p)
    off = tl.load(X + low * N + high)
    first, second = tl.load(X + low * N + low), tl.load(X + high * N + high)
    turns = (off != 0) & (i != p)
    theta = (second - first) / tl.where(turns, 2 * off, 1.0)
    size = tl.abs(theta)
    t = 1.0 / (size + tl.sqrt(1.0 + size * size))
    t = tl.where(turns, tl.where(theta < 0, -t, t), 0.0)
    c = 1.0 / tl.sqrt(1.0 + t * t)
    return c, tl.where(i == low, -t, t) * c


@jit
def turn(X, V, Y, W, round, players, N: tl.constexpr):  # noqa: N803
    """Y = J^T X J and W = V J for the rotations of a round."""
    j = tl.arange(0, N)
    q = partner_of(j, round, players)
    cj, tj = rotation(X, j, q, N)
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        p = partner_of(i, round, players)
        ci, ti = rotation(X, i, p, N)
        rows, others = (i * N)[:, None], (p * N)[:, None]
        upper = ci[:, None] * tl.load(X + (rows + j[None, :])) + ti[:, None] * tl.load(X + (others + j[None, :]))
        lower = ci[:, None] * tl.load(X + (rows + q[None, :])) + ti[:, None] * tl.load(X + (others + q[None, :]))
        tl.store(Y + (rows + j[None, :]), cj[None, :] * upper + tj[None, :] * lower)
        upper, lower = tl.load(V + (rows + j[None, :])), tl.load(V + (rows + q[None, :]))
        tl.store(W + (rows + j[None, :]), cj[None, :] * upper + tj[None, :] * lower)


@jit
def off_diagonal(X, N: tl.constexpr):  # noqa: N803
    """Sum of the squares off the diagonal."""
    j = tl.arange(0, N)
    total = tl.zeros((), tl.float64)
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        x = tl.where(i[:, None] == j[None, :], 0.0, tl.load(X + (i * N)[:, None] + j[None, :]))
        total += tl.sum(tl.sum(x * x, 1), 0)
    return total


@jit
def diagonalized(X, V, squares, d, N: tl.constexpr):  # noqa: N803
    """Number of rounds, until what is off the diagonal of X is below rounding, in units of `squares`; V turns along.

    Of X and V there are two copies, N * N apart; the rounds go from one to the other.
    """
    players, sweep, round = d + d % 2, tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    off = off_diagonal(X, N)
    while (sweep < SWEEPS) & (off > squares * RESIDUE):
        for k in range(players - 1):
            here, there = round % 2 * N * N, (1 - round % 2) * N * N
            turn(X + here, V + here, X + there, V + there, k, players, N)
            round += 1
            tl.debug_barrier()
        off = off_diagonal(X + round % 2 * N * N, N)
        sweep += 1
    return round


@jit
def load_symmetric(A, largest, d, first, N: tl.constexpr):  # noqa: N803
    """ROWS rows from `first` on of (A + A^T) / 2 over `largest`, float64, 0 beyond d."""
    i, j = first + tl.arange(0, ROWS), tl.arange(0, N)
    mask = (i < d)[:, None] & (j < d)[None, :]
    upper = tl.load(A + (i * d)[:, None] + j[None, :], mask=mask, other=0).to(tl.float64)
    lower = tl.load(A + (j * d)[None, :] + i[:, None], mask=mask, other=0).to(tl.float64)
    return (upper / 2 + lower / 2) / largest


@jit(generic=("d",))
def root_kernel(A, S, aux, work, d, eps: tl.float64, INVERSE: tl.constexpr, N: tl.constexpr):  # noqa: N803
    """S = V sqrt(max(w, 0)) V^T, or its pseudo-inverse; aux (d + 2, d): roots, what is above rounding, V.

    work (4, N, N): A and V, twice.
    """
    batch = tl.program_id(0).to(tl.int64)
    A += batch * d * d  # noqa: N806
    S += batch * d * d  # noqa: N806
    aux += batch * d * (d + 2)
    X = work + batch * 4 * N * N  # noqa: N806
    eps = scalar(eps, tl.float64)
    j = tl.arange(0, N)
    largest, broken = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for first in range(0, N, ROWS):
        rows = load_symmetric(A, 1.0, d, first, N)
        broken += tl.sum(tl.sum(rows * 0.0, 1), 0)  # NaN where something is not finite
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(rows), 1), 0))
    largest = tl.where((largest > 0) & (broken == 0), largest, 1.0)
    squares = tl.zeros((), tl.float64)
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        rows = tl.where(broken == 0, load_symmetric(A, largest, d, first, N), 0.0)
        squares += tl.sum(tl.sum(rows * rows, 1), 0)
        tl.store(X + (i * N)[:, None] + j[None, :], rows)
        tl.store(X + 2 * N * N + (i * N)[:, None] + j[None, :], tl.where(i[:, None] == j[None, :], 1.0, 0.0))
    tl.debug_barrier()
    round = diagonalized(X, X + 2 * N * N, squares, d, N)
    X += round % 2 * N * N  # noqa: N806
    V = X + 2 * N * N  # noqa: N806
    values = tl.load(X + j * N + j)
    roots = tl.sqrt(tl.where(values > 0, values, 0.0)) * tl.sqrt(largest) + broken
    kept = (values > eps * tl.sqrt(squares)) & (j < d)
    scale = tl.where(kept, 1.0 / tl.where(kept, roots, 1.0), 0.0) + broken if INVERSE else roots
    tl.store(aux + j, roots, mask=j < d)
    tl.store(aux + d + j, tl.where(kept, 1.0, 0.0), mask=j < d)
    left, right = X, work + batch * 4 * N * N + (1 - round % 2) * N * N
    tl.debug_barrier()
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        vectors = tl.load(V + (i * N)[:, None] + j[None, :])
        mask = (i < d)[:, None] & (j < d)[None, :]
        tl.store(aux + 2 * d + (i * d)[:, None] + j[None, :], vectors + broken, mask=mask)
        tl.store(left + (i * N)[:, None] + j[None, :], vectors * scale[None, :])
        tl.store(right + (j * N)[None, :] + i[:, None], vectors)
    tl.debug_barrier()
    store_symmetric(S, staged_product(left, right, N, False), d, N)


@jit
def store_symmetric(out, X, d, N: tl.constexpr):  # noqa: N803
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    X = (X + tl.trans(X)) / 2  # noqa: N806
    tl.store(out + i * d + j, X.to(out.dtype.element_ty), mask=(i < d) & (j < d))


@jit(generic=("d",))
def adjoint_kernel(aux, grad, out, work, d, INVERSE: tl.constexpr, N: tl.constexpr):  # noqa: N803
    """V (V^T G V / (s_i + s_j)) V^T for the symmetric part G of grad; inverse: times -1 / (s_i s_j). work (3, N, N)."""
    batch = tl.program_id(0).to(tl.int64)
    aux += batch * d * (d + 2)
    grad += batch * d * d
    out += batch * d * d
    work += batch * 3 * N * N
    V, T = work + N * N, work + 2 * N * N  # noqa: N806
    j = tl.arange(0, N)
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        at, mask = (i * N)[:, None] + j[None, :], (i < d)[:, None] & (j < d)[None, :]
        tl.store(work + at, load_symmetric(grad, 1.0, d, first, N))
        tl.store(V + at, tl.load(aux + 2 * d + (i * d)[:, None] + j[None, :], mask=mask, other=0.0))
    roots = tl.load(aux + j, mask=j < d, other=0.0)
    kept = tl.load(aux + d + j, mask=j < d, other=0.0) > 0
    at = j[:, None] * N + j[None, :]
    tl.debug_barrier()
    tl.store(T + at, staged_product(V, work, N, True))  # V^T G
    tl.debug_barrier()
    X = staged_product(T, V, N, False)  # noqa: N806
    pairs = kept[:, None] & kept[None, :] if INVERSE else kept[:, None] | kept[None, :]
    sums = roots[:, None] + roots[None, :]
    X = tl.where(pairs, X / tl.where(pairs, sums, 1.0), 0.0 * sums)  # noqa: N806
    if INVERSE:
        safe = tl.where(kept, roots, 1.0)
        X = -X / (safe[:, None] * safe[None, :])  # noqa: N806
    tl.debug_barrier()
    tl.store(work + at, X)
    tl.debug_barrier()
    tl.store(T + at, tl.trans(staged_product(V, work, N, False)))  # (V X)^T
    tl.store(work + at, tl.trans(tl.load(V + at)))
    tl.debug_barrier()
    store_symmetric(out, staged_product(T, work, N, True), d, N)


def on_chip(algorithm: str, d: int) -> bool:
    """Whether the kernels serve d x d matrices.

    Raises:
        ValueError: 'jacobi' for larger ones.
    """
    if algorithm == "jacobi" and d > LARGEST:
        raise ValueError(f"algorithm: 'jacobi' on backend 'triton' takes matrices up to {LARGEST} x {LARGEST}, got {d}")
    return algorithm in ("auto", "jacobi") and d <= LARGEST


def by_products(algorithm: str, d: int) -> bool:
    """Whether batched products serve d x d matrices."""
    return algorithm == "auto" and LARGEST < d <= products.LARGEST


def sqrtm_fwd(A: Tensor, inverse: bool, algorithm: str) -> tuple[Tensor, Tensor]:
    """Roots and, float64 (*B, d + 2, d), what the reference's adjoint needs as well."""
    *batch, d, _ = A.shape
    if by_products(algorithm, d):
        A = A.contiguous()
        if A.numel() == 0:
            return empty(A.shape, A), empty((*batch, 2), A, torch.float64)
        with on_device(A):
            S, bounds = products.root(A.view(-1, d, d), inverse)
        return S.view(A.shape), bounds.view(*batch, 2)
    if not on_chip(algorithm, d):
        return reference.sqrtm_fwd(A, inverse, algorithm)
    A, count = A.contiguous(), torch.Size(batch).numel()
    S, aux = empty(A.shape, A), empty((*batch, d + 2, d), A, torch.float64)
    if count:
        with on_device(A):
            size = tiles(d)
            work = empty((count, 4, size["N"], size["N"]), A, torch.float64)
            eps = torch.finfo(A.dtype).eps * (1.0 if inverse else reference.derivative_level(A.dtype, d))
            root_kernel[(count,)](A, S, aux, work, d, eps, INVERSE=inverse, **size, enable_fp_fusion=True)
    return S, aux


def sqrtm_bwd(A: Tensor, S: Tensor, aux: Tensor, grad: Tensor, inverse: bool, algorithm: str) -> Tensor:
    *batch, d, _ = A.shape
    if by_products(algorithm, d):
        if A.numel() == 0:
            return empty(A.shape, A)
        with on_device(A):
            operands = (x.reshape(-1, *x.shape[len(batch) :]).contiguous() for x in (A, S, aux, grad))
            return products.adjoint(*operands, inverse).view(A.shape)
    if not on_chip(algorithm, d):
        return reference.sqrtm_bwd(A, S, aux, grad, inverse, algorithm)
    aux, grad, count = aux.contiguous(), grad.contiguous(), torch.Size(batch).numel()
    out = empty(A.shape, A)
    if count:
        with on_device(A):
            size = tiles(d)
            work = empty((count, 3, size["N"], size["N"]), A, torch.float64)
            adjoint_kernel[(count,)](aux, grad, out, work, d, INVERSE=inverse, **size, enable_fp_fusion=True)
    return out


def aot_cases() -> list[AotCase]:
    """Each size, and both ways."""
    cases = products.factor_cases()
    for dtype in (torch.float32, torch.float64):
        kind = f"*{SIGNATURE_DTYPES[dtype]}:16"
        for n in (16, 32, 64) if dtype == torch.float32 else (64,):
            size = tiles(n)
            common = {"num_warps": size["num_warps"], "num_stages": 1}
            constants = {"INVERSE": False, "N": size["N"]}
            wide = dict.fromkeys(("aux", "work"), "*fp64:16")
            root = dict.fromkeys(("A", "S"), kind) | wide | {"d": "i32", "eps": "fp64"}
            adjoint = wide | dict.fromkeys(("grad", "out"), kind) | {"d": "i32"}
            for name, kernel, signature in (("root", root_kernel, root), ("adjoint", adjoint_kernel, adjoint)):
                why = HELD if (name, n) == ("root", 32) else ""
                cases.append(AotCase(f"{name} {n} {kind[1:5]}", kernel, signature, constants, **common, may_spill=why))
    return cases
