"""The one table of tolerances, op x quantity x dtype. A test may ask for less, never for more.

An answer passes where ``|actual - expected| <= rtol |expected| + atol max |expected|``: the absolute part is in units
of the largest finite entry of the expected tensor, so a table entry means the same for costs of 1e-3 and of 1e3.
`expected` is the reference in float64 for the same, already rounded, inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Relative to the entry, and relative to the largest entry."""

    rtol: float
    atol: float


_F64, _F32, _F16, _BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# half precision: computed in float32 and rounded once, so half a unit in the last place and the smallest subnormal
_ROUNDED = {_F16: Tolerance(5e-4, 1e-6), _BF16: Tolerance(4e-3, 1e-6)}

TOLERANCES: dict[tuple[str, str], dict[torch.dtype, Tolerance]] = {
    ("cost_matrix", "value"): {_F64: Tolerance(1e-12, 1e-14), _F32: Tolerance(1e-5, 1e-6), **_ROUNDED},
    # rows that nearly coincide; no absolute part, so that every digit of a small distance counts
    ("cost_matrix", "near_coincident"): {_F64: Tolerance(1e-11, 0.0), _F32: Tolerance(1e-5, 0.0)},
    ("cost_matrix", "gradient"): {_F64: Tolerance(1e-11, 1e-12), _F32: Tolerance(1e-5, 2e-5), **_ROUNDED},
    ("sinkhorn", "transport_cost"): {_F64: Tolerance(1e-11, 1e-13), _F32: Tolerance(1e-5, 1e-6)},
    ("sinkhorn", "regularized_cost"): {_F64: Tolerance(1e-11, 1e-12), _F32: Tolerance(1e-5, 1e-5)},
    # the absolute part in units of the largest cost or of epsilon, whichever is larger
    ("sinkhorn", "potential"): {_F64: Tolerance(1e-12, 1e-12), _F32: Tolerance(1e-6, 5e-6)},
    # absolute, for a total mass of 1
    ("sinkhorn", "marginal_error"): {_F64: Tolerance(1e-9, 1e-12), _F32: Tolerance(1e-5, 1e-5)},
    ("sinkhorn", "gradient"): {_F64: Tolerance(1e-9, 1e-9), _F32: Tolerance(1e-4, 1e-4)},
    # Matrix roots: rtol is in the Frobenius norm of each matrix of a batch, see assert_norm_close.
    # for condition numbers of K up to 1e4
    ("polar", "factor"): {_F64: Tolerance(1e-9, 0.0), _F32: Tolerance(1e-4, 0.0)},
    ("polar", "nuclear_norm"): {_F64: Tolerance(1e-12, 0.0), _F32: Tolerance(1e-6, 0.0)},
    # |S S - A| / |A| for condition numbers of A up to 1e8; the error of S itself is in root_tolerance
    ("sqrtm", "residual"): {_F64: Tolerance(1e-12, 0.0), _F32: Tolerance(5e-6, 0.0)},
    # for condition numbers of A up to 1e2; beyond, a fifth of the error of eigh and the Lyapunov formula in float32
    ("sqrtm", "gradient"): {_F64: Tolerance(1e-10, 0.0), _F32: Tolerance(2e-5, 0.0)},
    # in units of tr A + tr B
    ("gaussian_wasserstein", "value"): {_F64: Tolerance(0.0, 1e-12), _F32: Tolerance(0.0, 1e-6)},
    # for condition numbers of K up to 1e4
    ("gaussian_wasserstein", "gradient"): {_F64: Tolerance(1e-9, 0.0), _F32: Tolerance(1e-4, 0.0)},
    # from covariances, for condition numbers of A and B up to 1e4 (value: of any)
    ("bures_distance", "value"): {_F64: Tolerance(0.0, 1e-12), _F32: Tolerance(0.0, 1e-6)},
    ("bures_distance", "gradient"): {_F64: Tolerance(1e-9, 0.0), _F32: Tolerance(2e-4, 0.0)},
    ("gaussian_kl", "value"): {_F64: Tolerance(1e-11, 1e-14), _F32: Tolerance(2e-7, 1e-14)},
    ("gaussian_kl", "gradient"): {_F64: Tolerance(1e-10, 1e-10), _F32: Tolerance(1e-6, 1e-6)},
    ("feature_moments", "mean"): {_F64: Tolerance(1e-14, 1e-14), _F32: Tolerance(5e-7, 5e-7)},
    ("feature_moments", "std"): {_F64: Tolerance(1e-12, 0.0), _F32: Tolerance(2e-6, 0.0)},
    ("feature_moments", "gradient"): {_F64: Tolerance(1e-12, 1e-12), _F32: Tolerance(5e-6, 5e-6)},
    # for potentials that are rounded to the dtype: off by the rounding of f / epsilon, relative
    ("sinkhorn_points", "plan_apply"): {_F64: Tolerance(1e-11, 1e-12), _F32: Tolerance(1e-5, 1e-5)},
}

_UNIT = {_F64: 2.0**-53, _F32: 2.0**-24}  # of rounding


def root_tolerance(dtype: torch.dtype, condition: float) -> float:
    """Bound of |S - A^(1/2)| / |A^(1/2)|, Frobenius norms, for matrices of this condition number (inf: singular).

    A perturbation of the entries of A by their rounding u alone moves the root by u sqrt(condition) / 2, and that of a
    singular matrix by up to sqrt(u): the contract follows that law, and ends at 6 sqrt(u).

    >>> import torch
    >>> root_tolerance(torch.float32, 1e4)
    2e-06
    """
    unit = _UNIT[dtype]
    floor, slope = (2e-6, 0.2) if dtype == _F32 else (1e-13, 4.0)
    return min(max(floor, slope * unit * condition**0.5), 6 * unit**0.5)


def tolerance(op: str, quantity: str, dtype: torch.dtype) -> Tolerance:
    """The table's entry.

    Raises:
        KeyError: no such op, quantity or dtype.

    >>> import torch
    >>> tolerance("cost_matrix", "near_coincident", torch.float32)
    Tolerance(rtol=1e-05, atol=0.0)
    """
    return TOLERANCES[op, quantity][dtype]
