"""WKD-L: Wasserstein distillation of logits, with a cost between the categories."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional._validate import not_negative_float
from . import _wkd
from ._common import (
    IGNORE_INDEX,
    Loss,
    at_least_float32,
    check_device,
    check_ignore_index,
    check_labels,
    check_mask,
    check_num_items,
    check_pair,
    check_reduction,
    check_weight,
    kept_rows,
    one_hot,
    overwrite,
    poison,
    reduce_rows,
    zero,
)

__all__ = ["WKDLogit", "wkd_logit"]


class _Options(NamedTuple):
    temperature: float
    gamma: float
    epsilon: float
    num_iters: int
    kappa: float
    variant: str
    gradient: str
    reduction: str
    ignore_index: int
    backend: str | None

    def transport(self) -> _wkd.Transport:
        return _wkd.Transport(self.temperature, self.epsilon, self.num_iters, self.variant, self.gradient, self.backend)


def wkd_logit(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    *,
    cost: Tensor,
    temperature: float = 8.0,
    gamma: float | Tensor = 600.0,
    epsilon: float = 0.05,
    num_iters: int = 10,
    kappa: float = 0.0,
    variant: str = "released",
    gradient: str = "unroll",
    reduction: str = "mean",
    ignore_index: int = IGNORE_INDEX,
    backend: str | None = None,
) -> Tensor:
    r"""WKD-L: ``L_t + gamma W``, the target class by cross-entropy, the others by optimal transport.

    For a row with label y, student logits s, teacher logits t:

        L_t = -softmax(t)_y log softmax(s)_y                                (temperature 1, all C classes)
        W   = <P, c>,  P = Sinkhorn(p, q; c, epsilon, num_iters),  p, q = softmax(s / T), softmax(t / T) without y

    The C - 1 other probabilities are normalised to 1; their cost is that of `cost` without row and column y. P has rows
    p (student) and columns q (teacher), the columns are updated first, and there are exactly `num_iters` iterations
    from constant scalings. Neither term has a factor T^2. The loss does not contain the student's cross-entropy, which
    the published total adds with weight 1.

    ``variant="released"`` (the default) has the constants of the authors' code, 1e-8 in the denominators of both
    scalings, and with it the published numbers; ``variant="paper"`` has none and is otkd_fast.sinkhorn, accurate for
    every epsilon. On costs like the published ones the loss differs by 1e-5 (CIFAR-100) to 1e-3
    (ResNet-50 on ImageNet), its gradient by 4e-5 to 2e-2, relative (docs/losses.md).

    Args:
        student_logits: (..., C), C >= 2, float16, bfloat16, float32 or float64.
        teacher_logits: the same shape and device. The published code has no gradient here: compute them under
            ``torch.no_grad()``.
        labels: (...) integers in [0, C). Rows labelled `ignore_index` do not count. Values are checked on the CPU only;
            elsewhere a label out of range makes the loss NaN.
        mask: bool (...); rows that are False do not count, whatever they hold.
        num_items_in_batch: divisor of "mean" and "batchmean" in place of their own (gradient accumulation).
        cost: (C, C), >= 0: the cost c between the categories, e.g. of :func:`otkd_fast.losses.wkd_cost`;
            ``relu(cost) + 1e-8`` is used. Differentiable.
        temperature: T > 0 of the transport term. Published: 8, 6 (CIFAR-100), 2 (ImageNet).
        gamma: >= 0, weight of the transport term, a number or a tensor of one element. Published: 600, 200, 30, 25.
        epsilon: > 0, entropic weight, in units of the cost.
        num_iters: >= 1.
        kappa: 0: `cost` is c. > 0: `cost` holds distances d, as the released files do, and ``c = 1 - exp(-kappa d)``.
        variant: "released" or "paper".
        gradient: "unroll" as published, or "last_step"; with variant="paper" also "implicit".
        reduction: "mean" as published; "none" (...), "sum", or "batchmean": the sum divided by the size of the first
            axis.
        ignore_index: see `labels`.
        backend: one of the package's backends, None chooses; only the CPU's kernels have the released guards, with the
            other backends that loop is PyTorch's.

    Returns:
        Scalar (or (...) for "none") in float32, or float64 if an input is float64. No row that counts: 0, gradient 0.

    Raises:
        TypeError: a tensor argument of the wrong kind, a parameter of the wrong type.
        ValueError: a wrong shape or device, a label out of range, an unknown word, a parameter out of range.

    Source: "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation" (arXiv 2412.08139) and
    its released code.

    >>> import torch
    >>> cost = 0.5 * (1 - torch.eye(3))
    >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0, 1.0]])
    >>> loss = wkd_logit(student, teacher, torch.tensor([0]), cost=cost, temperature=1.0, gamma=1.0)
    >>> print(f"{loss:.4f}")
    0.5750
    """
    options = _options(
        temperature, gamma, epsilon, num_iters, kappa, variant, gradient, reduction, ignore_index, backend
    )
    _wkd.check_cost(cost)
    cost = _wkd.finished_cost(cost, options.kappa)
    return _loss(student_logits, teacher_logits, labels, mask, num_items_in_batch, cost, options)


class WKDLogit(Loss):
    """Module form of :func:`wkd_logit`: the cost and the parameters are given once.

    ``forward(student_logits, teacher_logits, labels, mask=None, num_items_in_batch=None, gamma=None)`` gives the loss;
    `gamma` there replaces the module's for one call, as for the published decay::

        loss = distil(student(x), teacher_logits, y, gamma=cosine_decay(600, epoch, 240, start=150))

    The only state is the buffer `cost`, as it is used (sharpened, + 1e-8), without gradient. All parameters are
    keyword-only, checked here, and documented in :func:`wkd_logit`.

    >>> import torch
    >>> distil = WKDLogit(cost=1 - torch.eye(3), temperature=2.0, gamma=1.0)
    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> distil(logits, logits, torch.tensor([0])).shape
    torch.Size([])
    """

    cost: Tensor

    def __init__(
        self,
        *,
        cost: Tensor,
        temperature: float = 8.0,
        gamma: float = 600.0,
        epsilon: float = 0.05,
        num_iters: int = 10,
        kappa: float = 0.0,
        variant: str = "released",
        gradient: str = "unroll",
        reduction: str = "mean",
        ignore_index: int = IGNORE_INDEX,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._options = _options(
            temperature, gamma, epsilon, num_iters, kappa, variant, gradient, reduction, ignore_index, backend
        )
        _wkd.check_cost(cost)
        _wkd.check_cost_values(cost, self._options.variant)
        self.register_buffer("cost", _wkd.finished_cost(cost.detach(), self._options.kappa))

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        gamma: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits (..., C) for labels (...); see :func:`wkd_logit`."""
        options = self._options if gamma is None else self._options._replace(gamma=check_weight("gamma", gamma))
        return _loss(student_logits, teacher_logits, labels, mask, num_items_in_batch, self.cost, options)


