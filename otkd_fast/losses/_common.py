"""What the losses share: checks of their inputs, dtype policy, masks, reductions.

A loss is computed for each row (one sample or token) and then reduced. Rows that a mask leaves out are overwritten
before any arithmetic, so that they may hold anything, NaN included. Values of tensors are looked at only where that
costs nothing (ordinary CPU tensors): elsewhere what is wrong makes its row NaN, never the host wait.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._dispatch import NAMES
from .._values import values_readable
from ..functional._validate import check_choice, check_tensor, not_negative_float

REDUCTIONS = ("none", "mean", "batchmean", "sum")
IGNORE_INDEX = -100  # as in torch.nn.functional.cross_entropy
_LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Loss(nn.Module):
    """Base of the losses: `_options` (a NamedTuple of checked parameters) is all there is besides buffers."""

    _options: NamedTuple

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options._asdict().items())


def check_backend(backend: str | None) -> str | None:
    """The name of a backend, or None; whether it is available is found out at the call."""
    if backend is not None:
        check_choice("backend", backend, NAMES)
    return backend


def check_reduction(reduction: str, known: tuple[str, ...] = REDUCTIONS) -> str:
    """`reduction` is one of the `known` words."""
    check_choice("reduction", reduction, known)
    return reduction


def check_ignore_index(ignore_index: int) -> int:
    """An int."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    return ignore_index


def check_weight(name: str, value: float | Tensor) -> float | Tensor:
    """A finite number >= 0, or a tensor of one element, as 0-dim."""
    if not isinstance(value, Tensor):
        return not_negative_float(name, value)
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"{name}: expected one number, got shape {tuple(value.shape)} of {value.dtype}")
    return value.reshape(())


def check_pair(student: Tensor, teacher: Tensor, min_dim: int, axes: str, names=("student", "teacher")) -> None:
    """Two floating-point tensors of one shape and device; their dtypes may differ.

    Args:
        min_dim: the least number of axes.
        axes: they in words, e.g. ``"(..., C)"``.
        names: of the arguments.
    """
    check_tensor(names[0], student, min_dim, axes)
    check_tensor(names[1], teacher, min_dim, axes)
    check_device(names[1], teacher, names[0], student)
    if teacher.shape != student.shape:
        raise ValueError(f"{names[1]}: expected shape {tuple(student.shape)} as {names[0]}, got {tuple(teacher.shape)}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` is on the device of `other`."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {value.device}")


def check_mask(mask: Tensor | None, shape: tuple[int, ...], student: Tensor, name: str = "student") -> None:
    """None, or a bool tensor of this shape on the device of `student`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, got {got}")
    if mask.shape != torch.Size(shape):
        raise ValueError(f"mask: expected shape {tuple(shape)}, got {tuple(mask.shape)}")
    check_device("mask", mask, name, student)


def check_labels(
    labels: Tensor, shape: tuple[int, ...], student: Tensor, name: str = "labels", other_name: str = "student"
) -> None:
    """An integer tensor of this shape on the device of `student`; its values are for :func:`kept_rows`."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(labels).__name__}")
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"{name}: expected an integer tensor, got {labels.dtype}")
    if labels.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(labels.shape)}")
    check_device(name, labels, other_name, student)


def kept_rows(
    labels: Tensor, classes: int, mask: Tensor | None, ignore_index: int | None = IGNORE_INDEX, name: str = "labels"
) -> tuple[Tensor | None, Tensor | None]:
    """Which rows count, and which of them have a label out of range.

    Returns:
        mask: the rows that are in `mask` and not labelled `ignore_index`; None if all rows count and this is known.
        wrong: bool, rows that count and whose label is not in [0, classes), for :func:`poison`. None if it is known
            that there are none: where values can be read, such a label is a ValueError instead.
    """
    ignores = ignore_index is not None and torch.iinfo(labels.dtype).min <= ignore_index
    kept = labels != ignore_index if ignores else None
    if kept is not None and mask is not None:
        kept = kept & mask
    elif kept is None:
        kept = mask
    wrong = (labels < 0) | (labels >= classes)
    if kept is not None:
        wrong = wrong & kept
    if not values_readable(labels, mask):
        return kept, wrong
    if wrong.any():
        bad = labels[wrong].reshape(-1)[0].item()
        raise ValueError(f"{name}: expected class labels in [0, {classes}), got {bad}")
    return None if kept is not None and kept.all() else kept, None


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """labels (...) -> bool (..., classes); a label out of range gives a row of False."""
    index_dtype = labels.dtype if classes <= torch.iinfo(labels.dtype).max else None
    return labels.unsqueeze(-1) == torch.arange(classes, device=labels.device, dtype=index_dtype)


