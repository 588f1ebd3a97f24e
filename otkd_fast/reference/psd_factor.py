"""Factors A = F F^T of symmetric positive semidefinite matrices in plain PyTorch.

Two of them: :func:`eigen_factor` clamps negative eigenvalues at 0, the nearest semidefinite matrix. Pivoted Cholesky
works on the correlation matrix (unit diagonal), takes the largest remaining pivot first and stops when it is not
above PIVOT times the rounding unit of the dtype of A: below, the rounding of A's own entries decides (in float64 that
of the factorisation, which leaves up to 25 units of a zero: products of integers, d = 256). That rule does not depend
on the units of the variables, so that a tiny variance counts as much as a large one.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIVOT = {torch.float32: 0.25, torch.float64: 32.0}
# Entries of the correlation matrix that the factor leaves may be this many units; beyond, A is indefinite.
REST = {torch.float32: 16.0, torch.float64: 128.0}


def symmetric(A: Tensor) -> Tensor:
    """(A + A^T) / 2 in float64."""
    A = A.double()
    return (A + A.mT) / 2


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of symmetric float64 matrices (..., d, d), with NaN for those that are not finite."""
    finite = A.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # (..., 1, 1)
    values, vectors = torch.linalg.eigh(torch.where(finite, A, 0))
    return torch.where(finite.squeeze(-1), values, torch.nan), torch.where(finite, vectors, torch.nan)


def rounding_level(A: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 1): eigenvalues of A up to this may be none: eps |A|_F from the rounding of the entries to `dtype` (Weyl).

    In float64 the eigenvalues themselves are rounded, being computed no wider: LAPACK misses a zero by up to
    2.4 eps |A|_F at d <= 64, 4 at d = 256 (products of integers, exactly singular). 2 + sqrt(d) / 4 covers it.
    """
    largest = A.abs().amax((-2, -1))  # squares must not vanish
    unit = torch.where(largest == 0, 1, largest)
    norm = (A / unit[..., None, None]).square().sum((-2, -1)).sqrt() * unit
    share = 2 + A.shape[-1] ** 0.5 / 4 if dtype == torch.float64 else 1.0
    return (share * torch.finfo(dtype).eps * norm).unsqueeze(-1)


def eigen_factor(A: Tensor) -> tuple[Tensor, Tensor]:
    """F = V sqrt(max(w, 0)) and its pseudo-inverse, of which eigenvalues at the rounding level take no part.

    Args:
        A: (..., d, d), float32 or float64; only its symmetric part counts.

    Returns:
        F, F^+ (..., d, d), float64.
    """
    wide = symmetric(A)
    values, vectors = eigh(wide)
    roots = values.clamp(min=0).sqrt()  # (..., d)
    kept = values > rounding_level(wide, A.dtype)
    inverse = torch.where(kept, 1 / torch.where(kept, roots, 1), 0) + 0 * roots  # NaN stays NaN
    return vectors * roots.unsqueeze(-2), inverse.unsqueeze(-1) * vectors.mT


def pivoted_cholesky(A: Tensor) -> Tensor:
    """F (..., d, d), float64, with A = F F^T up to rounding; the columns beyond the rank found are 0.

    Row p[k] of F, for the pivots p[0], p[1], ..., is 0 from column k + 1 on.

    Args:
        A: (..., d, d), float32 or float64; only its symmetric part counts. Variances that are not > 0 give rows of 0.
    """
    wide = symmetric(A)
    deviation = wide.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()  # (..., d)
    positive = deviation > 0
    unit = torch.where(positive, deviation, 1)
    correlation = torch.where(positive.unsqueeze(-1) & positive.unsqueeze(-2), wide / unit.unsqueeze(-1), 0)
    correlation = correlation / unit.unsqueeze(-2)
    tolerance = PIVOT[A.dtype] * torch.finfo(A.dtype).eps
    rest = positive.to(wide.dtype)  # diagonal of the Schur complement, 0 where it has been a pivot
    columns = torch.zeros_like(wide)
    for k in range(wide.shape[-1]):
        pivot, index = rest.max(-1, keepdim=True)  # (..., 1)
        chosen = index.unsqueeze(-1)
        active = pivot > tolerance
        row = columns.take_along_dim(chosen, -2)  # (..., 1, d)
        column = correlation.take_along_dim(chosen, -1) - columns @ row.mT  # (..., d, 1)
        column = column.squeeze(-1) / torch.where(active, pivot, 1).sqrt()
        column = torch.where(active & (rest != 0), column, 0)
        columns[..., k] = column
        rest = (rest - column.square()).scatter(-1, index, 0)
    broken = ~wide.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(broken, torch.nan, columns * deviation.unsqueeze(-1))


def is_indefinite(A: Tensor, F: Tensor) -> Tensor:
    """(...,), bool: whether A has negative eigenvalues beyond rounding, F being :func:`pivoted_cholesky` of it."""
    wide = symmetric(A)
    deviation = wide.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    # beside a variance of 0 an entry has no correlation: there it is set against the largest entry
    deviation = torch.where(deviation > 0, deviation, wide.abs().amax((-2, -1)).sqrt().unsqueeze(-1))
    units = deviation.unsqueeze(-1) * deviation.unsqueeze(-2) * torch.finfo(A.dtype).eps
    return ((wide - F @ F.mT).abs() > REST[A.dtype] * units).any(-1).any(-1)
