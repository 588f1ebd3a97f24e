"""Distillation in transformers' Trainer and TRL's GKDTrainer. Neither is imported here.

from transformers import Trainer
from otkd_fast.integrations.huggingface import DistillationMixin

class DistillationTrainer(DistillationMixin, Trainer):
    pass

trainer = DistillationTrainer(
    model=student, args=args, train_dataset=data,
    teacher_model=teacher, distillation_loss=SinKD(reduction="mean"), distillation_weight=0.8,
)

from trl import GKDTrainer                     # or its place in a later version
from otkd_fast.integrations.huggingface import gkd_loss

class TransportGKDTrainer(GKDTrainer):
    generalized_jsd_loss = staticmethod(gkd_loss(SinKD(reduction="mean")))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DistillationMixin", "gkd_loss"]

IGNORE_INDEX = -100


class DistillationMixin:
    """Put before transformers' Trainer: ``hard_weight * cross-entropy + distillation_weight * loss(student, teacher)``.

    Args:
        teacher_model: gives an object with `logits` for the student's inputs; frozen and put into evaluation mode.
        distillation_loss: called with logits (rows, C) of student and teacher, only rows whose label is not -100
            (counted by `mask`), and with `num_items_in_batch` where the Trainer gives it and
            `divides_by_items` is True. A loss that compares the rows of a batch with each other, such as SinKD, sees
            the tokens of one device's batch.
        distillation_weight, hard_weight: factors of the two terms.
        shift_labels: True for causal language models: position i predicts label i + 1.
        divides_by_items: whether the distillation loss takes `num_items_in_batch` (gradient accumulation). False for
            losses that refuse it, being no sums over rows: that of each part of a batch is then multiplied by its share
            of the items, which makes an average of the parts.
        args, kwargs: the Trainer's.

    The cross-entropy is divided by `num_items_in_batch` where the Trainer gives it, and with
    `average_tokens_across_devices` both are multiplied by the number of processes, as the Trainer does itself.
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: nn.Module,
        distillation_loss: Callable[..., Tensor],
        distillation_weight: float = 1.0,
        hard_weight: float = 1.0,
        shift_labels: bool = True,
        divides_by_items: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model.eval().requires_grad_(False)
        if hasattr(self, "args") and hasattr(self.args, "device"):
            self.teacher_model.to(self.args.device)
        self.distillation_loss = distillation_loss
        self.distillation_weight, self.hard_weight = distillation_weight, hard_weight
        self.shift_labels, self.divides_by_items = shift_labels, divides_by_items

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """What the Trainer calls for each batch."""
        labels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**given)
        with torch.no_grad():
            teacher_logits = self.teacher_model(**given).logits
        student, teacher, labels = _rows(outputs.logits, teacher_logits, labels, self.shift_labels)
        mask = labels != IGNORE_INDEX
        divisor = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        hard = F.cross_entropy(student.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum") / divisor
        items = {}
        if num_items_in_batch is not None and self.divides_by_items:
            items["num_items_in_batch"] = num_items_in_batch
        soft = self.distillation_loss(student, teacher, mask=mask, **items)
        if num_items_in_batch is not None and not self.divides_by_items:
            soft = soft * (mask.sum() / num_items_in_batch)
        loss = self.hard_weight * hard + self.distillation_weight * soft
        if num_items_in_batch is not None and getattr(self.args, "average_tokens_across_devices", False):
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def gkd_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function with the signature of ``GKDTrainer.generalized_jsd_loss`` that computes an otkd_fast loss.

    Its `beta`, `temperature` and `reduction` belong to the divergence that it replaces and are not used: those of
    `loss` count. Labels are aligned with the logits there already; rows labelled -100 are left out.

    >>> import torch
    >>> from otkd_fast.losses import SinKD
    >>> logits = torch.eye(6).reshape(2, 3, 6)
    >>> gkd_loss(SinKD(reduction="mean"))(logits, logits, torch.zeros(2, 3, dtype=torch.long), beta=0.5).shape
    torch.Size([])
    """

    def generalized_jsd_loss(
        student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean",
        num_items_in_batch=None, **unused,
    ):  # fmt: skip
        mask = None
        if labels is None:
            student, teacher = (x.reshape(-1, x.shape[-1]) for x in (student_logits, teacher_logits))
        else:
            student, teacher, labels = _rows(student_logits, teacher_logits, labels, False)
            mask = labels != IGNORE_INDEX
        items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return loss(student, teacher, mask=mask, **items)

    return generalized_jsd_loss


def _rows(student: Tensor, teacher: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (..., L, V) and labels (..., L) -> (rows, V), (rows, V), (rows,).

    A longer vocabulary is cut: models of one tokenizer differ in padding at its end.
    """
    if shift:
        student, teacher, labels = student[..., :-1, :], teacher[..., :-1, :], labels[..., 1:]
    size = min(student.shape[-1], teacher.shape[-1])
    student, teacher = (x[..., :size].reshape(-1, size) for x in (student, teacher))
    return student, teacher, labels.reshape(-1)
