"""Triton kernels under the interpreter in guarded memory.

The interpreter does not notice accesses out of bounds. Here every access is checked twice: each address that a kernel
loads or stores, where it is not masked off, must lie in a tensor of its arguments; and inputs and results lie between
bands of NaN that must be untouched afterwards. The interpreter also cuts float32 to bfloat16 off where a GPU rounds to
nearest: here it rounds; and it multiplies float32 matrices in float32 whatever precision a product asks for: here one
TF32 product has the errors of TF32, and three have those of three.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

_BAND_BYTES = 8192


class OutOfBoundsError(AssertionError):
    """A kernel read or wrote outside of its arguments."""


class Guards:
    """Tensors between bands of NaN; made by :func:`guarded`."""

    def __init__(self) -> None:
        self._buffers: list[tuple[str, Tensor, Tensor, Tensor]] = []  # name, bytes of the buffer, inside, their copy
        self.launches = 0  # of kernels

    def input(self, tensor: Tensor | None, name: str = "input") -> Tensor | None:
        """A contiguous copy between bands, which no kernel may change."""
        if tensor is None:
            return None
        copy = self.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        copy.copy_(tensor)
        buffer, inside = self._buffers.pop()[1:3]
        self._buffers.append((name, buffer, inside, inside.clone()))
        return copy

    def empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory, NaN, between bands."""
        count = torch.Size(shape).numel()
        band = _BAND_BYTES // dtype.itemsize
        flat = torch.empty(count + 2 * band, dtype=dtype, device=device)
        buffer = flat.view(torch.uint8)
        buffer.fill_(0xFF)  # NaN in every floating-point format, -1 in integers
        inside = flat[band : band + count]
        self._buffers.append((f"result or workspace {tuple(shape)}", buffer, inside.view(torch.uint8), None))
        return inside.view(shape)

    def check(self) -> None:
        """Raise OutOfBoundsError where a band or an input is not what it was."""
        for name, buffer, inside, before in self._buffers:
            start, stop = _BAND_BYTES, _BAND_BYTES + inside.numel()
            for where, band in (("before", buffer[:start]), ("behind", buffer[stop:])):
                if bool((band != 0xFF).any()):
                    raise OutOfBoundsError(f"a kernel wrote {where} {name}")
            if before is not None and not torch.equal(before, inside):
                raise OutOfBoundsError(f"a kernel wrote to {name}")


@contextlib.contextmanager
def guarded() -> Iterator[Guards]:
    """Guards for the Triton kernels launched in the block; at its end the bands are checked.

    Results and workspaces that the kernels' host functions allocate lie between bands; the tensors that the test makes
    do so if it passes them through `input`. The functions below do both.

    Raises:
        OutOfBoundsError: a kernel read or wrote out of bounds, or wrote to an input.
    """
    runtime = importlib.import_module("otkd_fast.triton_kernels._runtime")
    guards, before = Guards(), runtime._allocate
    runtime._allocate = lambda shape, *, dtype, device: guards.empty(shape, dtype=dtype, device=device)
    try:
        with _checked_addresses(guards):
            yield guards
    finally:
        runtime._allocate = before
    guards.check()


def run_guarded(function: Callable, *arguments, **options):
    """`function` with its tensor arguments between bands, its kernels checked; at least one must have been launched.

    Leaves that require a gradient stay differentiable: the copies are made inside of autograd.
    """

    def place(value):
        if not isinstance(value, Tensor):
            return value
        if value.requires_grad:
            return _Placed.apply(value, guards)
        return guards.input(value)

    with guarded() as guards:
        result = function(*map(place, arguments), **{name: place(value) for name, value in options.items()})
    if guards.launches == 0:
        raise AssertionError("no Triton kernel was launched")
    return result


def gradients_guarded(function: Callable, inputs: tuple[Tensor, ...], weights: Callable | None = None):
    """Value of `function(*inputs)` and the gradients of its sum, forward and backward in guarded memory.

    Args:
        function: of the placed copies of `inputs` to a tensor or a tuple of tensors.
        inputs: leaves; those that require a gradient get one.
        weights: index of an output -> weights of its entries; None: ones.

    Returns:
        (outputs, gradients of the inputs that require one)
    """
    with guarded() as guards:
        placed = [_Placed.apply(x, guards) if x.requires_grad else guards.input(x) for x in inputs]
        outputs = function(*placed)
        many = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((out * (1 if weights is None else weights(i))).sum() for i, out in enumerate(many))
        leaves = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(total, leaves)
    if guards.launches == 0:
        raise AssertionError("no Triton kernel was launched")
    return outputs, grads


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, guards: Guards) -> Tensor:
        return guards.input(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def repair_rounding() -> None:
    """From now on the interpreter rounds float32 to the nearest bfloat16, as a GPU does."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    before = builder.cast_impl
    if getattr(before, "rounds", False):
        return

    def cast(self, source, kind):
        if source.dtype.scalar.name == "fp32" and kind.scalar.name == "bf16":
            rounded = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), kind.scalar)
        return before(self, source, kind)

    cast.rounds = True
    builder.cast_impl = cast


def repair_products() -> None:
    """From now on the interpreter's float32 products are TF32 products where that is what a kernel asks for."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    before = builder.create_dot
    if getattr(before, "by_precision", False):
        return

    def dot(self, a, b, d, precision, *rest):
        name = str(getattr(precision, "name", precision)).rpartition(".")[2]
        if a.data.dtype != np.float32 or name not in ("TF32", "TF32x3"):
            return before(self, a, b, d, precision, *rest)
        high_a, high_b = _tf32(a.data), _tf32(b.data)
        total = d.data + np.matmul(high_a, high_b)
        if name == "TF32x3":
            total += np.matmul(_tf32(a.data - high_a), high_b) + np.matmul(high_a, _tf32(b.data - high_b))
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    dot.by_precision = True
    builder.create_dot = dot


def _tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest with 10 bits after the point, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return np.where(np.isfinite(x), (rounded & np.uint32(0xFFFFE000)).view(np.float32), x)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last of the elements of a tensor."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


@contextlib.contextmanager
def _checked_addresses(guards: Guards) -> Iterator[None]:
    """The interpreter's loads and stores compared with the memory of the arguments of the kernel that runs."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    repair_rounding()
    repair_products()
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    before = executor.__call__, builder.create_masked_load, builder.create_masked_store
    spans: list[tuple[np.ndarray, np.ndarray]] = []

    def call(self, *arguments, **options):
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        bounds = np.array([_span(tensor) for tensor in tensors], dtype=np.uint64).reshape(-1, 2)
        spans.append((bounds[:, 0], bounds[:, 1], self.fn.__name__))
        guards.launches += 1
        try:
            return before[0](self, *arguments, **options)
        finally:
            spans.pop()

    def check(pointers, mask, what: str) -> None:
        at = (
            pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.uint64).reshape(-1, 1)
        )
        starts, stops, kernel = spans[-1]
        width = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        outside = ~((at >= starts) & (at + width <= stops)).any(-1)
        if outside.any():
            raise OutOfBoundsError(f"{kernel} {what} {int(outside.sum())} elements outside of its arguments")

    def load(self, pointers, mask, *rest):
        check(pointers, mask, "loads")
        return before[1](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        check(pointers, mask, "stores")
        return before[2](self, pointers, value, mask, *rest)

    executor.__call__, builder.create_masked_load, builder.create_masked_store = call, load, store
    try:
        yield
    finally:
        executor.__call__, builder.create_masked_load, builder.create_masked_store = before
