"""The forms of SinKD on checked inputs of at least float32; each returns the reduced loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._values import values_readable
from ..functional.cost_matrix import cost_matrix
from ..functional.sinkd import sinkd_transport_cost
from ..functional.sinkhorn import sinkhorn
from ..functional.softmax_l1 import softmax_l1
from ._common import divide, nan_rows, poison, reduce_rows, zero

if TYPE_CHECKING:
    from .sinkd import _Options

# The factor that the released code puts in front of the loss; the paper has none.
RELEASED_FACTOR = 0.001
# Logits of both sides from which a batch is not softmaxed into memory: 64 MiB in float32.
LEAST_STREAMED = 1 << 24
# Above this largest exponent (L1 costs of probabilities are at most 2) float32 costs do not determine the plan.
MAX_FLOAT32_EXPONENT = 60.0


class Call(NamedTuple):
    """What one call has besides the logits, as rows (b, d)."""

    mask: Tensor | None  # bool (b,)
    shape: torch.Size  # of the rows as they came, b in all
    num_items_in_batch: int | Tensor | None
    teacher_temperature: float  # 0.0: the teacher's rows are probabilities


def streams(student: Tensor, teacher: Tensor, form: str) -> bool:
    """Whether the costs of these logits (b, d) are computed without a softmaxed copy of them."""
    if student.numel() + teacher.numel() < LEAST_STREAMED or form != "batch" or not teacher.is_floating_point():
        return False
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def streamed(student: Tensor, teacher: Tensor, call: Call, options: _Options) -> Tensor:
    """The batch form of logits (b, d) in any floating dtypes, which are softmaxed a piece at a time."""
    wanted = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    dtype = torch.float64 if options.epsilon * MAX_FLOAT32_EXPONENT < 2.0 else wanted
    index = mask = None
    if call.mask is not None:
        if values_readable(call.mask):
            index = call.mask.nonzero().squeeze(1)
            if index.shape[0] == 0:
                nothing = zero(student, teacher).to(wanted)
                return nothing.expand(call.shape) if options.reduction == "none" else nothing
        else:
            mask = call.mask
    paper = options.variant == "paper"
    rows, columns = (teacher, student) if paper else (student, teacher)
    cost = softmax_l1(
        rows, columns, options.temperature, options.temperature, index=index, mask=mask, dtype=dtype,
        backend=options.backend,
    )  # fmt: skip
    value = _transport(cost, None if mask is None else _masses(mask, dtype), paper, options)
    if options.reduction != "none":
        return _scaled(value, call, 1, options).to(wanted)
    kept = cost.shape[0] if mask is None else mask.sum()
    value = (value * kept * _factor(1, options)).to(wanted)
    if index is not None:
        value = value.new_zeros(call.mask.shape).index_copy(0, index, value)
    return value.reshape(call.shape)


def _transport(cost: Tensor, weights: Tensor | None, columns_are_student: bool, options: _Options) -> Tensor:
    """<P, cost> of the plan of mass 1; for the reduction "none" what of it belongs to each row of the student."""
    result = sinkhorn(
        cost, weights, weights, epsilon=options.epsilon, num_iters=options.num_iters, backend=options.backend
    )
    if options.reduction != "none":
        return result.transport_cost
    return (result.plan() * cost).sum(0 if columns_are_student else 1)


def _masses(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Equal masses of the rows that count (b,). A problem needs mass: with no row left all have it, and the zeros
    written over the rows make every cost 0.
    """
    kept = mask | ~mask.any()
    return kept.to(dtype) / kept.sum()


def _factor(per_row: int, options: _Options) -> float:
    """The mass of the plan for each row of the batch, with the factor of the released code."""
    return float(per_row) if options.variant == "paper" else RELEASED_FACTOR * per_row


def _scaled(mean: Tensor, call: Call, per_row: int, options: _Options) -> Tensor:
    """The reduction of a transport cost of mass 1, the mean over the rows that count."""
    mean = _factor(per_row, options) * mean
    if options.reduction == "mean" and call.num_items_in_batch is None:
        return mean
    rows = call.shape.numel() if call.mask is None else call.mask.sum()
    return divide(mean * rows, call.shape, call.mask, options.reduction, call.num_items_in_batch)


def _batch(student: Tensor, teacher: Tensor, call: Call, options: _Options) -> Tensor:
    if options.variant == "paper":
        rows, columns, temperatures = teacher, student, (call.teacher_temperature, options.temperature)
    else:
        rows, columns, temperatures = student, teacher, (options.temperature, call.teacher_temperature)
    return _uniform_plan(rows, columns, temperatures, call, 1, options)


