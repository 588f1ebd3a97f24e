"""Float64 answers for the tests of Gaussian distances, by singular values and eigenvalues."""

import torch

from otkd_fast.testing import feature_rows

DTYPES = (torch.float64, torch.float32)


def centred(x):
    return x - x.mean(-2, keepdim=True)


def sample_covariance(x, unbiased=False):
    return centred(x).mT @ centred(x) / (x.shape[-2] - unbiased)


def wasserstein_from_samples(x, y, unbiased=False, rtol=1e-9):
    """Value, gradients of x and y, traces tr A + tr B, condition number of K; by singular value decomposition."""
    x, y = x.double(), y.double()
    scale_x, scale_y = ((rows.shape[-2] - unbiased) ** 0.5 for rows in (x, y))
    rows_x, rows_y = centred(x) / scale_x, centred(y) / scale_y
    U, s, Vh = torch.linalg.svd(rows_x @ rows_y.mT, full_matrices=False)
    kept = s > rtol * s[..., :1]
    P = (U * kept.unsqueeze(-2)) @ Vh
    offset = x.mean(-2, keepdim=True) - y.mean(-2, keepdim=True)
    traces = rows_x.square().sum((-2, -1)) + rows_y.square().sum((-2, -1))
    value = offset.square().sum((-2, -1)) + traces - 2 * s.sum(-1)
    grad_x = 2 * ((rows_x - P @ rows_y) / scale_x + offset / x.shape[-2])
    grad_y = 2 * ((rows_y - P.mT @ rows_x) / scale_y - offset / y.shape[-2])
    smallest = torch.where(kept, s, torch.inf).amin(-1)
    return value, grad_x, grad_y, traces, s[..., 0] / smallest


def bures(A, B):
    """tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2) by three eigenvalue problems in float64."""
    A, B = A.double(), B.double()
    values, V = torch.linalg.eigh(A)
    root = (V * values.clamp(min=0).sqrt().unsqueeze(-2)) @ V.mT
    inner = root @ B @ root
    values = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0)
    return A.diagonal(dim1=-2, dim2=-1).sum(-1) + B.diagonal(dim1=-2, dim2=-1).sum(-1) - 2 * values.sqrt().sum(-1)


def feature_pair(n, m, d, generator, batch=(), dtype=torch.float64, noise=0.5):
    """Features of a teacher x (*batch, n, d) and of a student y (*batch, m, d) that resembles it."""
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x, y = (feature_rows(*batch, rows, d, generator=generator, mixing=mixing) for rows in (n, m))
    y = y + noise * torch.randn(*batch, m, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)
