"""KD2M: distances between the distributions of a batch's student and teacher features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional._validate import check_choice, check_tensor, not_negative_float, positive_float, positive_int
from . import _common
from ._kd2m_metrics import METRICS as _METRICS
from ._kd2m_metrics import Batch

__all__ = ["KD2M", "kd2m"]

METRICS = tuple(_METRICS)
VARIANTS = ("paper", "released")
SOLVERS = ("exact", "sinkhorn")
GRADIENTS = ("detach", "unroll", "last_step", "implicit")
COVARIANCES = ("diagonal", "full")
LABEL_COSTS = ("euclidean", "sqeuclidean", "cross_entropy", "kl")
KERNELS = ("linear", "rbf")
DIRECTIONS = ("student_teacher", "teacher_student")
OF_CLASSES = ("cw2", "cw2_gaussian")
_NO_SUM = "KD2M is a distance between distributions, no sum over rows"


class _Options(NamedTuple):
    metric: str
    variant: str
    solver: str
    epsilon: float
    num_iters: int
    gradient: str
    covariance: str
    num_classes: int | None
    beta: float
    label_cost: str
    kl_direction: str
    jitter: float
    kernel: str
    bandwidth: float | None
    reduction: str
    backend: str | None


def kd2m(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor | None = None,
    *,
    student_outputs: Tensor | None = None,
    teacher_outputs: Tensor | None = None,
    mask: Tensor | None = None,
    num_items_in_batch: None = None,
    metric: str = "w2",
    variant: str = "paper",
    solver: str = "exact",
    epsilon: float = 0.02,
    num_iters: int = 100,
    gradient: str = "detach",
    covariance: str = "diagonal",
    num_classes: int | None = None,
    beta: float = 1.0,
    label_cost: str = "euclidean",
    kl_direction: str = "student_teacher",
    jitter: float = 0.0,
    kernel: str = "linear",
    bandwidth: float | None = None,
    reduction: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Distance between the distributions of student features ``x_i`` and teacher features ``y_j`` of a batch.

    ``metric=``

    ``"w2"`` (Eq. 2)
        ``min_P sum_ij P_ij |x_i - y_j|^2`` over plans with masses 1/n and 1/m.
    ``"cw2"`` (Eq. 3)
        the mean of the former over the classes, each with its own rows.
    ``"jw2"`` (Eq. 4)
        ``min_P sum_ij P_ij (|x_i - y_j|^2 + beta L_ij)`` with a discrepancy L of the labels, see `label_cost`.
    ``"w2_gaussian"`` (Eq. 5)
        ``|mean_x - mean_y|^2 + |std_x - std_y|^2`` (covariance "diagonal"), or with the squared Bures distance of the
        covariances ("full"). Variances are biased (divided by n).
    ``"cw2_gaussian"`` (Eq. 3 with Eq. 5)
        the mean of the former over the classes; a class with a single row has variance 0.
    ``"kl_gaussian"`` (Eq. 6)
        ``KL(N_x || N_y)`` of Gaussians, or of ``N_y || N_x`` with kl_direction="teacher_student".
    ``"mmd"`` (not in the paper's table)
        squared maximum mean discrepancy over all pairs: ``|mean_x - mean_y|^2`` (kernel "linear"), or with
        ``exp(-|x - y|^2 / (2 s^2))`` ("rbf"), where s is `bandwidth` or, None, the mean of all n^2 + m^2 + n m
        distances, as a constant.

    The plan is a constant for the gradient, as published: with ``solver="exact"`` always, with "sinkhorn" if `gradient`
    says so.

    ``variant="released"`` follows the authors' code where it differs: cw2 and cw2_gaussian are summed over the classes,
    not averaged (unless `reduction` says otherwise). jw2: the feature cost is that between students, ``|x_i - x_j|^2``
    divided by its largest value and constant; L is taken on raw outputs, or is 0 without outputs, and beta is not
    used: the features then get no gradient at all. kl_gaussian: 1e-9 is added to the standard deviations that are
    divided by.

    Args:
        student_features: (n, d); teacher_features: (m, d), m = n where labels or outputs are used. float16, bfloat16,
            float32 or float64; their dtypes may differ.
        labels: (n,) integers for "cw2", "cw2_gaussian", and for "jw2" without outputs. Rows labelled -100 are left out.
        student_outputs, teacher_outputs: (n, C) logits, for "jw2". With student_outputs alone the teacher's side is
            the one-hot `labels`.
        mask: bool (n,), rows that count on both sides (m = n); the others may hold anything. No row left: 0.
        num_items_in_batch: there for the losses' common signature; only None. A distance between the distributions of
            two batches is no sum over rows: those of parts of a batch do not add up to that of the batch.
        solver: "exact": SciPy or POT on the host (it waits for the device); or "sinkhorn".
        epsilon: > 0, entropic weight in units of the mean cost (of a class for "cw2").
        num_iters: >= 1, iterations of "sinkhorn".
        gradient: of "sinkhorn": "detach", "unroll", "last_step" or "implicit".
        covariance: "diagonal" or "full", for the Gaussian metrics.
        num_classes: number the classes are averaged over; labels outside [0, num_classes) are then errors. None: the
            classes of the batch. An absent class counts as distance 0.
        beta: >= 0, weight of the label cost.
        label_cost: "euclidean" or "sqeuclidean", between one-hot labels or, where there are outputs, softmax
            probabilities; "cross_entropy", ``-sum_c q_j log p_i`` with the student's p; "kl", ``KL(p_i || q_j)``.
        jitter: >= 0, added to variances in "kl_gaussian" with variant "paper", where a constant feature (and with
            covariance="full" n <= d) otherwise is an error.
        kernel: "linear" or "rbf"; bandwidth: > 0 or None, for "mmd".
        reduction: of the classes for "cw2" and "cw2_gaussian": "mean", "batchmean" (the same: `num_classes` or the
            number of classes in the batch divides), "sum", or "none": (num_classes,) with 0 for absent classes. All
            other metrics are one number, whatever it says. None: as published, "mean", with variant "released" "sum".
        backend: one of the package's backends, None chooses.

    Returns:
        Scalar, or (num_classes,), in float32, or float64 if an input is float64. Gradients go to whatever requires
        them.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes or devices that do not match, labels or outputs that are missing, a label out of range, an
            unknown word, a number out of its range, variances of 0 in "kl_gaussian" (on the CPU), a
            `num_items_in_batch`, reduction "none" of classes without `num_classes`.
        ImportError: solver="exact" without SciPy and POT.

    Source: KD2M: An unifying framework for feature knowledge distillation (arXiv 2504.01757), equation numbers; its
    released code.

    >>> import torch
    >>> student, teacher = torch.tensor([[0.0], [4.0]]), torch.tensor([[5.0], [1.0]])
    >>> kd2m(student, teacher)
    tensor(1.)
    >>> kd2m(student, teacher, metric="cw2", labels=torch.tensor([0, 1]))
    tensor(17.)
    >>> kd2m(student, teacher, metric="w2_gaussian")
    tensor(1.)
    """
    options = _options(
        metric, variant, solver, epsilon, num_iters, gradient, covariance, num_classes, beta, label_cost, kl_direction,
        jitter, kernel, bandwidth, reduction, backend,
    )  # fmt: skip
    _common.refuse_num_items(num_items_in_batch, _NO_SUM)
    return _loss(student_features, teacher_features, labels, student_outputs, teacher_outputs, mask, options)


