"""``feature_moments_fwd`` and ``_bwd``: means and standard deviations over windows (``csrc/cpu/moments.cpp``,
``csrc/cuda/moments.cu``).

The kernel takes up to three axes that lie beside each other; the op brings others to that form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._library import address, native

AXES = 3  # of windows that the kernel takes


def _fwd_fake(x: Tensor, dim: list[int], grid: list[int], unbiased: bool, eps: float) -> tuple[Tensor, Tensor]:
    shape = list(x.shape)
    for axis, count in zip(dim, grid, strict=True):
        shape[axis] = count
    return x.new_empty(shape), x.new_empty(shape)


def _bwd_fake(
    x: Tensor, grad_mean: Tensor | None, grad_std: Tensor | None, dim: list[int], grid: list[int], unbiased: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def _layout(x: Tensor, dim: list[int], grid: list[int]) -> tuple[list[int] | None, tuple]:
    """Order of the axes to bring x into, None if it stays, and (outer, sizes, counts, inner) of the kernel."""
    pairs = sorted(zip(dim, grid, strict=True))
    axes = [axis for axis, _ in pairs]
    order, shape = None, list(x.shape)
    if axes != list(range(axes[0], axes[0] + len(axes))):
        order = [axis for axis in range(x.dim()) if axis not in axes] + axes
        shape = [shape[axis] for axis in order]
        axes = list(range(len(shape) - len(axes), len(shape)))
    sizes, counts = [], []
    for axis, (_, count) in zip(axes, pairs, strict=True):
        if sizes and count == counts[-1] == 1:  # one window over both: one axis
            sizes[-1] *= shape[axis]
        else:
            sizes.append(shape[axis])
            counts.append(count)
    fill = [1] * (AXES - len(sizes))
    outer, inner = _library.product(shape[: axes[0]]), _library.product(shape[axes[-1] + 1 :])
    return order, (outer, fill + sizes, fill + counts, inner)


def kernel_takes(x: Tensor, dim: list[int], grid: list[int]) -> bool:
    """Whether there are not more axes than the kernel has."""
    return len(_layout(x, dim, grid)[1][1]) == AXES


def _ordered(tensor: Tensor | None, order: list[int] | None) -> Tensor | None:
    return tensor if tensor is None else (tensor if order is None else tensor.permute(order)).contiguous()


def _restored(tensor: Tensor, order: list[int] | None) -> Tensor:
    """Undoes :func:`_ordered`."""
    if order is None:
        return tensor
    back = [order.index(axis) for axis in range(len(order))]
    return tensor.permute(back).contiguous()


def _fwd_cpu(x: Tensor, dim: list[int], grid: list[int], unbiased: bool, eps: float) -> tuple[Tensor, Tensor]:
    mean, std = _fwd_fake(x, dim, grid, unbiased, eps)
    if mean.numel() == 0:
        return mean, std
    order, layout = _layout(x, dim, grid)
    x = _ordered(x, order)
    if order is not None:
        mean, std = (x.new_empty([part.shape[axis] for axis in order]) for part in (mean, std))
    call = (*layout, unbiased, eps, torch.get_num_threads())
    code = _library.dtype_code(x)
    scratch = _library.workspace(native.feature_moments_workspace(code, *call))
    native.feature_moments_fwd(code, x.data_ptr(), mean.data_ptr(), std.data_ptr(), scratch.data_ptr(), *call)
    return _restored(mean, order), _restored(std, order)


def _fwd_cuda(x: Tensor, dim: list[int], grid: list[int], unbiased: bool, eps: float) -> tuple[Tensor, Tensor]:
    mean, std = _fwd_fake(x, dim, grid, unbiased, eps)
    if mean.numel() == 0:
        return mean, std
    order, (outer, sizes, counts, inner) = _layout(x, dim, grid)
    x = _ordered(x, order).contiguous()
    if order is not None:
        mean, std = (x.new_empty([part.shape[axis] for axis in order]) for part in (mean, std))
    call = (x.data_ptr(), mean.data_ptr(), std.data_ptr(), 0, 0, 0, 0, outer, sizes, counts, inner, unbiased, eps)
    _library.launch("feature_moments", x, "feature_moments_fwd", _library.dtype_code(x), call)
    return _restored(mean, order), _restored(std, order)


def _bwd_cpu(
    x: Tensor, grad_mean: Tensor | None, grad_std: Tensor | None, dim: list[int], grid: list[int], unbiased: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    order, layout = _layout(x, dim, grid)
    x, grad_mean, grad_std = (_ordered(tensor, order) for tensor in (x, grad_mean, grad_std))
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return _restored(grad_x, order)
    call = (*layout, unbiased, eps, torch.get_num_threads())
    code = _library.dtype_code(x)
    scratch = _library.workspace(native.feature_moments_workspace(code, *call))
    native.feature_moments_bwd(
        code, x.data_ptr(), address(grad_mean), address(grad_std), grad_x.data_ptr(), scratch.data_ptr(), *call
    )
    return _restored(grad_x, order)


def _bwd_cuda(
    x: Tensor, grad_mean: Tensor | None, grad_std: Tensor | None, dim: list[int], grid: list[int], unbiased: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    order, layout = _layout(x, dim, grid)
    x, grad_mean, grad_std = (_ordered(tensor, order) for tensor in (x, grad_mean, grad_std))
    x, grad_mean, grad_std = x.contiguous(), _library.contiguous(grad_mean), _library.contiguous(grad_std)
    grad_x = x.new_empty(x.shape)
    if x.numel() == 0:
        return _restored(grad_x, order)
    code, call = _library.dtype_code(x), (x.data_ptr(), 0, 0, address(grad_mean), address(grad_std), grad_x.data_ptr())
    options = (*layout, unbiased, eps)
    scratch = _library.cuda_workspace(x, _library.cuda.feature_moments_workspace(code, (*call, 0, *options)))
    _library.launch("feature_moments", x, "feature_moments_bwd", code, (*call, scratch.data_ptr(), *options))
    return _restored(grad_x, order)


_library.register(
    "feature_moments_fwd(Tensor x, int[] dim, int[] grid, bool unbiased, float eps) -> (Tensor, Tensor)",
    _fwd_fake,
    _fwd_cpu,
    cuda=_fwd_cuda,
    triton="moments:feature_moments_fwd",
)
_library.register(
    "feature_moments_bwd(Tensor x, Tensor? grad_mean, Tensor? grad_std, int[] dim, int[] grid, bool unbiased, "
    "float eps) -> Tensor",
    _bwd_fake,
    _bwd_cpu,
    cuda=_bwd_cuda,
    triton="moments:feature_moments_bwd",
)
