"""Mean and standard deviation over windows in plain PyTorch; differentiable by ordinary autograd."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def window(index: int, count: int, size: int) -> slice:
    """Window i = `index` of the `count` that cover an axis: floor(i size / count) up to ceil((i + 1) size / count).

    They overlap where `count` does not divide `size`; torch.nn.functional.adaptive_avg_pool2d has the same.
    """
    return slice(index * size // count, -(-(index + 1) * size // count))


def feature_moments(
    x: Tensor, *, dim: Sequence[int], grid: Sequence[int], unbiased: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + eps) of each window of the axes `dim`.

    Args:
        x: float32 or float64.
        dim: axes, not negative, ascending.
        grid: number of windows along each of them.
        unbiased: the variance divides by the number of elements - 1.
        eps: >= 0.

    Returns:
        mean, std: the shape of `x` with the sizes `grid` on the axes `dim`. A standard deviation of 0 has gradient 0.
    """
    means, variances = [], []
    for cell in itertools.product(*map(range, grid)):
        part = x.double()
        for axis, index, count in zip(dim, cell, grid, strict=True):
            part = part[(slice(None),) * axis + (window(index, count, x.shape[axis]),)]
        origin = part.detach()  # its first element: deviations from it are exactly 0 where the window is constant
        for axis in dim:
            origin = origin.narrow(axis, 0, 1)
        means.append(part.mean(tuple(dim)))
        variances.append((part - origin).var(tuple(dim), correction=int(unbiased)))
    std = _root(_placed(variances, dim, grid) + eps)
    return _placed(means, dim, grid).to(x.dtype), std.to(x.dtype)


def _placed(cells: list[Tensor], dim: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Cells in the order of itertools.product, as the axes `dim` of one tensor."""
    stacked = torch.stack(cells).unflatten(0, tuple(grid))
    return stacked.movedim(tuple(range(len(grid))), tuple(dim))


def _root(variance: Tensor) -> Tensor:
    zero = variance == 0
    return torch.where(zero, 0, torch.where(zero, 1, variance).sqrt())
