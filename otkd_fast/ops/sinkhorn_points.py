"""Sinkhorn between points: ``sinkhorn_points_fwd`` and ``_bwd``, and the product of the plan with a matrix
(..., m, k) -> (..., n, k), ``sinkhorn_points_apply``, with ``_apply_bwd`` for its gradient by the points
(kernels: ``csrc/cpu/sinkhorn_points.cpp``, ``csrc/cuda/sinkhorn_points.cu``, ``csrc/cuda/plan_apply.cu``).

As in ``ops/sinkhorn.py`` the kernels update rows first; columns first is the problem with x and y exchanged. ``stored``
lets the kernel exp(-C / epsilon) stay in memory during a call; it changes nothing else. The kernels for GPUs never
store it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _library
from ._library import address, contiguous, native
from .cost_matrix import METRICS
from .sinkhorn import _FORWARD, GRADIENTS, KEEP, history_size


def _sizes(x: Tensor, y: Tensor) -> tuple[list[int], int, int, int]:
    """Batch axes, n, m and d of x (*B, n, d) and y (*B, m, d)."""
    *batch, n, d = x.shape
    return batch, n, y.shape[-2], d


def _points(x: Tensor, y: Tensor, metric: str) -> tuple:
    """What the native module is told of contiguous points."""
    return address(x), address(y), x.shape[-1], METRICS[metric]


def _problems(
    x: Tensor, y: Tensor, operands: tuple[Tensor | None, ...], history: Tensor, num_iters: int, keep: int,
    options: tuple[float, ...],
) -> tuple:  # fmt: skip
    """As in ``ops/sinkhorn.py`` but for the workspace; operands: a, b, initial_f, initial_g, all contiguous."""
    batch, n, m, _ = _sizes(x, y)
    return (
        _library.dtype_code(x), 0, *(address(tensor) for tensor in operands), address(history), 0,
        _library.product(batch), n, m, num_iters, keep, *options, torch.get_num_threads(),
    )  # fmt: skip


def _with_workspace(
    points: tuple, problems: tuple, stored: bool, gradient: int, need_x: bool, need_y: bool
) -> tuple[tuple, Tensor]:
    """The problems with a workspace, and that, which has to outlive the call."""
    num_bytes = native.sinkhorn_points_workspace(points, problems, stored, gradient, need_x, need_y)
    scratch = _library.workspace(num_bytes)
    return (*problems[:7], scratch.data_ptr(), *problems[8:]), scratch


def _fwd_fake(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    metric: str, epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int, stored: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, n, m, _ = _sizes(x, y)
    transport_cost, regularized_cost, marginal_error = (x.new_empty(batch) for _ in range(3))
    history = x.new_empty((*batch, history_size(n, m, num_iters, keep)), dtype=torch.float64)
    return (
        transport_cost, regularized_cost, x.new_empty((*batch, n)), x.new_empty((*batch, m)), marginal_error,
        x.new_empty(batch, dtype=torch.int64), history,
    )  # fmt: skip


def _forward(
    solve: Callable,
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    metric: str, epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int, stored: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What is common to the backends; `solve` calls the kernel."""
    outputs = _fwd_fake(
        x, y, a, b, initial_f, initial_g, metric, epsilon, num_iters, tol, relaxation, penalty_a, penalty_b,
        update_a_first, keep, stored,
    )  # fmt: skip
    transport_cost, regularized_cost, f, g, marginal_error, iterations, history = outputs
    if not update_a_first:
        x, y, a, b, initial_f, initial_g, f, g = y, x, b, a, initial_g, initial_f, g, f
        penalty_a, penalty_b = penalty_b, penalty_a
    if marginal_error.numel():
        x, y, *operands = (contiguous(tensor) for tensor in (x, y, a, b, initial_f, initial_g))
        points, options = _points(x, y, metric), (epsilon, tol, relaxation, penalty_a, penalty_b)
        problems = _problems(x, y, operands, history, num_iters, keep, options)
        results = (transport_cost, regularized_cost, f, g, marginal_error, iterations)
        solve(x, points, problems, stored, tuple(address(tensor) for tensor in results))
    return outputs


def _solve_cpu(x: Tensor, points: tuple, problems: tuple, stored: bool, results: tuple) -> None:
    problems, scratch = _with_workspace(points, problems, stored, _FORWARD, False, False)
    native.sinkhorn_points_fwd(points, problems, stored, results)


def _solve_cuda(x: Tensor, points: tuple, problems: tuple, stored: bool, results: tuple) -> None:
    problems, scratch = _on_device(x, points, problems, _FORWARD)
    _library.launch("sinkhorn_points", x, "sinkhorn_points_fwd", points, problems, results)


def _fwd_cpu(*arguments) -> tuple[Tensor, ...]:
    return _forward(_solve_cpu, *arguments)


def _fwd_cuda(*arguments) -> tuple[Tensor, ...]:
    return _forward(_solve_cuda, *arguments)


def _bwd_fake(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, metric: str, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float,
    update_a_first: bool, gradient: str, stored: bool, need_x: bool, need_y: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, n, m, _ = _sizes(x, y)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        y.new_empty(y.shape if need_y else (0,)),
        x.new_empty((*batch, n) if need_a else (0,)),
        x.new_empty((*batch, m) if need_b else (0,)),
    )


