"""What the tests and the self-checks share: tolerances, problems, assertions, the backends to run."""

from .assertions import assert_close, assert_norm_close, assert_potentials_equivalent
from .backends import backends, instruction_sets, use_instruction_set
from .problems import (
    SPECTRA,
    OTProblem,
    block_diagonal_problem,
    covariance,
    equicorrelated,
    feature_rows,
    near_coincident_rows,
    random_problem,
    random_rows,
    spectrum,
)
from .tolerances import TOLERANCES, Tolerance, root_tolerance, tolerance

__all__ = [
    "SPECTRA",
    "TOLERANCES",
    "OTProblem",
    "Tolerance",
    "assert_close",
    "assert_norm_close",
    "assert_potentials_equivalent",
    "backends",
    "block_diagonal_problem",
    "covariance",
    "equicorrelated",
    "feature_rows",
    "instruction_sets",
    "near_coincident_rows",
    "random_problem",
    "random_rows",
    "root_tolerance",
    "spectrum",
    "tolerance",
    "use_instruction_set",
]
