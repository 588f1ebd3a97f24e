"""Every loss of the package under one call, ``loss(student, teacher, mask=None, num_items_in_batch=None)``.

A case makes the loss for a reduction, and has inputs for it. `items`: what the reduction runs over, given the mask: how
many count and how many there are. `parts`: whether the losses of a batch's parts add up to it with num_items_in_batch;
"divides" where it divides only (SinKD's plan is one of the batch); None where it is refused.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import behaviour_cases
import kd2m_cases
import sinkd_cases
import torch

from otkd_fast.losses import KD2M, MultiLevelOT, SinKD, SinkhornDivergenceLoss, WCoRD, sinkd_total, wcord_local

ROWS = 6
MASK = torch.tensor([True, False, True, True, False, True])
LABELS = torch.tensor([0, 1, 1, 0, 3, 1])
CLASSES = 4


class Bound:
    """A loss with what it takes besides student, teacher, mask and num_items_in_batch; cut with the rows."""

    def __init__(self, loss: Callable, *others: Any, **named: Any) -> None:
        self.loss, self.others, self.named = loss, others, named

    def __call__(self, student, teacher, mask=None, num_items_in_batch=None):
        given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return self.loss(student, teacher, *self.others, mask=mask, **given, **self.named)

    def of_rows(self, kept):
        return self._with(lambda x: x[kept] if isinstance(x, torch.Tensor) and x.dim() else x, self.loss)

    def to(self, target):
        moved = self.loss.to(target) if isinstance(self.loss, torch.nn.Module) else self.loss
        as_labels = target if not isinstance(target, torch.dtype) else torch.int64
        return self._with(lambda x: x.to(as_labels) if isinstance(x, torch.Tensor) and x.dim() else x, moved)

    def _with(self, change, loss):
        return Bound(loss, *map(change, self.others), **{name: change(x) for name, x in self.named.items()})


class Case(NamedTuple):
    make: Callable[..., Bound]  # (reduction=...)
    inputs: Callable[..., tuple]  # (dtype=...) -> student, teacher
    items: Callable = lambda mask: (int(mask.sum()), len(mask))
    parts: bool | str | None = True
    on_device: bool = True


def one(mask):
    """The batch is one item."""
    return 1, 1


def features(rows=ROWS, dtype=torch.float64):
    return kd2m_cases.features(rows, rows, 5, dtype=dtype)


def logits(width=5, dtype=torch.float64):
    return sinkd_cases.logits(ROWS, width, dtype=dtype)


def tokens(dtype=torch.float64):
    """Answers (6, 3, 5) against (6, 3, 7)."""
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(ROWS, 3, v, generator=generator, dtype=torch.float64).to(dtype) for v in (5, 7))


def problems(dtype=torch.float64):
    generator = torch.Generator().manual_seed(6)
    return tuple(torch.randn(ROWS, 4, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


class WholeAnswers:
    """A loss of (B, L, ...) with masks of whole answers (B,)."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, student, teacher, mask=None, **given):
        if isinstance(mask, torch.Tensor) and mask.shape == student.shape[:1]:
            mask = mask[:, None].expand(student.shape[:2])
        return self.loss(student, teacher, mask=mask, **given)


def rows_case(name):
    make, inputs = behaviour_cases.CASES[name]
    others = inputs()[2:]
    return Case(lambda **options: Bound(make(**options), *others), lambda **given: inputs(**given)[:2])


def sinkd_case(parts="divides", **options):
    width = 1 if options.get("form") == "regression" else 5
    return Case(lambda **given: Bound(SinKD(**options, **given)), functools.partial(logits, width), parts=parts)


def kd2m_case(on_device=True, **options):
    of_classes = options.get("metric") in ("cw2", "cw2_gaussian")
    if of_classes:
        options["num_classes"] = CLASSES
    items = (lambda mask: (CLASSES, CLASSES)) if of_classes else one
    return Case(lambda **given: Bound(KD2M(**options, **given), LABELS), features, items, None, on_device)


def released_jw2(**given):
    loss = KD2M(metric="jw2", variant="released", solver="sinkhorn", **given)
    return Bound(lambda s, t, **kw: loss(s, t, student_outputs=s[:, :3], teacher_outputs=t[:, :3], **kw))


