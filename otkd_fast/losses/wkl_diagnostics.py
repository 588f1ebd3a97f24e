"""The terms that WKL is made of, split into target class and other classes, for the log of a training."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _wkd
from ._common import check_mask, check_pair, poison, reduce_rows
from ._wkl import kl_term
from .wkd_logit import check_rows
from .wkl import WKL, decoupled, full, separated, shares

__all__ = ["WKLDiagnostics"]

NAMES = ("kl", "dkd", "tckd", "nckd", "wkd", "dwkd", "twkd", "nwkd")
GRADIENT_NAMES = ("gradient_top", "gradient_next")
LAST_RANK = 6  # of the teacher's classes whose gradients are looked at


class WKLDiagnostics:
    """A log of the terms of a :class:`WKL`, whatever its mode: means over the rows seen since the last reset.

    ============  ================================================================================
    kl, wkd       over all classes: softened KL without T^2, W_full
    tckd, nckd    divergences of target class and of the others, each with its weight (1 and 2 as published) and T^2
    dkd           their sum
    twkd, nwkd    L_t of the target class, gamma' W of the others, which fades with gamma'
    dwkd          their sum
    ============  ================================================================================

    With :meth:`watch` also the gradient that arrives at the student's logits in the backward pass, of whatever loss is
    trained: ``gradient_top`` at the teacher's most probable class, ``gradient_next`` at its classes of rank 2 to 6.

    Nothing waits for the device: `update` adds to tensors there, `compute` returns tensors, and reading them is the
    caller's synchronisation. No gradient. The published code makes the same numbers in every step; here two more
    Sinkhorn solves are spent only where `update` is called.

    >>> import torch
    >>> distil = WKL(cost=0.5 * (1 - torch.eye(3)), temperature=1.0, gamma=1.0)
    >>> log = WKLDiagnostics(distil)
    >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0, 1.0]])
    >>> log.update(student, teacher, torch.tensor([0]), progress=0.0)
    >>> print({name: round(float(value), 3) for name, value in log.compute().items()})
    {'kl': 0.154, 'dkd': 1.006, 'tckd': 0.082, 'nckd': 0.924, 'wkd': 0.101, 'dwkd': 0.575, 'twkd': 0.344, 'nwkd': 0.231}
    >>> log.watch(student.requires_grad_(), teacher)
    >>> distil(student, teacher, torch.tensor([0]), progress=0.0).backward()
    >>> print({name: round(float(value), 3) for name, value in log.compute().items() if "gradient" in name})
    {'gradient_top': -0.282, 'gradient_next': 0.141}
    """

    def __init__(self, loss: WKL) -> None:
        if not isinstance(loss, WKL):
            raise TypeError(f"loss: expected a WKL, got {type(loss).__name__}")
        self._loss = loss
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._sums: Tensor | None = None  # (8,), float64
        self._count: Tensor | None = None
        self._gradient_sums: Tensor | None = None  # (2,), float64
        self._gradient_count: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        progress: float | Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Add the rows of one batch; arguments and errors as of :func:`otkd_fast.losses.wkl`."""
        options = self._loss._options
        rows = check_rows(student_logits, teacher_logits, labels, mask, self._loss.cost, options.ignore_index)
        _, gamma = shares(progress, options)
        if rows.target.numel() == 0:
            return
        tckd, nckd = decoupled(rows, options)
        twkd = _wkd.target_term(rows.student, rows.teacher, rows.target)
        nwkd = gamma * separated(rows, options)
        kl = kl_term(rows.student, rows.teacher, options.kl_temperature or options.temperature)
        terms = (kl, tckd + nckd, tckd, nckd, full(rows, options), twkd + nwkd, twkd, nwkd)
        kept = None if rows.mask is None else rows.mask.reshape(-1)
        sums = torch.stack([reduce_rows(poison(term, rows.wrong), kept, "sum") for term in terms]).double()
        count = torch.full_like(sums[0], rows.target.shape[0]) if kept is None else kept.sum().double()
        self._sums = sums if self._sums is None else self._sums + sums
        self._count = count if self._count is None else self._count + count

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean over the rows seen (0-dim, float64, on the device of the logits); 0 if there was none.

        The gradients' names are there if one has been watched.
        """
        if self._sums is None:
            means = {name: torch.zeros((), dtype=torch.float64) for name in NAMES}
        else:
            means = dict(zip(NAMES, (self._sums / self._count.clamp(min=1)).unbind(), strict=True))
        if self._gradient_sums is not None:
            gradients = self._gradient_sums / self._gradient_count.clamp(min=1)
            means |= dict(zip(GRADIENT_NAMES, gradients.unbind(), strict=True))
        return means

    def watch(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> None:
        """Log the gradient of `student_logits` when the next backward pass reaches it.

        Call it in each step whose gradients are to be logged, before ``backward()``, with the tensor that the loss is
        computed from. Gradients are logged as they arrive: those of a mean over B rows have its factor 1/B, those of a
        scaled loss (GradScaler) the scale.

        Args:
            student_logits: (..., C), C >= 2, with gradient.
            teacher_logits: the same shape and device.
            mask: bool (...), rows that count.

        Raises:
            TypeError, ValueError: tensors that do not fit, a student without gradient.
        """
        check_pair(student_logits, teacher_logits, 1, "(..., C)", ("student_logits", "teacher_logits"))
        check_mask(mask, student_logits.shape[:-1], student_logits, "student_logits")
        classes = student_logits.shape[-1]
        if classes < 2:
            raise ValueError(f"student_logits: expected at least two classes, got shape {tuple(student_logits.shape)}")
        if not student_logits.requires_grad:
            raise ValueError("student_logits: expected a tensor that requires a gradient, got one that does not")
        with torch.no_grad():
            ranked = teacher_logits.detach().topk(min(LAST_RANK, classes), -1).indices  # (..., 2 to 6)

        def log(gradient: Tensor) -> None:
            with torch.no_grad():
                own = gradient.gather(-1, ranked).double()
                rows = torch.stack([own[..., 0], own[..., 1:].mean(-1)])  # (2, ...)
                if mask is not None:
                    rows = torch.where(mask, rows, 0)
                sums = rows.flatten(1).sum(1)
                number = mask.sum().double() if mask is not None else torch.full_like(sums[0], rows[0].numel())
                before = self._gradient_sums is not None
                self._gradient_sums = self._gradient_sums + sums if before else sums
                self._gradient_count = self._gradient_count + number if before else number

        student_logits.register_hook(log)
