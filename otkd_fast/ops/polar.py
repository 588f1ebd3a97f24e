"""``polar_fwd``: polar factors and nuclear norms (``csrc/cpu/polar.cpp``, ``csrc/cuda/polar.cu``)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._library import native


def _fake(K: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    return K.new_empty(K.shape), K.new_empty(K.shape[:-2])


def _cpu(K: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    K = K.contiguous()
    *batch, n, m = K.shape
    P, nuclear_norm = _fake(K, steps)
    if K.numel() == 0:
        return P, nuclear_norm.zero_()
    problems, code, threads = _library.product(batch), _library.dtype_code(K), torch.get_num_threads()
    scratch = _library.workspace(native.polar_workspace(code, problems, n, m, threads))
    native.polar_fwd(
        code, K.data_ptr(), P.data_ptr(), nuclear_norm.data_ptr(), scratch.data_ptr(), problems, n, m, steps, threads
    )
    return P, nuclear_norm


def _cuda(K: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    K = K.contiguous()
    P, nuclear_norm = _fake(K, steps)
    if K.numel() == 0:
        return P, nuclear_norm.zero_()
    code, results = _library.dtype_code(K), (P.data_ptr(), nuclear_norm.data_ptr())
    sizes = (nuclear_norm.numel(), *K.shape[-2:], steps)
    needed = _library.cuda.polar_workspace(code, (0, 0, 0, 0, *sizes), _library.place(K))
    scratch = _library.cuda_workspace(K, needed)
    _library.launch("polar", K, "polar_fwd", code, (K.data_ptr(), *results, scratch.data_ptr(), *sizes))
    return P, nuclear_norm


_library.register(
    "polar_fwd(Tensor K, int steps) -> (Tensor, Tensor)", _fake, _cpu, cuda=_cuda, triton="polar:polar_fwd"
)
