"""SinKD: Sinkhorn-distance distillation of logits, in every form of the paper and of its released code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._values import values_readable
from ..functional._validate import check_choice, positive_float, positive_int
from . import _sinkd_forms as _forms
from ._common import (
    IGNORE_INDEX,
    REDUCTIONS,
    Loss,
    at_least_float32,
    check_backend,
    check_device,
    check_ignore_index,
    check_labels,
    check_mask,
    check_num_items,
    kept_rows,
    one_hot,
    overwrite,
    zero,
)

__all__ = ["SinKD", "sinkd"]

FORMS = tuple(_forms.FORMS)
VARIANTS = ("paper", "released")
SOLVERS = ("sinkhorn", "sort")


class _Options(NamedTuple):
    temperature: float
    epsilon: float
    num_iters: int
    form: str
    variant: str
    solver: str
    reduction: str
    ignore_index: int
    backend: str | None


def sinkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    num_iters: int = 20,
    form: str = "batch",
    variant: str = "paper",
    solver: str = "sinkhorn",
    reduction: str = "sum",
    ignore_index: int = IGNORE_INDEX,
    backend: str | None = None,
) -> Tensor:
    r"""Sinkhorn distance between a batch of student outputs and a batch of teacher outputs.

    With ``s = softmax(student / temperature)`` and ``t = softmax(teacher / temperature)``, rows ``s_i`` and ``t_i``:

    ``form="batch"`` (Eq. 13 to 18 and Algorithm 1; the default)
        ``D_ij = ||t_i - s_j||_1`` (b x b), ``K = exp(-D / epsilon)``; ``num_iters`` times: divide the rows of ``K``
        by their sums, then the columns by theirs; the loss is ``sum_ij K_ij D_ij``. The plan has total mass b.
    ``form="sample"`` (Eq. 5 to 12, with the sequential updates of Eq. 14)
        For each i a problem between the entries of one row: ``D_mn = |s_i(m) - t_i(n)|`` (d x d), rows with marginal
        ``s_i``, columns with marginal ``t_i``, rows updated first; summed over i. Eq. 5 gives the rows of the plan
        the mass ``s_i``, while Eq. 7 writes the cost as ``|t_i(m) - s_i(n)|`` with m the row: both cannot hold at
        once. Here mass and cost of a row belong to the same entry, so that moving an entry's mass costs the
        difference between that entry and its target.
    ``form="flattened"`` (Eq. 20)
        All b d probabilities as points on the line, ``D = |t_i(m) - s_j(n)|`` (bd x bd), plan of mass b d, rows =
        teacher.
    ``form="regression"`` (Eq. 21)
        Raw outputs, no softmax: ``D_ij = |t_i - s_j|``, plan of mass b, rows = teacher.

    ``variant="released"`` follows the authors' code where it differs from the paper:

    - batch: rows = student, columns = teacher, times 0.001;
    - sample: 1 x 1 problems whose plan is 1, thus ``0.001 sum_i ||s_i - t_i||_1`` (that code had ``temperature`` 1);
    - regression: a softmax over one output is constant, so that the loss is identically 0 (returned exactly, attached
      to the graph);
    - flattened: does not exist (ValueError).

    Args:
        student: logits (b, d), or (..., d) with b rows in all, e.g. tokens; for ``form="regression"`` outputs (b,) or
            (b, 1). float16, bfloat16, float32 or float64. Long rows (a language model's) are not copied in the batch
            form: from 16.8 million logits on both sides together, they are softmaxed a piece at a time (not under
            torch.compile and torch.func).
        teacher: the same shape and device, any floating dtype; or integer class labels (...) in [0, d), whose one-hot
            rows are taken as ``t`` without a softmax (Eq. 23; not for regression). Label values are checked on the
            CPU only; elsewhere one that is out of range makes the loss NaN. Rows labelled `ignore_index` are left out.
        mask: bool (...); rows that are False are left out on both sides, whatever they hold (None: all rows count).
            With no row left the loss is 0 and so is its gradient.
        num_items_in_batch: divisor of "mean" and "batchmean" in place of their own (gradient accumulation). All forms
            but "sample" compare the rows of one call with each other: parts of a batch then add up to the mean of what
            their rows pay within their part, not to the loss of the whole batch.
        labels: integers (...); rows labelled `ignore_index` are left out. Nothing else is done with them.
        temperature: > 0, divides the logits. Not used for regression.
        epsilon: > 0, entropic weight (lambda in the paper), in units of the cost.
        num_iters: >= 1, number of iterations of rows and columns. Always all of them: there is no stopping rule.
        form, variant: see above.
        solver: ``"sinkhorn"``, or ``"sort"`` for the flattened and regression forms: the exact transport cost
            (``epsilon`` to 0) by sorting.
        reduction: ``"sum"`` as published; ``"mean"``: divided by the number of rows that count; ``"batchmean"``:
            divided by the size of the first axis; ``"none"``: (...), what each row of the student pays.
        ignore_index: see `teacher` and `labels`.
        backend: one of the package's backends, None chooses.

    Returns:
        Scalar loss (or (...) for "none") in float32, or float64 for float64 inputs. Gradients are those of the
        unrolled iterations and go to whatever requires them (a teacher under ``torch.no_grad`` does not).

    Raises:
        TypeError: a tensor argument of the wrong kind, a parameter of the wrong type.
        ValueError: a wrong shape or device, a label out of range, an unknown word, a parameter out of range.

    Source:
        "Sinkhorn Distance Minimization for Knowledge Distillation", arXiv 2402.17110, and its extension in IEEE TNNLS
        (equation numbers).

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
    >>> teacher = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    >>> loss = sinkd(student, teacher)
    >>> round(loss.item(), 4)
    0.3462
    >>> loss.backward()
    >>> round(sinkd(student, torch.tensor([0, 1]), reduction="mean").item(), 4)
    0.538
    """
    options = _options(temperature, epsilon, num_iters, form, variant, solver, reduction, ignore_index, backend)
    return _loss(student, teacher, mask, num_items_in_batch, labels, options)


class SinKD(Loss):
    """Module form of :func:`sinkd`: the parameters are given once, ``forward(student, teacher, mask=None,
    num_items_in_batch=None, labels=None)`` gives the loss.

    Has no parameters, no buffers and no other state; can be pickled and copied. All parameters are keyword-only,
    checked here, and documented in :func:`sinkd`.

    >>> import torch
    >>> loss = SinKD(temperature=2.0, epsilon=0.1, num_iters=20)
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> loss(logits, logits).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        epsilon: float = 0.1,
        num_iters: int = 20,
        form: str = "batch",
        variant: str = "paper",
        solver: str = "sinkhorn",
        reduction: str = "sum",
        ignore_index: int = IGNORE_INDEX,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._options = _options(
            temperature, epsilon, num_iters, form, variant, solver, reduction, ignore_index, backend
        )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of student (..., d) against teacher (..., d) or labels (...); see :func:`sinkd`."""
        return _loss(student, teacher, mask, num_items_in_batch, labels, self._options)


def _options(temperature, epsilon, num_iters, form, variant, solver, reduction, ignore_index, backend) -> _Options:
    """The checked parameters."""
    for name, word, known in (
        ("form", form, FORMS),
        ("variant", variant, VARIANTS),
        ("solver", solver, SOLVERS),
        ("reduction", reduction, REDUCTIONS),
    ):
        check_choice(name, word, known)
    if solver == "sort" and form not in ("flattened", "regression"):
        raise ValueError(
            f"solver: expected 'sinkhorn' for form {form!r} ('sort' is for 'flattened' and 'regression'), got 'sort'"
        )
    if form == "flattened" and variant == "released":
        raise ValueError(
            "variant: expected 'paper' for form 'flattened' (the released code has no such form), got 'released'"
        )
    check_backend(backend)
    check_ignore_index(ignore_index)
    temperature, epsilon = positive_float("temperature", temperature), positive_float("epsilon", epsilon)
    return _Options(
        temperature,
        epsilon,
        positive_int("num_iters", num_iters),
        form,
        variant,
        solver,
        reduction,
        ignore_index,
        backend,
    )


def _check_inputs(student: Tensor, teacher: Tensor, form: str) -> torch.Size:
    """Raise for outputs that do not fit; the shape of the rows."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not student.is_floating_point():
        raise TypeError(f"student: expected a floating-point tensor, got {student.dtype}")
    shape = student.shape
    if form == "regression":
        if not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)):
            raise ValueError(f"student: expected shape (b,) or (b, 1) for form 'regression', got {tuple(shape)}")
        rows = shape[:1]
    elif len(shape) < 2 or shape[-1] == 0:
        raise ValueError(f"student: expected shape (..., d) with d >= 1 and rows, got {tuple(shape)}")
    else:
        rows = shape[:-1]
    check_device("teacher", teacher, "student", student)
    if not teacher.is_floating_point():
        if teacher.is_complex() or teacher.dtype == torch.bool:
            raise TypeError(f"teacher: expected floating-point logits or integer class labels, got {teacher.dtype}")
        if form == "regression":
            raise TypeError(f"teacher: expected a floating-point tensor for form 'regression', got {teacher.dtype}")
        check_labels(teacher, rows, student, "teacher")
    elif teacher.shape != shape:
        raise ValueError(f"teacher: expected shape {tuple(shape)} as student, got {tuple(teacher.shape)}")
    return rows


