"""Argument checks of the functions on points and on square matrices, and what their batches share."""

from __future__ import annotations

from torch import Tensor

from ._validate import HALF_DTYPES, check_same_kind, check_tensor


def check_not_empty(name: str, value: Tensor, axes: int) -> None:
    """The last `axes` axes of `value` have at least one element each."""
    if 0 in value.shape[-axes:]:
        raise ValueError(f"{name}: expected at least one element along its last axes, got shape {tuple(value.shape)}")


def check_square(name: str, value: Tensor) -> None:
    """A real floating-point tensor (..., d, d), d >= 1."""
    check_tensor(name, value, 2, "(..., d, d)")
    if value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{name}: expected square matrices (..., d, d), got shape {tuple(value.shape)}")
    check_not_empty(name, value, 2)


def check_features(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """The last axes of `value` and `other` have the same size."""
    if value.shape[-1] != other.shape[-1]:
        raise ValueError(f"{name}: expected size {other.shape[-1]} like {other_name}, got shape {tuple(value.shape)}")


def check_flag(name: str, value: bool) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def common_batch(**operands: tuple[Tensor, int]) -> list[Tensor]:
    """Tensors of one dtype and device, expanded to the batch axes that all of them have that have any.

    Args:
        **operands: name -> (tensor, number of its last axes that are no batch axes).
    """
    first_name, (first, _) = next(iter(operands.items()))
    owner, batch = "", first.shape[:0]
    for name, (tensor, axes) in operands.items():
        check_same_kind(name, tensor, first_name, first)
        own = tensor.shape[: tensor.dim() - axes]
        if len(own) and not owner:
            owner, batch = name, own
        elif len(own) and own != batch:
            raise ValueError(
                f"{name}: expected the batch axes of {owner}, {tuple(batch)}, or none, got shape {tuple(tensor.shape)}"
            )
    return [tensor.expand(batch + tensor.shape[tensor.dim() - axes :]) for tensor, axes in operands.values()]


def in_float32(*tensors: Tensor) -> list[Tensor]:
    """float16 and bfloat16 tensors as float32, others as they are."""
    return [tensor.float() if tensor.dtype in HALF_DTYPES else tensor for tensor in tensors]
