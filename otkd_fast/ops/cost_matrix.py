"""``cost_matrix_fwd`` and ``cost_matrix_bwd``: pairwise cost matrices (kernels: ``csrc/cpu/cost_matrix.cpp``,
``csrc/cuda/cost_matrix.cu``)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._library import address, native

METRICS = {"l1": 0, "l2": 1, "sqeuclidean": 2, "cosine": 3}


def _sizes(x: Tensor, y: Tensor) -> tuple[torch.Size, int, int, int]:
    """Batch shape (of the operand that has one), n, m, d of x (*B, n, d) and y (*B, m, d)."""
    batch = x.shape[:-2] if x.dim() >= y.dim() else y.shape[:-2]
    return batch, x.shape[-2], y.shape[-2], x.shape[-1]


def _batch_strides(x: Tensor, y: Tensor, n: int, m: int, d: int) -> tuple[int, int]:
    """Elements from one problem to the next; 0 for an operand that the whole batch shares."""
    return (n * d if x.dim() >= y.dim() else 0, m * d if y.dim() >= x.dim() else 0)


def _fwd_fake(x: Tensor, y: Tensor, metric: str, temperature_x: float, temperature_y: float) -> Tensor:
    batch, n, m, _ = _sizes(x, y)
    return x.new_empty((*batch, n, m))


def _fwd_fake_triton(x: Tensor, y: Tensor, metric: str, temperature_x: float, temperature_y: float) -> Tensor:
    """float32 costs of half-precision rows, which the Triton kernels take as they are."""
    cost = _fwd_fake(x, y, metric, temperature_x, temperature_y)
    return cost if x.dtype == torch.float64 else cost.float()


def _fwd_cpu(x: Tensor, y: Tensor, metric: str, temperature_x: float, temperature_y: float) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    batch, n, m, d = _sizes(x, y)
    cost = x.new_empty((*batch, n, m))
    if cost.numel() == 0 or d == 0:
        return cost.zero_()  # the sum over no features
    problems, code, kind = _library.product(batch), _library.dtype_code(x), METRICS[metric]
    elements = native.cost_matrix_workspace(code, problems, n, m, d, kind, temperature_x, temperature_y, False)
    scratch = _library.workspace(elements * x.element_size())
    native.cost_matrix_fwd(
        code, address(x), address(y), cost.data_ptr(), scratch.data_ptr(), problems, n, m, d,
        *_batch_strides(x, y, n, m, d), kind, temperature_x, temperature_y, torch.get_num_threads(),
    )  # fmt: skip
    return cost


def _bwd_fake(
    x: Tensor, y: Tensor, cost: Tensor, grad_cost: Tensor, metric: str, temperature_x: float, temperature_y: float,
    need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))


def _bwd_cpu(
    x: Tensor, y: Tensor, cost: Tensor, grad_cost: Tensor, metric: str, temperature_x: float, temperature_y: float,
    need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, y, cost, grad_cost = (operand.contiguous() for operand in (x, y, cost, grad_cost))
    batch, n, m, d = _sizes(x, y)
    grad_x = x.new_empty((*batch, n, d) if need_x else (0,))
    grad_y = y.new_empty((*batch, m, d) if need_y else (0,))
    if cost.numel() == 0:
        grad_x.zero_()
        grad_y.zero_()
    elif grad_x.numel() or grad_y.numel():
        problems, code, kind = _library.product(batch), _library.dtype_code(x), METRICS[metric]
        elements = native.cost_matrix_workspace(code, problems, n, m, d, kind, temperature_x, temperature_y, True)
        scratch = _library.workspace(elements * x.element_size())
        native.cost_matrix_bwd(
            code, address(x), address(y), cost.data_ptr(), grad_cost.data_ptr(), address(grad_x), address(grad_y),
            scratch.data_ptr(), problems, n, m, d, *_batch_strides(x, y, n, m, d), kind, temperature_x,
            temperature_y, torch.get_num_threads(),
        )  # fmt: skip
    return _sum_to(grad_x, x, need_x), _sum_to(grad_y, y, need_y)


def _cuda_call(x: Tensor, y: Tensor, cost: Tensor, metric: str, temperature_x: float, temperature_y: float):
    """What the CUDA half is told of the costs, and the workspace, which has to outlive the call."""
    batch, n, m, d = _sizes(x, y)
    code = _library.dtype_code(x)
    call = (
        _library.product(batch), n, m, d, *_batch_strides(x, y, n, m, d), METRICS[metric], temperature_x, temperature_y,
    )  # fmt: skip
    scratch = _library.cuda_workspace(x, _library.cuda.cost_matrix_workspace(code, (0, 0, 0, 0, *call)))
    return code, (address(x), address(y), address(cost), address(scratch), *call), scratch


def _fwd_cuda(x: Tensor, y: Tensor, metric: str, temperature_x: float, temperature_y: float) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    cost = _fwd_fake(x, y, metric, temperature_x, temperature_y)
    if cost.numel() == 0 or x.shape[-1] == 0:
        return cost.zero_()
    code, call, scratch = _cuda_call(x, y, cost, metric, temperature_x, temperature_y)
    _library.launch("cost_matrix", cost, "cost_matrix_fwd", code, call)
    return cost


def _bwd_cuda(
    x: Tensor, y: Tensor, cost: Tensor, grad_cost: Tensor, metric: str, temperature_x: float, temperature_y: float,
    need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, y, cost, grad_cost = (operand.contiguous() for operand in (x, y, cost, grad_cost))
    batch, n, m, d = _sizes(x, y)
    grad_x = x.new_empty((*batch, n, d) if need_x else (0,))
    grad_y = y.new_empty((*batch, m, d) if need_y else (0,))
    if cost.numel() == 0:
        grad_x.zero_()
        grad_y.zero_()
    elif grad_x.numel() or grad_y.numel():
        code, call, scratch = _cuda_call(x, y, cost, metric, temperature_x, temperature_y)
        grads = (address(grad) if grad.numel() else 0 for grad in (grad_x, grad_y))
        _library.launch("cost_matrix", cost, "cost_matrix_bwd", code, call, address(grad_cost), *grads)
    return _sum_to(grad_x, x, need_x), _sum_to(grad_y, y, need_y)


def _sum_to(grad: Tensor, operand: Tensor, needed: bool) -> Tensor:
    """Sum over the batch where one operand was shared by it."""
    if not needed or grad.dim() == operand.dim():
        return grad
    return grad.flatten(0, -3).sum(0)


_library.register(
    "cost_matrix_fwd(Tensor x, Tensor y, str metric, float temperature_x, float temperature_y) -> Tensor",
    _fwd_fake,
    _fwd_cpu,
    cuda=_fwd_cuda,
    triton="cost_matrix:cost_matrix_fwd",
    triton_fake=_fwd_fake_triton,
)
_library.register(
    "cost_matrix_bwd(Tensor x, Tensor y, Tensor cost, Tensor grad_cost, str metric, float temperature_x, "
    "float temperature_y, bool need_x, bool need_y) -> (Tensor, Tensor)",
    _bwd_fake,
    _bwd_cpu,
    cuda=_bwd_cuda,
    triton="cost_matrix:cost_matrix_bwd",
)
