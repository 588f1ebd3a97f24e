"""Pairwise cost matrices in plain PyTorch.

Differences are formed before anything is squared or summed, so that rows that nearly coincide keep full relative
accuracy; the GEMM form |x|^2 + |y|^2 - 2 <x, y> loses it there. The price is a (B, chunk, m, d) temporary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# elements of the (B, chunk, m, d) temporary; 32 MiB in float64
_CHUNK_ELEMENTS = 1 << 22

# (squares are safe between 2^-e and 2^e, factor 2^s that brings the rest there); powers of two are exact
_RESCALE = {torch.float64: (400, 600), torch.float32: (50, 80)}


def cost_matrix(x: Tensor, y: Tensor, *, metric: str, softmax_temperature: float | None = None) -> Tensor:
    """Cost between each row of `x` and each row of `y`; see :func:`otkd_fast.cost_matrix`.

    Args:
        x: (..., n, d), float32 or float64.
        y: (..., m, d); the same batch axes as `x`, or one of the two has none.
        metric: 'l1', 'l2', 'sqeuclidean' or 'cosine'.
        softmax_temperature: rows are logits and ``softmax(row / softmax_temperature)`` is compared.

    Returns:
        (..., n, m).
    """
    if softmax_temperature is not None:
        x = torch.softmax(x / softmax_temperature, dim=-1)  # (..., n, d)
        y = torch.softmax(y / softmax_temperature, dim=-1)  # (..., m, d)
    pairs = _METRICS[metric]
    n, d = x.shape[-2:]
    batch = max(x.shape[:-2].numel(), y.shape[:-2].numel())
    chunk = max(1, _CHUNK_ELEMENTS // max(1, batch * y.shape[-2] * d))
    if n <= chunk:
        return pairs(x, y)
    return torch.cat(in_chunks(lambda rows: pairs(rows, y), chunk, x), dim=-2)


def in_chunks(function: Callable, chunk: int, *tensors: Tensor) -> list:
    """`function` of at most `chunk` rows (axis -2) of each tensor at a time; a backward pass computes it again.

    Not under functorch, which does not support checkpoints: there the memory of a backward pass is not bounded.
    """
    chunks = zip(*(tensor.split(max(1, chunk), dim=-2) for tensor in tensors), strict=True)
    recompute = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if recompute and not torch._C._are_functorch_transforms_active():
        return [checkpoint(function, *rows, use_reentrant=False) for rows in chunks]
    return [function(*rows) for rows in chunks]


def _differences(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-2) - y.unsqueeze(-3)  # (..., n, m, d)


def _rescale(rows: Tensor) -> Tensor:
    """Power of two (constant for autograd) that brings `rows` where squares neither overflow nor vanish."""
    if rows.shape[-1] == 0:
        return rows.new_ones(rows.shape[:-1] + (1,))
    exponent, shift = _RESCALE[rows.dtype]
    largest = rows.detach().abs().amax(dim=-1, keepdim=True)  # (..., 1)
    one = torch.ones_like(largest)
    factor = torch.where(largest < 2.0**-exponent, 2.0**shift, one)
    return torch.where((largest > 2.0**exponent) & (largest < torch.inf), 2.0**-shift, factor)


def _norm(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean norm of the last axis, 1 in place of 0, and the mask of the zeros; their gradient is 0."""
    square = rows.square().sum(-1)
    zero = square == 0
    return torch.where(zero, 1, square).sqrt(), zero


def _l1(x: Tensor, y: Tensor) -> Tensor:
    return _differences(x, y).abs().sum(-1)


def _sqeuclidean(x: Tensor, y: Tensor) -> Tensor:
    return _differences(x, y).square().sum(-1)


def _l2(x: Tensor, y: Tensor) -> Tensor:
    delta = _differences(x, y)  # (..., n, m, d)
    factor = _rescale(delta)  # (..., n, m, 1)
    norm, zero = _norm(delta * factor)
    return torch.where(zero, 0, norm / factor.squeeze(-1))


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos = |u - v|^2 / 2 with u = x / |x| and v = y / |y|.

    For |y| <= |x| the difference is |x| (u - v) = (x - y) - y (|x| - |y|) / |y|, which loses no digits when x and y
    nearly coincide; otherwise x and y change places.
    """
    x = x * _rescale(x)
    y = y * _rescale(y)
    norm_x, zero_x = _norm(x)
    norm_y, zero_y = _norm(y)
    norm_x, norm_y = norm_x.unsqueeze(-1), norm_y.unsqueeze(-2)  # (..., n, 1), (..., 1, m)
    delta = _differences(x, y)  # (..., n, m, d)
    # |x| - |y| without cancellation: <x - y, x + y> / (|x| + |y|)
    gap = (delta * (x.unsqueeze(-2) + y.unsqueeze(-3))).sum(-1) / (norm_x + norm_y)  # (..., n, m)
    y_shorter = norm_y <= norm_x
    shorter = torch.where(y_shorter.unsqueeze(-1), y.unsqueeze(-3), x.unsqueeze(-2))  # (..., n, m, d)
    short, long = torch.where(y_shorter, norm_y, norm_x), torch.where(y_shorter, norm_x, norm_y)  # (..., n, m)
    residual = delta - shorter * (gap / short).unsqueeze(-1)  # (..., n, m, d)
    cost = residual.square().sum(-1) / (2 * long.square())
    return torch.where(zero_x.unsqueeze(-1) | zero_y.unsqueeze(-2), 1, cost)


_METRICS = {"l1": _l1, "l2": _l2, "sqeuclidean": _sqeuclidean, "cosine": _cosine}
