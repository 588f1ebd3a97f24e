"""The autograd.Functions of the Sinkhorn ops on costs: dense, or shared by a batch of marginals."""

from __future__ import annotations

import torch
from torch import Tensor

from .._guards import refuse_gradient, uncovered_message
from ..ops._library import operators
from ._autograd import (
    apply,
    distinct,
    each_mapped,
    eager,
    keep_signature,
    mapped,
    needs_function,
    no_second_derivative,
    transformed,
)
from ._sinkhorn_options import COVERED, KEEP, OUTPUTS, Options

_NAMES = {"dense": "sinkhorn", "shared": "sinkhorn_shared"}
_FORWARD = {family: operators(f"{name}_fwd") for family, name in _NAMES.items()}
_BACKWARD = {family: operators(f"{name}_bwd") for family, name in _NAMES.items()}


def solve(
    family: str,
    backend: str,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    initial_f: Tensor | None,
    initial_g: Tensor | None,
    options: Options,
    gradient: str,
    guards: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, ...]:
    """transport_cost, regularized_cost, f, g, marginal_error, num_iters of the compiled op of `family` and `backend`.

    'dense': cost (..., n, m), a (..., n), b (..., m); 'shared': cost (n, m), a (B, n), b (B, m), one of them not None.
    guards: those of rows and columns, which only 'cpu' has and only for 'shared'.
    """
    if needs_function(cost, a, b):
        if family == "shared":
            a, b = (x if x is None or x.requires_grad else x.contiguous() for x in (a, b))  # once for both passes
        if eager():
            call = family, backend, options, gradient, _given(*guards)
            return apply(_SinkhornEager, cost, a, b, initial_f, initial_g, call)
        tensors = distinct(cost, a, b, initial_f, initial_g)
        return _Sinkhorn.apply(*tensors, family, backend, *options, gradient, *guards)[:6]
    return _FORWARD[family][backend](cost, a, b, initial_f, initial_g, *options, 0, *_given(*guards))[:6]


def _given(guard_a: float, guard_b: float) -> tuple[float, ...]:
    """What an op is handed for them: nothing where there are none."""
    return (guard_a, guard_b) if guard_a or guard_b else ()


class _SinkhornEager(torch.autograd.Function):
    """_Sinkhorn without what compilers and transforms need: the history is no output (12 us less a step)."""

    @staticmethod
    def forward(ctx, cost, a, b, initial_f, initial_g, call):
        family, backend, options, gradient, guards = call
        *outputs, history = _FORWARD[family][backend](
            cost, a, b, initial_f, initial_g, *options, KEEP[gradient], *guards
        )
        ctx.mark_non_differentiable(*outputs[4:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cost, a, b, initial_f, initial_g, history)
        ctx.call = call
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        family, backend, options, gradient, guards = ctx.call
        grads = covered_only(grads[:4], gradient)
        if all(grad is None for grad in grads):
            return (None,) * 6
        epsilon, num_iters, _, _, *penalties_and_order = options
        needs = ctx.needs_input_grad[:3]
        arguments = (*ctx.saved_tensors, *grads, epsilon, num_iters, *penalties_and_order, gradient, *needs, *guards)
        if torch.is_grad_enabled():
            results = _SinkhornBackward.apply(family, backend, *arguments)
        else:
            results = _BACKWARD[family][backend](*arguments)
        return *(result if need else None for result, need in zip(results, needs, strict=True)), None, None, None


@keep_signature
class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(
        cost, a, b, initial_f, initial_g,
        family, backend, epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, gradient,
        guard_a, guard_b,
    ):  # fmt: skip
        return _FORWARD[family][backend](
            cost, a, b, initial_f, initial_g,
            epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, KEEP[gradient],
            *_given(guard_a, guard_b),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, marginal_error, num_iters, history = output
        ctx.mark_non_differentiable(marginal_error, num_iters, history)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], history)
        ctx.family, ctx.backend, epsilon, iterations, _, _, *penalties_and_order, ctx.gradient, guard_a, guard_b = (
            inputs[5:]
        )
        ctx.options = (epsilon, iterations, *penalties_and_order)
        ctx.guards = _given(guard_a, guard_b)

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[:3]
        grads = covered_only(grads[:4], ctx.gradient)
        if all(grad is None for grad in grads):
            return (None,) * 17
        arguments = (*ctx.saved_tensors, *grads, *ctx.options, ctx.gradient, *needs, *ctx.guards)
        if transformed():
            results = _SinkhornBackward.apply(ctx.family, ctx.backend, *arguments)
        else:
            results = _BACKWARD[ctx.family][ctx.backend](*arguments)
        return *(result if need else None for result, need in zip(results, needs, strict=True)), *(None,) * 14

    @staticmethod
    def vmap(info, in_dims, *arguments):
        if arguments[5] == "dense":
            tensors = _all_mapped(info, in_dims, arguments, range(5))
            return _Sinkhorn.apply(*tensors, *arguments[5:]), (0,) * 7
        runs = [_Sinkhorn.apply(*one) for one in each_mapped(info, in_dims, arguments)]
        return tuple(torch.stack(outputs) for outputs in zip(*runs, strict=True)), (0,) * 7


@keep_signature
class _SinkhornBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        family, backend, cost, a, b, initial_f, initial_g, history,
        grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
        epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient, need_cost, need_a, need_b,
        *guards,
    ):  # fmt: skip
        return _BACKWARD[family][backend](
            cost, a, b, initial_f, initial_g, history,
            grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
            epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient, need_cost, need_a, need_b,
            *guards,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.family = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise no_second_derivative(_NAMES[ctx.family])

    @staticmethod
    def vmap(info, in_dims, *arguments):
        needs = arguments[18:21]
        out_dims = tuple(0 if need else None for need in needs)
        if arguments[0] == "dense":
            tensors = _all_mapped(info, in_dims, arguments, range(2, 12))
            return _SinkhornBackward.apply(*arguments[:2], *tensors, *arguments[12:]), out_dims
        runs = [_SinkhornBackward.apply(*one) for one in each_mapped(info, in_dims, arguments)]
        grads = zip(*runs, strict=True)
        return tuple(torch.stack(g) if need else g[0] for g, need in zip(grads, needs, strict=True)), out_dims


def covered_only(grads, gradient: str):
    """`grads` of the outputs that the mode differentiates; RuntimeError if another one has a gradient."""
    if gradient not in COVERED:
        return grads
    covered = COVERED[gradient]
    for output, grad in zip(OUTPUTS, grads, strict=True):
        if output != covered and grad is not None:
            refuse_gradient(grad, uncovered_message(output, gradient, covered))
    return tuple(grad if output == covered else None for output, grad in zip(OUTPUTS, grads, strict=True))


def _all_mapped(info, in_dims, arguments, which: range) -> list[Tensor | None]:
    """The tensors (or None) at the positions `which` with the mapped axis in front of each."""
    return [mapped(arguments[k], in_dims[k], info.batch_size) for k in which]
