"""``sinkd_value_and_grad``: softmax, L1 cost, Sinkhorn rows first, <P, C> and its gradient in one op
(``csrc/cpu/sinkd.cpp``, ``csrc/cuda/sinkd.cu``).

Value and gradients are multiplied by ``scale``. The gradients come with the value, for an incoming gradient of 1: the
backward of the loss only multiplies them by the one that comes. An L1 cost of softmax rows is at most 2; where
2 / epsilon leaves the range in which a float32 cost determines the plan to 1e-5, float32 input is solved in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._library import address, contiguous, dtype_code, native, product, workspace

WIDE_RANGE = 60.0  # largest 2 / epsilon at which float32 is solved in float32


def _fake(
    rows: Tensor, columns: Tensor, weights_rows: Tensor | None, weights_columns: Tensor | None,
    temperature_rows: float, temperature_columns: float, epsilon: float, num_iters: int, scale: float,
    need_rows: bool, need_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        rows.new_empty(rows.shape[:-2]),
        rows.new_empty(rows.shape if need_rows else (0,)),
        rows.new_empty(columns.shape if need_columns else (0,)),
    )


def _cpu(
    rows: Tensor, columns: Tensor, weights_rows: Tensor | None, weights_columns: Tensor | None,
    temperature_rows: float, temperature_columns: float, epsilon: float, num_iters: int, scale: float,
    need_rows: bool, need_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = rows.dtype
    if dtype == torch.float32 and epsilon * WIDE_RANGE < 2.0:
        rows, columns, weights_rows, weights_columns = (
            None if t is None else t.double() for t in (rows, columns, weights_rows, weights_columns)
        )
    rows, columns = rows.contiguous(), columns.contiguous()
    *batch, n, d = rows.shape
    problems = product(batch) if batch else 1
    transport_cost = rows.new_empty(batch)
    grad_rows = torch.empty_like(rows) if need_rows else rows.new_empty(0)
    grad_columns = torch.empty_like(columns) if need_columns else rows.new_empty(0)
    if problems:
        weights_rows, weights_columns = contiguous(weights_rows), contiguous(weights_columns)
        code = dtype_code(rows)
        call = (
            problems, n, columns.shape[-2], d, num_iters, temperature_rows, temperature_columns, epsilon, scale,
            torch.get_num_threads(), grad_rows.data_ptr(), grad_columns.data_ptr(),
        )  # fmt: skip
        scratch = workspace(native.sinkd_workspace(code, *call))  # a name: it must outlive the call
        native.sinkd_value_and_grad(
            code, rows.data_ptr(), columns.data_ptr(), address(weights_rows), address(weights_columns),
            scratch.data_ptr(), transport_cost.data_ptr(), *call,
        )  # fmt: skip
    if transport_cost.dtype is dtype:
        return transport_cost, grad_rows, grad_columns
    return transport_cost.to(dtype), grad_rows.to(dtype), grad_columns.to(dtype)


def _cuda(
    rows: Tensor, columns: Tensor, weights_rows: Tensor | None, weights_columns: Tensor | None,
    temperature_rows: float, temperature_columns: float, epsilon: float, num_iters: int, scale: float,
    need_rows: bool, need_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = rows.dtype
    if dtype == torch.float32 and epsilon * WIDE_RANGE < 2.0:
        rows, columns, weights_rows, weights_columns = (
            None if t is None else t.double() for t in (rows, columns, weights_rows, weights_columns)
        )
    operands = [contiguous(tensor) for tensor in (rows, columns, weights_rows, weights_columns)]
    rows, columns = operands[:2]
    *batch, n, d = rows.shape
    transport_cost = rows.new_empty(batch)
    grads = [rows.new_empty(t.shape if need else (0,)) for t, need in ((rows, need_rows), (columns, need_columns))]
    if transport_cost.numel():
        results = [address(transport_cost), *(address(grad) if grad.numel() else 0 for grad in grads)]
        call = (
            transport_cost.numel(), n, columns.shape[-2], d, num_iters, temperature_rows, temperature_columns, epsilon,
            scale,
        )  # fmt: skip
        code = dtype_code(rows)
        call = (*map(address, operands), 0, *results, *call)
        scratch = _library.cuda_workspace(rows, _library.cuda.sinkd_workspace(code, call, _library.place(rows)))
        call = (*call[:4], address(scratch), *call[5:])
        _library.launch("sinkd", rows, "sinkd_value_and_grad", code, call)
    return transport_cost.to(dtype), *(grad.to(dtype) for grad in grads)


_library.register(
    "sinkd_value_and_grad(Tensor rows, Tensor columns, Tensor? weights_rows, Tensor? weights_columns, "
    "float temperature_rows, float temperature_columns, float epsilon, int num_iters, float scale, "
    "bool need_rows, bool need_columns) -> (Tensor, Tensor, Tensor)",
    _fake,
    _cpu,
    cuda=_cuda,
    triton="sinkd:sinkd_value_and_grad",
)
