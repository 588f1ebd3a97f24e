"""Weights that change over the training, as published with WKD and WKL."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from ..functional._validate import not_negative_float, positive_int

__all__ = ["cosine_decay", "stage_share"]


def cosine_decay(weight: float, epoch: int, epochs: int, start: int = 0) -> float:
    """The weight of WKD's losses in an epoch: constant up to epoch `start`, then half a cosine down to exactly 0.

    ``weight`` while ``epoch <= start``, else ``weight (1 + cos(pi (epoch - start) / (epochs - start))) / 2``.

    Args:
        weight: >= 0.
        epoch: counted from 1, at most `epochs`.
        epochs: their total number.
        start: the last epoch with the full weight; published are 150 of 240 (CIFAR-100) and 0 or 30 of 100 (ImageNet).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an epoch not in 1..epochs, a start not in 0..epochs, a weight that is negative or not finite.

    Source: WKD (arXiv 2412.08139), released code.

    >>> [round(cosine_decay(600, epoch, 240, start=150), 1) for epoch in (1, 150, 195, 240)]
    [600.0, 600.0, 300.0, 0.0]
    """
    weight = not_negative_float("weight", weight)
    epochs, epoch = positive_int("epochs", epochs), positive_int("epoch", epoch)
    if start != 0:
        start = positive_int("start", start)
    if epoch > epochs:
        raise ValueError(f"epoch: expected at most epochs = {epochs}, got {epoch}")
    if start > epochs:
        raise ValueError(f"start: expected at most epochs = {epochs}, got {start}")
    if epoch <= start:
        return weight
    if epoch == epochs:
        return 0.0  # the formula's rounding leaves it
    return 0.5 * weight * (1 + math.cos(math.pi * (epoch - start) / (epochs - start)))


def stage_share(progress: float | Tensor, start: float = 0.0) -> float | Tensor:
    """The share ``g = (1 + cos(pi p)) / 2``, from 1 to 0 over the training, with ``p = (progress - start) / (1 -
    start)``, 1 before `start`: WKL's schedule (start 0), and WKD's (start 150 / 240) as a function of the progress.

    Args:
        progress: epoch / epochs in [0, 1], a number or a tensor of one element (which is not looked at).
        start: in [0, 1]; the progress up to which the share is 1.

    Returns:
        A float, or a 0-dim tensor if `progress` is one.

    Raises:
        TypeError, ValueError: a progress or a start of the wrong type, not in [0, 1], or of several elements.

    Sources: WKL's and WKD's released codes.

    >>> [round(1 - stage_share(epoch / 240), 3) for epoch in (1, 60, 120, 150, 180, 240)]
    [0.0, 0.146, 0.5, 0.691, 0.854, 1.0]
    """
    start = check_share("start", start)
    progress = check_share("progress", progress, tensor=True)
    if isinstance(progress, Tensor):
        late = (progress - start) / (1 - start) if start < 1 else torch.zeros_like(progress)
        return 0.5 * (1 + torch.cos(math.pi * late.clamp(0, 1)))
    if progress <= start:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))


def check_share(name: str, value: float | Tensor, tensor: bool = False) -> float | Tensor:
    """A number in [0, 1] as float, or (with `tensor`) a tensor of one element as 0-dim, in at least float32."""
    if tensor and isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"{name}: expected one number, got shape {tuple(value.shape)} of {value.dtype}")
        return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return float(value)
