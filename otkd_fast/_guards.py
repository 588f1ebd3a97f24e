"""Autograd nodes that turn a gradient nobody computes into an error instead of a silent zero."""

from __future__ import annotations

import torch
from torch import Tensor


def uncovered_message(output: str, gradient: str, covered: str) -> str:
    """Sentence for a backward pass through an output that the gradient mode does not differentiate."""
    return (
        f"sinkhorn: gradient='{gradient}' differentiates {covered} only, but a gradient arrived for {output}; "
        f"use {output}.detach() if it is a diagnostic, or gradient='unroll' to differentiate it"
    )


def refuse_gradient(grad: Tensor, message: str) -> None:
    """Raise ``RuntimeError(message)``; in a compiled graph, where unused outputs get zeros, only if `grad` is not 0."""
    if not torch.compiler.is_compiling():
        raise RuntimeError(message)
    torch._assert_async((grad == 0).all(), message)


class _Refuse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, anchor: Tensor, message: str) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.message = inputs[2]

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_gradient(grad, ctx.message)
        return None, None, None


def uncovered(value: Tensor, anchor: Tensor, message: str) -> Tensor:
    """`value`, attached to the graph of `anchor` so that a backward pass through it raises."""
    if not anchor.requires_grad and not torch._C._are_functorch_transforms_active():
        return value
    return _Refuse.apply(value, anchor, message)


class _FirstOrderOnly(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, message: str) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return grad, None
        # the anchor makes the gradient require grad even where it is a constant, so that a second derivative raises
        return _Refuse.apply(grad, ctx.saved_tensors[0], ctx.message), None


def first_order_only(value: Tensor, message: str) -> Tensor:
    """`value` with its first derivative intact and an error in place of a second one."""
    if not value.requires_grad and not torch._C._are_functorch_transforms_active():
        return value
    return _FirstOrderOnly.apply(value, message)
