"""A distiller as mdistiller (and the released WKD and WKL codes, which are built on it) has them.

    from mdistiller.distillers import distiller_dict
    from otkd_fast.integrations.mdistiller import TransportDistiller

    distiller_dict["OTKD"] = lambda student, teacher, cfg: TransportDistiller(
        student, teacher, logit_loss=WKDLogit(cost=cost, temperature=8.0, gamma=600.0)
    )

mdistiller is not imported: what its trainer calls is `forward` (in training mode the logits and a dictionary of
losses, which it sums), `get_learnable_parameters` and `get_extra_parameters`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TransportDistiller"]


class TransportDistiller(nn.Module):
    """Cross-entropy, a loss of logits and a loss of features, any of the last two.

    Args:
        student, teacher: models that return ``(logits, {"feats": [...], "pooled_feat": ...})``. The teacher stays in
            evaluation mode and without gradient.
        logit_loss: ``loss(student_logits, teacher_logits)``, with `labels` as third argument if it has a parameter
            of that name, e.g. WKDLogit.
        feature_loss: ``loss(student_features, teacher_features)``, likewise; an `nn.Module` with parameters is trained.
        hint_layer: an index into "feats" (-1: the last), or "pooled_feat".
        projector: module for the student's features before they are compared; trained.
        ce_weight, logit_weight, feature_weight: factors; functions of the epoch (given to `forward_train` as `epoch`)
            or numbers.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        logit_loss: nn.Module | None = None,
        feature_loss: nn.Module | None = None,
        hint_layer: int | str = -1,
        projector: nn.Module | None = None,
        ce_weight: float | Callable[[int], float] = 1.0,
        logit_weight: float | Callable[[int], float] = 1.0,
        feature_weight: float | Callable[[int], float] = 1.0,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.logit_loss, self.feature_loss, self.projector = logit_loss, feature_loss, projector
        self.hint_layer = hint_layer
        self.weights = {"ce": ce_weight, "logit": logit_weight, "feature": feature_weight}
        self.train()

    def train(self, mode: bool = True) -> TransportDistiller:
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets: student, projector, and a loss's own parameters."""
        trained = (self.student, self.projector, self.logit_loss, self.feature_loss)
        return [p for module in trained if isinstance(module, nn.Module) for p in module.parameters()]

    def get_extra_parameters(self) -> int:
        """Number of parameters that are trained besides the student's."""
        own = sum(p.numel() for p in self.student.parameters())
        return sum(p.numel() for p in self.get_learnable_parameters()) - own

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the student, and the weighted losses by name."""
        logits, features = self.student(image)
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(image)
        epoch = kwargs.get("epoch", 0)
        losses = {"loss_ce": self._weight("ce", epoch) * F.cross_entropy(logits.float(), target)}
        if self.logit_loss is not None:
            losses["loss_kd"] = self._weight("logit", epoch) * _call(self.logit_loss, logits, teacher_logits, target)
        if self.feature_loss is not None:
            student_hint, teacher_hint = self._hint(features), self._hint(teacher_features)
            if self.projector is not None:
                student_hint = self.projector(student_hint)
            value = _call(self.feature_loss, student_hint, teacher_hint, target)
            losses["loss_feature"] = self._weight("feature", epoch) * value
        return logits, losses

    def forward_test(self, image: Tensor) -> Tensor:
        return self.student(image)[0]

    def forward(self, **kwargs):
        if self.training:
            return self.forward_train(**kwargs)
        return self.forward_test(kwargs["image"])

    def _weight(self, name: str, epoch: int) -> float:
        weight = self.weights[name]
        return weight(epoch) if callable(weight) else weight

    def _hint(self, features: dict) -> Tensor:
        return features[self.hint_layer] if isinstance(self.hint_layer, str) else features["feats"][self.hint_layer]


def _call(loss: nn.Module, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    function = loss.forward if isinstance(loss, nn.Module) else loss
    takes_labels = "labels" in inspect.signature(function).parameters
    return loss(student, teacher, labels=labels) if takes_labels else loss(student, teacher)
