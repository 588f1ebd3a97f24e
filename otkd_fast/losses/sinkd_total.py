"""The total losses that SinKD is published with: Eq. 19 for classes, Eq. 22 for regression, Eq. 23 for labels alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional._validate import not_negative_float, positive_float
from ._common import (
    at_least_float32,
    check_labels,
    check_mask,
    check_num_items,
    kept_rows,
    one_hot,
    overwrite,
    poison,
    reduce_rows,
)
from ._wkl import kl_term
from .schedules import check_share
from .sinkd import SinKD

__all__ = ["sinkd_total"]


def sinkd_total(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    *,
    transport: SinKD | None = None,
    alpha: float | None = None,
    beta: float = 0.8,
    kl_temperature: float = 4.0,
) -> Tensor:
    r"""The student's whole loss with SinKD's transport term L_SD.

        Eq. 19, a teacher's logits        sum_i (1 - alpha) CE_i + alpha KL_i + beta L_SD(student, teacher)
        Eq. 22, form="regression"         sum_i (1 - alpha) (s_i - y_i)^2 + alpha (s_i - t_i)^2 + beta L_SD
        Eq. 23, no teacher                sum_i alpha CE_i + beta L_SD(student, labels)

    CE is the cross-entropy of the labels, KL = KL(softmax(teacher / kl_temperature) || softmax(student /
    kl_temperature)) without a factor T^2 (the released code takes the soft cross-entropy, which has the same gradient).

    Args:
        student: logits (..., d), or outputs (b,) or (b, 1) with a `transport` of the regression form.
        teacher: the same shape; None for Eq. 23.
        labels: integers (...), rows labelled ``transport``'s ignore_index do not count; for regression targets in the
            shape of `student`.
        mask: bool, one a row; rows that are False do not count.
        num_items_in_batch: divisor of the reductions "mean" and "batchmean" in place of their own.
        transport: SinKD with its parameters, whose reduction is that of the whole ("none": one value a row). None:
            ``SinKD()``, and ``SinKD(num_iters=30)`` for Eq. 23, as published.
        alpha: in [0, 1]. None: 0.9 (published: 0.8, 0.9 or 1; CIFAR-100 0.85, 0.9 or 0.95), and 1 for Eq. 23.
        beta: >= 0, weight of the transport term.
        kl_temperature: > 0. Published: 1 to 4, CIFAR-100: 4.

    Returns:
        Scalar (or a value for each row with the reduction "none") in float32, or float64 if an input is float64.

    Raises:
        TypeError, ValueError: as :func:`otkd_fast.losses.sinkd`.

    Source: "Sinkhorn Distance Minimization for Knowledge Distillation" (arXiv 2402.17110), and its extension in IEEE
    TNNLS (equation numbers).

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
    >>> teacher, labels = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1])
    >>> sinkd_total(student, teacher, labels, transport=SinKD(reduction="mean")).backward()
    >>> print(f"{sinkd_total(student, None, labels).item():.4f}")
    1.1146
    """
    if transport is None:
        transport = SinKD(num_iters=30) if teacher is None else SinKD()
    elif not isinstance(transport, SinKD):
        raise TypeError(f"transport: expected a SinKD or None, got {type(transport).__name__}")
    options = transport._options
    num_items_in_batch = check_num_items(num_items_in_batch, options.reduction)
    alpha = check_share("alpha", (1.0 if teacher is None else 0.9) if alpha is None else alpha)
    beta, kl_temperature = not_negative_float("beta", beta), positive_float("kl_temperature", kl_temperature)
    if isinstance(student, Tensor) and student.is_floating_point():
        (student,) = at_least_float32(student)  # so that the terms' gradients are not added in half precision
    if options.form == "regression":
        rows = _squares(student, teacher, labels, mask, alpha)
        distance = transport(student, teacher, mask, num_items_in_batch)
    else:
        if teacher is None:
            distance = transport(student, labels, mask, num_items_in_batch)
        else:
            distance = transport(student, teacher, mask, num_items_in_batch, labels)
        rows, mask = _entropies(student, teacher, labels, mask, alpha, kl_temperature, options.ignore_index)
    return reduce_rows(rows, mask, options.reduction, num_items_in_batch) + beta * distance


def _entropies(student, teacher, labels, mask, alpha, temperature, ignore_index) -> tuple[Tensor, Tensor | None]:
    """(1 - alpha) CE + alpha KL, without a teacher alpha CE, of each row; and the rows that count."""
    shape, d = student.shape[:-1], student.shape[-1]
    check_labels(labels, shape, student)
    mask, wrong = kept_rows(labels, d, mask, ignore_index)
    labels, student = overwrite(mask, labels, student)
    student, *given = at_least_float32(student, *(() if teacher is None else overwrite(mask, teacher)))
    target = one_hot(labels, d)
    entropy = -torch.where(target, torch.log_softmax(student, -1), 0).sum(-1)
    if teacher is None:
        return poison(alpha * entropy, wrong), mask
    return poison((1 - alpha) * entropy + alpha * kl_term(student, given[0], temperature), wrong), mask


def _squares(student: Tensor, teacher: Tensor | None, targets: Tensor, mask: Tensor | None, alpha: float) -> Tensor:
    """(1 - alpha) (s - y)^2 + alpha (s - t)^2 of each row (b,)."""
    if teacher is None:
        raise ValueError("teacher: expected outputs for form 'regression', got None")
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"labels: expected floating-point targets for form 'regression', got {got}")
    if targets.shape != student.shape:
        raise ValueError(f"labels: expected shape {tuple(student.shape)} as student, got {tuple(targets.shape)}")
    check_mask(mask, student.shape[:1], student)
    s, t, y = (x.reshape(-1) for x in at_least_float32(*overwrite(mask, student, teacher, targets)))
    return (1 - alpha) * (s - y).square() + alpha * (s - t).square()
