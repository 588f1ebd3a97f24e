"""ipot: (nearly) exact optimal transport by proximal points."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional._validate import HALF_DTYPES, check_same_kind, check_tensor, positive_float, positive_int

__all__ = ["ipot"]


def ipot(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    beta: float = 0.5,
    num_iters: int = 50,
    inner_iters: int = 1,
) -> Tensor:
    r"""Transport plan by the inexact proximal point method.

    From ``T = 1`` and ``sigma = 1/m``, each of `num_iters` times

        Q = exp(-C / beta) T,  inner_iters times: delta = a / (Q sigma), sigma = b / (Q^T delta),
        T = diag(delta) Q diag(sigma)

    After k iterations T is a plan of the entropic problem with ``epsilon = beta / k`` up to the inexact scalings: it
    tends to an exact optimal plan without a small epsilon. Computed in the log domain; differentiable (through all
    iterations): detach `cost` for a constant plan.

    Args:
        cost: (..., n, m), n, m >= 1, float16, bfloat16, float32 or float64, finite.
        a: (..., n) or (n,) masses >= 0; None: 1/n each.
        b: (..., m) or (m,) masses >= 0 of the same total; None: 1/m each.
        beta: > 0, weight of the proximal term, in units of the cost.
        num_iters, inner_iters: >= 1.

    Returns:
        (..., n, m) in the dtype of `cost`; float32 for half-precision inputs. Its column sums are `b`, its row sums
        approximately `a`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not match, a number out of its range.

    Source: Xie, Wang, Wang and Zha, A Fast Proximal Point Method for Computing Exact Wasserstein Distance (UAI 2019).

    >>> import torch
    >>> ipot(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).round(decimals=4)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    beta = positive_float("beta", beta)
    num_iters, inner_iters = positive_int("num_iters", num_iters), positive_int("inner_iters", inner_iters)
    check_tensor("cost", cost, 2, "(..., n, m)")
    n, m = cost.shape[-2:]
    if n == 0 or m == 0:
        raise ValueError(f"cost: expected at least one row and one column, got shape {tuple(cost.shape)}")
    for name, mass, size in (("a", a, n), ("b", b, m)):
        if mass is None:
            continue
        check_tensor(name, mass, 1, f"(..., {'n' if name == 'a' else 'm'})")
        check_same_kind(name, mass, "cost", cost)
        if mass.shape not in (cost.shape[:-2] + (size,), (size,)):
            raise ValueError(f"{name}: expected shape {(*cost.shape[:-2], size)} or ({size},), got {tuple(mass.shape)}")
    if cost.dtype in HALF_DTYPES:
        cost, a, b = (None if x is None else x.float() for x in (cost, a, b))
    a = cost.new_full((n,), 1 / n) if a is None else a
    b = cost.new_full((m,), 1 / m) if b is None else b
    log_a, closed_rows = (x.unsqueeze(-1) for x in _log_masses(a))  # (..., n, 1)
    log_b, closed_columns = (x.unsqueeze(-2) for x in _log_masses(b))  # (..., 1, m)
    step = -cost / beta
    log_plan = torch.zeros_like(cost)
    log_sigma = -cost.new_full((), m).log()
    for _ in range(num_iters):
        log_kernel = step + log_plan
        for _ in range(inner_iters):
            log_delta = log_a - (log_kernel + (log_sigma + closed_columns)).logsumexp(-1, keepdim=True)
            log_sigma = log_b - (log_kernel + (log_delta + closed_rows)).logsumexp(-2, keepdim=True)
        log_plan = log_kernel + log_delta + log_sigma
    return (log_plan + closed_rows + closed_columns).exp()


def _log_masses(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms, 0 where there is no mass, and what closes those entries to the other side: 0 or -inf.

    They are closed in the sums only: their own scalings stay finite, and so does every gradient.
    """
    served = mass > 0
    return torch.where(served, mass, 1).log(), torch.zeros_like(mass).masked_fill(~served, -torch.inf)
