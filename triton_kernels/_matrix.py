"""Polar factors of a matrix in one program, and batched products beyond: shared by polar, gaussian_wasserstein, sqrtm.

Products run in full float32: three TF32 products that add up to one (`tf32x3`), or float64. Rows and columns of zeros
stay exactly zero, so that matrices are padded to a power of two.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..reference.polar import SCHEDULES, STEPS
from ._runtime import HELD, SIGNATURE_DTYPES, AotCase, cdiv, empty, jit, power_of_2, tl

LARGEST = 64  # rows and columns of a matrix that one program holds


def tiles(n: int, dtype: torch.dtype) -> dict[str, int]:
    """Padded size and warps. One stage: a load must not overtake the barrier in front of it."""
    size = power_of_2(n, 16)
    warps = {16: 2, 32: 8, 64: 8} if dtype == torch.float64 else {16: 2, 32: 4, 64: 8}
    return {"N": size, "num_warps": warps[size], "num_stages": 1}


def staged(n: int, dtype: torch.dtype) -> bool:
    """Whether operands of padded size n go through memory, for the sake of the registers."""
    return n * dtype.itemsize > 128


def scratch_of(problems: int, n: int, like: Tensor) -> Tensor:
    """What `polar_factor` needs for matrices that are padded to n x n."""
    return empty((problems if staged(n, like.dtype) else 0, 3, n, n), like)


@functools.lru_cache(maxsize=64)
def schedule(steps: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(steps + 1, 3) coefficients of the odd quintics and of the refinement; 0: as many as the dtype has."""
    return torch.tensor((*SCHEDULES[steps or STEPS[dtype]], (1.5, -0.5, 0.0)), dtype=dtype, device=device)


@jit
def product(a, b):
    """a @ b in the full precision of the dtype."""
    if a.dtype == tl.float64:
        return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    return tl.dot(a, b, input_precision="tf32x3")


@jit
def staged_product(a, b, N: tl.constexpr, TRANSPOSE_A: tl.constexpr):
    """The product of two N x N matrices in memory, 16 of the depth at a time; A, or A^T, times B."""
    i, k = tl.arange(0, N), tl.arange(0, 16)
    sum = tl.zeros((N, N), a.dtype.element_ty)
    for first in range(0, N, 16):
        at = first + k
        left = tl.load(a + (at[None, :] * N + i[:, None] if TRANSPOSE_A else i[:, None] * N + at[None, :]))
        sum += product(left, tl.load(b + at[:, None] * N + i[None, :]))
    return sum


@jit
def total(x):
    """Sum of a matrix in float64."""
    return tl.sum(tl.sum(x.to(tl.float64), 1), 0)


@jit
def normalized(X):
    """X with largest singular value at most 1, by its Frobenius norm or sqrt(row sum * column sum); 0 stays 0."""
    size = tl.abs(X)
    largest = tl.max(tl.max(size, 1), 0)
    largest = tl.where(largest == 0, 1, largest)
    X, size = X / largest, size / largest
    sums = tl.max(tl.sum(size, 1), 0) * tl.max(tl.sum(size, 0), 0)
    bound = tl.sqrt(tl.minimum(sums, tl.sum(tl.sum(size * size, 1), 0)))
    return X / tl.where(bound == 0, 1, bound)


@jit
def polar_factor(X, coefficients, steps, scratch, N: tl.constexpr, STAGED: tl.constexpr):
    """Polar factor P of X (N, N) by `steps` odd quintics a X + X (b X^T X + c (X^T X)^2), and 1.5 P - 0.5 P P^T P.

    The latter is one more step. <K, .> of it is the nuclear norm: an error e of a singular value of P becomes 1.5 e^2.
    The matrices stay in registers, or the operands of products go through `scratch` (3, N, N), the program's own, which
    stays in the first cache: always beyond 32 x 32.
    """
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    X = normalized(X)
    P = X
    for step in range(steps + 1):
        P = X
        a = tl.load(coefficients + 3 * step)
        b = tl.load(coefficients + 3 * step + 1)
        c = tl.load(coefficients + 3 * step + 2)
        if not STAGED:
            gram = product(tl.trans(X), X)
            gram = b * gram + c * product(gram, gram)
            X = a * X + product(X, gram)
        else:
            tl.store(scratch + at, X)
            tl.debug_barrier()
            gram = staged_product(scratch, scratch, N, True)
            tl.store(scratch + N * N + at, gram)
            tl.debug_barrier()
            gram = b * gram + c * staged_product(scratch + N * N, scratch + N * N, N, False)
            tl.store(scratch + 2 * N * N + at, gram)
            tl.debug_barrier()
            X = a * X + staged_product(scratch, scratch + 2 * N * N, N, False)
            tl.debug_barrier()
    return P, X


