"""Square roots of symmetric positive semidefinite matrices and their adjoint, in plain PyTorch.

'eigh' ('auto'): S = V sqrt(max(w, 0)) V^T. 'polar': A = F F^T by pivoted Cholesky and S = U^T F^T for the polar factor
U of F^T; indefinite A by eigenvalues. 'newton_schulz': the coupled cubic iteration of the literature (Higham, Functions
of Matrices, 2008, eq. 6.35), kept for comparison; it needs A to be positive definite. The adjoint solves S X + X S = G
in the eigenbasis of A; it never divides by the gaps of eigenvalues, as the derivative of eigenvectors
does.

Small eigenvalues are taken for rounded zeros in two places: the inverse root leaves out directions up to eps |A|_F
(pseudo-inverse), with eps of the dtype of A; in the adjoint of the root an entry of G between two of them, where the
root has no finite derivative, counts 0. There the level of float32 matrices is :func:`derivative_level`, so that small
eigenvalues which are none of the rounding keep their part. Everything is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .polar import STEPS, polar
from .psd_factor import eigh, is_indefinite, pivoted_cholesky, rounding_level, symmetric

ALGORITHMS = ("auto", "eigh", "polar", "newton_schulz")
_NEWTON_SCHULZ_STEPS = 24


def sqrtm_fwd(A: Tensor, inverse: bool, algorithm: str) -> tuple[Tensor, Tensor]:
    """A^(1/2), or A^(-1/2) with `inverse`, of A (..., d, d), float32 or float64, and `aux` for the adjoint."""
    if algorithm in ("auto", "eigh"):
        basis = _eigenbasis(A, inverse)
        return _from_eigenbasis(basis, inverse).to(A.dtype), basis
    S = (_polar if algorithm == "polar" else _newton_schulz)(A, inverse)
    return S.to(A.dtype), S.new_empty(0)


def sqrtm_bwd(A: Tensor, S: Tensor, aux: Tensor, grad: Tensor, inverse: bool, algorithm: str) -> Tensor:
    """Gradient (..., d, d) of A, symmetric, for the gradient `grad` of the result S of :func:`sqrtm_fwd`."""
    basis = aux if algorithm in ("auto", "eigh") else _eigenbasis(A, inverse)
    roots, kept, V = basis[..., 0, :], basis[..., 1, :] > 0, basis[..., 2:, :]
    sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)  # (..., d, d)
    pairs = kept.unsqueeze(-1) & kept.unsqueeze(-2) if inverse else kept.unsqueeze(-1) | kept.unsqueeze(-2)
    X = torch.where(pairs, V.mT @ symmetric(grad) @ V / torch.where(pairs, sums, 1), 0 * sums)
    if inverse:
        safe = torch.where(kept, roots, 1)
        X = -X / (safe.unsqueeze(-1) * safe.unsqueeze(-2))
    return symmetric(V @ X @ V.mT).to(A.dtype)


def derivative_level(dtype: torch.dtype, d: int) -> float:
    """Eigenvalues up to this times eps |A|_F may come from the rounding of a matrix (d, d) that was singular.

    The bound is 1/2, met if all entries are rounded alike; independent errors move eigenvalues by 0.4 / sqrt(d) or so.
    In float64 it is the eigenvalues themselves that are computed to eps |A|.
    """
    return min(0.5, max(d, 1) ** -0.5) if dtype == torch.float32 else 1.0


def _eigenbasis(A: Tensor, inverse: bool) -> Tensor:
    """(..., d + 2, d): square roots of the eigenvalues, 1 where they are above rounding, eigenvectors."""
    wide = symmetric(A)
    values, V = eigh(wide)
    share = 1.0 if inverse else derivative_level(A.dtype, A.shape[-1])
    kept = values > share * rounding_level(wide, A.dtype)  # (..., d)
    return torch.cat((torch.stack((values.clamp(min=0).sqrt(), kept.to(values.dtype)), -2), V), -2)


def _from_eigenbasis(basis: Tensor, inverse: bool) -> Tensor:
    roots, kept, V = basis[..., 0, :], basis[..., 1, :] > 0, basis[..., 2:, :]
    diagonal = torch.where(kept, 1 / torch.where(kept, roots, 1), 0 * roots) if inverse else roots
    return symmetric((V * diagonal.unsqueeze(-2)) @ V.mT)


def _polar(A: Tensor, inverse: bool) -> Tensor:
    F = pivoted_cholesky(A)
    by_values = _from_eigenbasis(_eigenbasis(A, inverse), inverse)
    return torch.where(is_indefinite(A, F)[..., None, None], by_values, _from_factor(F, A.dtype, inverse))


def _from_factor(F: Tensor, dtype: torch.dtype, inverse: bool) -> Tensor:
    U, _ = polar(F.mT, STEPS[dtype])
    if not inverse:
        return symmetric(U.mT @ F.mT)
    # S^+ = (F^+)^T U, with F = Q R on the columns that are not 0
    Q, R = torch.linalg.qr(F)
    empty = F.abs().amax(-2) == 0  # (..., d)
    R = R + torch.diag_embed(empty.to(R.dtype))
    kept = Q * ~empty.unsqueeze(-2)
    return symmetric(kept @ torch.linalg.solve_triangular(R.mT, U, upper=False))


def _newton_schulz(A: Tensor, inverse: bool) -> Tensor:
    wide = symmetric(A)
    norm = torch.linalg.matrix_norm(wide, keepdim=True)  # (..., 1, 1)
    norm = torch.where(norm == 0, 1, norm)
    identity = torch.eye(A.shape[-1], dtype=wide.dtype, device=A.device)
    Y, Z = wide / norm, identity.expand_as(wide)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        T = (3 * identity - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return symmetric(Z / norm.sqrt() if inverse else Y * norm.sqrt())
