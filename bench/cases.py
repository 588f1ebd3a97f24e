"""What is measured: sizes, inputs, required ratios and accuracy limits, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Batch of b rows with d classes."""

    b: int
    d: int

    def __str__(self) -> str:
        return f"{self.b}x{self.d}"


SIZES = (Size(64, 100), Size(256, 100), Size(1024, 1000))
TEMPERATURE, EPSILON, NUM_ITERS = 2.0, 0.1, 20

# Ratio (peer's time over ours, forward and backward) that the package has to reach, by size and peer.
REQUIRED_SINKD = {
    "64x100": {"released": 10.0, "released-compiled": 4.0, "pot": 12.0, "geomloss": 12.0},
    "256x100": {"released": 6.0, "released-compiled": 3.0, "pot": 6.0, "geomloss": 6.0},
    "1024x1000": {"released": 8.0, "released-compiled": 8.0, "pot": 8.0, "geomloss": 8.0},
}
REQUIRED_COST = {str(size): {"cdist": 10.0} for size in SIZES}

# Relative errors against float64 above which a result counts as wrong and no time is shown.
MAX_VALUE_ERROR = 1e-5
MAX_GRADIENT_ERROR = 1e-3


def logits(size: Size, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits (b, d), float32: the student is a noisy version of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3.0 * torch.randn(size.b, size.d, generator=generator)
    student = 0.7 * teacher + torch.randn(size.b, size.d, generator=generator)
    return student, teacher


def probabilities(size: Size, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The softmax rows (b, d) of `logits`, for the cost matrix alone."""
    student, teacher = logits(size, seed)
    return torch.softmax(student / TEMPERATURE, dim=-1), torch.softmax(teacher / TEMPERATURE, dim=-1)
