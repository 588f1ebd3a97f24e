"""Variances far apart: graded matrices D C D, C well conditioned, D over many powers of ten and in any order."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import assert_norm_close, covariance, root_tolerance

from .cases import DTYPES, RUNS, root

COMPILED = [run for run in RUNS if run[0] != "triton"]


def graded(d, span, dtype, generator, batch=(16,)):
    """(*batch, d, d), variances from 1 down to 10^-span."""
    scales = torch.logspace(-span / 2, 0, d, dtype=torch.float64)[torch.randperm(d, generator=generator)]
    A = covariance("geometric 1e2", d, generator=generator, batch=batch)
    return (A * scales * scales.unsqueeze(-1)).to(dtype)


@pytest.mark.parametrize("span", [8, 16, 20, 24, 30, 38, 44])
@pytest.mark.parametrize("backend, algorithm", COMPILED)
def test_roots(backend, algorithm, span, generator):
    """The error of S is that of a well conditioned matrix, or twice it."""
    for d in (8, 20, 28, 100):
        A = graded(d, span, torch.float32, generator, (16 if d < 30 else 2,))
        S = otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)
        assert_norm_close(S, root(A), 2 * root_tolerance(A.dtype, 1), context=f"{d}")


@pytest.mark.parametrize("span", [24, 100, 200, 300])
@pytest.mark.parametrize("algorithm", ["auto", "polar"])
def test_roots_in_float64(algorithm, span, generator):
    for d in (8, 28, 60):
        A = graded(d, span, torch.float64, generator, (2,))
        S = otkd_fast.sqrtm(A, algorithm=algorithm)
        assert_norm_close(S, root(A), root_tolerance(A.dtype, torch.inf), context=f"{d}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_roots_of_diagonal_matrices(dtype, generator):
    """By rotations every variance has its part, to 1e-30 of the largest at least (float64: 1e-290)."""
    span = 30 if dtype == torch.float32 else 290
    for d in (2, 9, 24):
        variances = torch.logspace(-span / 2, span / 2, d, dtype=torch.float64)[torch.randperm(d, generator=generator)]
        A = torch.diag_embed(variances.to(dtype)).expand(16, d, d)
        R = otkd_fast.sqrtm(A, inverse=True, algorithm="jacobi")
        torch.testing.assert_close(R, torch.diag_embed(A.diagonal(dim1=-2, dim2=-1).rsqrt()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("algorithm", ["jacobi", "polar"])
def test_inverse_roots_have_every_direction_or_those_above_rounding(algorithm, generator):
    """As far as roots by pivots reach they have every direction, beyond that they are those by eigenvalues."""
    reach = 30 if algorithm == "jacobi" else 14
    for d in (8, 24):
        for span in (8, 14, 18, 24, 30, 38):
            A = graded(d, span, torch.float32, generator)
            R = otkd_fast.sqrtm(A, inverse=True, algorithm=algorithm).double()
            exact = otkd_fast.sqrtm(A.double(), inverse=True, algorithm="jacobi")
            by_values = otkd_fast.sqrtm(A, inverse=True, algorithm="eigh").double()
            for actual, every, some in zip(R, exact, by_values, strict=True):
                expected = [every] if span <= reach else [every, some]
                assert min((actual - X).norm() / X.norm() for X in expected) < 1e-4, (d, span)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("backend, algorithm", COMPILED)
def test_gradients_are_finite(backend, algorithm, inverse, generator):
    for d in (8, 20, 28, 100):
        for span in (12, 20) if inverse else (12, 20, 30):  # a gradient of the inverse grows as its cube
            A = graded(d, span, torch.float32, generator, (4,)).requires_grad_()
            S = otkd_fast.sqrtm(A, inverse=inverse, algorithm=algorithm, backend=backend)
            weight = torch.randn(A.shape, generator=generator)
            (grad,) = torch.autograd.grad(S, A, weight)
            assert grad.isfinite().all() and torch.equal(grad, grad.mT) and grad.any(), (d, span)


@pytest.mark.parametrize("algorithm", ["jacobi", "polar"])
def test_gradients_have_every_direction_or_those_above_rounding(algorithm, generator):
    """As the inverse roots: each is that of every direction, or that by eigenvalues."""
    for d in (4, 8, 24) if algorithm == "jacobi" else (4, 8, 24, 28):
        for span in (8, 9, 10, 12, 14, 16, 20, 24):
            A = graded(d, span, torch.float32, generator)
            weight = torch.randn(A.shape, generator=generator)

            def gradient(A, algorithm, weight=weight):
                leaf = A.clone().requires_grad_()
                S = otkd_fast.sqrtm(leaf, algorithm=algorithm)
                return torch.autograd.grad(S, leaf, weight.to(A.dtype))[0].double()

            actual, some = gradient(A, algorithm), gradient(A, "eigh")
            every = gradient(A.double(), "jacobi" if d <= 24 else "polar")
            for got, *expected in zip(actual, every, some, strict=True):
                assert min((got - X).norm() / X.norm() for X in expected) < 2e-3, (d, span)