@jit(generic=("n", "m", "k"))
def product_kernel(
    a, b, c, out, coefficients, step, n, m, k, TRANSPOSE_A: tl.constexpr, TRANSPOSE_B: tl.constexpr,
    MODE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of out (B, n, m) = A B, A (B, n, k) or its transpose in memory, B (B, k, m) or its transpose.

    MODE 1: symmetric, n = m: the tiles on and above the diagonal, with their mirror images. 2: symmetric, b C + c A B.
    3: a C + A B. a, b, c: coefficients of the step.
    """
    program = tl.program_id(0)
    columns, rows = tl.cdiv(m, TILE), tl.cdiv(n, TILE)
    tile_j, program = program % columns, program // columns
    tile_i, batch = program % rows, (program // rows).to(tl.int64)
    if (MODE == 0 or MODE == 3) or tile_i <= tile_j:
        i, j = tile_i * TILE + tl.arange(0, TILE), tile_j * TILE + tl.arange(0, TILE)
        a += batch * n * k
        b += batch * k * m
        sum = tl.zeros((TILE, TILE), out.dtype.element_ty)
        for first in range(0, k, DEPTH):
            at = first + tl.arange(0, DEPTH)
            mask_a, mask_b = (i < n)[:, None] & (at < k)[None, :], (at < k)[:, None] & (j < m)[None, :]
            if TRANSPOSE_A:
                left = tl.load(a + at[None, :].to(tl.int64) * n + i[:, None], mask=mask_a, other=0)
            else:
                left = tl.load(a + i[:, None].to(tl.int64) * k + at[None, :], mask=mask_a, other=0)
            if TRANSPOSE_B:
                right = tl.load(b + j[None, :].to(tl.int64) * k + at[:, None], mask=mask_b, other=0)
            else:
                right = tl.load(b + at[:, None].to(tl.int64) * m + j[None, :], mask=mask_b, other=0)
            sum += product(left, right)
        mask = (i < n)[:, None] & (j < m)[None, :]
        target = batch * n * m + i[:, None].to(tl.int64) * m + j[None, :]
        if MODE == 2:
            previous = tl.load(c + target, mask=mask, other=0)
            sum = tl.load(coefficients + 3 * step + 1) * previous + tl.load(coefficients + 3 * step + 2) * sum
        if MODE == 3:
            sum += tl.load(coefficients + 3 * step) * tl.load(c + target, mask=mask, other=0)
        tl.store(out + target, sum, mask=mask)
        if (MODE == 1 or MODE == 2) and tile_i < tile_j:
            mirror = batch * n * m + j[:, None].to(tl.int64) * m + i[None, :]
            tl.store(out + mirror, tl.trans(sum), mask=(j < n)[:, None] & (i < m)[None, :])


PLAIN, SYMMETRIC, COMBINED, ADDED = 0, 1, 2, 3


def batched_product(
    a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False, mode: int = PLAIN,
    c: Tensor | None = None, coefficients: Tensor | None = None, step: int = 0,
) -> Tensor:  # fmt: skip
    """(B, n, m) = A B of contiguous batches, in full precision; see `product_kernel`."""
    n, k = (a.shape[-1], a.shape[-2]) if transpose_a else a.shape[-2:]
    m = b.shape[-2] if transpose_b else b.shape[-1]
    out = empty((a.shape[0], n, m), a)
    if out.numel() == 0:
        return out
    blocks = product_tiles(a.dtype)
    product_kernel[(a.shape[0] * cdiv(n, blocks["TILE"]) * cdiv(m, blocks["TILE"]),)](
        a, b, a if c is None else c, out, a if coefficients is None else coefficients, step, n, m, k,
        TRANSPOSE_A=transpose_a, TRANSPOSE_B=transpose_b, MODE=mode, **blocks, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def product_tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tile, depth and warps of a product."""
    if dtype == torch.float64:
        return {"TILE": 32, "DEPTH": 16, "num_warps": 4}
    return {"TILE": 64, "DEPTH": 32, "num_warps": 8}


def polar_batched(K: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Polar factors of (B, n, m) of any size and their nuclear norms, float64 (B,): three launches a step."""
    P, X = polar_iterates(K, steps)
    return P, (K.double() * X).sum((-2, -1))


def polar_iterates(K: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The factor, and 1.5 P - 0.5 P P^T P, see `polar_factor`."""
    tall = K.shape[-2] >= K.shape[-1]
    largest = K.abs().amax((-2, -1), keepdim=True)
    X = K / torch.where(largest == 0, 1, largest)
    size = X.abs()
    sums = size.sum(-1).amax(-1) * size.sum(-2).amax(-1)
    bound = torch.minimum(sums, size.square().sum((-2, -1))).sqrt()[:, None, None]
    X = X / torch.where(bound == 0, 1, bound)
    X = X if tall else X.mT.contiguous()
    coefficients = schedule(steps, K.dtype, K.device)
    P = X
    for step in range(coefficients.shape[0]):
        P = X
        gram = batched_product(X, X, transpose_a=True, mode=SYMMETRIC)
        options = {"coefficients": coefficients, "step": step}
        W = batched_product(gram, gram, mode=COMBINED, c=gram, **options)
        X = batched_product(X, W, mode=ADDED, c=X, **options)
    return (P, X) if tall else (P.mT.contiguous(), X.mT)


def product_cases() -> list[AotCase]:
    """The batched product, to compile ahead of time."""
    cases = []
    for dtype in (torch.float32, torch.float64):
        kind = f"*{SIGNATURE_DTYPES[dtype]}:16"
        blocks = product_tiles(dtype)
        modes = (("plain", PLAIN), ("symmetric", SYMMETRIC), ("combined", COMBINED), ("added", ADDED))
        for name, mode in modes:
            cases.append(AotCase(
                f"product {name} {kind[1:5]}", product_kernel,
                dict.fromkeys(("a", "b", "c", "out", "coefficients"), kind)
                | dict.fromkeys(("step", "n", "m", "k"), "i32"),
                {"TRANSPOSE_A": mode == SYMMETRIC, "TRANSPOSE_B": False, "MODE": mode}
                | {"TILE": blocks["TILE"], "DEPTH": blocks["DEPTH"]},
                num_warps=blocks["num_warps"],
                may_spill=HELD if (mode, dtype) == (SYMMETRIC, torch.float64) else "",
            ))  # fmt: skip
    return cases
