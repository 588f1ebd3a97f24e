"""Optimal-transport operators and distillation losses: fused kernels behind autograd, with a pure PyTorch reference.

The public names; the documentation of each is in its docstring.
"""

from . import losses
from ._dispatch import backend, explain
from ._version import __version__
from .functional.cost_matrix import cost_matrix
from .functional.gaussian import (
    bures_distance,
    gaussian_wasserstein,
    gaussian_wasserstein_diagonal,
    gaussian_wasserstein_from_samples,
)
from .functional.gaussian_kl import gaussian_kl, gaussian_kl_diagonal
from .functional.moments import FeatureMoments, feature_moments
from .functional.polar import polar
from .functional.sinkhorn import sinkhorn
from .functional.sinkhorn_divergence import sinkhorn_divergence
from .functional.sinkhorn_points import sinkhorn_points
from .functional.sinkhorn_ragged import sinkhorn_ragged
from .functional.sinkhorn_result import SinkhornResult
from .functional.sqrtm import sqrtm
from .functional.wasserstein_1d import wasserstein_1d

__all__ = [
    "FeatureMoments",
    "SinkhornResult",
    "__version__",
    "backend",
    "bures_distance",
    "cost_matrix",
    "explain",
    "feature_moments",
    "gaussian_kl",
    "gaussian_kl_diagonal",
    "gaussian_wasserstein",
    "gaussian_wasserstein_diagonal",
    "gaussian_wasserstein_from_samples",
    "losses",
    "polar",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_points",
    "sinkhorn_ragged",
    "sqrtm",
    "wasserstein_1d",
]
