"""The operators ``torch.ops.otkd_fast.*``: schema, fake and one implementation per dispatch key, one file an op.

Importing this package registers them. They are below autograd: gradients belong to :mod:`otkd_fast.functional`.
"""

from . import (
    cost_matrix,
    gaussian,
    moments,
    polar,
    sinkd,
    sinkhorn,
    sinkhorn_points,
    sinkhorn_ragged,
    sinkhorn_shared,
    sqrtm,
)

__all__ = [
    "cost_matrix",
    "gaussian",
    "moments",
    "polar",
    "sinkd",
    "sinkhorn",
    "sinkhorn_points",
    "sinkhorn_ragged",
    "sinkhorn_shared",
    "sqrtm",
]
