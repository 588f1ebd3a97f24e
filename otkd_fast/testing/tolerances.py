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
}


def tolerance(op: str, quantity: str, dtype: torch.dtype) -> Tolerance:
    """The table's entry.

    Raises:
        KeyError: no such op, quantity or dtype.

    >>> import torch
    >>> tolerance("cost_matrix", "near_coincident", torch.float32)
    Tolerance(rtol=1e-05, atol=0.0)
    """
    return TOLERANCES[op, quantity][dtype]
