"""feature_moments: means and standard deviations over windows of positions or over the batch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops as _ops  # noqa: F401  registers torch.ops.otkd_fast.*
from .. import reference
from .._dispatch import resolve
from ..ops._library import operators
from ..ops.moments import kernel_takes
from ._autograd import apply, keep_signature, mapped, needs_function, no_second_derivative, transformed
from ._matrices import check_flag, in_float32
from ._validate import check_tensor, not_negative_float, positive_int

_FWD, _BWD = operators("feature_moments_fwd"), operators("feature_moments_bwd")


class FeatureMoments(NamedTuple):
    """What :func:`feature_moments` returns."""

    mean: Tensor
    std: Tensor


def feature_moments(
    x: Tensor,
    *,
    dim: int | Sequence[int],
    grid: int | Sequence[int] | None = None,
    unbiased: bool = False,
    eps: float = 0.0,
    backend: str | None = None,
) -> FeatureMoments:
    r"""Mean and standard deviation sqrt(variance + eps) of features, over the batch or over windows of positions.

    Without a grid the axes `dim` are reduced: ``dim=0`` of features (n, d) is KD2M's diagonal Gaussian,
    ``dim=(-2, -1)`` of a feature map (n, c, h, w) that of WKD-F with one cell. With a grid each axis in `dim` is
    covered by that many windows and stays, with one element a window. Window i of g on an axis of s positions goes
    from floor(i s / g) up to, but without, ceil((i + 1) s / g), as in torch.nn.functional.adaptive_avg_pool2d: windows
    overlap where g does not divide s. 7 positions in 4 windows are (0, 2), (1, 4), (3, 6), (5, 7).

    Squares are those of deviations from the mean, so that a large mean costs no digits. Where variance + eps is 0, the
    standard deviation has gradient 0.

    Args:
        x: float16, bfloat16, float32 or float64.
        dim: axis or axes over which the moments are taken.
        grid: number of windows, one for all axes in `dim` or one for each; at most the size of the axis. None: one
            window, and the axes are removed.
        unbiased: the variance divides by the number of elements of the window - 1.
        eps: >= 0, added to the variance.
        backend: 'auto', 'reference', 'cpu', 'cuda' or 'triton'; None: see :func:`otkd_fast.backend`.

    Returns:
        FeatureMoments(mean, std), in the dtype of `x`; float32 for half-precision inputs, which are computed in
        float32.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: axes that do not exist, come twice or are empty; more windows than positions; unbiased=True with a
            window of a single element, which has no unbiased variance; eps negative or not finite.
        RuntimeError: the named backend is not available.

    Sources: WKD (arXiv 2412.08139), feature loss, released with unbiased=True and eps=1e-5; KD2M (arXiv 2504.01757),
    equation 5, released with unbiased=False and eps=0.

    >>> import torch, otkd_fast
    >>> mean, std = otkd_fast.feature_moments(torch.tensor([[0.0, 1.0], [4.0, 1.0]]), dim=0)
    >>> mean, std
    (tensor([2., 1.]), tensor([2., 0.]))
    >>> otkd_fast.feature_moments(torch.zeros(2, 512, 7, 7), dim=(-2, -1), grid=4, unbiased=True, eps=1e-5).std.shape
    torch.Size([2, 512, 4, 4])
    """
    check_tensor("x", x, 1, "with at least one axis")
    axes = _axes(x, dim)
    counts = _counts(x, axes, grid)
    check_flag("unbiased", unbiased)
    eps = not_negative_float("eps", eps)
    if unbiased:
        _check_more_than_one(x, axes, counts)
    (x,) = in_float32(x)
    backend = resolve("feature_moments", x.device, backend)
    if backend == "reference" or not kernel_takes(x, axes, counts):
        mean, std = reference.feature_moments(x, dim=axes, grid=counts, unbiased=unbiased, eps=eps)
    elif needs_function(x):
        mean, std = apply(_Moments, x, axes, counts, unbiased, eps, backend)
    else:
        mean, std = _FWD[backend](x, axes, counts, unbiased, eps)
    if grid is None:
        mean, std = mean.squeeze(axes), std.squeeze(axes)
    return FeatureMoments(mean, std)


@keep_signature
class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(x, dim, grid, unbiased, eps, backend):
        return _FWD[backend](x, dim, grid, unbiased, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad_mean, grad_std):
        if grad_mean is None and grad_std is None:
            return (None,) * 6
        backward = _MomentsBackward.apply if transformed() else _backward
        return backward(*ctx.saved_tensors, grad_mean, grad_std, *ctx.options), *(None,) * 5

    @staticmethod
    def vmap(info, in_dims, x, dim, *options):
        inside = tuple(axis + 1 for axis in dim)
        return _Moments.apply(mapped(x, in_dims[0], info.batch_size), inside, *options), (0, 0)


def _backward(x, grad_mean, grad_std, dim, grid, unbiased, eps, backend):
    return _BWD[backend](x, grad_mean, grad_std, dim, grid, unbiased, eps)


@keep_signature
class _MomentsBackward(torch.autograd.Function):
    """The gradient as a node, where autograd records the backward pass: its derivative is an error."""

    @staticmethod
    def forward(x, grad_mean, grad_std, dim, grid, unbiased, eps, backend):
        return _backward(x, grad_mean, grad_std, dim, grid, unbiased, eps, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise no_second_derivative("feature_moments")

    @staticmethod
    def vmap(info, in_dims, x, grad_mean, grad_std, dim, *options):
        tensors = (mapped(t, d, info.batch_size) for t, d in zip((x, grad_mean, grad_std), in_dims[:3], strict=True))
        return _MomentsBackward.apply(*tensors, tuple(axis + 1 for axis in dim), *options), 0


def _axes(x: Tensor, dim: int | Sequence[int]) -> tuple[int, ...]:
    """The axes, ascending, none negative."""
    given = dim if isinstance(dim, (tuple, list)) else (dim,)
    axes = []
    for axis in given:
        try:
            axis = operator.index(axis)
        except TypeError:
            raise TypeError(f"dim: expected an int or a sequence of ints, got {type(axis).__name__}") from None
        if not -x.dim() <= axis < x.dim():
            raise ValueError(f"dim: expected axes of a tensor with {x.dim()} axes, got {axis}")
        axes.append(axis % x.dim())
        if x.shape[axis] == 0:
            raise ValueError(f"x: expected at least one element along axis {axis}, got shape {tuple(x.shape)}")
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"dim: expected one or more different axes, got {dim}")
    return tuple(axes)


def _counts(x: Tensor, axes: tuple[int, ...], grid: int | Sequence[int] | None) -> tuple[int, ...]:
    """Windows along each axis."""
    if grid is None:
        return (1,) * len(axes)
    given = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,) * len(axes)
    counts = tuple(positive_int("grid", count) for count in given)
    if len(counts) != len(axes):
        raise ValueError(f"grid: expected one number or {len(axes)}, one for each axis in dim, got {grid}")
    for axis, count in zip(axes, counts, strict=True):
        if count > x.shape[axis]:
            raise ValueError(f"grid: expected at most {x.shape[axis]} windows along axis {axis}, got {count}")
    return counts


def _check_more_than_one(x: Tensor, axes: tuple[int, ...], counts: tuple[int, ...]) -> None:
    """ValueError if a window has a single element, which happens where every axis has a window of one."""
    smallest = 1
    for axis, count in zip(axes, counts, strict=True):
        windows = (reference.window(index, count, x.shape[axis]) for index in range(count))
        smallest *= min(window.stop - window.start for window in windows)
    if smallest == 1:
        raise ValueError(
            "unbiased: expected False, or windows of at least two elements, "
            f"got windows of one with shape {tuple(x.shape)} and grid {counts}"
        )