class KD2M(_common.Loss):
    """Module form of :func:`kd2m`: ``forward(student_features, teacher_features, labels=None)``.

    Has no parameters, no buffers and no other state. All parameters are keyword-only and documented in :func:`kd2m`.

    >>> import torch
    >>> loss = KD2M(metric="w2_gaussian")
    >>> features = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> loss(features, features + 1)
    tensor(2.)
    """

    def __init__(
        self,
        *,
        metric: str = "w2",
        variant: str = "paper",
        solver: str = "exact",
        epsilon: float = 0.02,
        num_iters: int = 100,
        gradient: str = "detach",
        covariance: str = "diagonal",
        num_classes: int | None = None,
        beta: float = 1.0,
        label_cost: str = "euclidean",
        kl_direction: str = "student_teacher",
        jitter: float = 0.0,
        kernel: str = "linear",
        bandwidth: float | None = None,
        reduction: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._options = _options(
            metric, variant, solver, epsilon, num_iters, gradient, covariance, num_classes, beta, label_cost,
            kl_direction, jitter, kernel, bandwidth, reduction, backend,
        )  # fmt: skip

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        labels: Tensor | None = None,
        *,
        student_outputs: Tensor | None = None,
        teacher_outputs: Tensor | None = None,
        mask: Tensor | None = None,
        num_items_in_batch: None = None,
    ) -> Tensor:
        """Distance of features (n, d) from features (m, d); see :func:`kd2m`."""
        _common.refuse_num_items(num_items_in_batch, _NO_SUM)
        return _loss(student_features, teacher_features, labels, student_outputs, teacher_outputs, mask, self._options)