def _uniform_plan(
    rows: Tensor, columns: Tensor, temperatures: tuple[float, float], call: Call, per_row: int, options: _Options
) -> Tensor:
    """rows, columns (n, d), n = b per_row, equal weights. A sum has mass `per_row` a batch row."""
    if options.reduction == "none":
        return _student_rows(rows, columns, temperatures, call, per_row, options)
    mask, simple = call.mask, call.num_items_in_batch is None and options.reduction in ("sum", "mean")
    weights, scale = None, 1.0
    if mask is not None:
        weights = mask.to(rows.dtype) / (mask.sum() * per_row).clamp(min=1)
        if per_row > 1:
            weights = weights.repeat_interleave(per_row)
    if mask is None and simple:
        scale = _factor(per_row, options) * (rows.shape[0] // per_row if options.reduction == "sum" else 1)
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
    return loss if mask is None and simple else _scaled(loss, call, per_row, options)


def _student_rows(
    rows: Tensor, columns: Tensor, temperatures: tuple[float, float], call: Call, per_row: int, options: _Options
) -> Tensor:
    """What each row of the student pays, in the shape of the rows."""
    dtype = rows.dtype
    if options.epsilon * MAX_FLOAT32_EXPONENT < 2.0:
        rows, columns = rows.double(), columns.double()
    p, q = (
        torch.softmax(x / temperature, -1) if temperature else x
        for x, temperature in zip((rows, columns), temperatures, strict=True)
    )
    cost = cost_matrix(p, q, metric="l1", backend=options.backend)
    weights = None
    if call.mask is not None:
        weights = _masses(call.mask, cost.dtype).repeat_interleave(per_row) / per_row
    value = _transport(cost, weights, options.variant == "paper", options)
    value = value.reshape(-1, per_row).sum(1)
    kept = value.shape[0] if call.mask is None else call.mask.sum()
    return (value * kept * _factor(per_row, options)).to(dtype).reshape(call.shape)


def _sample(student: Tensor, teacher: Tensor, call: Call, options: _Options) -> Tensor:
    s, t = _probabilities(student, teacher, call.teacher_temperature, options.temperature)  # (b, d)
    if options.variant == "released":
        # 1 x 1 problems: the plan is 1 and the cost is the L1 distance of the two rows.
        values = RELEASED_FACTOR * (s - t).abs().sum(-1)
    else:
        bad = nan_rows(s, t)
        if bad is not None:
            s, t = (torch.where(bad.unsqueeze(-1), 1 / x.shape[-1], x) for x in (s, t))
        cost = cost_matrix(s.unsqueeze(-1), t.unsqueeze(-1), metric="l1", backend=options.backend)  # (b, d, d)
        result = sinkhorn(cost, s, t, epsilon=options.epsilon, num_iters=options.num_iters, backend=options.backend)
        values = poison(result.transport_cost, bad)
    return _reduced(values, call, options)


def _flattened(student: Tensor, teacher: Tensor, call: Call, options: _Options) -> Tensor:
    s, t = _probabilities(student, teacher, call.teacher_temperature, options.temperature)
    d = s.shape[1]
    if options.solver == "sort":
        points_mask = None if call.mask is None else call.mask.repeat_interleave(d)
        return _sorted_cost(s.reshape(-1), t.reshape(-1), points_mask, d, call, options)
    return _uniform_plan(t.reshape(-1, 1), s.reshape(-1, 1), (0.0, 0.0), call, d, options)


def _regression(student: Tensor, teacher: Tensor, call: Call, options: _Options) -> Tensor:
    if options.variant == "released":
        # The released code takes a softmax over one output: all rows are 1 and all costs 0.
        nothing = zero(student, teacher)
        return nothing.expand(call.shape) if options.reduction == "none" else nothing
    student, teacher = student.reshape(-1), teacher.reshape(-1)
    if options.solver == "sort":
        return _sorted_cost(student, teacher, call.mask, 1, call, options)
    weights = None if call.mask is None else _masses(call.mask, student.dtype)
    cost = cost_matrix(teacher.unsqueeze(-1), student.unsqueeze(-1), metric="l1", backend=options.backend)
    value = _transport(cost, weights, True, options)
    if options.reduction != "none":
        return _scaled(value, call, 1, options)
    return (value * (value.shape[0] if call.mask is None else call.mask.sum())).reshape(call.shape)


def _probabilities(
    student: Tensor, teacher: Tensor, teacher_temperature: float, temperature: float
) -> tuple[Tensor, Tensor]:
    s = torch.softmax(student / temperature, dim=-1)
    return s, teacher if teacher_temperature == 0.0 else torch.softmax(teacher / teacher_temperature, dim=-1)


def _reduced(values: Tensor, call: Call, options: _Options) -> Tensor:
    """values (b,) of the rows, reduced."""
    mask = None if call.mask is None else call.mask.reshape(call.shape)
    return reduce_rows(values.reshape(call.shape), mask, options.reduction, call.num_items_in_batch)


def _sorted_cost(x: Tensor, y: Tensor, mask: Tensor | None, per_row: int, call: Call, options: _Options) -> Tensor:
    """Exact transport of points x (n,) to y (n,) on the line, mass 1 a point: sorted, they are matched in order."""
    if mask is not None:
        # Points left out are sorted to the end and dropped by position: the shapes do not depend on the mask. A NaN
        # that counts goes there too, and one of them is then within the positions that count.
        valid = torch.arange(x.shape[0], device=x.device) < mask.sum()
        x, y = torch.where(mask, x, torch.nan), torch.where(mask, y, torch.nan)
    (x, order), y = x.sort(), y.sort().values
    if mask is not None:
        x, y = torch.where(valid, x, 0.0), torch.where(valid, y, 0.0)
    values = (x - y).abs()
    if options.reduction != "none":
        return divide(values.sum(), call.shape, call.mask, options.reduction, call.num_items_in_batch)
    return torch.zeros_like(values).index_copy(0, order, values).reshape(-1, per_row).sum(1).reshape(call.shape)


FORMS = {"batch": _batch, "sample": _sample, "flattened": _flattened, "regression": _regression}
