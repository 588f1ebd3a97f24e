"""``gaussian_wasserstein_from_samples``: W2^2 between the Gaussians fitted to two samples, with its gradients, in one
op (``csrc/cpu/gaussian.cpp``).

The gradients come with the value, for an incoming gradient of 1; one that is not needed is an empty tensor (0,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._library import native


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


_library.register(
    "gaussian_wasserstein_from_samples(Tensor x, Tensor y, bool unbiased, bool need_x, bool need_y) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
    _cpu,
    triton="gaussian_wasserstein:from_samples",
)
