"""``polar_fwd``: polar factors and nuclear norms (kernels: ``csrc/cpu/polar.cpp``)."""

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


_library.register("polar_fwd(Tensor K, int steps) -> (Tensor, Tensor)", _fake, _cpu, triton="polar:polar_fwd")
