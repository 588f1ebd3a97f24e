"""Gradients of sqrtm: finite differences, the Lyapunov equation in float64, and what must stay finite."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import SPECTRA, assert_norm_close, backends, covariance, tolerance

from .cases import DTYPES, RUNS, condition, lyapunov

ALL_RUNS = RUNS + [(backend, "newton_schulz") for backend in backends("sqrtm")]


def gradient(A, G, **options):
    A = A.clone().requires_grad_()
    return torch.autograd.grad(otkd_fast.sqrtm(A, **options), A, G)[0]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("backend, algorithm", ALL_RUNS)
def test_gradcheck(backend, algorithm, inverse, generator):
    for name, d in (("geometric 1e2", 4), ("identity", 3), ("geometric 1e2", 1)):
        A = covariance(name, d, generator=generator, batch=(2,)).requires_grad_()
        options = {"inverse": inverse, "algorithm": algorithm, "backend": backend}
        assert torch.autograd.gradcheck(lambda A: otkd_fast.sqrtm(A, **options), A)  # noqa: B023


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("d", [1, 2, 8, 17, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_against_the_lyapunov_equation(backend, algorithm, dtype, d, inverse, generator):
    A = covariance("geometric 1e2", d, generator=generator, batch=(3,)).to(dtype)
    G = torch.randn(3, d, d, generator=generator, dtype=torch.float64).to(dtype)
    actual = gradient(A, G, inverse=inverse, algorithm=algorithm, backend=backend)
    assert torch.equal(actual, actual.mT)
    if inverse:  # d(S^-1) = -S^-1 dS S^-1
        R = torch.linalg.inv(A.double())
        values, V = torch.linalg.eigh(R)
        root = (V * values.sqrt().unsqueeze(-2)) @ V.mT
        expected = -lyapunov(A.double(), root @ ((G + G.mT) / 2).double() @ root)
    else:
        expected = lyapunov(A.double(), G.double())
    bound = tolerance("sqrtm", "gradient", dtype).rtol * (10 if inverse else 1)  # sqrt(condition)
    assert_norm_close(actual, expected, bound)


@pytest.mark.parametrize("backend", backends("sqrtm", compiled_only=True))
@pytest.mark.parametrize("algorithm", ["polar", "tridiagonal"])
def test_sums_of_several_slices(backend, algorithm, generator):
    """Beyond 256 rows a product is summed in slices."""
    A = covariance("geometric 1e2", 270, generator=generator).float()
    G = torch.randn(270, 270, generator=generator)
    options = {"algorithm": algorithm, "backend": backend}
    assert_norm_close(gradient(A, G, **options), lyapunov(A.double(), G.double()), 4e-5)
    S = otkd_fast.sqrtm(A, **options)
    assert_norm_close(S.double() @ S.double(), A.double(), tolerance("sqrtm", "residual", torch.float32).rtol)


@pytest.mark.parametrize("name", ["geometric 1e4", "geometric 1e6", "geometric 1e7", "power law", "two clusters"])
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_float32_is_five_times_closer_than_eigh_and_loewner(backend, algorithm, name, generator):
    """A direct formula in float32 divides by sums of roots that eigh's rounding has spoilt."""
    A = covariance(name, 64, generator=generator, batch=(4,)).float()
    G = torch.randn(4, 64, 64, generator=generator)
    expected = lyapunov(A.double(), G.double())
    plain = torch.linalg.matrix_norm(lyapunov(A, G) - expected).mean()
    if algorithm == "eigh" and backend != "reference":
        pytest.skip("it is that formula")
    error = torch.linalg.matrix_norm(gradient(A, G, algorithm=algorithm, backend=backend) - expected).mean()
    assert condition(name, 64) < 4e3 or error < plain / 5


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_finite_on_every_spectrum(backend, algorithm, dtype, name, inverse, generator):
    A = covariance(name, 24, generator=generator, batch=(2,)).to(dtype)
    G = torch.randn(2, 24, 24, generator=generator, dtype=torch.float64).to(dtype)
    assert gradient(A, G, inverse=inverse, algorithm=algorithm, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend, algorithm", [run for run in RUNS if run[1] in ("eigh", "tridiagonal")])
def test_no_gradient_between_directions_that_only_rounding_keeps_from_zero(backend, algorithm, generator):
    for d in (6, 24, 40):
        rows = torch.randn(33, d // 2, d, generator=generator, dtype=torch.float64)
        A = (rows.mT @ rows).float()  # of rank d / 2 before the rounding
        null = torch.linalg.qr(rows.mT, mode="complete").Q[..., d // 2 :]
        G = torch.randn(A.shape, generator=generator)
        grad = gradient(A, G, algorithm=algorithm, backend=backend).double()
        left = torch.linalg.matrix_norm(null.mT @ grad @ null) / torch.linalg.matrix_norm(grad)
        assert float(left.max()) < 1e-2, d


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_identity_and_zero(backend, algorithm, dtype):
    G = torch.randn(2, 5, 5, dtype=dtype)
    options = {"algorithm": algorithm, "backend": backend}
    identity = torch.eye(5, dtype=dtype).expand(2, 5, 5)
    half = (G + G.mT) / 4
    torch.testing.assert_close(gradient(identity, G, **options), half, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(identity, G, inverse=True, **options), -half, rtol=1e-5, atol=1e-6)
    assert gradient(0 * identity, G, **options).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_stride_zero_gradient_and_bad_matrices(backend, algorithm, dtype, generator):
    A = covariance("geometric 1e2", 6, generator=generator, batch=(3,)).to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(otkd_fast.sqrtm(A, backend=backend), A, torch.ones(3, 6, 6, dtype=dtype))
    (actual,) = torch.autograd.grad(otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend).sum(), A)
    assert_norm_close(actual, expected, tolerance("sqrtm", "gradient", dtype).rtol)
    bad = A.detach().clone()
    bad[1, 0, 0] = torch.nan
    grad = gradient(bad, torch.ones(3, 6, 6, dtype=dtype), algorithm=algorithm, backend=backend)
    assert grad[1].isnan().any() and grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_repeated_eigenvalues_where_eigh_gives_nan(backend, algorithm):
    """The derivative of eigenvectors divides by gaps of eigenvalues."""
    A = torch.eye(3, dtype=torch.float64, requires_grad=True)
    values, V = torch.linalg.eigh(A)
    (plain,) = torch.autograd.grad((V @ torch.diag(values.sqrt()) @ V.mT)[0, 1], A)
    assert plain.isnan().any()
    (grad,) = torch.autograd.grad(otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)[0, 1], A)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 1] = expected[1, 0] = 0.25
    torch.testing.assert_close(grad, expected)
