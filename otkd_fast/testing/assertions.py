"""Comparisons by the table of tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from .tolerances import tolerance


def assert_close(
    actual: Tensor, expected: Tensor, op: str, quantity: str, *, scale: float | None = None, context: str = ""
) -> None:
    """`actual` equals `expected` up to the table's entry for ``(op, quantity, actual.dtype)``.

    Shapes must be the same, infinities must be in the same places, NaN is never equal to anything.

    Args:
        actual: any dtype of the table.
        expected: the same values, usually in float64.
        scale: unit of the absolute part; None: the largest finite entry of `expected`.
        context: said first in the message of a failure.

    Raises:
        AssertionError: with the worst entry.

    >>> import torch
    >>> assert_close(torch.ones(2), torch.ones(2, dtype=torch.float64), "cost_matrix", "value")
    """
    rtol, atol = tolerance(op, quantity, actual.dtype)
    if actual.shape != expected.shape:
        raise AssertionError(f"{context} {op} {quantity}: shape {tuple(actual.shape)} != {tuple(expected.shape)}")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = expected.isfinite()
    if expected.isnan().any() or actual.isnan().any():
        counts = f"{int(actual.isnan().sum())} in actual, {int(expected.isnan().sum())} in expected"
        raise AssertionError(f"{context} {op} {quantity}: NaN, {counts}")
    if not torch.equal(actual[~finite], expected[~finite]) or not torch.equal(actual.isfinite(), finite):
        raise AssertionError(f"{context} {op} {quantity}: infinities differ: {actual} and {expected}")
    if not finite.any():
        return
    actual, expected = actual[finite], expected[finite]
    scale = float(expected.abs().max()) if scale is None else scale
    excess = (actual - expected).abs() - rtol * expected.abs() - atol * scale
    worst = int(excess.argmax())
    if excess[worst] > 0:
        got, want = float(actual[worst]), float(expected[worst])
        raise AssertionError(
            f"{context} {op} {quantity}: got {got!r}, expected {want!r}, difference {abs(got - want):.3e} > "
            f"{rtol:g} * {abs(want):.3e} + {atol:g} * {scale:.3e}; "
            f"{int((excess > 0).sum())} of {excess.numel()} entries are off"
        )


def assert_norm_close(actual: Tensor, expected: Tensor, bound: float, *, context: str = "") -> None:
    """|actual - expected| <= bound |expected| in the Frobenius norm of each matrix (..., n, m); NaN never passes.

    Raises:
        AssertionError: with the worst matrix.

    >>> import torch
    >>> assert_norm_close(torch.eye(2), torch.eye(2, dtype=torch.float64), 1e-6)
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{context}: shape {tuple(actual.shape)} != {tuple(expected.shape)}")
    expected = expected.detach().double().cpu()
    unit = expected.abs().amax((-2, -1), keepdim=True)  # squares must not vanish
    unit = torch.where(unit > 0, unit, 1)
    difference = (actual.detach().double().cpu() - expected) / unit
    error, size = (torch.linalg.matrix_norm(t).reshape(-1) for t in (difference, expected / unit))
    wrong = ~(error <= bound * size)
    if wrong.any():
        worst = int((error / size).nan_to_num(nan=torch.inf).argmax())
        off = float(error[worst] / size[worst])
        count = f"{int(wrong.sum())} of {wrong.numel()} matrices are"
        raise AssertionError(f"{context}: matrix {worst} is off by {off:.3e} > {bound:g}; {count}")


def assert_potentials_equivalent(
    f: Tensor, g: Tensor, expected_f: Tensor, expected_g: Tensor, *, context: str = ""
) -> None:
    """Potentials equal up to the constant that may move from f to g: compares f and g after removing the mean shift.

    Args:
        f, expected_f: (..., n).
        g, expected_g: (..., m).

    >>> import torch
    >>> f, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    >>> assert_potentials_equivalent(f + 5, g - 5, f, g)
    """
    served = expected_f.isfinite() & f.isfinite()
    count = served.sum(-1, keepdim=True).clamp(min=1)
    shift = torch.where(served, f.double() - expected_f.double(), 0).sum(-1, keepdim=True) / count  # (..., 1)
    assert_close((f.double() - shift).to(f.dtype), expected_f, "sinkhorn", "potential", context=f"{context} f")
    assert_close((g.double() + shift).to(g.dtype), expected_g, "sinkhorn", "potential", context=f"{context} g")
