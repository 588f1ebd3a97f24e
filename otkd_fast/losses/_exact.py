"""Exact optimal transport on the host: SciPy's assignment solver, POT's network simplex for other masses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NOT_FINITE = (
    "student_features, teacher_features (or outputs): expected finite numbers for exact transport, whose costs are "
    "infinite or NaN"
)


@torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo now
def exact_plan(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal plan of one problem as its non-zero entries; waits for the device and solves in float64.

    Args:
        cost: (n, m); a: (n,), b: (m,) masses >= 0 of equal totals. Their values only: nothing is differentiated.

    Returns:
        rows (k,), columns (k,), masses (k,) on the device and (the masses) in the dtype of `cost`.

    Raises:
        ImportError: neither POT nor SciPy is installed; POT is needed where the masses are not those of an assignment.
        ValueError: costs or masses that are not finite.
    """
    costs, rows_mass, columns_mass = (t.detach().to("cpu", torch.float64).numpy() for t in (cost, a, b))
    if not np.isfinite(costs).all():
        raise ValueError(NOT_FINITE)
    rows, columns, mass = _solve(costs, rows_mass, columns_mass)
    index = [torch.from_numpy(np.ascontiguousarray(k, dtype=np.int64)).to(cost.device) for k in (rows, columns)]
    return index[0], index[1], torch.from_numpy(np.ascontiguousarray(mass)).to(cost.device, cost.dtype)


@torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo now
def class_assignment(cost: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """For each row its partner in an optimal matching within each class; waits for the device.

    Args:
        cost: (n, n); labels: (n,) integers, of rows and columns alike; kept: bool (n,). A row that is not kept is its
            own partner.

    Returns:
        (n,) int64: a permutation.
    """
    costs = cost.detach().to("cpu", torch.float64).numpy()
    partner = np.arange(costs.shape[0])
    classes = np.where(kept.cpu().numpy(), labels.cpu().to(torch.int64).numpy(), np.iinfo(np.int64).min)
    for label in np.unique(classes[kept.cpu().numpy()]):
        members = np.flatnonzero(classes == label)
        block = costs[np.ix_(members, members)]
        if not np.isfinite(block).all():
            raise ValueError(NOT_FINITE)
        rows, columns, _ = _solve(block, *(np.full(len(members), 1 / len(members)) for _ in range(2)))
        partner[members[rows]] = members[columns]
    return torch.from_numpy(partner).to(cost.device)


def _solve(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and masses of the plan; rows and columns without mass do not take part."""
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    if len(rows) == 0 or len(columns) == 0:
        return rows[:0], columns[:0], a[:0]
    a, b, cost = a[rows], b[columns], cost[np.ix_(rows, columns)]
    if len(a) == len(b) and np.ptp(a) <= 1e-7 * a[0] and np.ptp(b) <= 1e-7 * b[0]:
        solver = _assignment_solver()
        if solver is not None:
            i, j = solver(cost)
            return rows[i], columns[j], a[i]
    plan = _network_simplex()(a / a.sum(), b / b.sum(), np.ascontiguousarray(cost), numItermax=10_000_000) * a.sum()
    i, j = np.nonzero(plan)
    return rows[i], columns[j], plan[i, j]


def _assignment_solver():
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return None
    return linear_sum_assignment


def _network_simplex():
    try:
        from ot import emd
    except ImportError:
        raise ImportError(
            "solver='exact' needs POT (pip install POT) or, for equally many student and teacher rows, "
            "SciPy (pip install scipy); solver='sinkhorn' needs neither"
        ) from None
    return emd
