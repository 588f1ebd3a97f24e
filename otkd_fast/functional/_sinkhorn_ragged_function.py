"""The autograd.Functions of the ops on packed problems: the solve, and the costs between packed points."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._library import operators
from ._autograd import apply, distinct, each_mapped, keep_signature, needs_function, no_second_derivative, transformed
from ._sinkhorn_function import covered_only
from ._sinkhorn_options import KEEP, Options

_FORWARD = operators("sinkhorn_ragged_fwd")
_BACKWARD = operators("sinkhorn_ragged_bwd")
_COSTS = operators("cost_matrix_ragged_fwd")
_COSTS_BACKWARD = operators("cost_matrix_ragged_bwd")


def solve(
    backend: str,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    initial_f: Tensor | None,
    initial_g: Tensor | None,
    row_offsets: Tensor,
    column_offsets: Tensor,
    options: Options,
    gradient: str,
) -> tuple[Tensor, ...]:
    """transport_cost, regularized_cost, f, g, marginal_error, num_iters of the compiled op of `backend`."""
    tensors = cost, a, b, initial_f, initial_g, row_offsets, column_offsets
    if needs_function(cost, a, b):
        return apply(_Ragged, *distinct(*tensors), backend, *options, gradient)[:6]
    return _FORWARD[backend](*tensors, *options, 0)[:6]


def costs(
    backend: str, x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, entries: int, metric: str
) -> Tensor:
    """Packed costs (E,) between the points (N, d) and (M, d) of each problem; differentiable by the points."""
    tensors = x, y, row_offsets, column_offsets
    if needs_function(x, y):
        return apply(_Costs, *distinct(*tensors), entries, metric, backend)
    return _COSTS[backend](*tensors, entries, metric)


@keep_signature
class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(
        cost, a, b, initial_f, initial_g, row_offsets, column_offsets,
        backend, epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, gradient,
    ):  # fmt: skip
        return _FORWARD[backend](
            cost, a, b, initial_f, initial_g, row_offsets, column_offsets,
            epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, KEEP[gradient],
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, marginal_error, num_iters, history = output
        ctx.mark_non_differentiable(marginal_error, num_iters, history)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7], history)
        ctx.backend, epsilon, iterations, _, _, *penalties_and_order, ctx.gradient = inputs[7:]
        ctx.options = (epsilon, iterations, *penalties_and_order)

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[:3]
        grads = covered_only(grads[:4], ctx.gradient)
        if all(grad is None for grad in grads):
            return (None,) * 16
        arguments = (*ctx.saved_tensors, *grads, *ctx.options, ctx.gradient, *needs)
        if transformed():
            results = _RaggedBackward.apply(ctx.backend, *arguments)
        else:
            results = _BACKWARD[ctx.backend](*arguments)
        return *(result if need else None for result, need in zip(results, needs, strict=True)), *(None,) * 13

    @staticmethod
    def vmap(info, in_dims, *arguments):
        runs = [_Ragged.apply(*one) for one in each_mapped(info, in_dims, arguments)]
        return tuple(torch.stack(outputs) for outputs in zip(*runs, strict=True)), (0,) * 7


@keep_signature
class _RaggedBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        backend, cost, a, b, initial_f, initial_g, row_offsets, column_offsets, history,
        grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
        epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient, need_cost, need_a, need_b,
    ):  # fmt: skip
        return _BACKWARD[backend](
            cost, a, b, initial_f, initial_g, row_offsets, column_offsets, history,
            grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
            epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient, need_cost, need_a, need_b,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise no_second_derivative("sinkhorn_ragged")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        runs = [_RaggedBackward.apply(*one) for one in each_mapped(info, in_dims, arguments)]
        return _stacked(runs, arguments[-3:])


@keep_signature
class _Costs(torch.autograd.Function):
    @staticmethod
    def forward(x, y, row_offsets, column_offsets, entries, metric, backend):
        return _COSTS[backend](x, y, row_offsets, column_offsets, entries, metric)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, ctx.metric, ctx.backend = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:2]
        arguments = (*ctx.saved_tensors, grad, ctx.metric, *needs)
        if transformed():
            grads = _CostsBackward.apply(ctx.backend, *arguments)
        else:
            grads = _COSTS_BACKWARD[ctx.backend](*arguments)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 5

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return torch.stack([_Costs.apply(*one) for one in each_mapped(info, in_dims, arguments)]), 0


@keep_signature
class _CostsBackward(torch.autograd.Function):
    @staticmethod
    def forward(backend, x, y, row_offsets, column_offsets, cost, grad_cost, metric, need_x, need_y):
        return _COSTS_BACKWARD[backend](x, y, row_offsets, column_offsets, cost, grad_cost, metric, need_x, need_y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise no_second_derivative("cost_matrix_ragged")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        runs = [_CostsBackward.apply(*one) for one in each_mapped(info, in_dims, arguments)]
        return _stacked(runs, arguments[-2:])


def _stacked(runs, needs) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Gradients of each run, one after the other where they are wanted, and the axis of that."""
    grads = zip(*runs, strict=True)
    stacked = tuple(torch.stack(part) if need else part[0] for part, need in zip(grads, needs, strict=True))
    return stacked, tuple(0 if need else None for need in needs)
