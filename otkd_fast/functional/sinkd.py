"""Fused operator of the batch-wise SinKD loss: softmax, L1 cost, Sinkhorn iterations and the gradient in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import resolve
from ..ops._library import operators
from ..reference.sinkd import sinkd_transport_cost as _reference
from ._autograd import apply, distinct, keep_signature, mapped, needs_function, no_second_derivative, transformed

__all__ = ["sinkd_transport_cost"]

_VALUE_AND_GRAD = operators("sinkd_value_and_grad")


def sinkd_transport_cost(
    rows: Tensor,
    columns: Tensor,
    weights_rows: Tensor | None = None,
    weights_columns: Tensor | None = None,
    *,
    temperature_rows: float,
    temperature_columns: float,
    epsilon: float,
    num_iters: int,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """scale <P, C> (*B,) of the Sinkhorn plan (mass 1, rows updated first) for the L1 cost between softmaxed rows.

    rows (*B, n, d) and columns (*B, m, d), float32 or float64 alike: logits, softmax(z / temperature) is taken
    inside; temperature 0.0 takes the rows as they are (entries in [0, 1], e.g. one-hot). weights_rows (*B, n),
    weights_columns (*B, m): masses >= 0 or None (uniform); no gradient goes to them. Gradients are those of the
    unrolled iterations. The callers in otkd_fast.losses have validated the arguments: nothing is checked here.
    """
    backend = resolve("sinkd", rows.device, backend)
    if backend == "reference":
        cost = _reference(
            rows,
            columns,
            weights_rows,
            weights_columns,
            temperature_rows=temperature_rows,
            temperature_columns=temperature_columns,
            epsilon=epsilon,
            num_iters=num_iters,
        )
        return cost if scale == 1.0 else cost * scale
    parameters = (temperature_rows, temperature_columns, epsilon, num_iters, scale)
    if not needs_function(rows, columns):
        return _VALUE_AND_GRAD[backend](rows, columns, weights_rows, weights_columns, *parameters, False, False)[0]
    # Under a transform, requires_grad says nothing about outer levels: both gradients are made.
    unknown = torch._C._are_functorch_transforms_active()
    needs = unknown or rows.requires_grad, unknown or columns.requires_grad
    if unknown or torch.compiler.is_compiling():
        return _SinKD.apply(*distinct(rows, columns, weights_rows, weights_columns), *parameters, *needs, backend)[0]
    return apply(_SinKDEager, rows, columns, weights_rows, weights_columns, (*parameters, *needs), backend)


class _SinKDEager(torch.autograd.Function):
    """_SinKD without what compilers and transforms need: its gradients are no outputs (8 us less a step)."""

    @staticmethod
    def forward(ctx, rows, columns, weights_rows, weights_columns, parameters, backend):
        op = _VALUE_AND_GRAD[backend]
        value, grad_rows, grad_columns = op(rows, columns, weights_rows, weights_columns, *parameters)
        ctx.save_for_backward(rows, columns, grad_rows, grad_columns)
        return value

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return *_gradients(ctx, grad), *(None,) * 4
        _, _, grad_rows, grad_columns = ctx.saved_tensors
        need_rows, need_columns, *_ = ctx.needs_input_grad
        factor = grad[..., None, None] if grad.dim() else grad
        grad_rows = grad_rows * factor if need_rows else None
        return grad_rows, grad_columns * factor if need_columns else None, *(None,) * 4


@keep_signature
class _SinKD(torch.autograd.Function):
    """Outputs: value (*B,), and the gradients of rows (*B, n, d) and columns (*B, m, d) for an incoming 1."""

    @staticmethod
    def forward(
        rows,
        columns,
        weights_rows,
        weights_columns,
        temperature_rows,
        temperature_columns,
        epsilon,
        num_iters,
        scale,
        need_rows,
        need_columns,
        backend,
    ):
        return _VALUE_AND_GRAD[backend](
            rows,
            columns,
            weights_rows,
            weights_columns,
            temperature_rows,
            temperature_columns,
            epsilon,
            num_iters,
            scale,
            need_rows,
            need_columns,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, grad_rows, grad_columns = output
        ctx.mark_non_differentiable(grad_rows, grad_columns)
        ctx.set_materialize_grads(False)
        # rows and columns are there for a recorded backward alone, whose derivative must be refused
        ctx.save_for_backward(inputs[0], inputs[1], grad_rows, grad_columns)

    @staticmethod
    def backward(ctx, grad, _grad_rows, _grad_columns):
        if grad is None:
            return (None,) * 12
        return *_gradients(ctx, grad), *(None,) * 10

    @staticmethod
    def vmap(info, in_dims, *arguments):
        front = _all_mapped(info, in_dims, arguments, 4)
        need_rows, need_columns = arguments[-3:-1]
        # A gradient that is not needed is an empty tensor without a mapped axis.
        return _SinKD.apply(*front, *arguments[4:]), (0, 0 if need_rows else None, 0 if need_columns else None)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows and columns, None where not needed, from what the forward saved."""
    rows, columns, grad_rows, grad_columns = ctx.saved_tensors
    need_rows, need_columns = ctx.needs_input_grad[:2]
    if transformed():
        grad_rows, grad_columns = _SinKDBackward.apply(rows, columns, grad_rows, grad_columns, grad)
    else:
        grad_rows, grad_columns = _scaled(grad_rows, grad_columns, grad)
    return grad_rows if need_rows else None, grad_columns if need_columns else None


def _scaled(grad_rows: Tensor, grad_columns: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients for an incoming `grad` (*B,); an empty one stays empty."""
    factor = grad[..., None, None] if grad.dim() else grad
    return tuple(own * factor if own.dim() > 1 else own for own in (grad_rows, grad_columns))


@keep_signature
class _SinKDBackward(torch.autograd.Function):
    """The gradient as a node, where autograd records the backward pass: its derivative is an error."""

    @staticmethod
    def forward(rows, columns, grad_rows, grad_columns, grad):
        return _scaled(grad_rows, grad_columns, grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise no_second_derivative("sinkd")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        front = [
            gradient if gradient.dim() == 1 else mapped(gradient, dim, info.batch_size)
            for gradient, dim in zip(arguments[2:4], in_dims[2:4], strict=True)
        ]
        rows, columns, grad = (mapped(arguments[i], in_dims[i], info.batch_size) for i in (0, 1, 4))
        out_dims = tuple(0 if gradient.dim() > 1 else None for gradient in front)
        return _SinKDBackward.apply(rows, columns, *front, grad), out_dims


def _all_mapped(info, in_dims, arguments, count: int) -> list[Tensor | None]:
    """The first `count` arguments, tensors or None, with the mapped axis in front of each."""
    return [mapped(x, dim, info.batch_size) for x, dim in zip(arguments[:count], in_dims[:count], strict=True)]
