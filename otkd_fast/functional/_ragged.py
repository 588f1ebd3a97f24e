"""Problems of different sizes packed one after the other: offsets, indices, totals of the masses."""

from __future__ import annotations

import torch
from torch import Tensor

from .._values import values_readable
from ._validate import TOTAL_TOLERANCE


def check_offsets(name: str, offsets: Tensor, like: Tensor) -> Tensor:
    """`offsets` (K + 1,) as int64; on CPU, outside transforms, also that they start at 0 and do not decrease."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name}: expected a tensor (K + 1,), got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{name}: expected shape (K + 1,), got {tuple(offsets.shape)}")
    if offsets.device != like.device:
        raise ValueError(f"{name}: expected the device of cost, {like.device}, got {offsets.device}")
    if values_readable(offsets):
        values = offsets.tolist()
        if values[0] != 0 or any(first > second for first, second in zip(values, values[1:], strict=False)):
            raise ValueError(f"{name}: expected 0 first and no entry smaller than the one before it, got {values}")
    return offsets.to(torch.int64)


def check_last(name: str, offsets: Tensor, size: int) -> None:
    """On CPU, outside transforms: `offsets` end at the number of packed rows or columns."""
    if values_readable(offsets) and offsets[-1] != size:
        raise ValueError(f"{name}: expected {size} last, the number of packed entries, got {int(offsets[-1])}")


def number_of_entries(row_offsets: Tensor, column_offsets: Tensor) -> int:
    """Sum of n_k m_k; waits for the device."""
    return int((row_offsets.diff() * column_offsets.diff()).sum())


def packed_indices(row_offsets: Tensor, column_offsets: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Row and column (E,) among all rows and all columns of each packed entry."""
    n, m = row_offsets.diff(), column_offsets.diff()  # (K,)
    sizes = n * m
    start = sizes.cumsum(0) - sizes
    problem = torch.repeat_interleave(sizes, output_size=entries)  # (E,)
    local = torch.arange(entries, device=sizes.device) - start[problem]
    width = m[problem]
    return row_offsets[problem] + local // width, column_offsets[problem] + local % width


def check_packed_masses(a: Tensor, b: Tensor, row_offsets: Tensor, column_offsets: Tensor, same_total: bool) -> None:
    """Entries >= 0 and finite; in a problem that has both rows and columns totals > 0, and equal if `same_total`."""
    for name, weights in (("a", a), ("b", b)):
        if weights.numel() and not weights.detach().amin() >= 0:
            raise ValueError(f"{name}: expected masses >= 0, got {float(weights.detach().amin())}")
    solved = (row_offsets.diff() > 0) & (column_offsets.diff() > 0)  # (K,)
    totals = [_totals(weights, offsets) for weights, offsets in ((a, row_offsets), (b, column_offsets))]
    for name, total in zip("ab", totals, strict=True):
        wrong = solved & ~((total > 0) & (total < torch.inf))
        if wrong.any():
            k = int(wrong.to(torch.uint8).argmax())
            raise ValueError(f"{name}: expected a finite total mass > 0, got {float(total[k]):.9g} in problem {k}")
    total_a, total_b = totals
    tolerance = max(TOTAL_TOLERANCE[a.dtype], TOTAL_TOLERANCE[b.dtype])
    wrong = solved & ((total_b - total_a).abs() > tolerance * total_a)
    if same_total and wrong.any():
        k = int(wrong.to(torch.uint8).argmax())
        got, want = float(total_b[k]), float(total_a[k])
        raise ValueError(f"b: expected total mass {want:.9g} (the total of a), got {got:.9g} in problem {k}")


def _totals(weights: Tensor, offsets: Tensor) -> Tensor:
    """Total mass (K,) of each problem, in float64."""
    weights = weights.detach().double()
    return torch.segment_reduce(weights, "sum", lengths=offsets.diff(), unsafe=True, initial=0)