def poison(values: Tensor, wrong: Tensor | None) -> Tensor:
    """`values` with NaN in the rows that are `wrong` (None: none is)."""
    return values if wrong is None else torch.where(wrong, torch.nan, values)


def nan_rows(*rows: Tensor) -> Tensor | None:
    """bool (N,): which rows of the tensors (N, d) hold a NaN; None where none does and this is known.

    Operators that take probabilities as masses would take a NaN for an error, or for no mass.
    """
    bad = sum(x.detach().sum(-1) for x in rows).isnan()
    return None if values_readable(bad) and not bad.any() else bad


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in their common dtype, float16 and bfloat16 raised to float32."""
    dtype = tensors[0].dtype
    if dtype in (torch.float32, torch.float64) and all(tensor.dtype is dtype for tensor in tensors):
        return tensors
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def overwrite(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors (*rows, ...) with zeros in the rows that `mask` (*rows) leaves out, whatever was there."""
    if mask is None:
        return tensors
    return tuple(torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())), x, 0) for x in tensors)


def zero(*tensors: Tensor) -> Tensor:
    """An exact 0 that is attached to the graph of the tensors (gradient 0), whatever values they hold."""
    terms = [torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0.0).sum() for x in tensors]
    return sum(terms[1:], terms[0])


def check_num_items(num_items_in_batch: int | Tensor | None, reduction: str) -> int | Tensor | None:
    """None, a number >= 0, or a tensor of one element; only where the reduction divides."""
    if num_items_in_batch is None:
        return None
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1 or num_items_in_batch.is_complex():
            raise ValueError(f"num_items_in_batch: expected one number, got shape {tuple(num_items_in_batch.shape)}")
        number = num_items_in_batch.reshape(())
    else:
        try:
            number = operator.index(num_items_in_batch)
        except TypeError:
            kind = type(num_items_in_batch).__name__
            raise TypeError(f"num_items_in_batch: expected an int, a tensor or None, got {kind}") from None
        if number < 0:
            raise ValueError(f"num_items_in_batch: expected a number >= 0, got {number}")
    if reduction not in ("mean", "batchmean"):
        raise ValueError(f"num_items_in_batch: expected None for reduction {reduction!r}, which does not divide")
    return number


def refuse_num_items(num_items_in_batch: int | Tensor | None, reason: str) -> None:
    """For losses that are no sums over their rows: the parts of a batch do not add up to it, whatever divides."""
    if num_items_in_batch is not None:
        raise ValueError(
            f"num_items_in_batch: expected None, got {num_items_in_batch}: {reason}, so the values of a batch's parts "
            "do not add up to that of the batch (multiply each by its share of the rows for an average of the parts)"
        )


def reduce_rows(
    values: Tensor,
    mask: Tensor | None,
    reduction: str,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Losses of rows to the loss.

    Args:
        values: (*rows).
        mask: bool (*rows), the rows that count; None: all.
        reduction: "none": (*rows), 0 for rows left out. "sum": over the rows that count. "mean": the sum divided by
            their number. "batchmean": the sum divided by the size of the first axis, whatever the mask.
        num_items_in_batch: replaces the divisor of "mean" and "batchmean" (gradient accumulation: the number of
            items that count in all parts of the batch together); checked by :func:`check_num_items`.

    Nothing to divide by (no rows, none that counts): 0, attached to the graph.
    """
    if mask is not None:
        values = torch.where(mask, values, 0)
    if reduction == "none":
        return values
    return divide(values.sum(), values.shape, mask, reduction, num_items_in_batch)


def divide(
    total: Tensor, rows: tuple[int, ...], mask: Tensor | None, reduction: str,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The reduction of :func:`reduce_rows` for losses that come as their sum over the rows; `rows` is their shape."""
    if reduction == "sum":
        return total
    if num_items_in_batch is not None:
        number = num_items_in_batch
    elif reduction == "batchmean":
        number = rows[0] if rows else 1
    else:
        number = torch.Size(rows).numel() if mask is None else mask.sum()
    if isinstance(number, Tensor):
        return total / number.to(total.device).clamp(min=1)
    return total / max(number, 1)