def _loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None, num_items_in_batch: int | Tensor | None,
    labels: Tensor | None, options: _Options,
) -> Tensor:  # fmt: skip
    shape = _check_inputs(student, teacher, options.form)
    check_mask(mask, shape, student)
    num_items_in_batch = check_num_items(num_items_in_batch, options.reduction)
    if labels is not None:
        check_labels(labels, shape, student)
        mask = _without(labels, options.ignore_index, mask)
    if len(shape) > 1:
        student, teacher = (x.reshape(-1, *x.shape[len(shape) :]) for x in (student, teacher))
        mask = None if mask is None else mask.reshape(-1)
    if _forms.streams(student, teacher, options.form):
        call = _forms.Call(mask, shape, num_items_in_batch, options.temperature)
        return _forms.streamed(student, teacher, call, options)
    teacher_temperature = options.temperature
    if not teacher.is_floating_point():
        mask, teacher = _one_hot_rows(teacher, student, mask, options.ignore_index)
        teacher_temperature = 0.0
    elif mask is not None:
        (teacher,) = overwrite(mask, teacher)
    student, teacher = at_least_float32(*overwrite(mask, student), teacher)
    if student.shape[0] == 0:
        nothing = zero(student, teacher)
        return nothing.expand(shape) if options.reduction == "none" else nothing
    call = _forms.Call(mask, shape, num_items_in_batch, teacher_temperature)
    return _forms.FORMS[options.form](student, teacher, call, options)


def _one_hot_rows(
    labels: Tensor, student: Tensor, mask: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, Tensor]:
    """Which rows count, and labels (b,) as probabilities (b, d); those of rows that do not count are any."""
    d = student.shape[-1]
    mask, wrong = kept_rows(labels, d, mask, ignore_index, "teacher")
    rows = one_hot(*overwrite(mask, labels), d).to(student.dtype)
    return mask, rows if wrong is None else torch.where(wrong.unsqueeze(-1), torch.nan, rows)


def _without(labels: Tensor, ignore_index: int, mask: Tensor | None) -> Tensor | None:
    """The rows of `mask` that are not labelled `ignore_index`; None: all, where that can be known."""
    if ignore_index < torch.iinfo(labels.dtype).min:
        return mask
    kept = labels != ignore_index
    kept = kept if mask is None else kept & mask
    return None if values_readable(kept) and kept.all() else kept
