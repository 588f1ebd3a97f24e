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
