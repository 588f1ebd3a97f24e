"""What WCoRD's global part keeps: embeddings of the whole training set, and layers of spectral norm 1."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._values import values_readable
from ..functional._validate import not_negative_float, positive_int


class MemoryBank(nn.Module):
    """One embedding of unit length for each training sample, a running mean of those that were seen (a buffer)."""

    def __init__(self, num_samples: int, embedding_dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = not_negative_float("momentum", momentum)
        if self.momentum > 1:
            raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")
        bound = math.sqrt(3 / embedding_dim)
        entries = torch.empty(positive_int("num_samples", num_samples), embedding_dim).uniform_(-bound, bound)
        self.register_buffer("entries", entries)

    def draw(self, rows: int, count: int) -> Tensor:
        """(rows, count, d): entries drawn uniformly, with replacement, from all."""
        index = torch.randint(self.entries.shape[0], (rows * count,), device=self.entries.device)
        return self.entries.index_select(0, index).view(rows, count, -1)

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Tensor, mask: Tensor | None = None) -> None:
        """Moves the entries `index` (n,) towards `embeddings` (n, d); of equal indices one counts.

        Rows that the mask leaves out become copies of the first that counts: no shape depends on the mask.
        """
        if mask is not None:
            first = mask.to(torch.uint8).argmax(0, keepdim=True)  # (1,), 0 if none counts
            index = torch.where(mask, index, torch.where(mask.any(), index.index_select(0, first), 0))
            embeddings = torch.where(mask[:, None], embeddings, embeddings.index_select(0, first))
        before = self.entries.index_select(0, index)
        moved = F.normalize(torch.lerp(embeddings.to(self.entries.dtype), before, self.momentum), dim=-1)
        self.entries.index_copy_(0, index, moved if mask is None else torch.where(mask.any(), moved, before))

    def check(self, index: Tensor | None, features: Tensor, mask: Tensor | None = None) -> None:
        """`index` is (n,) int64 on the device of `features`; its range in the rows that count where it can be read."""
        size = features.shape[0]
        if index is None:
            raise ValueError(f"index: expected the samples' positions ({size},) with a memory bank, got None")
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index: expected an int64 tensor, got {got}")
        if index.shape != (size,):
            raise ValueError(f"index: expected shape ({size},), got {tuple(index.shape)}")
        if index.device != features.device:
            raise ValueError(f"index: expected device {features.device} as student_features, got {index.device}")
        if not values_readable(index, mask):
            return
        index = index if mask is None else index[mask]
        if index.numel():
            low, high = (int(value) for value in torch.aminmax(index))
            if low < 0 or high >= self.entries.shape[0]:
                raise ValueError(f"index: expected positions in [0, {self.entries.shape[0]}), got {low} to {high}")

    def extra_repr(self) -> str:
        return f"num_samples={self.entries.shape[0]}, momentum={self.momentum}"


class SpectralLinear(nn.Module):
    """A linear layer whose weight is divided by its largest singular value, followed by one power iteration a training
    step.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        layer = nn.Linear(in_features, out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("left", F.normalize(torch.randn(out_features), dim=0))
        self.register_buffer("right", F.normalize(torch.randn(in_features), dim=0))
        for _ in range(30):
            self._iterate()

    @torch.no_grad()
    def _iterate(self) -> None:
        self.right.copy_(F.normalize(self.weight.mT @ self.left, dim=0))
        self.left.copy_(F.normalize(self.weight @ self.right, dim=0))

    def normalised_weight(self) -> Tensor:
        """weight / sigma; the singular vectors are constants for the gradient."""
        if self.training:
            self._iterate()
        left, right = self.left.clone(), self.right.clone()  # the next step changes them in place
        return self.weight / torch.dot(left, self.weight @ right)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised_weight(), self.bias)
