"""polar: polar factor and nuclear norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._dispatch import resolve
from .._guards import refuse_gradient
from ..ops._library import operators
from ._autograd import apply, keep_signature, mapped, needs_function, transformed
from ._matrices import check_not_empty, in_float32
from ._validate import check_tensor
from ._value_and_gradients import only_first_derivative

_ALL_STEPS = 0  # those of the dtype of K
_FORWARD = operators("polar_fwd")


def polar(K: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    r"""Polar factor P = U V^T and nuclear norm sum s = <K, P> of matrices K = U diag(s) V^T.

    A composition of odd quintic polynomials of K, which needs products of matrices only, takes every singular value
    above 1e-5 (float64: 1e-10) of the largest to 1; smaller ones are damped towards 0. K = 0 has P = 0.

    Gradients: that of the nuclear norm is P. P itself is not differentiated: backward through it raises.

    Args:
        K: (..., n, m), n, m >= 1, float16, bfloat16, float32 or float64.
        backend: 'auto', 'reference', 'cpu', 'cuda' or 'triton'; None: see :func:`otkd_fast.backend`.

    Returns:
        P (..., n, m) and the nuclear norm (...), in the dtype of `K`; float32 for half-precision inputs, which are
        computed in float32. NaN or infinities in one matrix of a batch give NaN for that one.

    Raises:
        TypeError: not a tensor, an integer or complex tensor.
        ValueError: fewer than two axes, no rows or no columns, an unknown backend.
        RuntimeError: the named backend is not available. In the backward pass: a gradient for P; a second derivative.

    Sources: Higham, Functions of Matrices (2008), chapter 8; Amsel et al., The Polar Express (2025).

    >>> import torch, otkd_fast
    >>> factor, norm = otkd_fast.polar(torch.tensor([[0.0, -2.0], [3.0, 0.0]]))
    >>> factor
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    >>> norm
    tensor(5.)
    """
    check_tensor("K", K, 2, "(..., n, m)")
    check_not_empty("K", K, 2)
    (K,) = in_float32(K)
    backend = resolve("polar", K.device, backend)
    return apply(_Polar, K, backend) if needs_function(K) else _forward(K, backend)


def _forward(K: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend != "reference":
        return _FORWARD[backend](K, _ALL_STEPS)
    P, nuclear_norm = reference.polar(K)
    return P, nuclear_norm.to(K.dtype)


@keep_signature
class _Polar(torch.autograd.Function):
    @staticmethod
    def forward(K, backend):
        return _forward(K, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_factor, grad_norm):
        if grad_factor is not None:
            refuse_gradient(grad_factor, "polar: a gradient arrived for the polar factor, which is not differentiated")
        if grad_norm is None:
            return None, None
        K, P = ctx.saved_tensors
        return _Scaled.apply(K, P, grad_norm) if transformed() else P * grad_norm[..., None, None], None

    @staticmethod
    def vmap(info, in_dims, K, backend):
        return _Polar.apply(mapped(K, in_dims[0], info.batch_size), backend), (0, 0)


@keep_signature
class _Scaled(torch.autograd.Function):
    """The gradient as a node, where autograd records the backward pass: its derivative is an error."""

    @staticmethod
    def forward(K, P, grad):
        return P.detach() * grad[..., None, None]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise only_first_derivative("polar")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        tensors = (mapped(tensor, dim, info.batch_size) for tensor, dim in zip(arguments, in_dims, strict=True))
        return _Scaled.apply(*tensors), 0
