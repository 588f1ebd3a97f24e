"""``gaussian_wasserstein_from_samples``: W2^2 between the Gaussians fitted to two samples, with its gradients, in one
op (``csrc/cpu/gaussian.cpp``, ``csrc/cuda/gaussian.cu``).

The gradients come with the value, for an incoming gradient of 1; one that is not needed is an empty tensor (0,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import _library
from ._library import native

_ROWS_IN_A_BLOCK = 160  # larger samples with more rows than features: the d x d problem of their QR factors


def _fake(x: Tensor, y: Tensor, unbiased: bool, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[:-2]),
        x.new_empty(x.shape if need_x else (0,)),
        y.new_empty(y.shape if need_y else (0,)),
    )


def _cpu(x: Tensor, y: Tensor, unbiased: bool, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    *batch, n, d = x.shape
    m = y.shape[-2]
    value, grad_x, grad_y = outputs = _fake(x, y, unbiased, need_x, need_y)
    if value.numel() == 0:
        return outputs
    code, problems, threads = _library.dtype_code(x), _library.product(batch), torch.get_num_threads()
    scratch = _library.workspace(native.gaussian_samples_workspace(code, problems, n, m, d, threads))
    native.gaussian_samples(
        code, x.data_ptr(), y.data_ptr(), value.data_ptr(), grad_x.data_ptr(), grad_y.data_ptr(), scratch.data_ptr(),
        problems, n, m, d, unbiased, threads,
    )  # fmt: skip
    return outputs


def _cuda(x: Tensor, y: Tensor, unbiased: bool, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    n, d, m = *x.shape[-2:], y.shape[-2]
    value, grad_x, grad_y = outputs = _fake(x, y, unbiased, need_x, need_y)
    if value.numel() == 0:
        return outputs
    if min(n, m) > d and max(n, m) > _ROWS_IN_A_BLOCK:
        found = reference.wasserstein_from_samples(x, y, unbiased=unbiased, need_x=need_x, need_y=need_y)
        return tuple(t if got is None else got for t, got in zip(outputs, found, strict=True))
    code, results = _library.dtype_code(x), tuple(t.data_ptr() if t.numel() else 0 for t in outputs)
    sizes = (value.numel(), n, m, d, unbiased)
    call = (x.data_ptr(), y.data_ptr(), *results)
    needed = _library.cuda.gaussian_samples_workspace(code, (*call, 0, *sizes), _library.place(x))
    scratch = _library.cuda_workspace(x, needed)
    _library.launch("gaussian_wasserstein", x, "gaussian_samples", code, (*call, scratch.data_ptr(), *sizes))
    return outputs


_library.register(
    "gaussian_wasserstein_from_samples(Tensor x, Tensor y, bool unbiased, bool need_x, bool need_y) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
    _cpu,
    cuda=_cuda,
    triton="gaussian_wasserstein:from_samples",
)
