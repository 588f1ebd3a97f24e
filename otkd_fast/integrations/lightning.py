"""The training step of a LightningModule that distils. Lightning is not imported.

import lightning
from otkd_fast.integrations.lightning import DistillationStep

class Distillation(DistillationStep, lightning.LightningModule):
    def __init__(self, student, teacher):
        super().__init__()
        self.set_up_distillation(student, teacher, SinKD(reduction="mean"), distillation_weight=0.8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.trained_parameters(), lr=0.05)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mdistiller import _call

__all__ = ["DistillationStep"]


class DistillationStep:
    """Put before LightningModule: `training_step` for batches (inputs, labels) and models that return logits."""

    def set_up_distillation(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: nn.Module,
        *,
        distillation_weight: float = 1.0,
        hard_weight: float = 1.0,
    ) -> None:
        """Call it in ``__init__``. The loss is given the labels if its `forward` has a parameter of that name.

        The teacher is kept out of the module's children: it is neither trained nor saved.
        """
        self.student, self.loss = student, loss
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.distillation_weight, self.hard_weight = distillation_weight, hard_weight

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the student and of the loss, if it has any."""
        return [*self.student.parameters(), *self.loss.parameters()]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self.student(inputs)
        self.teacher.to(logits.device)
        with torch.no_grad():
            teacher_logits = self.teacher(inputs)
        hard = F.cross_entropy(logits.float(), labels)
        soft = _call(self.loss, logits, teacher_logits, labels)
        total = self.hard_weight * hard + self.distillation_weight * soft
        self.log_dict({"train/cross_entropy": hard.detach(), "train/distillation": soft.detach()})
        return total