def _backward(
    adjoint: Callable,
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, metric: str, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float,
    update_a_first: bool, gradient: str, stored: bool, need_x: bool, need_y: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What is common to the backends; `adjoint` calls the kernel."""
    if not update_a_first:
        x, y, a, b, initial_f, initial_g, grad_f, grad_g = y, x, b, a, initial_g, initial_f, grad_g, grad_f
        penalty_a, penalty_b = penalty_b, penalty_a
        need_x, need_y, need_a, need_b = need_y, need_x, need_b, need_a
    batch, n, m, d = _sizes(x, y)
    if history.shape[-1] != history_size(n, m, num_iters, KEEP[gradient]):
        raise ValueError(f"history: expected that of a forward with keep={KEEP[gradient]}, got {tuple(history.shape)}")
    grad_x = x.new_empty((*batch, n, d) if need_x else (0,))
    grad_y = y.new_empty((*batch, m, d) if need_y else (0,))
    grad_a = x.new_empty((*batch, n) if need_a else (0,))
    grad_b = x.new_empty((*batch, m) if need_b else (0,))
    if _library.product(batch):
        history = history.contiguous()
        x, y, *operands = (contiguous(tensor) for tensor in (x, y, a, b, initial_f, initial_g))
        incoming = [contiguous(grad) for grad in (grad_transport_cost, grad_regularized_cost, grad_f, grad_g)]
        points, options, mode = _points(x, y, metric), (epsilon, 0.0, 1.0, penalty_a, penalty_b), GRADIENTS[gradient]
        problems = _problems(x, y, operands, history, num_iters, KEEP[gradient], options)
        adjoint(x, points, problems, stored, mode, incoming, (grad_x, grad_y, grad_a, grad_b), need_x, need_y)
    return (grad_x, grad_y, grad_a, grad_b) if update_a_first else (grad_y, grad_x, grad_b, grad_a)


def _adjoint_cpu(
    x: Tensor, points: tuple, problems: tuple, stored: bool, mode: int, incoming: list, grads: tuple, need_x: bool,
    need_y: bool,
) -> None:  # fmt: skip
    problems, scratch = _with_workspace(points, problems, stored, mode, need_x, need_y)
    tensors = tuple(address(tensor) for tensor in (*incoming, *grads))
    native.sinkhorn_points_bwd(points, problems, stored, mode, need_x, need_y, tensors)


def _adjoint_cuda(
    x: Tensor, points: tuple, problems: tuple, stored: bool, mode: int, incoming: list, grads: tuple, need_x: bool,
    need_y: bool,
) -> None:  # fmt: skip
    if mode == GRADIENTS["implicit"]:
        raise NotImplementedError("sinkhorn_points_bwd: no implicit gradient on CUDA; the reference computes it")
    problems, scratch = _on_device(x, points, problems, mode)
    results = (address(grad) if grad.numel() else 0 for grad in grads)
    _library.launch(
        "sinkhorn_points", x, "sinkhorn_points_bwd", points, problems, mode, (*map(address, incoming), *results)
    )


def _bwd_cpu(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(_adjoint_cpu, *arguments)


def _bwd_cuda(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(_adjoint_cuda, *arguments)


def _apply_fake(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, metric: str, epsilon: float, transpose: bool
) -> Tensor:
    batch, n, m, _ = _sizes(x, y)
    return x.new_empty((*batch, m if transpose else n, v.shape[-1]))


def _products(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, out: Tensor | None, metric: str, epsilon: float,
    backward: bool = False, need_x: bool = False, need_y: bool = False,
) -> tuple[tuple, tuple, Tensor]:  # fmt: skip
    """What the native module is told of the contiguous operands of P v, and the workspace, to outlive the call."""
    batch, n, m, _ = _sizes(x, y)
    points = _points(x, y, metric)
    head = (_library.dtype_code(x), *(address(tensor) for tensor in (f, g, v, out)))
    sizes = (_library.product(batch), n, m, v.shape[-1], epsilon, torch.get_num_threads())
    scratch = _library.workspace(native.plan_apply_workspace(points, (*head, 0, *sizes), backward, need_x, need_y))
    return points, (*head, scratch.data_ptr(), *sizes), scratch


def _apply_cpu(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, metric: str, epsilon: float, transpose: bool
) -> Tensor:
    out = _apply_fake(x, y, f, g, v, metric, epsilon, transpose)
    if transpose:
        x, y, f, g = y, x, g, f
    if out.numel():
        x, y, f, g, v = (tensor.contiguous() for tensor in (x, y, f, g, v))
        points, products, scratch = _products(x, y, f, g, v, out, metric, epsilon)
        native.plan_apply(points, products)
    return out


def _apply_bwd_fake(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, grad_out: Tensor, metric: str, epsilon: float,
    transpose: bool, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))


def _apply_bwd_cpu(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, grad_out: Tensor, metric: str, epsilon: float,
    transpose: bool, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if transpose:
        x, y, f, g, need_x, need_y = y, x, g, f, need_y, need_x
    batch, n, m, d = _sizes(x, y)
    grad_x = x.new_zeros((*batch, n, d) if need_x else (0,))
    grad_y = y.new_zeros((*batch, m, d) if need_y else (0,))
    if _library.product(batch) and v.shape[-1] and (need_x or need_y):
        x, y, f, g, v, grad_out = (tensor.contiguous() for tensor in (x, y, f, g, v, grad_out))
        points, products, scratch = _products(x, y, f, g, v, None, metric, epsilon, True, need_x, need_y)
        native.plan_apply_bwd(points, products, need_x, need_y, address(grad_out), address(grad_x), address(grad_y))
    return (grad_y, grad_x) if transpose else (grad_x, grad_y)


def _on_device(like: Tensor, points: tuple, problems: tuple, gradient: int) -> tuple[tuple, Tensor]:
    """The problems with a workspace on the device, and that, which has to outlive the call."""
    num_bytes = _library.cuda.sinkhorn_points_workspace(points, problems, gradient)
    scratch = _library.cuda_workspace(like, num_bytes)
    return (*problems[:7], address(scratch), *problems[8:]), scratch


def _products_on_device(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, out: Tensor | None, metric: str, epsilon: float
) -> tuple[tuple, tuple, Tensor]:  # fmt: skip
    """As `_products`, for the CUDA half."""
    batch, n, m, _ = _sizes(x, y)
    points = _points(x, y, metric)
    head = (_library.dtype_code(x), *(address(tensor) for tensor in (f, g, v, out)))
    sizes = (_library.product(batch), n, m, v.shape[-1], epsilon, 1)
    scratch = _library.cuda_workspace(x, _library.cuda.plan_apply_workspace(points, (*head, 0, *sizes)))
    return points, (*head, address(scratch), *sizes), scratch


def _apply_cuda(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, metric: str, epsilon: float, transpose: bool
) -> Tensor:
    out = _apply_fake(x, y, f, g, v, metric, epsilon, transpose)
    if transpose:
        x, y, f, g = y, x, g, f
    if out.numel():
        x, y, f, g, v = (tensor.contiguous() for tensor in (x, y, f, g, v))
        points, products, scratch = _products_on_device(x, y, f, g, v, out, metric, epsilon)
        _library.launch("plan_apply", x, "plan_apply", points, products)
    return out


def _apply_bwd_cuda(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, grad_out: Tensor, metric: str, epsilon: float,
    transpose: bool, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not v.shape[-1]:
        return x.new_zeros(x.shape if need_x else (0,)), x.new_zeros(y.shape if need_y else (0,))
    grads = _apply_bwd_fake(x, y, f, g, v, grad_out, metric, epsilon, transpose, need_x, need_y)
    grad_x, grad_y = grads
    if transpose:
        x, y, f, g, grad_x, grad_y = y, x, g, f, grad_y, grad_x
    if grad_x.numel() or grad_y.numel():
        x, y, f, g, v, grad_out = (tensor.contiguous() for tensor in (x, y, f, g, v, grad_out))
        points, products, scratch = _products_on_device(x, y, f, g, v, None, metric, epsilon)
        results = (address(grad) if grad.numel() else 0 for grad in (grad_x, grad_y))
        _library.launch("plan_apply", x, "plan_apply_bwd", points, products, address(grad_out), *results)
    return grads


_library.register(
    "sinkhorn_points_fwd(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor? initial_f, Tensor? initial_g, str metric, "
    "float epsilon, int num_iters, float tol, float relaxation, float penalty_a, float penalty_b, "
    "bool update_a_first, int keep, bool stored) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_cpu,
    cuda=_fwd_cuda,
    triton="sinkhorn_points:sinkhorn_points_fwd",
)
_library.register(
    "sinkhorn_points_bwd(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor? initial_f, Tensor? initial_g, "
    "Tensor history, Tensor? grad_transport_cost, Tensor? grad_regularized_cost, Tensor? grad_f, Tensor? grad_g, "
    "str metric, float epsilon, int num_iters, float penalty_a, float penalty_b, bool update_a_first, str gradient, "
    "bool stored, bool need_x, bool need_y, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_cpu,
    cuda=_bwd_cuda,
    triton="sinkhorn_points:sinkhorn_points_bwd",
)
_library.register(
    "sinkhorn_points_apply(Tensor x, Tensor y, Tensor f, Tensor g, Tensor v, str metric, float epsilon, "
    "bool transpose) -> Tensor",
    _apply_fake,
    _apply_cpu,
    cuda=_apply_cuda,
    triton="sinkhorn_points:sinkhorn_points_apply",
)
_library.register(
    "sinkhorn_points_apply_bwd(Tensor x, Tensor y, Tensor f, Tensor g, Tensor v, Tensor grad_out, str metric, "
    "float epsilon, bool transpose, bool need_x, bool need_y) -> (Tensor, Tensor)",
    _apply_bwd_fake,
    _apply_bwd_cpu,
    cuda=_apply_bwd_cuda,
    triton="sinkhorn_points:sinkhorn_points_apply_bwd",
)
