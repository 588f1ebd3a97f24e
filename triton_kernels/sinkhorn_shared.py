"""``sinkhorn_shared_fwd`` and ``_bwd`` by Triton (see ``ops/sinkhorn_shared.py``): one cost for a batch of marginals.

The kernels are those of ``sinkhorn``, with a batch stride of 0: a problem that fits in one program is solved by it,
its cost
coming from the cache; of larger ones each half-iteration is one launch for the batch. The gradient of the cost is
added up
over the problems in their order. History: as ``sinkhorn``'s, one row a problem, flat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.sinkhorn import KEEP, history_size
from . import _runtime
from .sinkhorn import Problems, differentiate, is_small, problems, solve

CHUNK_ENTRIES = 1 << 24  # of gradients of single problems in memory at a time


def _expanded(cost: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    return cost.expand((b if a is None else a).shape[0], *cost.shape)


def sinkhorn_shared_fwd(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    cost = _expanded(cost, a, b)
    batch, n, m = cost.shape
    values = [_runtime.empty((batch,), cost) for _ in range(2)]
    f, g = _runtime.empty((batch, n), cost), _runtime.empty((batch, m), cost)
    error, count = _runtime.empty((batch,), cost), _runtime.empty((batch,), cost, torch.int64)
    history = _runtime.empty((batch, history_size(n, m, num_iters, keep)), cost, torch.float64)
    if batch:
        given = problems(cost, a, b, initial_f, initial_g, epsilon, penalty_a, penalty_b, update_a_first)
        sides = (f, g) if update_a_first else (g, f)
        with _runtime.on_device(cost):
            solve(given, (*values, *sides, error, count, history), num_iters, tol, relaxation, keep)
    return *values, f, g, error, count, history


def sinkhorn_shared_bwd(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if gradient == "implicit":
        raise NotImplementedError("sinkhorn_shared_bwd: no implicit gradient; expand the cost and use sinkhorn_bwd")
    cost = _expanded(cost, a, b)
    batch, n, m = cost.shape
    if history.shape[-1] != history_size(n, m, num_iters, KEEP[gradient]):
        raise ValueError(f"history: expected that of a forward with keep={KEEP[gradient]}, got {tuple(history.shape)}")
    grad_cost = _runtime.empty((n, m) if need_cost else (0,), cost)
    grad_a = _runtime.empty((batch, n) if need_a else (0,), cost)
    grad_b = _runtime.empty((batch, m) if need_b else (0,), cost)
    grad_cost.zero_()
    chunk = max(1, batch)
    if need_cost and is_small(n, m, cost.dtype):
        chunk = max(1, CHUNK_ENTRIES // (n * m))
    tensors = (a, b, initial_f, initial_g, history, grad_transport_cost, grad_regularized_cost, grad_f, grad_g)
    with _runtime.on_device(cost):
        for first in range(0, batch, chunk):
            some = slice(first, first + chunk)
            part = [None if tensor is None else tensor[some].contiguous() for tensor in tensors]
            given = problems(cost[some], *part[:4], epsilon, penalty_a, penalty_b, update_a_first)
            sides = [grad[some] if grad.numel() else grad for grad in (grad_a, grad_b)]
            _differentiate(given, part[4], part[5:], grad_cost, sides, num_iters, gradient)
    return grad_cost, grad_a, grad_b


def _differentiate(batch: Problems, history, incoming, grad_cost, sides, num_iters: int, gradient: str) -> None:
    """Adds the cost's gradient of some of the problems to `grad_cost`; fills the others' in `sides`."""
    count, n, m = batch.sizes
    by_cost = grad_cost
    if grad_cost.numel():
        each = count if is_small(n, m, batch.cost.dtype) else 1  # the kernel for tiles adds them up
        by_cost = _runtime.empty((each, *grad_cost.shape), grad_cost)
    differentiate(batch, history, tuple(incoming), (by_cost, *sides), num_iters, gradient)
    if grad_cost.numel():
        grad_cost.add_(by_cost.sum(0))


def aot_cases() -> list[_runtime.AotCase]:
    """None: the kernels are those of ``sinkhorn``."""
    return []