def _options(
    temperature, gamma, epsilon, num_iters, kappa, variant, gradient, reduction, ignore_index, backend
) -> _Options:
    """The checked parameters."""
    transport = _wkd.check_transport(temperature, epsilon, num_iters, variant, gradient, backend)
    check_ignore_index(ignore_index)
    return _Options(
        transport.temperature, check_weight("gamma", gamma), transport.epsilon, transport.num_iters,
        not_negative_float("kappa", kappa), variant, gradient, check_reduction(reduction), ignore_index, backend,
    )  # fmt: skip


class Rows(NamedTuple):
    """Logits and labels of one call, checked, as rows."""

    student: Tensor  # (N, C), at least float32, zeros in the rows that do not count
    teacher: Tensor  # (N, C)
    target: Tensor  # bool (N, C), True at the label
    mask: Tensor | None  # bool, the shape of the labels
    wrong: Tensor | None  # bool (N,), rows whose loss is NaN
    cost: Tensor  # (C, C)
    shape: torch.Size  # of the labels


def check_rows(
    student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor | None, cost: Tensor, ignore_index: int
) -> Rows:
    """Raise for what does not fit together."""
    check_pair(student, teacher, 1, "(..., C)", ("student_logits", "teacher_logits"))
    classes, shape = student.shape[-1], student.shape[:-1]
    if classes < 2:
        raise ValueError(f"student_logits: expected at least two classes, got shape {tuple(student.shape)}")
    if cost.shape[-1] != classes:
        _wkd.check_cost(cost, classes, "student_logits")
    check_device("cost", cost, "student_logits", student)
    check_labels(labels, shape, student)
    check_mask(mask, shape, student, "student_logits")
    mask, wrong = kept_rows(labels, classes, mask, ignore_index)
    student, teacher = at_least_float32(*overwrite(mask, student, teacher))
    cost = cost.to(student.dtype)
    (labels,) = overwrite(mask, labels)
    flat = student.reshape(-1, classes), teacher.reshape(-1, classes), one_hot(labels.reshape(-1), classes)
    return Rows(*flat, mask, None if wrong is None else wrong.reshape(-1), cost, shape)


def _loss(student, teacher, labels, mask, num_items_in_batch, cost, options: _Options) -> Tensor:
    rows = check_rows(student, teacher, labels, mask, cost, options.ignore_index)
    num_items_in_batch = check_num_items(num_items_in_batch, options.reduction)
    if rows.target.numel() == 0:
        nothing = zero(rows.student, rows.teacher)
        return nothing.expand(rows.shape) if options.reduction == "none" else nothing
    value = _wkd.target_term(rows.student, rows.teacher, rows.target)
    transport = _wkd.transport_term(rows.student, rows.teacher, rows.target, rows.cost, options.transport())
    value = poison(value + options.gamma * transport, rows.wrong).reshape(rows.shape)
    return reduce_rows(value, rows.mask, options.reduction, num_items_in_batch)
