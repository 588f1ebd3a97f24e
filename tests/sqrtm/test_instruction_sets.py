"""Roots on every instruction set that this processor has; tests/dispatch/test_instruction_sets.py: the others."""

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
