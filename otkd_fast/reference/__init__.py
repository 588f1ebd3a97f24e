"""Plain PyTorch implementations: the oracle of the tests and the backend that runs everywhere.

Every function is differentiable by ordinary autograd, works in float64 and needs no compiled code.
"""

from .cost_matrix import cost_matrix
from .sinkhorn import SinkhornOutputs, sinkhorn
from .sinkhorn_ragged import cost_matrix_ragged, sinkhorn_ragged

__all__ = ["SinkhornOutputs", "cost_matrix", "cost_matrix_ragged", "sinkhorn", "sinkhorn_ragged"]
