"""cost_matrix: pairwise costs between two sets of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._dispatch import resolve
from ..ops._library import operators
from ._autograd import (
    apply,
    distinct,
    keep_signature,
    mapped,
    needs_function,
    no_second_derivative,
    to_front,
    transformed,
)
from ._validate import HALF_DTYPES, check_choice, check_same_kind, check_tensor, positive_float

METRICS = ("l1", "l2", "sqeuclidean", "cosine")

_FORWARD = operators("cost_matrix_fwd")
_BACKWARD = operators("cost_matrix_bwd")


def cost_matrix(
    x: Tensor,
    y: Tensor,
    *,
    metric: str,
    softmax_temperature: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Cost between each row of `x` and each row of `y`.

    ========================  ===========================================
    metric                    C_ij
    ========================  ===========================================
    'l1'                      sum_k abs(x_ik - y_jk)
    'l2'                      sqrt(sum_k (x_ik - y_jk)^2)
    'sqeuclidean'             sum_k (x_ik - y_jk)^2
    'cosine'                  1 - <x_i, y_j> / (norm(x_i) norm(y_j))
    ========================  ===========================================

    Differences are formed before they are squared, so that rows that nearly coincide keep their relative accuracy
    (1e-5 in float32), which the matrix-product form of the distance loses. Gradients: sign(0) = 0 in 'l1'; 0 where an
    'l2' distance is 0; a row of zeros has cosine cost 1 and gradient 0.

    Args:
        x: (..., n, d), float16, bfloat16, float32 or float64.
        y: (..., m, d), same dtype and device; the same batch axes as `x`, or one of the two has none and is shared.
        metric: 'l1', 'l2', 'sqeuclidean' or 'cosine'.
        softmax_temperature: t > 0: rows are logits, and softmax(row / t) is compared. None: rows as they are.
        backend: 'auto', 'reference', 'cpu', 'cuda' or 'triton'; None: see :func:`otkd_fast.backend`.

    Returns:
        (..., n, m) in the dtype of `x`. Half-precision inputs are computed in float32 and rounded once, at the end.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: wrong rank, sizes, dtypes or devices that do not match, an unknown word, a temperature that is not
            > 0, no features (d = 0) where the metric or the softmax needs some.
        RuntimeError: the named backend is not available; or a second derivative is asked of a compiled backend.

    >>> import torch, otkd_fast
    >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> otkd_fast.cost_matrix(x, x, metric="l2")
    tensor([[0., 5.],
            [5., 0.]])
    """
    temperature = check_rows(x, y, metric, softmax_temperature)
    dtype = x.dtype
    backend = resolve("cost_matrix", x.device, backend)
    if dtype in HALF_DTYPES and backend != "triton":  # its kernels read half precision
        x, y = x.float(), y.float()
    if backend == "reference":
        cost = reference.cost_matrix(x, y, metric=metric, softmax_temperature=softmax_temperature)
    elif needs_function(x, y):
        cost = apply(_CostMatrix, *distinct(x, y), metric, temperature, backend)
    else:
        cost = _FORWARD[backend](x, y, metric, temperature, temperature)
    return cost if cost.dtype == dtype else cost.to(dtype)


def check_rows(x: Tensor, y: Tensor, metric: str, softmax_temperature: float | None = None) -> float:
    """Raise for what the op cannot take; the temperature in the op's convention (0.0: none)."""
    check_tensor("x", x, 2, "(..., n, d)")
    check_tensor("y", y, 2, "(..., m, d)")
    check_same_kind("y", y, "x", x)
    check_choice("metric", metric, METRICS)
    temperature = 0.0 if softmax_temperature is None else positive_float("softmax_temperature", softmax_temperature)
    x_shape, y_shape = x.shape, y.shape
    if x_shape[-1] != y_shape[-1]:
        raise ValueError(f"y: expected rows of {x_shape[-1]} features like x, got shape {tuple(y_shape)}")
    if len(x_shape) > 2 and len(y_shape) > 2 and x_shape[:-2] != y_shape[:-2]:
        raise ValueError(f"y: expected the batch axes of x, {tuple(x_shape[:-2])}, or none, got shape {tuple(y_shape)}")
    if x_shape[-1] == 0 and (metric == "cosine" or softmax_temperature is not None):
        what = "metric 'cosine'" if metric == "cosine" else "softmax_temperature"
        raise ValueError(f"x: expected at least one feature for {what}, got shape {tuple(x_shape)}")
    return temperature


