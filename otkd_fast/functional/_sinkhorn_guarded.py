"""Sinkhorn with guards in the denominators of its scalings, which released losses have; for the losses."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .._dispatch import resolve
from . import _sinkhorn_function as compiled
from ._sinkhorn_options import Options
from .sinkhorn_result import SinkhornResult


def sinkhorn_guarded(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    guard: tuple[float, float],
    epsilon: float,
    num_iters: int,
    update_first: str = "a",
    gradient: str = "unroll",
    backend: str | None = None,
) -> SinkhornResult:
    """One cost (n, m) for a batch of marginals a (B, n), b (B, m), float32 or float64 alike; nothing is validated.

    The loop is that of :func:`otkd_fast.reference.sinkhorn_guarded`: u = a / (K v + guard_a), v = b / (K^T u + guard_b)
    with K = exp(-cost / epsilon), from u = 1, v = 1. Starting at u = s is the same as starting at u = 1 with the guards
    guard_a / s and guard_b s. The CPU's kernels run it; with the other backends the reference does.
    """
    backend = resolve("sinkhorn_shared", cost.device, backend, "guards")
    if backend == "reference":
        options = {"epsilon": epsilon, "num_iters": num_iters, "update_first": update_first, "gradient": gradient}
        outputs = reference.sinkhorn_guarded(cost, a, b, guard=guard, **options)
    else:
        options = Options(epsilon, num_iters, update_a_first=update_first == "a")
        outputs = compiled.solve("shared", backend, cost, a, b, None, None, options, gradient, guard)
    return SinkhornResult(*outputs, (cost,), epsilon)
