"""Roots, polar factors and distances on every instruction set that this processor has."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import (
    assert_norm_close,
    covariance,
    instruction_sets,
    root_tolerance,
    tolerance,
    use_instruction_set,
)

from .cases import DTYPES, lyapunov, root


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_roots_and_gradients(instruction_set, dtype, generator):
    for d, algorithms in (
        (7, ("jacobi", "polar", "tridiagonal")),
        (30, ("polar", "tridiagonal")),
        (110, ("polar", "tridiagonal")),
    ):
        A = covariance("geometric 1e2", d, generator=generator, batch=(3,)).to(dtype).requires_grad_()
        G = torch.randn(3, d, d, generator=generator, dtype=dtype)
        expected, gradient = root(A.detach()), lyapunov(A.detach().double(), G.double())
        for algorithm in algorithms:
            with use_instruction_set(instruction_set):
                S = otkd_fast.sqrtm(A, algorithm=algorithm)
                (grad,) = torch.autograd.grad(S, A, G)
            context = f"{algorithm}, {d}"
            assert torch.equal(S, S.mT) and torch.equal(grad, grad.mT), context
            assert_norm_close(S.detach(), expected, 2 * root_tolerance(dtype, 1e2), context=context)
            assert_norm_close(grad, gradient, tolerance("sqrtm", "gradient", dtype).rtol, context=context)


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_distances(instruction_set, generator):
    for n, d in ((12, 20), (40, 70), (70, 40)):
        x, y = (torch.randn(2, n, d, generator=generator).requires_grad_() for _ in range(2))
        wide = [leaf.detach().double().requires_grad_() for leaf in (x, y)]
        with use_instruction_set(instruction_set):
            actual = otkd_fast.gaussian_wasserstein_from_samples(x, y)
            grads = torch.autograd.grad(actual.sum(), (x, y))
        expected = otkd_fast.gaussian_wasserstein_from_samples(*wide, backend="reference")
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
        for grad, exact in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
            assert_norm_close(grad, exact, 1e-4, context=f"{n}, {d}")