def wcord(local_weight, banks, **given):
    torch.manual_seed(0)
    options = {"embedding_dim": 8, "hidden_dim": 16, "num_negatives": 9} | ({"num_samples": 50} if banks else {})
    loss = WCoRD(5, 5, local_weight=local_weight, **options, **given).eval().double()
    if banks:  # all entries alike: the drawing makes no difference
        for bank in (loss.bank_student, loss.bank_teacher):
            bank.entries.copy_(bank.entries[:1].expand_as(bank.entries))
    return Bound(loss, torch.tensor([3, 1, 4, 15, 9, 2]))


def total(labels, **given):
    transport = SinKD(**given)
    return Bound(lambda s, t, labels, **kw: sinkd_total(s, t, labels, transport=transport, **kw), labels)


CASES = {
    "SinKD": sinkd_case(),
    "SinKD released": sinkd_case(variant="released"),
    "SinKD sample": sinkd_case(True, form="sample"),
    "SinKD sample released": sinkd_case(True, form="sample", variant="released"),
    "SinKD flattened": sinkd_case(form="flattened"),
    "SinKD flattened sort": sinkd_case(form="flattened", solver="sort"),
    "SinKD regression": sinkd_case(form="regression"),
    "SinKD regression sort": sinkd_case(form="regression", solver="sort"),
    "sinkd_total": Case(functools.partial(total, LABELS), logits, parts="divides"),
    **{name: rows_case(name) for name in behaviour_cases.CASES},
    "KD2M w2": kd2m_case(False),
    "KD2M cw2": kd2m_case(False, metric="cw2"),
    "KD2M jw2": kd2m_case(False, metric="jw2"),
    "KD2M w2 sinkhorn": kd2m_case(solver="sinkhorn"),
    "KD2M cw2 sinkhorn": kd2m_case(metric="cw2", solver="sinkhorn"),
    "KD2M jw2 sinkhorn": kd2m_case(metric="jw2", solver="sinkhorn"),
    "KD2M jw2 released": Case(released_jw2, features, one, None),
    "KD2M w2_gaussian": kd2m_case(metric="w2_gaussian"),
    "KD2M w2_gaussian full": kd2m_case(metric="w2_gaussian", covariance="full"),
    "KD2M cw2_gaussian": kd2m_case(metric="cw2_gaussian"),
    "KD2M cw2_gaussian full": kd2m_case(metric="cw2_gaussian", covariance="full"),
    "KD2M kl_gaussian": kd2m_case(metric="kl_gaussian", jitter=0.1),
    "KD2M kl_gaussian full": kd2m_case(metric="kl_gaussian", covariance="full", jitter=0.1),
    "KD2M mmd": kd2m_case(metric="mmd"),
    "KD2M mmd rbf": kd2m_case(metric="mmd", kernel="rbf"),
    "wcord_local": Case(lambda **given: Bound(functools.partial(wcord_local, **given)), features, parts=None),
    "wcord_local ipot": Case(
        lambda **given: Bound(functools.partial(wcord_local, solver="ipot", **given)), features, parts=None
    ),
    "WCoRD": Case(functools.partial(wcord, 0.05, True), features, parts=None),
    "WCoRD global": Case(functools.partial(wcord, 0.0, True), features),
    "WCoRD without banks": Case(functools.partial(wcord, 0.05, False), features, parts=None),
    "MultiLevelOT": Case(lambda **given: Bound(WholeAnswers(MultiLevelOT(**given))), tokens, parts=None),
    "SinkhornDivergence": Case(
        lambda **given: Bound(SinkhornDivergenceLoss(epsilon=0.5, num_iters=9, **given)), features, one, None
    ),
    "SinkhornDivergence of problems": Case(
        lambda **given: Bound(WholeAnswers(SinkhornDivergenceLoss(epsilon=0.5, num_iters=9, **given))), problems
    ),
}


def value_and_gradient(loss, student, *others, weights=None):
    """Value and gradient with respect to a fresh copy of student; `weights` for a loss of several numbers."""
    student = student.detach().clone().requires_grad_()
    value = loss(student, *others)
    (gradient,) = torch.autograd.grad(value if weights is None else (value * weights).sum(), student)
    return value.detach(), gradient
