"""What the op files share: the library, registration, and the small change of a raw-pointer call."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _triton
from .._native import module as native

# the CUDA half of the native module, None where it was not built; the tests put an emulated one here
cuda = getattr(native, "cuda", None)

LIBRARY = torch.library.Library("otkd_fast", "DEF")
DTYPE_CODES = {torch.float32: 0, torch.float64: 1}
_KEPT_WORKSPACE_BYTES = 64 << 20  # a larger workspace is given back after the call
_kept = threading.local()


def register(
    schema: str,
    fake: Callable,
    cpu: Callable,
    *,
    cuda: Callable | None = None,
    triton: str | None = None,
    triton_fake: Callable | None = None,
) -> None:
    """Define ``otkd_fast::<schema>`` with its fake and, where the native module was built, its implementations.

    `triton` names the function that serves the twin op ``<name>_triton``, as "module:function" of
    otkd_fast.triton_kernels: same schema, imported at the first call. `triton_fake`: the twin's fake where it allocates
    otherwise. Under Triton's interpreter the twin serves CPU tensors, too.
    """
    name = schema.split("(", 1)[0]
    _define(schema, fake)
    if native is not None:
        LIBRARY.impl(name, cpu, "CPU")
        if cuda is not None and native.build_info()["cuda"]:
            LIBRARY.impl(name, cuda, "CUDA")
    if triton is not None:
        _define(schema.replace(name, f"{name}_triton", 1), triton_fake or fake)
        for key in ("CUDA", "CPU") if _triton.INTERPRETED else ("CUDA",):
            LIBRARY.impl(f"{name}_triton", _lazy(triton), key)


def _define(schema: str, fake: Callable) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"otkd_fast::{schema.split('(', 1)[0]}", fake, lib=LIBRARY)


def _lazy(place: str) -> Callable:
    """The function at "module:function" of otkd_fast.triton_kernels, which needs Triton only when it is called."""
    module, _, function = place.partition(":")
    found: list[Callable] = []

    def call(*arguments):
        if not found:
            found.append(getattr(importlib.import_module(f"otkd_fast.triton_kernels.{module}"), function))
        return found[0](*arguments)

    return call


def operators(name: str) -> dict[str, torch._ops.OpOverload]:
    """Backend -> op of the compiled backends that `name` is defined for. cpu and cuda share it, by dispatch key."""
    op = getattr(torch.ops.otkd_fast, name).default
    twin = getattr(torch.ops.otkd_fast, f"{name}_triton", None)
    return {"cpu": op, "cuda": op} | ({} if twin is None else {"triton": twin.default})


def dtype_code(tensor: Tensor) -> int:
    """Code of float32 or float64 for the native module."""
    try:
        return DTYPE_CODES[tensor.dtype]
    except KeyError:
        raise TypeError(f"the operators of otkd_fast take float32 or float64, got {tensor.dtype}") from None


def address(tensor: Tensor | None) -> int:
    """Where the data starts; 0 for an operand that is absent (PyTorch's own answer where it has no elements)."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor in memory order (gradients come expanded, with stride 0); None stays None."""
    return None if tensor is None else tensor.contiguous()


def workspace(num_bytes: int) -> Tensor:
    """Scratch memory of one call, kept from call to call by each thread, so that its pages are touched once."""
    if num_bytes > _KEPT_WORKSPACE_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    kept = getattr(_kept, "tensor", None)
    if kept is None or kept.numel() < num_bytes:
        kept = _kept.tensor = torch.empty(max(num_bytes, 1 << 16), dtype=torch.uint8)
    return kept


def place(like: Tensor) -> tuple[int, int]:
    """Device and current stream of `like` for the CUDA half; 0, 0 for a CPU tensor, which is on the tests' emulator."""
    if not like.is_cuda:
        return 0, 0
    return like.device.index, torch._C._cuda_getCurrentRawStream(like.device.index)


def launch(op: str, like: Tensor, function: str, *arguments) -> None:
    """Call the CUDA half's `function` on the device of `like` and the stream that is current there.

    Raises:
        RuntimeError: a kernel was not launched; says which op, shape, device and architecture, and what may help.
    """
    try:
        getattr(cuda, function)(*arguments, place(like))
    except RuntimeError as error:
        raise RuntimeError(_failure(op, like, str(error))) from error


def _failure(op: str, like: Tensor, error: str) -> str:
    """`error` of a launch in the words of the caller."""
    where, help_ = str(like.device), ""
    if like.is_cuda:
        major, minor = torch.cuda.get_device_capability(like.device)
        where += f" ({torch.cuda.get_device_name(like.device)}, architecture {major}{minor})"
        built = native.build_info()["cuda_architectures"]
        if "no kernel image" in error or "PTX" in error or "invalid device function" in error:
            help_ = (
                f". This build of otkd_fast has kernels for {built}; in a clone, OTKD_FAST_CUDA_ARCHS={major}{minor} "
                "pip install --force-reinstall --no-deps . builds them for this GPU; backend='reference' needs none"
            )
    dtype = str(like.dtype).removeprefix("torch.")
    return f"{op} on {tuple(like.shape)} {dtype} on {where}: {error}{help_}"


def cuda_workspace(like: Tensor, num_bytes: int) -> Tensor:
    """Scratch memory of one call on the device of `like`; PyTorch's allocator keeps it for the stream's later calls."""
    return like.new_empty(num_bytes, dtype=torch.uint8)


def product(sizes: Sequence[int]) -> int:
    """Number of problems in these batch sizes."""
    count = 1
    for size in sizes:
        count *= size
    return count
