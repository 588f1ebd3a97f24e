"""What the op files share: the library, registration, and the small change of a raw-pointer call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from .._native import module as native

LIBRARY = torch.library.Library("otkd_fast", "DEF")
DTYPE_CODES = {torch.float32: 0, torch.float64: 1}
_KEPT_WORKSPACE_BYTES = 64 << 20  # a larger workspace is given back after the call
_kept = threading.local()


def register(schema: str, fake: Callable, cpu: Callable) -> None:
    """Define ``otkd_fast::<schema>`` with its fake and, where the native module was built, its CPU implementation."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"otkd_fast::{name}", fake, lib=LIBRARY)
    if native is not None:
        LIBRARY.impl(name, cpu, "CPU")


def dtype_code(tensor: torch.Tensor) -> int:
    """Code of float32 or float64 for the native module."""
    try:
        return DTYPE_CODES[tensor.dtype]
    except KeyError:
        raise TypeError(f"the operators of otkd_fast take float32 or float64, got {tensor.dtype}") from None


def address(tensor: torch.Tensor | None) -> int:
    """Where the data starts; 0 for an operand that is absent (PyTorch's own answer where it has no elements)."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor in memory order (gradients come expanded, with stride 0); None stays None."""
    return None if tensor is None else tensor.contiguous()


def workspace(num_bytes: int) -> torch.Tensor:
    """Scratch memory of one call, kept from call to call by each thread, so that its pages are touched once."""
    if num_bytes > _KEPT_WORKSPACE_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    kept = getattr(_kept, "tensor", None)
    if kept is None or kept.numel() < num_bytes:
        kept = _kept.tensor = torch.empty(max(num_bytes, 1 << 16), dtype=torch.uint8)
    return kept


def product(sizes: Sequence[int]) -> int:
    """Number of problems in these batch sizes."""
    count = 1
    for size in sizes:
        count *= size
    return count
