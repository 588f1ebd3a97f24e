"""The losses in torchdistill's registries: name this module among the `dependencies` of a configuration.

    dependencies:
      - name: 'otkd_fast.integrations.torchdistill'

registers low-level losses, called with two tensors (``loss(input, target)``, through a `criterion_wrapper`), under
``otkd_fast.SinKD``, ``otkd_fast.WKDFeature``, ``otkd_fast.KD2M`` and so on, and mid-level losses, which take their
tensors and, where they need them, the labels by themselves, under the same names with ``.mid`` at the end:

    criterion:
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          transport:
            criterion:
              key: 'otkd_fast.WKDLogit.mid'
              kwargs:
                student_module_path: 'fc'
                student_module_io: 'output'
                teacher_module_path: 'fc'
                teacher_module_io: 'output'
                cost: 'cost.pt'            # the file of a tensor
                temperature: 2.0
                gamma: 30.0
            weight: 1.0

``otkd_fast.WKL.mid`` and ``otkd_fast.WKLFeature.mid`` need the stage of the training, of which torchdistill tells a
criterion nothing: give them `num_epochs` and `steps_per_epoch` (batches an epoch), and they count their calls.

WCoRD's local part is ``otkd_fast.wcord_local``. The whole of WCoRD has parameters, and torchdistill's optimizers train
those of models only: put the WCoRD into the student model, or use another of the integrations.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..functional._validate import positive_int

__all__ = ["MidLevelLoss", "register"]

# called with student and teacher alone
PAIRS = (
    "SinKD", "WKDFeature", "KD2M", "SinkhornDivergenceLoss", "UniversalLogitDistillation", "MultiLevelOT",
    "wcord_local",
)  # fmt: skip
# called with the labels as third argument
LABELLED = ("WKDLogit", "WKL")
# called with the progress of the training after these
STAGED = ("WKL", "WKLFeature")


class WCoRDLocal(nn.Module):
    """:func:`otkd_fast.losses.wcord_local` with its parameters given once."""

    def __init__(self, **parameters: Any) -> None:
        super().__init__()
        self.parameters_of_loss = parameters

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings (n, d) and (m, d)."""
        return losses.wcord_local(student, teacher, **self.parameters_of_loss)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.parameters_of_loss.items())


class MidLevelLoss(nn.Module):
    """``loss(student, teacher)`` of the outputs or inputs of two modules, with the labels where the loss takes them.

    Args:
        loss: name of a class of otkd_fast.losses, or "wcord_local".
        student_module_path, teacher_module_path: path of the module whose tensor is compared.
        student_module_io, teacher_module_io: 'output' or 'input' of it.
        num_epochs, steps_per_epoch: of WKL and WKLFeature: with them the progress is the number of the epoch, from 1,
            over `num_epochs`. Calls in training mode are the steps; `first_epoch` is that of the first.
        flatten: True gives the loss (n, d) features of maps (n, d, 1, 1).
        parameters: of the loss. A `cost` that is a path is loaded.
    """

    def __init__(
        self,
        loss: str,
        student_module_path: str,
        teacher_module_path: str,
        student_module_io: str = "output",
        teacher_module_io: str = "output",
        flatten: bool = False,
        num_epochs: int | None = None,
        steps_per_epoch: int | None = None,
        first_epoch: int = 1,
        **parameters: Any,
    ) -> None:
        super().__init__()
        self.staged = loss in STAGED
        if self.staged:
            self.num_epochs = positive_int("num_epochs", num_epochs)
            self.steps_per_epoch = positive_int("steps_per_epoch", steps_per_epoch)
            self.first_epoch, self.steps = positive_int("first_epoch", first_epoch), 0
        elif num_epochs is not None or steps_per_epoch is not None:
            raise ValueError(f"num_epochs, steps_per_epoch: expected for {' and '.join(STAGED)} only, not for {loss}")
        if isinstance(parameters.get("cost"), str):
            parameters["cost"] = torch.load(parameters["cost"], weights_only=True)
        self.loss = _class_of(loss)(**parameters)
        self.student = student_module_path, student_module_io
        self.teacher = teacher_module_path, teacher_module_io
        self.flatten = flatten
        of_labels = "cw2", "cw2_gaussian", "jw2"
        self.takes_labels = loss in LABELLED or (loss == "KD2M" and parameters.get("metric") in of_labels)

    def forward(self, student_io_dict: dict, teacher_io_dict: dict, targets: Tensor, *args, **kwargs) -> Tensor:
        """The loss of the tensors that torchdistill's hooks stored."""
        student, teacher = (
            outputs[path][io]
            for outputs, (path, io) in ((student_io_dict, self.student), (teacher_io_dict, self.teacher))
        )
        if self.flatten:
            student, teacher = student.flatten(1), teacher.flatten(1)
        given = [targets] if self.takes_labels else []
        if self.staged:
            given.append(min(self.first_epoch + self.steps // self.steps_per_epoch, self.num_epochs) / self.num_epochs)
            self.steps += self.training
        return self.loss(student, teacher, *given)

    def extra_repr(self) -> str:
        return f"student={'.'.join(self.student)}, teacher={'.'.join(self.teacher)}"


def _class_of(loss: str) -> type[nn.Module]:
    return WCoRDLocal if loss == "wcord_local" else getattr(losses, loss)


def _mid_level(name: str):
    def make(**kwargs: Any) -> MidLevelLoss:
        return MidLevelLoss(name, **kwargs)

    make.__name__ = name
    return make


def register() -> None:
    """Enters the losses into torchdistill's registries; importing this module does it where torchdistill is installed.

    Raises:
        ImportError: it is not.
    """
    try:
        from torchdistill.losses.registry import register_low_level_loss, register_mid_level_loss
    except ImportError as error:
        raise ImportError("register: needs torchdistill 1.0 or newer (pip install torchdistill)") from error
    for name in dict.fromkeys((*PAIRS, *LABELLED, *STAGED)):
        if name in PAIRS:
            register_low_level_loss(key=f"otkd_fast.{name}")(_class_of(name))
        register_mid_level_loss(key=f"otkd_fast.{name}.mid")(_mid_level(name))


with contextlib.suppress(ImportError):
    register()
