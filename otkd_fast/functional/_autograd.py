"""What the autograd.Functions of this folder share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether the call must go through an autograd.Function rather than straight to the op.

    True if a gradient may be asked for, or a transform (torch.func, forward-mode AD) must see the call. Under a
    transform `requires_grad` says nothing about outer levels.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def eager() -> bool:
    """Whether no compiler and no transform looks at the call: a Function with `ctx` in its forward serves."""
    return not (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def apply(function: type[torch.autograd.Function], *arguments):
    """``function.apply(*arguments)``; without what that asks on the way (3 us) where no compiler or transform looks."""
    return apply_eager(function, *arguments) if eager() else function.apply(*arguments)


def apply_eager(function: type[torch.autograd.Function], *arguments):
    """:func:`apply` where :func:`eager` was found to be true."""
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(arguments))


def transformed() -> bool:
    """Whether a backward pass must be recorded (create_graph, torch.func) instead of calling the op directly."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


class _Bound:
    """What Signature.bind returns, for arguments that are complete and in order."""

    __slots__ = ("args",)
    kwargs: dict = {}

    def __init__(self, args: tuple) -> None:
        self.args = args

    def apply_defaults(self) -> None:
        pass


class _PositionalSignature(inspect.Signature):
    def bind(self, *args):
        return _Bound(args)


def keep_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Spare each `apply` the inspection of `forward` and the binding to it (8 us); `apply` then takes every argument
    of `forward`, by position.
    """
    parameters = inspect.signature(function.forward).parameters.values()
    function.forward.__signature__ = _PositionalSignature(parameters)
    return function


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors; while compiling, copies of those that come a second time, which dynamo cannot pass to a Function."""
    if not torch.compiler.is_compiling():
        return tensors
    result: list[Tensor | None] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in result)
        result.append(tensor.clone() if again else tensor)
    return tuple(result)


def to_front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """`tensor` with the axis that vmap maps moved to the front."""
    return tensor if tensor is None or dim is None else tensor.movedim(dim, 0)


def mapped(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Like :func:`to_front`; a tensor that vmap does not map is repeated (without a copy) along a new front axis."""
    if tensor is not None and dim is None:
        return tensor.expand(size, *tensor.shape)
    return to_front(tensor, dim)


def each_mapped(info, in_dims, arguments) -> Iterator[list]:
    """The arguments for each entry of the axis that vmap maps, for ops without batch axes."""
    for k in range(info.batch_size):
        yield [x if dim is None else x.select(dim, k) for x, dim in zip(arguments, in_dims, strict=True)]


def no_second_derivative(op: str) -> RuntimeError:
    return RuntimeError(
        f"{op}: the compiled backends have no second derivative; use backend='reference' (see docs/numerics.md)"
    )
