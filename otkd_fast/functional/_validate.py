"""Argument checks shared by the public functions; each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.masses import can_check_masses, masses_right

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# how far the totals of two marginals may be apart, relative: the rounding of a normalisation in that dtype; for float64
# that of one in float32, which also lets the steps of torch.autograd.gradcheck pass
TOTAL_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_SUM_DTYPE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in FLOAT_DTYPES}


def check_tensor(name: str, value: Tensor, min_dim: int, axes: str) -> None:
    """A real floating-point tensor with at least `min_dim` axes, described to the user by `axes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {axes}, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.dim() < min_dim:
        raise ValueError(f"{name}: expected shape {axes}, got {tuple(value.shape)}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")


def check_same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` has the dtype and the device of `other`."""
    if value.dtype != other.dtype:
        raise ValueError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """`value` is one of the words in `known`."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(map(repr, known))}, got {type(value).__name__} {value!r}")
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def positive_float(name: str, value: float) -> float:
    """`value` as a float that is finite and > 0."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        value = float(value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return value


def not_negative_float(name: str, value: float) -> float:
    """`value` as a float that is finite and >= 0."""
    return 0.0 if type(value) in (int, float) and value == 0 else positive_float(name, value)


def positive_int(name: str, value: int) -> int:
    """`value` as an int >= 1."""
    if type(value) is not int:
        if isinstance(value, (bool, Tensor)):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")
    return value


def check_masses(a: Tensor | None, b: Tensor | None, same_total: bool = True) -> None:
    """Entries >= 0 and finite, totals > 0, and equal up to rounding if `same_total`; None is uniform with total 1.

    Args:
        a: (..., n) or None.
        b: (..., m) or None; not None if `a` is.
    """
    if same_total and _natively_right(a, b):
        return
    a, b = None if a is None else a.detach(), None if b is None else b.detach()
    if same_total:
        if not _surely_right(a, b):
            _find_what_is_wrong(a, b)
        return
    for name, weights in (("a", a), ("b", b)):
        if weights is not None and weights.numel():
            _total(name, weights)


def _natively_right(a: Tensor | None, b: Tensor | None) -> bool:
    """The check of every call, natively: as tensor operations it would cost as much as a small solve."""
    return can_check_masses(a, b) and masses_right(a, b, TOTAL_TOLERANCE[(b if a is None else a).dtype])


def _surely_right(a: Tensor | None, b: Tensor | None) -> bool:
    """The check where the native one does not serve, in few tensor operations. False if in doubt."""
    given = [weights for weights in (a, b) if weights is not None]
    if any(weights.numel() == 0 for weights in given):
        return True
    tolerance = TOTAL_TOLERANCE[given[0].dtype]
    given = [weights.contiguous() for weights in given]  # reductions over strided rows take ten times as long
    if any(not weights.amin().item() >= 0 for weights in given):
        return False
    total, *other = (weights.sum(-1, dtype=_SUM_DTYPE[weights.dtype]) for weights in given)
    if not other:
        return (total - 1).abs_().amax().item() <= tolerance
    least = total.amin().item()
    return least > 0 and torch.dist(total, other[0], p=math.inf).item() <= tolerance * least


def _find_what_is_wrong(a: Tensor | None, b: Tensor | None) -> None:
    total_a, total_b = _total("a", a), _total("b", b)  # (...)
    if b is None:
        name, total, expected, source = "a", total_a, torch.ones_like(total_a), "the total of uniform b"
    else:
        name, total, source = "b", total_b, "the total of a" if a is not None else "the total of uniform a"
        expected = total_a if a is not None else torch.ones_like(total_b)
    total, expected = torch.broadcast_tensors(total, expected)
    wrong = ((total - expected).abs() > TOTAL_TOLERANCE[(b if b is not None else a).dtype] * expected).reshape(-1)
    if not wrong.any():
        return
    index = int(wrong.to(torch.uint8).argmax())
    got, want = (float(values.reshape(-1)[index]) for values in (total, expected))
    where = f" in problem {index} of the batch" if wrong.numel() > 1 else ""
    raise ValueError(f"{name}: expected total mass {want:.9g} ({source}), got {got:.9g}{where}")


def _total(name: str, weights: Tensor | None) -> Tensor | None:
    """Total mass of each problem (...)."""
    if weights is None:
        return None
    total = weights.sum(-1, dtype=_SUM_DTYPE[weights.dtype])
    smallest = float(weights.min())  # NaN if any entry is
    if not smallest >= 0:
        raise ValueError(f"{name}: expected masses >= 0, got {smallest}")
    least, most = (float(value) for value in torch.aminmax(total))
    if not (least > 0 and most < math.inf):
        wrong = most if most == math.inf else least
        raise ValueError(f"{name}: expected a finite total mass > 0 in each problem, got {wrong}")
    return total
