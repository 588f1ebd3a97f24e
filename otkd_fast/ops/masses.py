"""The check of masses, natively. No operator: it answers on the host, and nothing is recorded or traced."""

from __future__ import annotations

from torch import Tensor

from ._library import DTYPE_CODES, address, contiguous, native


def can_check_masses(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether :func:`masses_right` takes these masses: CPU tensors (..., n), (..., m) of one dtype and batch."""
    if native is None:
        return False
    if a is None or b is None:
        return (b if a is None else a).dtype in DTYPE_CODES
    return a.dtype == b.dtype and a.dtype in DTYPE_CODES and a.shape[:-1] == b.shape[:-1]


def masses_right(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    """Whether all are >= 0 and the totals positive, finite and equal to within `tolerance`; None: uniform, total 1."""
    a, b = contiguous(a), contiguous(b)
    given = b if a is None else a
    n, m = (1 if weights is None else weights.shape[-1] for weights in (a, b))
    code, batch = DTYPE_CODES[given.dtype], given.numel() // given.shape[-1]
    return native.masses_right(code, address(a), address(b), batch, n, m, tolerance)
