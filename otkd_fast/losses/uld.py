"""Universal logit distillation: sorted probabilities compared, so that the two vocabularies may differ."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional._validate import check_tensor, positive_float, positive_int
from ._common import (
    Loss,
    at_least_float32,
    check_device,
    check_mask,
    check_num_items,
    check_reduction,
    overwrite,
    reduce_rows,
)

__all__ = ["UniversalLogitDistillation", "universal_logit_distillation"]


class _Options(NamedTuple):
    temperature: float
    teacher_temperature: float
    top_k: int | None
    reduction: str


def universal_logit_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    top_k: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Universal logit distillation: for each token ``sum_i |p_(i) - q_(i)|`` of the probabilities in descending order.

    The smaller vocabulary is filled up with zeros. As points on the line the two sets of V probabilities are at the
    Wasserstein-1 distance of this sum over V. No token of one vocabulary is matched with one of the other by name.

    Args:
        student_logits: (..., V), float16, bfloat16, float32 or float64; tokens are rows.
        teacher_logits: (..., W) with the same leading axes and device: the tokens are aligned already (published: the
            answers from their first token on, cut to the shorter).
        mask: bool (...); tokens that are False do not count, whatever they hold.
        num_items_in_batch: divisor of "mean" and "batchmean" in place of their own.
        temperature: > 0, of the student.
        teacher_temperature: > 0; None: the same.
        top_k: compare the k largest probabilities only; None: all, as published.
        reduction: "mean" over the tokens that count, "none" (...), "sum", "batchmean". (The published code takes the
            mean of the answers' means.)

    Returns:
        Scalar (or (...) for "none") in float32, or float64 if an input is float64. The gradient of a difference of 0
        is 0.

    Raises:
        TypeError: a tensor argument of the wrong kind, a parameter of the wrong type.
        ValueError: a wrong shape or device, an unknown reduction, a parameter out of range.

    Source: Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs (2024).

    >>> import torch
    >>> student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> universal_logit_distillation(student, teacher)
    tensor(0.5000)
    """
    options = _options(temperature, teacher_temperature, top_k, reduction)
    return _loss(student_logits, teacher_logits, mask, num_items_in_batch, options)


class UniversalLogitDistillation(Loss):
    """Module form of :func:`universal_logit_distillation`: the parameters are given once,
    ``forward(student_logits, teacher_logits, mask=None, num_items_in_batch=None)`` gives the loss.

    Has no state. All parameters are keyword-only, checked here, and documented there.

    >>> import torch
    >>> UniversalLogitDistillation()(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
    tensor(0.)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        top_k: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self._options = _options(temperature, teacher_temperature, top_k, reduction)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits (..., V) against (..., W); see :func:`universal_logit_distillation`."""
        return _loss(student_logits, teacher_logits, mask, num_items_in_batch, self._options)


def _options(temperature, teacher_temperature, top_k, reduction) -> _Options:
    """The checked parameters."""
    temperature = positive_float("temperature", temperature)
    if teacher_temperature is None:
        teacher_temperature = temperature
    else:
        teacher_temperature = positive_float("teacher_temperature", teacher_temperature)
    top_k = None if top_k is None else positive_int("top_k", top_k)
    return _Options(temperature, teacher_temperature, top_k, check_reduction(reduction))


def check_tokens(student: Tensor, teacher: Tensor, mask: Tensor | None, min_dim: int, axes: str) -> None:
    """Logits with the same leading axes, and a mask of these."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        check_tensor(name, logits, min_dim, axes)
        if logits.shape[-1] == 0:
            raise ValueError(f"{name}: expected a vocabulary, got shape {tuple(logits.shape)}")
    check_device("teacher_logits", teacher, "student_logits", student)
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_logits: expected the leading axes of student_logits, {tuple(student.shape[:-1])}, "
            f"got shape {tuple(teacher.shape)}"
        )
    check_mask(mask, student.shape[:-1], student, "student_logits")


def _loss(student, teacher, mask, num_items_in_batch, options: _Options) -> Tensor:
    check_tokens(student, teacher, mask, 1, "(..., V)")
    num_items_in_batch = check_num_items(num_items_in_batch, options.reduction)
    student, teacher = at_least_float32(*overwrite(mask, student, teacher))
    p = _descending(torch.softmax(student / options.temperature, -1), options.top_k)
    q = _descending(torch.softmax(teacher / options.teacher_temperature, -1), options.top_k)
    both = min(p.shape[-1], q.shape[-1])
    value = (p[..., :both] - q[..., :both]).abs().sum(-1) + p[..., both:].sum(-1) + q[..., both:].sum(-1)
    return reduce_rows(value, mask, options.reduction, num_items_in_batch)


def _descending(probabilities: Tensor, top_k: int | None) -> Tensor:
    if top_k is None or top_k >= probabilities.shape[-1]:
        return probabilities.sort(-1, descending=True).values
    return probabilities.topk(top_k, -1).values
