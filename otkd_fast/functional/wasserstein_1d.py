"""wasserstein_1d: exact optimal transport on the line, by sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from .._values import values_readable
from ._validate import HALF_DTYPES, check_masses, check_same_kind, check_tensor


def wasserstein_1d(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: int = 1,
) -> Tensor:
    r"""W_p^p between weighted points on the line: the least cost of moving masses `a` at `x` to masses `b` at `y`.

        W_p^p = min over plans P of sum_ij P_ij |x_i - y_j|^p = integral over q of |F_x^-1(q) - F_y^-1(q)|^p

    with the quantile functions F^-1 of the two measures. Points are sorted and matched by quantiles, in
    O((n + m) log(n + m)); without masses and for n = m this is the mean of ``|x_(i) - y_(i)|^p``, i-th by i-th point.

    Differentiable any number of times, by the points and by the masses. ``|0|`` has derivative 0, and the position of
    a point without mass has gradient 0. The gradient by the masses is a pair of dual potentials: it means something
    along directions that keep the totals equal.

    Args:
        x: (..., n), n >= 1, float16, bfloat16, float32 or float64.
        y: (..., m), m >= 1, same dtype and device. All arguments have the same batch axes; those without are shared.
        a: (..., n) masses >= 0, or (n,); None: 1/n each.
        b: (..., m) masses >= 0, or (m,); None: 1/m each. The totals of `a` and `b` are equal.
        p: 1 or 2.

    Returns:
        (...) in the dtype of `x`; float32 for half-precision inputs, which are computed in float32. A NaN among the
        masses, or the points that have mass, gives NaN.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: wrong rank, sizes, dtypes or devices that do not match, no points, another `p`. On CPU tensors,
            outside torch.compile and torch.func, also masses that are negative or not finite, and totals that are 0 or
            differ.

    Source: Peyre and Cuturi, Computational Optimal Transport (2019), section 2.6.

    >>> import torch, otkd_fast
    >>> otkd_fast.wasserstein_1d(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 5.0]), p=2)
    tensor(2.5000)
    >>> otkd_fast.wasserstein_1d(torch.tensor([0.0]), torch.tensor([1.0, 3.0]), None, torch.tensor([0.25, 0.75]))
    tensor(2.5000)
    """
    batch = _check(x, y, a, b, p)
    if values_readable(a, b) and not (a is None and b is None):
        check_masses(a, b)
    if x.dtype in HALF_DTYPES:
        x, y = x.float(), y.float()
        a, b = None if a is None else a.float(), None if b is None else b.float()
    if a is None and b is None and x.shape[-1] == y.shape[-1]:
        return _power(x.sort(-1).values - y.sort(-1).values, p).mean(-1)
    x, levels_x = _sorted(x, a, batch)
    y, levels_y = _sorted(y, b, batch)
    levels, order = torch.cat([levels_x, levels_y], -1).sort(dim=-1, stable=True)  # (..., n + m)
    masses = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1])).to(x.dtype)
    # the points of an interval, also of the empty one between two equal levels: so the masses' gradients are potentials
    own = (order < x.shape[-1]).long()
    passed_x = own.cumsum(-1) - own
    passed_y = torch.arange(own.shape[-1], device=own.device) - passed_x
    difference = _at(x, passed_x) - _at(y, passed_y)
    without_mass = (masses == 0) & ~difference.isfinite()
    return (masses * _power(torch.where(without_mass, 0, difference), p)).sum(-1)


def _power(difference: Tensor, p: int) -> Tensor:
    return difference.abs() if p == 1 else difference.square()


def _sorted(points: Tensor, masses: Tensor | None, batch: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Points in ascending order (*batch, n), and up to which quantile each reaches, in float64."""
    n = points.shape[-1]
    points, order = points.expand(*batch, n).sort(-1)
    if masses is None:
        levels = torch.arange(1, n + 1, device=points.device, dtype=torch.float64) / n
        return points, levels.expand(*batch, n)
    return points, masses.expand(*batch, n).gather(-1, order).cumsum(-1, dtype=torch.float64)


def _at(points: Tensor, index: Tensor) -> Tensor:
    """Entries of `points`; the rounding of the totals may lead one beyond the last."""
    return points.gather(-1, index.clamp(max=points.shape[-1] - 1))


def _check(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, p: int) -> tuple[int, ...]:
    """Raise for arguments that do not fit; the batch axes."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p: expected 1 or 2, got {type(p).__name__}")
    if p not in (1, 2):
        raise ValueError(f"p: expected 1 or 2, got {p}")
    batch: tuple[int, ...] = ()
    for name, value, letter, of, points in (
        ("x", x, "n", "", x), ("y", y, "m", "", y), ("a", a, "n", "x", x), ("b", b, "m", "y", y),
    ):  # fmt: skip
        if value is None and of:
            continue
        check_tensor(name, value, 1, f"(..., {letter})")
        check_same_kind(name, value, "x", x)
        if of and value.shape[-1] != points.shape[-1]:
            expected = f"{points.shape[-1]} masses, one for each point of {of}"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(value.shape)}")
        if value.shape[-1] == 0:
            raise ValueError(f"{name}: expected at least one point, got shape {tuple(value.shape)}")
        if value.dim() > 1 and batch and value.shape[:-1] != batch:
            raise ValueError(f"{name}: expected batch axes {tuple(batch)} or none, got shape {tuple(value.shape)}")
        batch = batch or value.shape[:-1]
    return batch
