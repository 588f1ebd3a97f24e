"""The check of masses, natively. No operator: it answers on the host, and nothing is recorded or traced."""

from __future__ import annotations

from torch import Tensor

from ._library import DTYPE_CODES, native


def can_check_masses(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether :func:`masses_right` takes these masses: CPU tensors (..., n), (..., m) of one dtype and batch."""
    if native is None:
        return False
    if a is None or b is None:
        given = b if a is None else a
        return given.dtype in DTYPE_CODES and given.shape[-1] > 0
    of_a, of_b = a.shape, b.shape
    if of_a[-1] == 0 or of_b[-1] == 0:
        return False
    return a.dtype == b.dtype and a.dtype in DTYPE_CODES and of_a[:-1] == of_b[:-1]


def masses_right(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    """Whether all are >= 0 and the totals positive, finite and equal to within `tolerance`; None: uniform, total 1."""
    given = b if a is None else a
    a, b = _in_rows(a), _in_rows(b)
    rows_a, rows_b = _rows(a), _rows(b)
    return native.masses_right(DTYPE_CODES[given.dtype], rows_a, rows_b, given.numel() // given.shape[-1], tolerance)


def _in_rows(weights: Tensor | None) -> Tensor | None:
    """Equidistant rows of adjacent masses."""
    if weights is None or weights.dim() == 2 and weights.stride(1) == 1:
        return weights
    return weights.detach().contiguous()


def _rows(weights: Tensor | None) -> tuple[int, int, int]:
    """Address, size and distance of the rows."""
    if weights is None:
        return 0, 1, 1
    size = weights.shape[-1]
    return weights.data_ptr(), size, weights.stride(0) if weights.dim() == 2 else size