@keep_signature
class _CostMatrix(torch.autograd.Function):
    @staticmethod
    def forward(x, y, metric, temperature, backend):
        return _FORWARD[backend](x, y, metric, temperature, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.metric, ctx.temperature, ctx.backend = inputs
        ctx.save_for_backward(x, y, output)

    @staticmethod
    def backward(ctx, grad):
        need_x, need_y = ctx.needs_input_grad[:2]
        x, y, cost = ctx.saved_tensors
        if transformed():
            options = (ctx.metric, ctx.temperature, need_x, need_y, ctx.backend)
            grads = _CostMatrixBackward.apply(x, y, cost, grad, *options)
        else:
            options = (ctx.metric, ctx.temperature, ctx.temperature, need_x, need_y)
            grads = _BACKWARD[ctx.backend](x, y, cost, grad, *options)
        return grads[0] if need_x else None, grads[1] if need_y else None, None, None, None

    @staticmethod
    def vmap(info, in_dims, x, y, *options):
        batch = _batch_axes(in_dims, x, y)
        # a plain (n, d) operand that is not mapped stays shared by the whole batch
        x, y = (
            rows if dim is None and rows.dim() == 2 else _repeat(rows, dim, info.batch_size, batch)
            for rows, dim in zip((x, y), in_dims[:2], strict=True)
        )
        return _CostMatrix.apply(x, y, *options), 0


@keep_signature
class _CostMatrixBackward(torch.autograd.Function):
    @staticmethod
    def forward(x, y, cost, grad, metric, temperature, need_x, need_y, backend):
        return _BACKWARD[backend](x, y, cost, grad, metric, temperature, temperature, need_x, need_y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise no_second_derivative("cost_matrix")

    @staticmethod
    def vmap(info, in_dims, x, y, cost, grad, metric, temperature, need_x, need_y, backend):
        x_dim, y_dim, cost_dim, grad_dim = in_dims[:4]
        batch = _batch_axes(in_dims, x, y)
        sum_x, sum_y = (
            need and len(batch) > 0 and rows.dim() - (dim is not None) == 2
            for need, rows, dim in ((need_x, x, x_dim), (need_y, y, y_dim))
        )
        x, y = _repeat(x, x_dim, info.batch_size, batch), _repeat(y, y_dim, info.batch_size, batch)
        cost, grad = mapped(cost, cost_dim, info.batch_size), mapped(grad, grad_dim, info.batch_size)
        options = (metric, temperature, need_x, need_y, backend)
        grad_x, grad_y = _CostMatrixBackward.apply(x, y, cost, grad, *options)
        # an operand without batch axes, shared by the batch inside, gets the sum over it
        axes = tuple(range(1, 1 + len(batch)))
        grads = (grad_x.sum(axes) if sum_x else grad_x, grad_y.sum(axes) if sum_y else grad_y)
        return grads, (0 if need_x else None, 0 if need_y else None)


def _batch_axes(in_dims, x: Tensor, y: Tensor) -> tuple[int, ...]:
    """Batch axes of the call that vmap maps: those of `x` or, where it has none, of `y`."""
    shapes = (to_front(rows, dim).shape[dim is not None : -2] for rows, dim in zip((x, y), in_dims[:2], strict=True))
    return max(shapes, key=len)


def _repeat(rows: Tensor, dim: int | None, size: int, batch: tuple[int, ...]) -> Tensor:
    """`rows` as (size, *batch, rows, d), without a copy."""
    rows = rows.unsqueeze(0) if dim is None else rows.movedim(dim, 0)  # (size or 1, *own batch, rows, d)
    if rows.dim() == 3:
        rows = rows.reshape(rows.shape[:1] + (1,) * len(batch) + rows.shape[1:])
    return rows.expand(size, *batch, *rows.shape[-2:])
