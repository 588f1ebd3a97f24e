"""When Python may look at the values of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def values_readable(*tensors: Tensor | None) -> bool:
    """Whether looking at the values is cheap and allowed: ordinary CPU tensors, not traced, not transformed."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(t is None or (t.device.type == "cpu" and type(t) in _PLAIN) for t in tensors)