def _options(
    metric, variant, solver, epsilon, num_iters, gradient, covariance, num_classes, beta, label_cost, kl_direction,
    jitter, kernel, bandwidth, reduction, backend,
) -> _Options:  # fmt: skip
    for name, word, known in (
        ("metric", metric, METRICS), ("variant", variant, VARIANTS), ("solver", solver, SOLVERS),
        ("gradient", gradient, GRADIENTS), ("covariance", covariance, COVARIANCES),
        ("label_cost", label_cost, LABEL_COSTS), ("kl_direction", kl_direction, DIRECTIONS),
        ("kernel", kernel, KERNELS),
    ):  # fmt: skip
        check_choice(name, word, known)
    if variant == "released" and covariance == "full":
        raise ValueError("covariance: expected 'diagonal' for variant 'released', which has no other, got 'full'")
    if variant == "released" and label_cost not in ("euclidean", "sqeuclidean", "kl"):
        raise ValueError(f"label_cost: expected 'sqeuclidean' or 'kl' for variant 'released', got {label_cost!r}")
    if variant == "released" and label_cost == "euclidean":
        label_cost = "sqeuclidean"  # what that code calls Euclidean
    if reduction is None:
        reduction = "sum" if variant == "released" and metric in OF_CLASSES else "mean"
    if _common.check_reduction(reduction) == "none" and metric in OF_CLASSES and num_classes is None:
        raise ValueError("num_classes: expected the number of classes for reduction 'none', one value each, got None")
    return _Options(
        metric, variant, solver, positive_float("epsilon", epsilon), positive_int("num_iters", num_iters), gradient,
        covariance, None if num_classes is None else positive_int("num_classes", num_classes),
        not_negative_float("beta", beta), label_cost, kl_direction, not_negative_float("jitter", jitter), kernel,
        None if bandwidth is None else positive_float("bandwidth", bandwidth), reduction,
        _common.check_backend(backend),
    )  # fmt: skip


def _loss(student, teacher, labels, student_outputs, teacher_outputs, mask, options: _Options) -> Tensor:
    _check_features(student, teacher)
    uses_labels = options.metric in OF_CLASSES or (
        options.metric == "jw2" and options.variant == "paper" and (student_outputs is None or teacher_outputs is None)
    )
    paired = uses_labels or mask is not None or options.metric == "jw2"
    if paired and student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"teacher_features: expected {student.shape[0]} rows as student_features (labels, outputs and mask are "
            f"those of both), got shape {tuple(teacher.shape)}"
        )
    _common.check_mask(mask, student.shape[:1], student, "student_features")
    outputs = _check_outputs(student, student_outputs, teacher_outputs, labels, options)
    mask, wrong = _check_labels(student, labels, mask, uses_labels, outputs[0], options)
    student, teacher, *kept = _common.at_least_float32(student, teacher, *(x for x in outputs if x is not None))
    if student.shape[0] == 0 or teacher.shape[0] == 0:
        nothing = _common.zero(student, teacher)
        per_class = options.reduction == "none" and options.metric in OF_CLASSES
        return nothing.expand(options.num_classes) if per_class else nothing
    batch = _batch(student, teacher, labels if uses_labels else None, kept, outputs, mask)
    loss = _METRICS[options.metric](batch, options)
    return loss if wrong is None else torch.where(wrong.any(), torch.nan, loss)


