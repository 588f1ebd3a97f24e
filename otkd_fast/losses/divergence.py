"""Sinkhorn divergence between features: optimal transport between the batches without its entropic bias."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..functional._sinkhorn_options import check_options
from ..functional._validate import check_choice, check_tensor
from ..functional.cost_matrix import METRICS
from ..functional.sinkhorn_divergence import GRADIENTS, sinkhorn_divergence
from ._common import (
    Loss,
    at_least_float32,
    check_backend,
    check_device,
    check_mask,
    check_num_items,
    check_reduction,
    overwrite,
    reduce_rows,
    refuse_num_items,
    zero,
)

__all__ = ["SinkhornDivergenceLoss", "sinkhorn_divergence_loss"]


class _Options(NamedTuple):
    metric: str
    epsilon: float
    num_iters: int
    tol: float | None
    gradient: str
    reduction: str
    backend: str | None


def sinkhorn_divergence_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    teacher_mask: Tensor | None = None,
    *,
    metric: str = "sqeuclidean",
    epsilon: float = 0.05,
    num_iters: int = 50,
    tol: float | None = None,
    gradient: str = "envelope",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Sinkhorn divergence of two batches of features, ``OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2``, with equal masses.

    It is 0, with gradient 0, for features that are the same up to their order, where a plain entropic cost is not; see
    :func:`otkd_fast.sinkhorn_divergence`. The defaults are this package's; no method published them.

    Args:
        student_features: (n, d), or (..., n, d) for several problems (e.g. one a sample, over its tokens); float16,
            bfloat16, float32 or float64.
        teacher_features: (m, d) or (..., m, d) with the same leading axes, same d and device.
        mask: bool (..., n); features that are False do not count, whatever they hold.
        num_items_in_batch: divisor of "mean" and "batchmean" in place of their own: the number of problems in all parts
            of a batch. Only where there are leading axes: one divergence of a whole batch (n, d) is no sum over rows.
        teacher_mask: bool (..., m); None: `mask` if n = m, else all count.
        metric: 'l1', 'l2', 'sqeuclidean' or 'cosine'.
        epsilon: > 0, in units of the cost: for features of d numbers of size 1, squared distances are about 2 d.
        num_iters, tol, gradient: as in :func:`otkd_fast.sinkhorn_divergence`.
        reduction: "mean" over the problems that count, "sum", "batchmean" (by the first axis), "none".
        backend: one of the package's backends, None chooses.

    Returns:
        Scalar (or (...) for "none") in float32, or float64 if an input is float64. A problem without a feature that
        counts on either side is 0, with gradient 0.

    Raises:
        TypeError: a tensor argument of the wrong kind, a parameter of the wrong type.
        ValueError: a wrong shape or device, an unknown word, a parameter out of range, a `num_items_in_batch` for a
            single problem.

    Source: Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences (AISTATS 2019).

    >>> import torch
    >>> features = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> print(f"{sinkhorn_divergence_loss(features, features.flip(0) + 2.0):.3f}")
    8.000
    """
    options = _options(metric, epsilon, num_iters, tol, gradient, reduction, backend)
    return _loss(student_features, teacher_features, mask, num_items_in_batch, teacher_mask, options)


class SinkhornDivergenceLoss(Loss):
    """Module form of :func:`sinkhorn_divergence_loss`: the parameters are given once,
    ``forward(student_features, teacher_features, mask=None, num_items_in_batch=None, teacher_mask=None)`` gives the
    loss.

    Has no state. All parameters are keyword-only, checked here, and documented there.

    >>> import torch
    >>> features = torch.randn(8, 4)
    >>> SinkhornDivergenceLoss(epsilon=0.5)(features, features)
    tensor(0.)
    """

    def __init__(
        self,
        *,
        metric: str = "sqeuclidean",
        epsilon: float = 0.05,
        num_iters: int = 50,
        tol: float | None = None,
        gradient: str = "envelope",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._options = _options(metric, epsilon, num_iters, tol, gradient, reduction, backend)

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of features (..., n, d) against (..., m, d); see :func:`sinkhorn_divergence_loss`."""
        return _loss(student_features, teacher_features, mask, num_items_in_batch, teacher_mask, self._options)


def _options(metric, epsilon, num_iters, tol, gradient, reduction, backend) -> _Options:
    """The checked parameters."""
    check_choice("metric", metric, METRICS)
    check_choice("gradient", gradient, GRADIENTS)
    checked = check_options(epsilon, num_iters, tol, "a", gradient, 1.0, None)
    return _Options(
        metric, checked.epsilon, checked.num_iters, tol, gradient, check_reduction(reduction), check_backend(backend)
    )


def _loss(student, teacher, mask, num_items_in_batch, teacher_mask, options: _Options) -> Tensor:
    for name, features in (("student_features", student), ("teacher_features", teacher)):
        check_tensor(name, features, 2, "(..., n, d)")
    check_device("teacher_features", teacher, "student_features", student)
    if student.shape[-1] == 0:
        raise ValueError(f"student_features: expected (..., n, d) with d >= 1, got shape {tuple(student.shape)}")
    batch = student.shape[:-2]
    if teacher.shape[:-2] != batch or teacher.shape[-1] != student.shape[-1]:
        raise ValueError(
            "teacher_features: expected the leading axes and the features of student_features, "
            f"{tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    if not batch:
        refuse_num_items(num_items_in_batch, "one divergence of a whole batch (n, d) is no sum over its rows")
    num_items_in_batch = check_num_items(num_items_in_batch, options.reduction)
    check_mask(mask, student.shape[:-1], student, "student_features")
    if teacher_mask is None and teacher.shape == student.shape:
        teacher_mask = mask
    check_mask(teacher_mask, teacher.shape[:-1], teacher, "teacher_features")
    (student,), (teacher,) = overwrite(mask, student), overwrite(teacher_mask, teacher)
    student, teacher = at_least_float32(student, teacher)
    if 0 in student.shape or 0 in teacher.shape:
        nothing = zero(student, teacher)
        return nothing.expand(batch) if options.reduction == "none" else nothing
    a, counts_a = _masses(mask, student)
    b, counts_b = _masses(teacher_mask, teacher)
    value = sinkhorn_divergence(
        student, teacher, a, b, metric=options.metric, epsilon=options.epsilon, num_iters=options.num_iters,
        tol=options.tol, gradient=options.gradient, backend=options.backend,
    )  # fmt: skip
    counts = counts_a if counts_b is None else counts_b if counts_a is None else counts_a & counts_b
    return reduce_rows(value, counts, options.reduction, num_items_in_batch)


def _masses(mask: Tensor | None, features: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Equal masses (..., n) of the features that count, and which problems have any (...)."""
    if mask is None:
        return None, None
    counts = mask.any(-1)
    kept = (mask | ~counts.unsqueeze(-1)).to(features.dtype)  # a problem needs mass; it is taken out afterwards
    return kept / kept.sum(-1, keepdim=True), counts
