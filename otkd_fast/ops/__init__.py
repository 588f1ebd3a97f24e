"""The operators ``torch.ops.otkd_fast.*``: schema, fake and one implementation per dispatch key, one file an op.

Importing this package registers them. They are below autograd: gradients belong to :mod:`otkd_fast.functional`.
"""

from . import _standin, cost_matrix, sinkd, sinkhorn, sinkhorn_points

_standin.register("sinkhorn_shared")

__all__ = ["cost_matrix", "sinkd", "sinkhorn", "sinkhorn_points"]
