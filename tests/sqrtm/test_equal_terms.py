"""Matrices all of whose terms are alike, I + rho 1 1^T: their sums in float32 are rounded to one side at every step."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import assert_norm_close, backends, root_tolerance

from .cases import RUNS

COMPILED = [run for run in RUNS if run[0] != "triton"]


def equicorrelated(rho, d):
    """I + rho 1 1^T in float32, its root and its condition."""
    A = torch.eye(d) + torch.tensor(rho)
    own, shared = float(A[0, 0]) - float(A[0, 1]), float(A[0, 1])
    low, high = own**0.5, (own + d * shared) ** 0.5
    root = low * torch.eye(d, dtype=torch.float64) + (high - low) / d
    return A, root, 1 + d * shared / own


@pytest.mark.parametrize("d", [24, 80, 112, 120, 300])
@pytest.mark.parametrize("backend, algorithm", COMPILED)
def test_root(backend, algorithm, d):
    if (backend, algorithm) == ("cpu", "jacobi") and d > 24:
        return
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
