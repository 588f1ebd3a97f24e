"""Kullback-Leibler divergences between Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._values import values_readable
from ._validate import not_negative_float
from .gaussian import diagonal_arguments, gaussian_arguments


def gaussian_kl(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, *, jitter: float = 0.0) -> Tensor:
    r"""Kullback-Leibler divergence KL(x || y) between Gaussians, by Cholesky factors.

    (tr(cov_y^-1 cov_x) + (mean_x - mean_y)^T cov_y^-1 (mean_x - mean_y) - d + log det cov_y - log det cov_x) / 2,
    computed in float64 as a sum of terms >= 0. Any order of differentiation; computed in PyTorch on every device.

    Args:
        mean_x, mean_y: (..., d), float16, bfloat16, float32 or float64.
        cov_x, cov_y: (..., d, d), same dtype and device, positive definite; only the symmetric parts count. Batch axes
            are the same wherever there are any.
        jitter: >= 0, added to the diagonals of both covariances.

    Returns:
        (...), >= 0, in the dtype of `mean_x`; float32 for half-precision inputs.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: shapes, dtypes or devices that do not match, a jitter that is negative or not finite. On CPU
            tensors, outside torch.compile and torch.func, also a covariance (with the jitter) that is not positive
            definite; elsewhere the divergence is NaN there.

    Sources: KD2M (arXiv 2504.01757), equation 6; the released code has the student as x.

    >>> import torch, otkd_fast
    >>> mean, cov = torch.zeros(2), torch.eye(2)
    >>> otkd_fast.gaussian_kl(mean, cov, mean + 1, cov)
    tensor(1.)
    """
    jitter = not_negative_float("jitter", jitter)
    mean_x, cov_x, mean_y, cov_y = gaussian_arguments(mean_x, cov_x, mean_y, cov_y)
    value, info_x, info_y = reference.gaussian_kl(mean_x, cov_x, mean_y, cov_y, jitter)
    if values_readable(mean_x, cov_x, mean_y, cov_y):
        for name, info in (("cov_x", info_x), ("cov_y", info_y)):
            if info.any():
                problem = int(info.ne(0).reshape(-1).to(torch.uint8).argmax())
                where = f" in problem {problem} of the batch" if info.dim() else ""
                raise ValueError(f"{name}: expected a positive definite matrix; it is not{where} (jitter={jitter:g})")
    return value.to(mean_x.dtype)


def gaussian_kl_diagonal(
    mean_x: Tensor, std_x: Tensor, mean_y: Tensor, std_y: Tensor, *, jitter: float = 0.0
) -> Tensor:
    r"""Kullback-Leibler divergence KL(x || y) between Gaussians with diagonal covariances.

    sum_k (r_k - 1 - log r_k + (mean_x_k - mean_y_k)^2 / var_y_k) / 2 with r = var_x / var_y, computed in float64. Any
    order of differentiation; computed in PyTorch on every device.

    Args:
        mean_x, std_x, mean_y, std_y: (..., d), the same dtype and device, the same batch axes wherever there are any.
        jitter: >= 0, added to the variances.

    Returns:
        (...), >= 0, in the dtype of `mean_x`; float32 for half-precision inputs.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: shapes, dtypes or devices that do not match, a jitter that is negative or not finite. On CPU
            tensors, outside torch.compile and torch.func, also a variance (with the jitter) that is not > 0; elsewhere
            the divergence is infinite or NaN there.

    Sources: KD2M (arXiv 2504.01757), equation 6, with the factor 1/2 that its diagonal form lacks in print.

    >>> import torch, otkd_fast
    >>> mean, std = torch.zeros(2), torch.ones(2)
    >>> otkd_fast.gaussian_kl_diagonal(mean, std, mean + 1, std)
    tensor(1.)
    """
    jitter = not_negative_float("jitter", jitter)
    mean_x, std_x, mean_y, std_y = diagonal_arguments(mean_x=mean_x, std_x=std_x, mean_y=mean_y, std_y=std_y)
    if values_readable(std_x, std_y):
        for name, std in (("std_x", std_x), ("std_y", std_y)):
            smallest = (std.detach().double().square() + jitter).min().item() if std.numel() else 1.0
            if not smallest > 0:
                raise ValueError(f"{name}: expected variances > 0 (jitter={jitter:g}), got {smallest:g}")
    return reference.gaussian_kl_diagonal(mean_x, std_x, mean_y, std_y, jitter).to(mean_x.dtype)
