"""The autograd.Functions of the Sinkhorn ops between points: the solve, and the product of its plan with a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._library import operators
from ._autograd import apply, distinct, keep_signature, mapped, needs_function, no_second_derivative, transformed
from ._sinkhorn_function import covered_only
from ._sinkhorn_options import KEEP, Options

_FORWARD = operators("sinkhorn_points_fwd")
_BACKWARD = operators("sinkhorn_points_bwd")
_APPLY = operators("sinkhorn_points_apply")
_APPLY_BACKWARD = operators("sinkhorn_points_apply_bwd")


def solve(
    backend: str,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    initial_f: Tensor | None,
    initial_g: Tensor | None,
    metric: str,
    options: Options,
    gradient: str,
    stored: bool,
) -> tuple[Tensor, ...]:
    """transport_cost, regularized_cost, f, g, marginal_error, num_iters of the compiled op of `backend`.

    x (..., n, d), y (..., m, d), a (..., n), b (..., m), all with the same batch axes.
    """
    tensors = x, y, a, b, initial_f, initial_g
    if needs_function(x, y, a, b):
        return apply(_Points, *distinct(*tensors), metric, *options, gradient, stored, backend)[:6]
    return _FORWARD[backend](*tensors, metric, *options, 0, stored)[:6]


def plan_apply(
    backend: str, x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, metric: str, epsilon: float, transpose: bool
) -> Tensor:
    """``P v``, (..., n, k), for v (..., m, k), or ``P^T v``; differentiable by every tensor."""
    tensors = x, y, f, g, v
    if needs_function(*tensors):
        return apply(_PlanApply, *distinct(*tensors), metric, epsilon, transpose, backend)
    return _APPLY[backend](*tensors, metric, epsilon, transpose)


@keep_signature
class _Points(torch.autograd.Function):
    @staticmethod
    def forward(
        x, y, a, b, initial_f, initial_g,
        metric, epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, gradient, stored,
        backend,
    ):  # fmt: skip
        return _FORWARD[backend](
            x, y, a, b, initial_f, initial_g,
            metric, epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, KEEP[gradient], stored,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, marginal_error, num_iters, history = output
        ctx.mark_non_differentiable(marginal_error, num_iters, history)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], history)
        metric, epsilon, iterations, _, _, *rest, ctx.backend = inputs[6:]
        ctx.options = (metric, epsilon, iterations, *rest)

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[:4]
        grads = covered_only(grads[:4], ctx.options[-2])
        if all(grad is None for grad in grads):
            return (None,) * 17
        arguments = (*ctx.saved_tensors, *grads, *ctx.options, *needs)
        if transformed():
            results = _PointsBackward.apply(*arguments, ctx.backend)
        else:
            results = _BACKWARD[ctx.backend](*arguments)
        return *(result if need else None for result, need in zip(results, needs, strict=True)), *(None,) * 13

    @staticmethod
    def vmap(info, in_dims, *arguments):
        tensors = _all_mapped(info, in_dims, arguments, 6)
        return _Points.apply(*tensors, *arguments[6:]), (0,) * 7


@keep_signature
class _PointsBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        x, y, a, b, initial_f, initial_g, history, grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
        metric, epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient, stored,
        need_x, need_y, need_a, need_b, backend,
    ):  # fmt: skip
        return _BACKWARD[backend](
            x, y, a, b, initial_f, initial_g, history, grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
            metric, epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient, stored,
            need_x, need_y, need_a, need_b,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise no_second_derivative("sinkhorn_points")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        tensors = _all_mapped(info, in_dims, arguments, 11)
        needs = arguments[-5:-1]
        return _PointsBackward.apply(*tensors, *arguments[11:]), tuple(0 if need else None for need in needs)


@keep_signature
class _PlanApply(torch.autograd.Function):
    @staticmethod
    def forward(x, y, f, g, v, metric, epsilon, transpose, backend):
        return _APPLY[backend](x, y, f, g, v, metric, epsilon, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], output)
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:5]
        arguments = (*ctx.saved_tensors, grad, *ctx.options, *needs)
        results = _PlanApplyBackward.apply(*arguments) if transformed() else _plan_apply_backward(*arguments)
        return *(result if need else None for result, need in zip(results, needs, strict=True)), *(None,) * 4

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _PlanApply.apply(*_all_mapped(info, in_dims, arguments, 5), *arguments[5:]), 0


@keep_signature
class _PlanApplyBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        x, y, f, g, v, out, grad, metric, epsilon, transpose, backend, need_x, need_y, need_f, need_g, need_v
    ):  # fmt: skip
        return _plan_apply_backward(
            x, y, f, g, v, out, grad, metric, epsilon, transpose, backend, need_x, need_y, need_f, need_g, need_v
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise no_second_derivative("plan_apply")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        tensors = _all_mapped(info, in_dims, arguments, 7)
        return _PlanApplyBackward.apply(*tensors, *arguments[7:]), (0,) * 5


def _plan_apply_backward(
    x, y, f, g, v, out, grad, metric, epsilon, transpose, backend, need_x, need_y, need_f, need_g, need_v
):  # fmt: skip
    """Gradients of x, y, f, g and v; empty where not needed."""
    nothing = x.new_empty((*x.shape[:-2], 0))
    grad_x, grad_y = _APPLY_BACKWARD[backend](x, y, f, g, v, grad, metric, epsilon, transpose, need_x, need_y)
    need_here, need_there = (need_g, need_f) if transpose else (need_f, need_g)
    back = nothing  # like v
    if need_there or need_v:
        back = _APPLY[backend](x, y, f, g, grad, metric, epsilon, not transpose)
    grad_here = (grad * out).sum(-1) / epsilon if need_here else nothing
    grad_there = (v * back).sum(-1) / epsilon if need_there else nothing
    grad_f, grad_g = (grad_there, grad_here) if transpose else (grad_here, grad_there)
    return grad_x if need_x else nothing, grad_y if need_y else nothing, grad_f, grad_g, back if need_v else nothing


def _all_mapped(info, in_dims, arguments, count: int) -> list[Tensor | None]:
    """The first `count` arguments, tensors or None, with the mapped axis in front of each."""
    return [mapped(x, dim, info.batch_size) for x, dim in zip(arguments[:count], in_dims[:count], strict=True)]
