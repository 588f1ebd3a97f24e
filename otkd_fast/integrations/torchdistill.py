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
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses

__all__ = ["MidLevelLoss", "register"]

# called with student and teacher alone
PAIRS = ("SinKD", "WKDFeature", "KD2M", "SinkhornDivergenceLoss", "UniversalLogitDistillation", "MultiLevelOT")
# called with the labels as third argument
LABELLED = ("WKDLogit",)


class MidLevelLoss(nn.Module):
    """``loss(student, teacher)`` of the outputs or inputs of two modules, with the labels where the loss takes them.

    Args:
        loss: name of a class of otkd_fast.losses.
        student_module_path, teacher_module_path: path of the module whose tensor is compared.
        student_module_io, teacher_module_io: 'output' or 'input' of it.
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
        **parameters: Any,
    ) -> None:
        super().__init__()
        if isinstance(parameters.get("cost"), str):
            parameters["cost"] = torch.load(parameters["cost"], weights_only=True)
        self.loss = getattr(losses, loss)(**parameters)
        self.student = student_module_path, student_module_io
        self.teacher = teacher_module_path, teacher_module_io
        self.flatten = flatten
        self.takes_labels = loss in LABELLED or (loss == "KD2M" and parameters.get("metric") in ("cw2", "cw2_gaussian"))

    def forward(self, student_io_dict: dict, teacher_io_dict: dict, targets: Tensor, *args, **kwargs) -> Tensor:
        """The loss of the tensors that torchdistill's hooks stored."""
        student, teacher = (
            outputs[path][io]
            for outputs, (path, io) in ((student_io_dict, self.student), (teacher_io_dict, self.teacher))
        )
        if self.flatten:
            student, teacher = student.flatten(1), teacher.flatten(1)
        return self.loss(student, teacher, targets) if self.takes_labels else self.loss(student, teacher)

    def extra_repr(self) -> str:
        return f"student={'.'.join(self.student)}, teacher={'.'.join(self.teacher)}"


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
    for name in (*PAIRS, *LABELLED):
        if name in PAIRS:
            register_low_level_loss(key=f"otkd_fast.{name}")(getattr(losses, name))
        register_mid_level_loss(key=f"otkd_fast.{name}.mid")(_mid_level(name))


with contextlib.suppress(ImportError):
    register()
