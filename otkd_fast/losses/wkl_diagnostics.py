"""The terms that WKL is made of, split into target class and other classes, for the log of a training."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _wkd
from ._common import poison, reduce_rows
from ._wkl import kl_term
from .wkd_logit import check_rows
from .wkl import WKL, decoupled, full, separated, shares

__all__ = ["WKLDiagnostics"]

NAMES = ("kl", "dkd", "tckd", "nckd", "wkd", "dwkd", "twkd", "nwkd")


class WKLDiagnostics:
    """A log of the terms of a :class:`WKL`, whatever its mode: means over the rows seen since the last reset.

    ============  ================================================================================
    kl, wkd       over all classes: softened KL without T^2, W_full
    tckd, nckd    divergences of target class and of the others, each with its weight (1 and 2 as published) and T^2
    dkd           their sum
    twkd, nwkd    L_t of the target class, gamma' W of the others, which fades with gamma'
    dwkd          their sum
    ============  ================================================================================

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
        """Name -> mean over the rows seen (0-dim, float64, on the device of the logits); 0 if there was none."""
        if self._sums is None:
            return {name: torch.zeros((), dtype=torch.float64) for name in NAMES}
        means = self._sums / self._count.clamp(min=1)
        return dict(zip(NAMES, means.unbind(), strict=True))
