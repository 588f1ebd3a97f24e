"""What the tests and the self-checks share: tolerances, problems, assertions, the backends to run."""

from .assertions import assert_close, assert_potentials_equivalent
from .backends import backends, instruction_sets, use_instruction_set
from .problems import (
    OTProblem,
    block_diagonal_problem,
    near_coincident_rows,
    random_problem,
    random_rows,
)
from .tolerances import TOLERANCES, Tolerance, tolerance

__all__ = [
    "TOLERANCES",
    "OTProblem",
    "Tolerance",
    "assert_close",
    "assert_potentials_equivalent",
    "backends",
    "block_diagonal_problem",
    "instruction_sets",
    "near_coincident_rows",
    "random_problem",
    "random_rows",
    "tolerance",
    "use_instruction_set",
]
