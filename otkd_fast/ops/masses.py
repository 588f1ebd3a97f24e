"""The check of marginals in one pass of the native module; no torch op: it reads the values of CPU tensors."""

from __future__ import annotations

import math

from torch import Tensor

from ._library import DTYPE_CODES, native

_ABSENT = (0, 0, 0, 0)


def surely_right(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool | None:
    """Whether `a` (..., n) and `b` (..., m) are >= 0 with equal totals > 0; None where the native module cannot tell."""
    like = a if a is not None else b
    if native is None or like is None or like.dtype not in DTYPE_CODES:
        return None
    rows_a, rows_b = _rows(a), _rows(b)
    if rows_a is None or rows_b is None:
        return None
    batch = max(1 if x is None else math.prod(x.shape[:-1]) for x in (a, b))
    return native.masses_right(DTYPE_CODES[like.dtype], rows_a, rows_b, batch, tolerance)


def _rows(masses: Tensor | None) -> tuple[int, int, int, int] | None:
    """Address, size, and strides of problems and atoms; None where the problems are not evenly apart."""
    if masses is None:
        return _ABSENT
    if masses.dim() == 1:
        return masses.data_ptr(), masses.shape[0], 0, masses.stride(0)
    if masses.dim() == 2:
        return masses.data_ptr(), masses.shape[1], *masses.stride()
    if masses.is_contiguous():
        return masses.data_ptr(), masses.shape[-1], masses.shape[-1], 1
    return None
