"""What the programs on handwritten digits share: the data, batches, a progress bar, means with their errors."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH = 64


@dataclass
class Digits:
    """Images (n, 64) in [0, 1] and labels (n,), split into two halves with equal class shares."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Progress:
    """A progress bar on one line; without a terminal, one line for every tenth of the work."""

    def __init__(self, total: int, title: str) -> None:
        self.total, self.title, self.done, self.shown = total, title, 0, -1

    def step(self, count: int = 1) -> None:
        self.done += count
        tenth = 10 * self.done // self.total
        if sys.stderr.isatty():
            filled = 30 * self.done // self.total
            end = "\n" if self.done == self.total else ""
            print(
                f"\r{self.title:28} [{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total}",
                end=end,
                file=sys.stderr,
            )
        elif tenth > self.shown:
            self.shown = tenth
            print(f"{self.title}: {self.done}/{self.total}", file=sys.stderr, flush=True)


def load(seed: int, validation: bool = False) -> Digits:
    """The digits, halved by seed; with `validation` the training half is split again, the test half not used."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype("float32")
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.5, stratify=y, random_state=seed)
    if validation:
        train_x, test_x, train_y, test_y = train_test_split(
            train_x, train_y, test_size=0.3, stratify=train_y, random_state=seed
        )
    return Digits(*(torch.as_tensor(part) for part in (train_x, train_y, test_x, test_y)))


def batches(data: Digits, epochs: int, seed: int) -> Iterator[Tensor]:
    """Row indices of each batch; the last short batch of an epoch is dropped. The order depends on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.train_y), generator=generator)
        yield from order[: len(order) // BATCH * BATCH].split(BATCH)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), error
