"""Optimal-transport operators and distillation losses: fused kernels behind autograd, with a pure PyTorch reference.

The public names; the documentation of each is in its docstring.
"""

from . import losses
from ._dispatch import backend, explain
from ._version import __version__
from .functional.cost_matrix import cost_matrix
from .functional.planned import (
    bures_distance,
    gaussian_wasserstein,
    gaussian_wasserstein_from_samples,
    sinkhorn_points,
    sqrtm,
)
from .functional.sinkhorn import sinkhorn
from .functional.sinkhorn_ragged import sinkhorn_ragged
from .functional.sinkhorn_result import SinkhornResult
from .functional.wasserstein_1d import wasserstein_1d

__all__ = [
    "SinkhornResult",
    "__version__",
    "backend",
    "bures_distance",
    "cost_matrix",
    "explain",
    "gaussian_wasserstein",
    "gaussian_wasserstein_from_samples",
    "losses",
    "sinkhorn",
    "sinkhorn_points",
    "sinkhorn_ragged",
    "sqrtm",
    "wasserstein_1d",
]
