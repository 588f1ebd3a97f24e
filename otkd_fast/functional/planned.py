"""Names of the public API whose operators are not implemented yet."""

from __future__ import annotations

from torch import Tensor

from .sinkhorn_result import SinkhornResult


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str,
    epsilon: float,
    num_iters: int,
    tol: float | None = None,
    update_first: str = "a",
    gradient: str = "unroll",
    backend: str | None = None,
) -> SinkhornResult:
    """:func:`otkd_fast.sinkhorn` between points, without a cost matrix in memory. Not implemented yet.

    Raises:
        NotImplementedError: always; ``sinkhorn(cost_matrix(x, y, metric=...), ...)`` gives the same result.
    """
    raise NotImplementedError(
        "sinkhorn_points is not implemented yet; "
        "sinkhorn(cost_matrix(x, y, metric=metric), a, b, ...) gives the same result"
    )


def sqrtm(A: Tensor, *, inverse: bool = False, backend: str | None = None) -> Tensor:  # noqa: N803
    """Square root of symmetric positive semi-definite matrices (..., d, d). Not implemented yet.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("sqrtm is not implemented yet")


def bures_distance(A: Tensor, B: Tensor) -> Tensor:  # noqa: N803
    """Squared Bures distance between covariance matrices (..., d, d). Not implemented yet.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("bures_distance is not implemented yet")


def gaussian_wasserstein(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between Gaussians. Not implemented yet.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("gaussian_wasserstein is not implemented yet")


def gaussian_wasserstein_from_samples(x: Tensor, y: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between the Gaussians of two samples (..., n, d). Not implemented yet.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("gaussian_wasserstein_from_samples is not implemented yet")
