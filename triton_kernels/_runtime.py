"""What the kernel modules share: Triton or a stand-in, allocation, launches, cases for ahead-of-time compilation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Triton's name of a dtype: in a signature for ahead-of-time compilation ("*fp32" is a pointer), in tl as below
SIGNATURE_DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
TL_DTYPES = {
    dtype: getattr(tl, str(dtype).removeprefix("torch."), None)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


# on one or two architectures; the registers of a thread are not used up there
HELD = "ptxas holds itself to 128 registers, or 64, and spills at most 40 bytes"


class AotCase(NamedTuple):
    """A kernel as it is launched: what tests compile for each architecture, without a GPU.

    `signature` maps each argument that is not a constexpr to its type: "*fp32", "i32", "fp64"; ":16" behind it says
    that address or value is a multiple of 16, as Triton finds out at a launch.
    """

    name: str  # unique in the module, e.g. "fwd l1 bf16"
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True
    may_spill: str = ""  # why it may; "": it must not
    quick: bool = False  # compiled in the default tests too


class _Missing:
    """Stands for a kernel where Triton is not installed."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(f"the Triton kernel {self.__name__} cannot run: {_triton.reason}")


def jit(function: Any = None, *, generic: Sequence[str] = ()) -> Any:
    """triton.jit; a stand-in that raises at its first launch where Triton is not installed.

    `generic`: integers whose value does not matter to the code. Triton compiles anew for others when they become 1 or
    a multiple of 16.
    """
    if function is None:
        return lambda function: jit(function, generic=generic)
    if triton is None:
        return _Missing(function.__name__)
    return triton.jit(function, do_not_specialize=list(generic))


def constant(value: Any) -> Any:
    """A module-level constant that kernels may read."""
    return value if tl is None else tl.constexpr(value)


@jit
def scalar(value, DTYPE: tl.constexpr):  # noqa: N803
    """A float argument in the dtype of the data; annotated as `tl.float64`, or else Triton rounds it to float32."""
    return (tl.full((), 0, DTYPE) + value).to(DTYPE)


_allocate = torch.empty  # otkd_fast.testing.guarded puts its own here


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised tensor on the device of `like`. Every result and workspace of the kernels comes from here.

    Raises:
        torch.OutOfMemoryError: with the shape and the bytes that were asked for.
    """
    shape, dtype = tuple(shape), dtype or like.dtype
    try:
        return _allocate(shape, dtype=dtype, device=like.device)
    except torch.OutOfMemoryError as error:
        gib = math.prod(shape) * dtype.itemsize / 2**30
        what = f"{shape} {dtype} on {like.device}, {gib:.3g} GiB"
        raise torch.OutOfMemoryError(f"otkd_fast: no memory for a tensor {what}: {error}") from error


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The device of `tensor` as the current one: Triton launches there, on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def power_of_2(n: int, least: int = 1, most: int | None = None) -> int:
    """Smallest power of two >= n, within bounds that are powers of two."""
    size = max(least, 1 << max(0, n - 1).bit_length())
    return size if most is None else min(size, most)
