"""SciPy and POT on problems where they are right, and POT where it is not."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import backends, covariance


@pytest.mark.parametrize("backend", backends("sqrtm"))
def test_scipy(backend, generator):
    linalg = pytest.importorskip("scipy.linalg")
    for d in (1, 6, 30):
        A = covariance("geometric 1e4", d, generator=generator)
        expected = torch.from_numpy(linalg.sqrtm(A.numpy()).real)
        torch.testing.assert_close(otkd_fast.sqrtm(A, backend=backend), expected, rtol=1e-9, atol=1e-12)
        U, _ = linalg.polar(A[: max(1, d // 2)].numpy())
        factor, _ = otkd_fast.polar(A[: max(1, d // 2)], backend=backend)
        torch.testing.assert_close(factor, torch.from_numpy(U), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", backends("sqrtm"))
def test_pot(backend, generator):
    ot = pytest.importorskip("ot")
    A = covariance("geometric 1e4", 12, generator=generator, batch=(3,)).requires_grad_()
    G = torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)
    answers = [root(A) for root in (ot.backend.get_backend(A).sqrtm, lambda A: otkd_fast.sqrtm(A, backend=backend))]
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-9, atol=1e-12)
    # POT's gradient is not symmetric where the incoming one is not
    theirs, ours = (torch.autograd.grad(S, A, G + G.mT)[0] for S in answers)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", backends("sqrtm"))
def test_ott(backend, generator):
    """`pip install otkd_fast[ott]`: its coupled iteration, run until it has converged."""
    root = pytest.importorskip("ott.math.matrix_square_root").sqrtm
    jax = pytest.importorskip("jax")
    for d in (3, 12):
        A = covariance("geometric 1e2", d, generator=generator).float()
        theirs = torch.from_numpy(jax.device_get(root(A.numpy(), threshold=1e-6)[0]).copy())
        torch.testing.assert_close(otkd_fast.sqrtm(A, backend=backend), theirs, rtol=1e-4, atol=1e-5)
