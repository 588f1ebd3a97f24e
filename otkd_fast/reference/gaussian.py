"""Squared 2-Wasserstein distances between Gaussians and their gradients, in plain PyTorch.

W2^2 = |mean_x - mean_y|^2 + tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2) for the covariances A = F F^T, B = G G^T. The
last trace is the nuclear norm of K = F^T G, whatever the factors, and equals <K, P> with P the polar factor of K: no
root of a covariance is formed. Every gradient comes from P, whose singular values are at most 1.

Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .polar import STEPS, polar
from .psd_factor import eigen_factor, symmetric

Polar = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def wasserstein_from_samples(
    x: Tensor, y: Tensor, *, unbiased: bool = False, need_x: bool = True, need_y: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """W2^2 between the Gaussians fitted to samples, and its gradients.

    Args:
        x: (..., n, d), y: (..., m, d), float32 or float64, with the same batch axes.
        unbiased: covariances divide by n - 1 and m - 1 instead of n and m.
        need_x, need_y: which gradients to compute.

    Returns:
        value (...), gradients of x and y or None, in the dtype of `x`.
    """
    n, m, d = x.shape[-2], y.shape[-2], x.shape[-1]
    unbiased = int(unbiased)  # torch 2.11 cannot take a bool from a symbolic size
    mean_x, x_rows = _centred(x.double(), n - unbiased)  # (..., 1, d), (..., n, d)
    mean_y, y_rows = _centred(y.double(), m - unbiased)
    if min(n, m) <= d:
        basis_x, F, basis_y, G = None, x_rows, None, y_rows
    else:  # rows = basis F with orthonormal columns: F^T F is the covariance as well
        basis_x, F = torch.linalg.qr(x_rows)  # (..., n, d), (..., d, d)
        basis_y, G = torch.linalg.qr(y_rows)
    P, nuclear_norm = polar(F @ G.mT, STEPS[x.dtype])
    offset = mean_x - mean_y  # (..., 1, d)
    squares = offset.square().sum((-2, -1)) + x_rows.square().sum((-2, -1)) + y_rows.square().sum((-2, -1))
    value = (squares - 2 * nuclear_norm).clamp(min=0)
    grad_x = _rows_gradient(x_rows, offset, basis_x, P @ G, n - unbiased) if need_x else None
    grad_y = _rows_gradient(y_rows, -offset, basis_y, P.mT @ F, m - unbiased) if need_y else None
    return value.to(x.dtype), *(None if grad is None else grad.to(x.dtype) for grad in (grad_x, grad_y))


def _centred(x: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Mean (..., 1, d), and rows (..., n, d) whose products rows^T rows are the covariance."""
    mean = x.mean(-2, keepdim=True)
    return mean, (x - mean) / divisor**0.5


def _rows_gradient(rows: Tensor, offset: Tensor, basis: Tensor | None, image: Tensor, divisor: int) -> Tensor:
    """Gradient for the points from what the polar factor maps the rows (or their factor) to."""
    if basis is not None:
        image = basis @ image
    image = image - image.mean(-2, keepdim=True)  # the adjoint of centring, exactly
    return 2 * ((rows - image) / divisor**0.5 + offset / rows.shape[-2])


def bures(
    A: Tensor, B: Tensor, *, need_a: bool = True, need_b: bool = True, polar: Polar = polar
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Squared Bures distance tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2), and its gradients.

    The gradient of the last trace in B is half the symmetric matrix T with T G = F P (the transport map, if B is
    regular). Directions in which B is 0 up to rounding are left out of the part of T that they do not determine.

    Args:
        A, B: (..., d, d), float32 or float64, with the same batch axes; only the symmetric parts count.
        need_a, need_b: which gradients to compute.
        polar: computes polar factors and nuclear norms of float64 matrices, from these and a number of steps.

    Returns:
        value (...), gradients of A and B or None, symmetric, in the dtype of `A`.
    """
    F, F_inverse = eigen_factor(A)
    G, G_inverse = (F, F_inverse) if B is A else eigen_factor(B)
    P, nuclear_norm = polar(F.mT @ G, STEPS[A.dtype])
    traces = F.square().sum((-2, -1)) + G.square().sum((-2, -1))
    value = (traces - 2 * nuclear_norm).clamp(min=0)
    grad_a = _covariance_gradient(G @ P.mT, F, F_inverse) if need_a else None
    grad_b = _covariance_gradient(F @ P, G, G_inverse) if need_b else None
    return value.to(A.dtype), *(None if grad is None else grad.to(A.dtype) for grad in (grad_a, grad_b))


def _covariance_gradient(image: Tensor, factor: Tensor, inverse: Tensor) -> Tensor:
    """I - T for the symmetric T with T factor = image, from the pseudo-inverse of the factor."""
    N = image @ inverse  # (..., d, d)
    T = N + (N - factor @ (inverse @ N)).mT
    return torch.eye(N.shape[-1], dtype=N.dtype, device=N.device) - symmetric(T)


def gaussian_kl(
    mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, jitter: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(x || y) of Gaussians, by Cholesky; differentiable by autograd.

    With cov = L L^T, M = L_y^-1 L_x and z = L_y^-1 (mean_x - mean_y):
    (|z|^2 + sum_i>j M_ij^2 + sum_i (M_ii^2 - 1 - 2 log M_ii)) / 2, a sum of terms >= 0 that keeps its digits where the
    two Gaussians nearly coincide.

    Args:
        mean_x, mean_y: (..., d). cov_x, cov_y: (..., d, d), with the same batch axes; only the symmetric parts count.
        jitter: added to the diagonals.

    Returns:
        value (...), float64, NaN where a covariance is not positive definite; two int tensors (...), not 0 where that
        of x, that of y is not.
    """
    shift = jitter * torch.eye(cov_x.shape[-1], dtype=torch.float64, device=cov_x.device)
    L_x, info_x = torch.linalg.cholesky_ex(symmetric(cov_x) + shift)
    L_y, info_y = torch.linalg.cholesky_ex(symmetric(cov_y) + shift)
    M = torch.linalg.solve_triangular(L_y, L_x, upper=False)  # (..., d, d)
    offset = (mean_x.double() - mean_y.double()).unsqueeze(-1)
    z = torch.linalg.solve_triangular(L_y, offset, upper=False)  # (..., d, 1)
    excess = M.diagonal(dim1=-2, dim2=-1) - 1
    diagonal = excess.square() + 2 * (excess - torch.log1p(excess))
    value = (z.square().sum((-2, -1)) + M.tril(-1).square().sum((-2, -1)) + diagonal.sum(-1)) / 2
    return torch.where((info_x | info_y) == 0, value.clamp(min=0), torch.nan), info_x, info_y


def gaussian_kl_diagonal(mean_x: Tensor, std_x: Tensor, mean_y: Tensor, std_y: Tensor, jitter: float = 0.0) -> Tensor:
    """KL(x || y) (...) of Gaussians with the standard deviations std_x, std_y (..., d), in float64; by autograd.

    `jitter` is added to the variances.
    """
    var_x, var_y = std_x.double().square() + jitter, std_y.double().square() + jitter
    excess = var_x / var_y - 1
    offset = mean_x.double() - mean_y.double()
    return ((offset.square() / var_y + excess - torch.log1p(excess)).sum(-1) / 2).clamp(min=0)
