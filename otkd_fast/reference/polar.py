"""Polar factor and nuclear norm of batches of matrices in plain PyTorch.

K = U diag(s) V^T has the polar factor P = U V^T, and the nuclear norm sum s = <K, P>. P comes from odd quintic
polynomials of K whose composition is nearly 1 on [ell, 1], ell = 10^((1 - steps) / 2), in units of the largest s: each
step is the minimax polynomial for the interval that the one before left (Amsel et al., The Polar Express, 2025;
Chen and Chow, 2014). Singular values below ell are damped: their part of P shrinks to 0 with s / ell, so that P = 0 for
K = 0, and the rounding noise of a singular K stays small.

Everything is computed in float64, which neither autocast nor TF32 touches.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

STEPS = {torch.float32: 11, torch.float64: 21}

# Lower ends below CUSHION times the upper end are treated as CUSHION: the exact minimax polynomial would map the
# largest singular values to ell, where rounding decides their sign. SAFETY keeps rounding from leaving the interval.
_CUSHION, _SAFETY = 0.1, 1.01


def polar(K: Tensor, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """Polar factor and nuclear norm.

    Args:
        K: (..., n, m), float32 or float64, n, m >= 1.
        steps: number of polynomials, a key of SCHEDULES; None: STEPS of the dtype.

    Returns:
        P (..., n, m) in the dtype of `K`, nuclear norm (...) in float64. NaN or infinities in a matrix give NaN there.
    """
    n, m = K.shape[-2:]
    wide = K.double()
    X = _normalized(wide if n >= m else wide.mT)  # (..., larger, smaller)
    for a, b, c in SCHEDULES[STEPS[K.dtype] if steps is None else steps]:
        gram = X.mT @ X  # (..., smaller, smaller)
        X = a * X + X @ (b * gram + c * (gram @ gram))
    P = (X if n >= m else X.mT).to(K.dtype)
    # 1.5 <K, P> - 0.5 <K, P P^T P>: an error e of a singular value of P becomes 1.5 e^2
    refined = 1.5 * X - 0.5 * (X @ (X.mT @ X))
    return P, (wide * (refined if n >= m else refined.mT)).sum((-2, -1))


def polar_svd(K: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """The same by singular value decomposition; singular values up to `rtol` times the largest count as 0 in P."""
    U, s, Vh = torch.linalg.svd(K, full_matrices=False)
    kept = s > rtol * s[..., :1]
    return (U * kept.unsqueeze(-2)) @ Vh, s.sum(-1)


def _normalized(X: Tensor) -> Tensor:
    """X with largest singular value at most 1, by its Frobenius norm or sqrt(row sum * column sum)."""
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(largest == 0, 1, largest)  # squares neither overflow nor vanish
    size = X.abs()
    rows, columns = size.sum(-1, keepdim=True).amax(-2, keepdim=True), size.sum(-2, keepdim=True).amax(-1, keepdim=True)
    bound = torch.minimum(rows * columns, size.square().sum((-2, -1), keepdim=True)).sqrt()
    return X / torch.where(bound == 0, 1, bound)


def _schedule(steps: int) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of a x + b x^3 + c x^5, one a step."""
    lower, upper = 10.0 ** ((1 - steps) / 2), 1.0
    result = []
    for step in range(steps):
        a, b, c = _minimax_quintic(max(lower, _CUSHION * upper), upper)
        if lower < _CUSHION * upper:  # centre the images of both ends around 1 again
            middle = (a * lower + b * lower**3 + c * lower**5 + a * upper + b * upper**3 + c * upper**5) / 2
            a, b, c = a / middle, b / middle, c / middle
        if step < steps - 1:
            a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        result.append((float(a), float(b), float(c)))
        lower = a * lower + b * lower**3 + c * lower**5
        upper = 2 - lower
    return tuple(result)


def _minimax_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """Odd quintic closest to 1 on [lower, upper], by Remez exchange of its two inner extrema."""
    if lower > (1 - 1e-5) * upper:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5  # the limit: Newton-Schulz of order 5
    inner = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error, previous = 0.0, math.inf
    while abs(error - previous) > 1e-14:
        previous = error
        points = (lower, *inner, upper)
        system = [[x, x**3, x**5, sign] for x, sign in zip(points, (1, -1, 1, -1), strict=True)]
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


SCHEDULES = {steps: _schedule(steps) for steps in (7, 9, 11, 21)}
