"""Scalars of two tensors whose gradients are computed with the value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._values import values_readable
from ._autograd import apply, distinct, keep_signature, mapped, needs_function, transformed

Compute = Callable[[Tensor, Tensor, bool, bool], tuple[Tensor, Tensor | None, Tensor | None]]


def value_and_gradients(op: str, compute: Compute, x: Tensor, y: Tensor) -> Tensor:
    """The value of ``compute(x, y, need_x, need_y) -> (value, grad_x, grad_y)``, differentiable once.

    The gradients are those for an incoming 1, and are computed with the value where they may be asked for: the backward
    pass multiplies them by what comes in.

    Args:
        op: name for the error about a second derivative.
        x, y: (*B, ., .) with the same batch axes B; the value is (*B).
    """
    if not needs_function(x, y):
        return compute(x, y, False, False)[0]
    # under a transform, requires_grad says nothing about outer levels
    unknown = torch._C._are_functorch_transforms_active()
    needs = unknown or x.requires_grad, unknown or y.requires_grad
    return apply(_ValueAndGradients, *distinct(x, y), op, compute, *needs)[0]


@keep_signature
class _ValueAndGradients(torch.autograd.Function):
    @staticmethod
    def forward(x, y, op, compute, need_x, need_y):
        value, grad_x, grad_y = compute(x, y, need_x, need_y)
        return value, grad_x if need_x else x.new_empty(0), grad_y if need_y else y.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.op, *_ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        # x and y are there for a recorded backward alone, whose derivative must be refused
        ctx.save_for_backward(x, y, *output[1:])

    @staticmethod
    def backward(ctx, grad, _grad_x, _grad_y):
        if grad is None:
            return (None,) * 6
        x, y, grad_x, grad_y = ctx.saved_tensors
        if transformed():
            grads = _Scaled.apply(x, y, grad_x, grad_y, grad, ctx.op)
        elif values_readable(grad) and bool((grad == 1).all()):
            grads = grad_x, grad_y  # the copy would cost more than the look
        else:
            grads = _scaled(grad_x, grad_y, grad)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True)), *(None,) * 4

    @staticmethod
    def vmap(info, in_dims, x, y, *options):
        x, y = (mapped(tensor, dim, info.batch_size) for tensor, dim in zip((x, y), in_dims[:2], strict=True))
        need_x, need_y = options[-2:]
        # a gradient that is not needed is an empty tensor without a mapped axis
        return _ValueAndGradients.apply(x, y, *options), (0, 0 if need_x else None, 0 if need_y else None)


def _scaled(grad_x: Tensor, grad_y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients for an incoming `grad` (*B,); an empty one stays empty."""
    factor = grad[..., None, None]
    return tuple(own * factor if own.dim() > 1 else own for own in (grad_x, grad_y))


@keep_signature
class _Scaled(torch.autograd.Function):
    """The gradient as a node, where autograd records the backward pass: its derivative is an error."""

    @staticmethod
    def forward(x, y, grad_x, grad_y, grad, op):
        return _scaled(grad_x, grad_y, grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[-1]

    @staticmethod
    def backward(ctx, *_):
        raise only_first_derivative(ctx.op)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        grads = [
            gradient if gradient.dim() == 1 else mapped(gradient, dim, info.batch_size)
            for gradient, dim in zip(arguments[2:4], in_dims[2:4], strict=True)
        ]
        x, y, grad = (mapped(arguments[i], in_dims[i], info.batch_size) for i in (0, 1, 4))
        return _Scaled.apply(x, y, *grads, grad, arguments[5]), tuple(0 if own.dim() > 1 else None for own in grads)


def only_first_derivative(op: str) -> RuntimeError:
    return RuntimeError(f"{op}: there is no second derivative, whatever the backend (see docs/numerics.md)")
