"""``sinkhorn_points_fwd``, ``_bwd``, ``_apply``: Sinkhorn between points (kernels: ``csrc/cpu/sinkhorn_points.cpp``).

As in ``ops/sinkhorn.py`` the kernels update rows first; columns first is the problem with x and y exchanged. ``stored``
lets the kernel exp(-C / epsilon) stay in memory during a call; it changes nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._library import address, contiguous, native
from .cost_matrix import METRICS, _batch_strides, _sizes, _sum_to
from .sinkhorn import GRADIENTS, _kept, history_size


def _fwd_fake(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, metric: str, epsilon: float, num_iters: int,
    update_a_first: bool, keep: int, stored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, n, m, _ = _sizes(x, y)
    scalars = [x.new_empty(batch) for _ in range(3)]
    history = x.new_empty((*batch, history_size(n, m, num_iters, keep)), dtype=torch.float64)
    return scalars[0], scalars[1], x.new_empty((*batch, n)), x.new_empty((*batch, m)), scalars[2], history


def _fwd_cpu(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, metric: str, epsilon: float, num_iters: int,
    update_a_first: bool, keep: int, stored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _fwd_fake(x, y, a, b, metric, epsilon, num_iters, update_a_first, keep, stored)
    transport_cost, regularized_cost, f, g, marginal_error, history = outputs
    if not update_a_first:
        x, y, a, b, f, g = y, x, b, a, g, f
    x, y, a, b = x.contiguous(), y.contiguous(), contiguous(a), contiguous(b)
    batch, n, m, d = _sizes(x, y)
    problems, code, threads = _library.product(batch), _library.dtype_code(x), torch.get_num_threads()
    if problems == 0:
        return outputs
    kind = METRICS[metric]
    num_bytes = native.sinkhorn_points_workspace(
        code, problems, n, m, d, kind, stored, num_iters, threads, False, 0, False, False
    )
    scratch = _library.workspace(num_bytes)
    native.sinkhorn_points_fwd(
        code, address(x), address(y), address(a), address(b), address(history), scratch.data_ptr(), problems, n, m, d,
        *_batch_strides(x, y, n, m, d), kind, stored, num_iters, _kept(history, n, m), epsilon, threads,
        address(transport_cost), address(regularized_cost), address(f), address(g), address(marginal_error),
    )  # fmt: skip
    return outputs


def _bwd_fake(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, history: Tensor, grad_transport_cost: Tensor | None,
    grad_regularized_cost: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None, metric: str, epsilon: float,
    num_iters: int, update_a_first: bool, gradient: str, stored: bool, need_x: bool, need_y: bool, need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, n, m, _ = _sizes(x, y)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        y.new_empty(y.shape if need_y else (0,)),
        x.new_empty((*batch, n) if need_a else (0,)),
        x.new_empty((*batch, m) if need_b else (0,)),
    )


def _bwd_cpu(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, history: Tensor, grad_transport_cost: Tensor | None,
    grad_regularized_cost: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None, metric: str, epsilon: float,
    num_iters: int, update_a_first: bool, gradient: str, stored: bool, need_x: bool, need_y: bool, need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not update_a_first:
        x, y, a, b, grad_f, grad_g = y, x, b, a, grad_g, grad_f
        need_x, need_y, need_a, need_b = need_y, need_x, need_b, need_a
    x, y, a, b, history = x.contiguous(), y.contiguous(), contiguous(a), contiguous(b), history.contiguous()
    incoming = [contiguous(g) for g in (grad_transport_cost, grad_regularized_cost, grad_f, grad_g)]
    batch, n, m, d = _sizes(x, y)
    problems, code, threads = _library.product(batch), _library.dtype_code(x), torch.get_num_threads()
    grad_x = x.new_empty((*batch, n, d) if need_x else (0,))
    grad_y = y.new_empty((*batch, m, d) if need_y else (0,))
    grad_a = x.new_empty((*batch, n) if need_a else (0,))
    grad_b = x.new_empty((*batch, m) if need_b else (0,))
    if problems:
        kind, mode = METRICS[metric], GRADIENTS[gradient]
        num_bytes = native.sinkhorn_points_workspace(
            code, problems, n, m, d, kind, stored, num_iters, threads, True, mode, need_x, need_y
        )
        scratch = _library.workspace(num_bytes)
        native.sinkhorn_points_bwd(
            code, address(x), address(y), address(a), address(b), history.data_ptr(), scratch.data_ptr(), problems, n,
            m, d, *_batch_strides(x, y, n, m, d), kind, stored, num_iters, _kept(history, n, m), epsilon, threads,
            mode, *(address(g) for g in incoming), need_x, need_y, address(grad_x), address(grad_y), address(grad_a),
            address(grad_b),
        )  # fmt: skip
    grads = _sum_to(grad_x, x, need_x), _sum_to(grad_y, y, need_y), grad_a, grad_b
    return grads if update_a_first else (grads[1], grads[0], grads[3], grads[2])


def _apply_fake(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, metric: str, epsilon: float, transpose: bool
) -> Tensor:
    batch, n, m, _ = _sizes(x, y)
    return x.new_empty((*batch, m if transpose else n, v.shape[-1]))


def _apply_cpu(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, v: Tensor, metric: str, epsilon: float, transpose: bool
) -> Tensor:
    out = _apply_fake(x, y, f, g, v, metric, epsilon, transpose)
    if transpose:
        x, y, f, g = y, x, g, f
    x, y, f, g, v = (tensor.contiguous() for tensor in (x, y, f, g, v))
    batch, n, m, d = _sizes(x, y)
    problems, code, threads = _library.product(batch), _library.dtype_code(x), torch.get_num_threads()
    if out.numel() == 0:
        return out
    columns, kind = v.shape[-1], METRICS[metric]
    scratch = _library.workspace(native.plan_apply_workspace(code, n, m, d, columns, kind, threads))
    native.plan_apply(
        code, address(x), address(y), address(f), address(g), address(v), out.data_ptr(), scratch.data_ptr(), problems,
        n, m, d, columns, *_batch_strides(x, y, n, m, d), kind, epsilon, threads,
    )  # fmt: skip
    return out


_library.register(
    "sinkhorn_points_fwd(Tensor x, Tensor y, Tensor? a, Tensor? b, str metric, float epsilon, int num_iters, "
    "bool update_a_first, int keep, bool stored) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_cpu,
)
_library.register(
    "sinkhorn_points_bwd(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor history, Tensor? grad_transport_cost, "
    "Tensor? grad_regularized_cost, Tensor? grad_f, Tensor? grad_g, str metric, float epsilon, int num_iters, "
    "bool update_a_first, str gradient, bool stored, bool need_x, bool need_y, bool need_a, bool need_b) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_cpu,
)
_library.register(
    "sinkhorn_points_apply(Tensor x, Tensor y, Tensor f, Tensor g, Tensor v, str metric, float epsilon, "
    "bool transpose) -> Tensor",
    _apply_fake,
    _apply_cpu,
)
