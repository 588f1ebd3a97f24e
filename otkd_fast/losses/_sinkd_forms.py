"""The forms of SinKD on checked inputs of at least float32; each returns the reduced loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._values import values_readable
from ..functional.cost_matrix import cost_matrix
from ..functional.sinkd import sinkd_transport_cost
from ..functional.sinkhorn import sinkhorn
from ._common import zero

if TYPE_CHECKING:
    from .sinkd import _Options

# The factor that the released code puts in front of the loss; the paper has none.
RELEASED_FACTOR = 0.001


def one_hot_rows(labels: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """labels (b,) -> (b, d) rows in the student's dtype; on the CPU a label out of range is a ValueError."""
    d = student.shape[1]
    if values_readable(labels, mask):
        kept = labels if mask is None else labels[mask]
        if kept.numel() and not (0 <= kept.min() and kept.max() < d):
            raise ValueError(f"teacher: expected labels in [0, {d}), got values from {kept.min()} to {kept.max()}")
    classes = torch.arange(d, device=labels.device, dtype=labels.dtype if d <= torch.iinfo(labels.dtype).max else None)
    return (labels.unsqueeze(-1) == classes).to(student.dtype)


def _batch(
    student: Tensor, teacher: Tensor, teacher_temperature: float, mask: Tensor | None, options: _Options
) -> Tensor:
    if options.variant == "paper":
        rows, columns, temperatures = teacher, student, (teacher_temperature, options.temperature)
    else:
        rows, columns, temperatures = student, teacher, (options.temperature, teacher_temperature)
    return _uniform_plan(rows, columns, temperatures, mask, 1, options)


def _uniform_plan(
    rows: Tensor,
    columns: Tensor,
    temperatures: tuple[float, float],
    mask: Tensor | None,
    per_row: int,
    options: _Options,
) -> Tensor:
    """rows, columns (n, d), n = b per_row, equal weights; mask (b,). A sum has mass `per_row` a batch row."""
    scale = float(per_row) if options.variant == "paper" else RELEASED_FACTOR * per_row
    weights = None
    if mask is None:
        if options.reduction == "sum":
            scale *= rows.shape[0] // per_row
    else:
        kept = mask.sum()
        weights = mask.to(rows.dtype) / (kept * per_row).clamp(min=1)
        if per_row > 1:
            weights = weights.repeat_interleave(per_row)
    loss = sinkd_transport_cost(
        rows,
        columns,
        weights,
        weights,
        temperature_rows=temperatures[0],
        temperature_columns=temperatures[1],
        epsilon=options.epsilon,
        num_iters=options.num_iters,
        scale=scale,
        backend=options.backend,
    )
    return loss * kept if mask is not None and options.reduction == "sum" else loss


def _sample(
    student: Tensor, teacher: Tensor, teacher_temperature: float, mask: Tensor | None, options: _Options
) -> Tensor:
    s, t = _probabilities(student, teacher, teacher_temperature, options.temperature)  # (b, d)
    if options.variant == "released":
        # 1 x 1 problems: the plan is 1 and the cost is the L1 distance of the two rows.
        return _reduce_rows(RELEASED_FACTOR * (s - t).abs().sum(-1), mask, options.reduction)
    cost = cost_matrix(s.unsqueeze(-1), t.unsqueeze(-1), metric="l1", backend=options.backend)  # (b, d, d)
    result = sinkhorn(cost, s, t, epsilon=options.epsilon, num_iters=options.num_iters, backend=options.backend)
    return _reduce_rows(result.transport_cost, mask, options.reduction)


def _flattened(
    student: Tensor, teacher: Tensor, teacher_temperature: float, mask: Tensor | None, options: _Options
) -> Tensor:
    s, t = _probabilities(student, teacher, teacher_temperature, options.temperature)
    d = s.shape[1]
    if options.solver == "sort":
        points_mask = None if mask is None else mask.repeat_interleave(d)
        return _sorted_cost(s.reshape(-1), t.reshape(-1), points_mask, d, options.reduction)
    return _uniform_plan(t.reshape(-1, 1), s.reshape(-1, 1), (0.0, 0.0), mask, d, options)


def _regression(student: Tensor, teacher: Tensor, _: float, mask: Tensor | None, options: _Options) -> Tensor:
    if options.variant == "released":
        # The released code takes a softmax over one output: all rows are 1 and all costs 0.
        return zero(student, teacher)
    student, teacher = student.reshape(-1), teacher.reshape(-1)
    if options.solver == "sort":
        return _sorted_cost(student, teacher, mask, 1, options.reduction)
    count: Tensor | int = student.shape[0]
    a = b = None
    if mask is not None:
        count = mask.sum()
        # A sinkhorn problem needs mass: with no row left the zeros written over the rows make every cost 0.
        kept = mask | (count == 0)
        a = b = kept.to(student.dtype) / kept.sum()
    cost = cost_matrix(teacher.unsqueeze(-1), student.unsqueeze(-1), metric="l1", backend=options.backend)
    result = sinkhorn(cost, a, b, epsilon=options.epsilon, num_iters=options.num_iters, backend=options.backend)
    return result.transport_cost * count if options.reduction == "sum" else result.transport_cost


def _probabilities(
    student: Tensor, teacher: Tensor, teacher_temperature: float, temperature: float
) -> tuple[Tensor, Tensor]:
    s = torch.softmax(student / temperature, dim=-1)
    return s, teacher if teacher_temperature == 0.0 else torch.softmax(teacher / teacher_temperature, dim=-1)


def _reduce_rows(values: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """values (b,) -> sum or mean of the rows that count."""
    if mask is None:
        return values.sum() if reduction == "sum" else values.mean()
    total = torch.where(mask, values, 0.0).sum()
    return total if reduction == "sum" else total / mask.sum().clamp(min=1)


def _sorted_cost(x: Tensor, y: Tensor, mask: Tensor | None, per_row: int, reduction: str) -> Tensor:
    """Exact transport of points x (n,) to y (n,) on the line, mass 1 a point: sorted, they are matched in order."""
    if mask is None:
        total, rows = (x.sort().values - y.sort().values).abs().sum(), x.shape[0] // per_row
        return total if reduction == "sum" else total / rows
    # Points left out are sorted to the end and dropped by position: the shapes do not depend on the mask.
    count = mask.sum()
    valid = torch.arange(x.shape[0], device=x.device) < count
    x_sorted, y_sorted = (torch.where(mask, z, float("inf")).sort().values for z in (x, y))
    total = (torch.where(valid, x_sorted, 0.0) - torch.where(valid, y_sorted, 0.0)).abs().sum()
    return total if reduction == "sum" else total / (count // per_row).clamp(min=1)


FORMS = {"batch": _batch, "sample": _sample, "flattened": _flattened, "regression": _regression}
