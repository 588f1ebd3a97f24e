"""Packed costs of problems of different sizes: what sinkhorn_ragged does with points."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops as _ops  # noqa: F401  registers torch.ops.otkd_fast.*
from ._autograd import distinct, each_mapped, find_op, keep_signature, needs_function, no_second_derivative, transformed

_forward = find_op("cost_matrix_ragged_fwd")
_backward = find_op("cost_matrix_ragged_bwd")


def cost_matrix_ragged(
    x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, entries: int, metric: str
) -> Tensor:
    """Costs (entries,) between the points x (N, d) and y (M, d) of each problem, by the compiled op."""
    if needs_function(x, y):
        return _CostMatrixRagged.apply(*distinct(x, y, row_offsets, column_offsets), entries, metric)
    return _forward(x, y, row_offsets, column_offsets, entries, metric)


@keep_signature
class _CostMatrixRagged(torch.autograd.Function):
    @staticmethod
    def forward(x, y, row_offsets, column_offsets, entries, metric):
        return _forward(x, y, row_offsets, column_offsets, entries, metric)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.entries, ctx.metric = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx, grad):
        need_x, need_y = ctx.needs_input_grad[:2]
        x, y, row_offsets, column_offsets, cost = ctx.saved_tensors
        arguments = (x, y, row_offsets, column_offsets, ctx.entries, ctx.metric, cost, grad, need_x, need_y)
        grads = _CostMatrixRaggedBackward.apply(*arguments) if transformed() else _backward(*arguments)
        return grads[0] if need_x else None, grads[1] if need_y else None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        each = each_mapped(info, in_dims, arguments)
        return torch.stack([_CostMatrixRagged.apply(*one) for one in each]), 0


@keep_signature
class _CostMatrixRaggedBackward(torch.autograd.Function):
    @staticmethod
    def forward(x, y, row_offsets, column_offsets, entries, metric, cost, grad, need_x, need_y):
        return _backward(x, y, row_offsets, column_offsets, entries, metric, cost, grad, need_x, need_y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise no_second_derivative("sinkhorn_ragged")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        needs = arguments[-2:]
        runs = [_CostMatrixRaggedBackward.apply(*one) for one in each_mapped(info, in_dims, arguments)]
        grads = zip(*runs, strict=True)
        stacked = tuple(torch.stack(g) if need else g[0] for g, need in zip(grads, needs, strict=True))
        return stacked, tuple(0 if need else None for need in needs)
