"""Plain PyTorch implementations: the oracle of the tests and the backend that runs everywhere.

They work in float64 and need no compiled code. Every function is differentiable by ordinary autograd, except those on
matrix roots (polar, sqrtm, bures, wasserstein_from_samples), which return their gradients or have an adjoint.
"""

from ._sinkhorn_costs import PointCosts
from .cost_matrix import cost_matrix
from .gaussian import bures, gaussian_kl, gaussian_kl_diagonal, wasserstein_from_samples
from .moments import feature_moments, window
from .polar import polar
from .sinkhorn import SinkhornOutputs, sinkhorn, sinkhorn_points
from .sinkhorn_guarded import sinkhorn_guarded
from .sinkhorn_ragged import cost_matrix_ragged, sinkhorn_ragged
from .sqrtm import sqrtm_bwd, sqrtm_fwd

__all__ = [
    "PointCosts",
    "SinkhornOutputs",
    "bures",
    "cost_matrix",
    "cost_matrix_ragged",
    "feature_moments",
    "gaussian_kl",
    "gaussian_kl_diagonal",
    "polar",
    "sinkhorn",
    "sinkhorn_guarded",
    "sinkhorn_points",
    "sinkhorn_ragged",
    "sqrtm_bwd",
    "sqrtm_fwd",
    "wasserstein_from_samples",
    "window",
]
