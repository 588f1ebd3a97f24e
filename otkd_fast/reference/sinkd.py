"""SinKD in plain differentiable PyTorch: the fused batch-wise operator, and every form of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .cost_matrix import cost_matrix
from .sinkhorn import sinkhorn

# Above this largest exponent (costs of two probability rows are at most 2) float32 potentials lose the plan: float64
# inside.
MAX_FLOAT32_EXPONENT = 60.0


def sinkd_transport_cost(
    rows: Tensor,
    columns: Tensor,
    weights_rows: Tensor | None = None,
    weights_columns: Tensor | None = None,
    *,
    temperature_rows: float,
    temperature_columns: float,
    epsilon: float,
    num_iters: int,
) -> Tensor:
    """<P, C> (*B,) of the Sinkhorn plan (mass 1, rows updated first) for the L1 cost between softmaxed rows.

    rows (*B, n, d) and columns (*B, m, d) are logits, softmax(z / temperature) is taken; temperature 0.0 takes them
    as they are. weights_rows (*B, n), weights_columns (*B, m): masses, None is uniform. Result in rows' dtype;
    float32 problems with 2 / epsilon > 60 are computed in float64. Differentiable by autograd through the unrolled
    iterations, any number of times.
    """
    dtype = rows.dtype
    if dtype == torch.float32 and 2.0 / epsilon > MAX_FLOAT32_EXPONENT:
        rows, columns = rows.double(), columns.double()
        weights_rows, weights_columns = (w if w is None else w.double() for w in (weights_rows, weights_columns))
    p = torch.softmax(rows / temperature_rows, dim=-1) if temperature_rows else rows  # (*B, n, d)
    q = torch.softmax(columns / temperature_columns, dim=-1) if temperature_columns else columns  # (*B, m, d)
    cost = cost_matrix(p, q, metric="l1")  # (*B, n, m)
    result = sinkhorn(cost, weights_rows, weights_columns, epsilon=epsilon, num_iters=num_iters)
    return result.transport_cost.to(dtype)


def sinkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    num_iters: int = 20,
    form: str = "batch",
    variant: str = "paper",
    solver: str = "sinkhorn",
    reduction: str = "sum",
) -> Tensor:
    """The loss of :func:`otkd_fast.losses.sinkd`, written for reading: masked rows are removed, samples are looped
    over.

    student (b, d) or (b,) for regression; teacher the same or labels (b,); mask bool (b,). Nothing is validated.
    """
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    kept = student.shape[0]
    if kept == 0:
        return student.sum()
    if form == "regression":
        s, t = student.reshape(-1, 1), teacher.reshape(-1, 1)
    else:
        s = torch.softmax(student / temperature, dim=-1)
        one_hot = not teacher.is_floating_point()
        t = (
            torch.nn.functional.one_hot(teacher, student.shape[1]).to(s)
            if one_hot
            else torch.softmax(teacher / temperature, dim=-1)
        )
    total = _FORMS[form](s, t, epsilon, num_iters, variant, solver)
    return total if reduction == "sum" else total / kept


def _solve(cost: Tensor, a: Tensor | None, b: Tensor | None, epsilon: float, num_iters: int) -> Tensor:
    return sinkhorn(cost, a, b, epsilon=epsilon, num_iters=num_iters).transport_cost


def _batch(s: Tensor, t: Tensor, epsilon: float, num_iters: int, variant: str, solver: str) -> Tensor:
    b = s.shape[0]
    if variant == "released":
        return 0.001 * b * _solve(cost_matrix(s, t, metric="l1"), None, None, epsilon, num_iters)
    return b * _solve(cost_matrix(t, s, metric="l1"), None, None, epsilon, num_iters)


def _sample(s: Tensor, t: Tensor, epsilon: float, num_iters: int, variant: str, solver: str) -> Tensor:
    total = s.new_zeros(())
    for s_i, t_i in zip(s, t, strict=True):
        if variant == "released":
            total = total + 0.001 * (s_i - t_i).abs().sum()
        else:
            total = total + _solve((s_i[:, None] - t_i[None, :]).abs(), s_i, t_i, epsilon, num_iters)
    return total


def _line(s: Tensor, t: Tensor, epsilon: float, num_iters: int, solver: str) -> Tensor:
    """s (n,), t (n,): transport on the line with mass 1 a point, rows = teacher."""
    if solver == "sort":
        return (s.sort().values - t.sort().values).abs().sum()
    return s.shape[0] * _solve((t[:, None] - s[None, :]).abs(), None, None, epsilon, num_iters)


def _flattened(s: Tensor, t: Tensor, epsilon: float, num_iters: int, variant: str, solver: str) -> Tensor:
    return _line(s.reshape(-1), t.reshape(-1), epsilon, num_iters, solver)


def _regression(s: Tensor, t: Tensor, epsilon: float, num_iters: int, variant: str, solver: str) -> Tensor:
    if variant == "released":
        # Softmax over one output is 1, so that every cost is 0.
        return (torch.softmax(s, dim=-1) - torch.softmax(t, dim=-1)).sum()
    return _line(s.reshape(-1), t.reshape(-1), epsilon, num_iters, solver)


_FORMS = {"batch": _batch, "sample": _sample, "flattened": _flattened, "regression": _regression}