def _batch(student, teacher, labels, kept, outputs, mask) -> Batch:
    """Masses of the rows that count, zeros in the others. With none left all count: zeros, whose distances are 0."""
    given = iter(kept)
    student_outputs, teacher_outputs = (None if x is None else next(given) for x in outputs)
    a, b = (x.new_full((x.shape[0],), 1 / x.shape[0]) for x in (student, teacher))
    if mask is not None:
        student, teacher = _common.overwrite(mask, student, teacher)
        student_outputs, teacher_outputs = (
            None if x is None else _common.overwrite(mask, x)[0] for x in (student_outputs, teacher_outputs)
        )
        none_left = ~mask.any()
        counted = mask | none_left
        a = b = counted.to(student.dtype) / counted.sum()
        if labels is not None:
            labels = torch.where(none_left, torch.zeros_like(labels), labels)
    return Batch(student, teacher, a, b, mask, labels, student_outputs, teacher_outputs)


def _check_features(student: Tensor, teacher: Tensor) -> None:
    for name, value in (("student_features", student), ("teacher_features", teacher)):
        check_tensor(name, value, 2, "(n, d)")
        if value.dim() != 2 or value.shape[1] == 0:
            raise ValueError(f"{name}: expected shape (n, d) with d >= 1 (pool maps first), got {tuple(value.shape)}")
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"teacher_features: expected {student.shape[1]} features as student_features (project one of them), "
            f"got shape {tuple(teacher.shape)}"
        )
    _common.check_device("teacher_features", teacher, "student_features", student)


def _check_outputs(student, student_outputs, teacher_outputs, labels, options) -> tuple[Tensor | None, Tensor | None]:
    """The outputs that the metric uses."""
    if options.metric != "jw2":
        return None, None
    for name, value in (("student_outputs", student_outputs), ("teacher_outputs", teacher_outputs)):
        if value is None:
            continue
        check_tensor(name, value, 2, "(n, C)")
        if value.dim() != 2 or value.shape[0] != student.shape[0] or value.shape[1] == 0:
            raise ValueError(f"{name}: expected shape ({student.shape[0]}, C) with C >= 1, got {tuple(value.shape)}")
        _common.check_device(name, value, "student_features", student)
    if student_outputs is None and teacher_outputs is not None:
        raise ValueError("student_outputs: expected logits (n, C) beside teacher_outputs, got None")
    if student_outputs is not None and teacher_outputs is not None and student_outputs.shape != teacher_outputs.shape:
        raise ValueError(
            f"teacher_outputs: expected shape {tuple(student_outputs.shape)} as student_outputs, "
            f"got {tuple(teacher_outputs.shape)}"
        )
    if options.variant == "released" and student_outputs is not None and teacher_outputs is None:
        raise ValueError("teacher_outputs: expected logits (n, C) for variant 'released', got None")
    if options.variant == "paper" and student_outputs is None and options.label_cost in ("cross_entropy", "kl"):
        raise ValueError(f"student_outputs: expected logits (n, C) for label_cost {options.label_cost!r}, got None")
    if options.label_cost == "kl" and student_outputs is not None and teacher_outputs is None:
        raise ValueError("teacher_outputs: expected logits (n, C) for label_cost 'kl', got None")
    return student_outputs, teacher_outputs


def _check_labels(student, labels, mask, uses_labels, student_outputs, options) -> tuple[Tensor | None, Tensor | None]:
    """The mask without rows labelled -100, and rows whose label is out of range (None where there are none)."""
    if not uses_labels:
        return mask, None
    if labels is None:
        raise ValueError(f"labels: expected integers ({student.shape[0]},) for metric {options.metric!r}, got None")
    _common.check_labels(labels, student.shape[:1], student)
    classes = options.num_classes
    if options.metric == "jw2" and student_outputs is not None:
        classes = student_outputs.shape[1]
    if classes is not None:
        return _common.kept_rows(labels, classes, mask)
    if torch.iinfo(labels.dtype).min > _common.IGNORE_INDEX:
        return mask, None
    kept = labels != _common.IGNORE_INDEX
    return kept if mask is None else mask & kept, None
