"""SinKD's value and gradient in one op, from the kernels of the cost matrix and of the dense Sinkhorn solver.

    P, Q = softmax(rows / temperature_rows), softmax(columns / temperature_columns)
    C = |P_i - Q_j|_1, T iterations rows first, scale <plan, C>, gradients through the unrolled iterations

The softmaxed rows are never in memory. Small problems take a launch each for C, the iterations and their adjoint, a
launch a side for the sums of the softmax and one for the gradient. An L1 cost of softmaxed rows is at most 2; where
2 / epsilon leaves the range in which a float32 cost determines the plan, float32 is solved in float64, as on the
other backends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.sinkd import WIDE_RANGE
from ..ops.sinkhorn import KEEP, KEEP_NOTHING
from ._runtime import AotCase, empty
from .cost_matrix import cost_matrix_bwd, cost_matrix_fwd
from .sinkhorn import sinkhorn_bwd, sinkhorn_fwd

_CONSTRAINTS = (math.inf, math.inf, True)  # no penalties, rows first


def sinkd_value_and_grad(
    rows: Tensor, columns: Tensor, weights_rows: Tensor | None, weights_columns: Tensor | None,
    temperature_rows: float, temperature_columns: float, epsilon: float, num_iters: int, scale: float,
    need_rows: bool, need_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Value (*B), gradients of rows and columns, (0,) where not needed."""
    dtype = rows.dtype
    if dtype == torch.float32 and epsilon * WIDE_RANGE < 2.0:
        rows, columns, weights_rows, weights_columns = (
            None if t is None else t.double() for t in (rows, columns, weights_rows, weights_columns)
        )
    how = ("l1", temperature_rows, temperature_columns)
    cost = cost_matrix_fwd(rows, columns, *how)
    needed = need_rows or need_columns
    problem = (cost, weights_rows, weights_columns, None, None)
    keep = KEEP["unroll"] if needed else KEEP_NOTHING
    solved = sinkhorn_fwd(*problem, epsilon, num_iters, 0.0, 1.0, *_CONSTRAINTS, keep)
    grads = empty((0,), rows), empty((0,), rows)
    if needed:
        weight = empty(solved[0].shape, cost).fill_(scale)
        incoming = (weight, None, None, None)
        grad_cost = sinkhorn_bwd(
            *problem, solved[-1], *incoming, epsilon, num_iters, *_CONSTRAINTS, "unroll", True, False, False
        )[0]
        grads = cost_matrix_bwd(rows, columns, cost, grad_cost, *how, need_rows, need_columns)
    value = solved[0] if scale == 1.0 else solved[0] * scale
    return value.to(dtype), *(grad.to(dtype) for grad in grads)


def aot_cases() -> list[AotCase]:
    """None of its own: the kernels are those of cost_matrix and sinkhorn."""
    return []
