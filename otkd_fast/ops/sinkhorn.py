"""``sinkhorn_fwd`` and ``sinkhorn_bwd``: Sinkhorn on a dense cost (kernels: ``csrc/cpu/sinkhorn.cpp``).

The kernels update rows first. Columns first is the transposed problem: cost, marginals and potentials change places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._library import address, contiguous, native

GRADIENTS = {"unroll": 0, "envelope": 1, "detach": 2}
KEEP_NOTHING, KEEP_LAST, KEEP_ALL = 0, 1, 2


def history_size(n: int, m: int, num_iters: int, keep: int) -> int:
    """Doubles of history a problem: how it was solved, then the scalings of the iterations kept."""
    kept = {KEEP_NOTHING: 0, KEEP_LAST: 1, KEEP_ALL: num_iters}[keep]
    return 1 + kept * (n + m) if kept else 0


def _kept(history: Tensor, n: int, m: int) -> int:
    return (history.shape[-1] - 1) // (n + m) if history.shape[-1] else 0


def _fwd_fake(
    cost: Tensor, a: Tensor | None, b: Tensor | None, epsilon: float, num_iters: int, update_a_first: bool, keep: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *batch, n, m = cost.shape
    scalars = [cost.new_empty(batch) for _ in range(3)]
    history = cost.new_empty((*batch, history_size(n, m, num_iters, keep)), dtype=torch.float64)
    return scalars[0], scalars[1], cost.new_empty((*batch, n)), cost.new_empty((*batch, m)), scalars[2], history


def _fwd_cpu(
    cost: Tensor, a: Tensor | None, b: Tensor | None, epsilon: float, num_iters: int, update_a_first: bool, keep: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _fwd_fake(cost, a, b, epsilon, num_iters, update_a_first, keep)
    transport_cost, regularized_cost, f, g, marginal_error, history = outputs
    if not update_a_first:
        cost, a, b, f, g = cost.mT, b, a, g, f
    cost, a, b = cost.contiguous(), contiguous(a), contiguous(b)
    *batch, n, m = cost.shape
    problems, code, threads = _library.product(batch), _library.dtype_code(cost), torch.get_num_threads()
    if problems == 0:
        return outputs
    scratch = _library.workspace(native.sinkhorn_workspace(code, problems, n, m, num_iters, threads, False))
    native.sinkhorn_fwd(
        code, cost.data_ptr(), address(a), address(b), address(history), scratch.data_ptr(), problems, n, m, num_iters,
        _kept(history, n, m), epsilon, threads, address(transport_cost), address(regularized_cost), address(f),
        address(g), address(marginal_error),
    )  # fmt: skip
    return outputs


def _bwd_fake(
    cost: Tensor, a: Tensor | None, b: Tensor | None, history: Tensor, grad_transport_cost: Tensor | None,
    grad_regularized_cost: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None, epsilon: float,
    num_iters: int, update_a_first: bool, gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *batch, n, m = cost.shape
    return (
        cost.new_empty(cost.shape if need_cost else (0,)),
        cost.new_empty((*batch, n) if need_a else (0,)),
        cost.new_empty((*batch, m) if need_b else (0,)),
    )


def _bwd_cpu(
    cost: Tensor, a: Tensor | None, b: Tensor | None, history: Tensor, grad_transport_cost: Tensor | None,
    grad_regularized_cost: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None, epsilon: float,
    num_iters: int, update_a_first: bool, gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not update_a_first:
        cost, a, b, grad_f, grad_g, need_a, need_b = cost.mT, b, a, grad_g, grad_f, need_b, need_a
    cost, a, b, history = cost.contiguous(), contiguous(a), contiguous(b), history.contiguous()
    incoming = [contiguous(g) for g in (grad_transport_cost, grad_regularized_cost, grad_f, grad_g)]
    *batch, n, m = cost.shape
    problems, code, threads = _library.product(batch), _library.dtype_code(cost), torch.get_num_threads()
    grads = (
        cost.new_empty(cost.shape if need_cost else (0,)),
        cost.new_empty((*batch, n) if need_a else (0,)),
        cost.new_empty((*batch, m) if need_b else (0,)),
    )
    if problems:
        scratch = _library.workspace(native.sinkhorn_workspace(code, problems, n, m, num_iters, threads, True))
        native.sinkhorn_bwd(
            code, cost.data_ptr(), address(a), address(b), history.data_ptr(), scratch.data_ptr(), problems, n, m,
            num_iters, _kept(history, n, m), epsilon, threads, GRADIENTS[gradient], *(address(g) for g in incoming),
            *(address(grad) for grad in grads),
        )  # fmt: skip
    if update_a_first:
        return grads
    grad_cost, grad_b, grad_a = grads
    return grad_cost.mT.contiguous() if need_cost else grad_cost, grad_a, grad_b


_library.register(
    "sinkhorn_fwd(Tensor cost, Tensor? a, Tensor? b, float epsilon, int num_iters, bool update_a_first, int keep) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_cpu,
)
_library.register(
    "sinkhorn_bwd(Tensor cost, Tensor? a, Tensor? b, Tensor history, Tensor? grad_transport_cost, "
    "Tensor? grad_regularized_cost, Tensor? grad_f, Tensor? grad_g, float epsilon, int num_iters, "
    "bool update_a_first, str gradient, bool need_cost, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_cpu,
)
