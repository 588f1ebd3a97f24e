"""Roots of larger float32 matrices, whose eigenvectors the CPU kernel puts together from those of halves."""

import pytest
import torch

import otkd_fast
from otkd_fast.ops.sqrtm import LANES_LIMIT
from otkd_fast.testing import SPECTRA, assert_norm_close, backends, covariance, root_tolerance, tolerance

from .cases import condition, lyapunov, root

compiled = pytest.mark.parametrize("backend", backends("sqrtm", compiled_only=True))
SMALLEST = LANES_LIMIT + 1


def roots(A, backend, **options):
    return otkd_fast.sqrtm(A, algorithm="tridiagonal", backend=backend, **options)


def tridiagonal(diagonal, coupling):
    return torch.diag(diagonal) + torch.diag(coupling, 1) + torch.diag(coupling, -1)


def wilkinson(d):
    """Eigenvalues in pairs, the large ones equal to rounding."""
    return tridiagonal((torch.arange(d) - (d - 1) / 2).abs() + 2, torch.ones(d - 1))


def glued(coupling):
    """Five times the same eigenvalues, as far apart as the coupling: vectors of close roots have to stay orthogonal."""
    A = torch.block_diag(*[wilkinson(32)] * 5)
    for i in range(32, 160, 32):
        A[i, i - 1] = A[i - 1, i] = coupling
    return A


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("d", [SMALLEST, 144, 301])
@compiled
def test_accuracy_contract(backend, d, name, generator):
    A = covariance(name, d, generator=generator, batch=(2,)).float()
    G = torch.randn(2, d, d, generator=generator)
    leaf = A.clone().requires_grad_()
    S = roots(leaf, backend)
    (grad,) = torch.autograd.grad(S, leaf, G)
    assert torch.equal(S, S.mT) and torch.equal(grad, grad.mT) and grad.isfinite().all()
    assert_norm_close(S.detach(), root(A), root_tolerance(A.dtype, condition(name, d)), context=name)
    if condition(name, d) <= 1e2:
        assert_norm_close(grad, lyapunov(A.double(), G.double()), tolerance("sqrtm", "gradient", A.dtype).rtol)


@pytest.mark.parametrize("name", ["geometric 1e2", "geometric 1e4", "identity"])
@compiled
def test_inverse_and_its_gradient(backend, name, generator):
    A = covariance(name, 130, generator=generator, batch=(2,)).float().requires_grad_()
    R = roots(A, backend, inverse=True)
    kappa = condition(name, 130)
    assert_norm_close(R.detach(), root(A.detach(), -0.5), root_tolerance(A.dtype, kappa) * kappa**0.5)
    G = torch.randn(2, 130, 130, generator=generator)
    (grad,) = torch.autograd.grad(R, A, G)
    middle = root(A.detach(), -0.5) @ ((G + G.mT) / 2).double() @ root(A.detach(), -0.5)
    inner = lyapunov(A.detach().double(), middle)  # d(S^-1) = -S^-1 dS S^-1
    assert_norm_close(grad, -inner, tolerance("sqrtm", "gradient", A.dtype).rtol * kappa**0.5)


@compiled
def test_where_nothing_is_left_to_join(backend, generator):
    """Couplings of 0, equal eigenvalues, halves that share all of theirs, a matrix that is tridiagonal already."""
    d = 160
    values = torch.rand(d, generator=generator) + 0.01
    A = torch.stack((torch.diag(values), torch.eye(d), torch.diag(torch.arange(d) % 3 + 1.0), torch.zeros(d, d)))
    torch.testing.assert_close(roots(A, backend), A.sqrt(), rtol=3e-7, atol=0)
    block = covariance("geometric 1e2", 16, generator=generator).float()
    repeated = torch.block_diag(*[block] * 10)
    laplacian = tridiagonal(torch.full((d,), 2.0), -torch.ones(d - 1))
    A = torch.stack((repeated, glued(1e-7), glued(1e-12), wilkinson(d), laplacian))
    assert_norm_close(roots(A, backend), root(A), root_tolerance(A.dtype, 1e4))


@compiled
def test_nearly_tridiagonal_matrices(backend, generator):
    """A reflector whose first entry is all but 1 loses its digits if that is subtracted from its length."""
    noise = 1e-8 * torch.randn(150, 150, generator=generator)
    for coupling in (1.0, -1.0):
        A = tridiagonal(torch.full((150,), 2.5), torch.full((149,), coupling)) + noise + noise.mT
        assert_norm_close(roots(A, backend), root(A), root_tolerance(A.dtype, 1e2))


@compiled
def test_entries_far_apart(backend, generator):
    """Variances from 1e-38 to 1: squares of what is left of a row would be subnormal in float64, or 0."""
    d = 120
    scales = torch.logspace(-19, 0, d, dtype=torch.float64)
    A = covariance("geometric 1e2", d, generator=generator, batch=(2,)) * scales * scales[:, None]
    A = torch.stack((A[0], A[1].flip(0, 1))).float()
    S = roots(A, backend)
    assert_norm_close(S, root(A), root_tolerance(A.dtype, torch.inf))
    tiny = torch.eye(d)
    tiny[0, 2:] = tiny[2:, 0] = 1e-41
    assert_norm_close(roots(tiny, backend), torch.eye(d, dtype=torch.float64), 1e-6)


@compiled
def test_only_the_symmetric_part_counts(backend, generator):
    A = covariance("geometric 1e2", 100, generator=generator).float()
    skew = torch.randn(100, 100, generator=generator)
    assert_norm_close(roots(A + skew - skew.mT, backend), root(A), 1e-5)  # entries are rounded at the size of skew


@pytest.mark.parametrize("scale", [1e-36, 1e36])
@compiled
def test_scale_does_not_matter(backend, scale, generator):
    for name in ("geometric 1e4", "rank d - 1", "rank one"):
        A = covariance(name, 110, generator=generator, scale=scale).float()
        assert_norm_close(roots(A, backend), root(A), root_tolerance(A.dtype, condition(name, 110)), context=name)


@compiled
def test_singular_and_indefinite_matrices(backend, generator):
    F = torch.randint(-3, 4, (3, 112, 60), generator=generator).float()
    A = F @ F.mT  # integers: exactly of rank 60
    U, s, _ = torch.linalg.svd(F.double(), full_matrices=False)
    assert_norm_close(roots(A, backend), (U * s.unsqueeze(-2)) @ U.mT, root_tolerance(A.dtype, torch.inf))
    assert_norm_close(roots(A, backend, inverse=True), (U / s.unsqueeze(-2)) @ U.mT, 1e-4)
    signs = covariance("geometric 1e2", 112, generator=generator).float()
    signs = signs - signs.diagonal().mean() * torch.eye(112)
    values, V = torch.linalg.eigh(signs.double())
    assert values[0] < -0.01
    assert_norm_close(roots(signs, backend), (V * values.clamp(min=0).sqrt()) @ V.mT, 2e-6)


@compiled
def test_bits_depend_on_neither_neighbours_nor_threads(backend, generator):
    A = covariance("geometric 1e4", 131, generator=generator, batch=(5,)).float()
    clean = roots(A, backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        again = roots(A, backend)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, clean) and torch.equal(roots(A.flip(0), backend).flip(0), clean)
    for bad in (torch.nan, torch.inf):
        A[1, 2, 100] = bad
        spoilt = roots(A, backend)
        assert spoilt[1].isnan().all() and torch.equal(spoilt[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])
