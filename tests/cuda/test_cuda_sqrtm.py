"""csrc/cuda/sqrtm.cu on the emulator, against eigenvalues in float64."""

import pytest
import torch

import otkd_fast
from otkd_fast.reference import sqrtm_bwd, sqrtm_fwd
from otkd_fast.testing import assert_norm_close, root_tolerance, tolerance

DTYPES = [torch.float32, torch.float64]
SIZES = [1, 2, 5, 15, 16, 17, 32]  # one and two matrices a warp, with and without idle lanes


def covariance(d, values, generator, batch=()):
    """Symmetric matrices with these eigenvalues and random eigenvectors."""
    basis, _ = torch.linalg.qr(torch.randn(*batch, d, d, generator=generator, dtype=torch.float64))
    matrix = (basis * values.double()) @ basis.mT
    return (matrix + matrix.mT) / 2


def root_and_gradient(A, guard, generator, inverse=False):
    leaf = A.clone().requires_grad_()
    grad = torch.randn(A.shape, generator=generator, dtype=torch.float64).to(A.dtype)
    with guard:
        S = otkd_fast.sqrtm(leaf, inverse=inverse, backend="cpu")
        (grad_A,) = torch.autograd.grad(S, leaf, grad)
    return S.detach(), grad_A, grad


def check(A, guard, generator, inverse=False):
    S, grad_A, grad = root_and_gradient(A, guard, generator, inverse)
    wide = A.double()
    expected, aux = sqrtm_fwd(wide, inverse, "eigh")
    bound = 2e-5 if A.dtype == torch.float32 else tolerance("sqrtm", "gradient", A.dtype).rtol
    assert_norm_close(S, expected, bound)
    assert torch.equal(S, S.mT) and torch.equal(grad_A, grad_A.mT)
    wanted = sqrtm_bwd(wide, expected, aux, grad.double(), inverse, "eigh")
    assert_norm_close(grad_A, wanted, tolerance("sqrtm", "gradient", A.dtype).rtol)
    return S, grad_A


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_definite(d, dtype, inverse, guarded, emulated, generator):
    before = emulated.launches()
    check(covariance(d, torch.linspace(0.05, 1, d), generator, (3,)).to(dtype), guarded, generator, inverse)
    assert emulated.launches() == before + 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [6, 20])
def test_singular_and_indefinite(d, dtype, guarded, generator):
    """Directions in which A is 0 or negative count as 0; a diagonal A has roots without any rotation."""
    values = torch.linspace(1, 4, d, dtype=torch.float64)
    values[1::3] = 0
    for worst in (0.0, -2.0):
        values[0] = worst
        A = torch.diag(values).to(dtype).expand(2, d, d)
        S, grad_A, grad = root_and_gradient(A, guarded, generator)
        torch.testing.assert_close(
            S.double(), torch.diag(values.clamp(min=0).sqrt()).expand(2, d, d), rtol=1e-6, atol=1e-7
        )
        _, aux = sqrtm_fwd(A.double(), False, "eigh")
        wanted = sqrtm_bwd(A.double(), S.double(), aux, grad.double(), False, "eigh")
        assert_norm_close(grad_A, wanted, tolerance("sqrtm", "gradient", dtype).rtol)
        inverse, _, _ = root_and_gradient(A, guarded, generator, True)
        kept = torch.where(values > 0, values, 1).rsqrt() * (values > 0)
        torch.testing.assert_close(inverse.double(), torch.diag(kept).expand(2, d, d), rtol=1e-6, atol=1e-7)


def test_zero_and_bad_matrices_and_any_scale(guarded, generator):
    A = covariance(7, torch.linspace(0.1, 1, 7), generator, (4,)).float()
    clean, clean_grad, grad = root_and_gradient(A, guarded, generator.manual_seed(1))
    A[1] = 0
    A[2, 3, 4] = torch.nan
    A[3] *= 2.0**120
    S, grad_A, _ = root_and_gradient(A, guarded, generator.manual_seed(1))
    assert torch.equal(S[0], clean[0]) and torch.equal(grad_A[0], clean_grad[0])
    assert S[1].eq(0).all() and grad_A[1].eq(0).all()
    assert S[2].isnan().all() and grad_A[2].isnan().all()
    assert torch.equal(S[3], clean[3] * 2.0**60)
    torch.testing.assert_close(grad_A[3] * 2.0**60, clean_grad[3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("d", [5, 24])
def test_rank_of_float64(d, inverse, guarded, generator):
    """Eigenvalues of 0 come out below the rounding of A although the rotations are those of a shifted matrix."""
    F = torch.randint(-3, 4, (20, d // 4, d), generator=generator).double()
    A = F.mT @ F
    S, grad_A, _ = root_and_gradient(A, guarded, generator, inverse)
    P = A @ torch.linalg.pinv(A, rtol=1e-9)  # onto the range
    assert_norm_close(S @ S, torch.linalg.pinv(A, rtol=1e-9) if inverse else A, 1e-12)
    assert_norm_close(P @ S, S, root_tolerance(A.dtype, torch.inf))
    null = torch.eye(d, dtype=A.dtype) - P
    assert float((null @ grad_A @ null).abs().max()) <= 1e-6 * float(grad_A.abs().max())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("d", [5, 20])
def test_exactly_singular_integers(d, inverse, guarded, generator):
    """Rank d - 1: a Cholesky factor without pivots may show the zero as anything up to a root of the rounding."""
    G = torch.randint(-3, 4, (60, d, d - 1), generator=generator).double()
    A = G @ G.mT
    values = torch.linalg.eigvalsh(A)
    A = A[values[:, 1] > 1e-4 * values[:, -1]]
    S, grad_A, grad = root_and_gradient(A, guarded, generator, inverse)
    expected, aux = sqrtm_fwd(A, inverse, "eigh")
    assert_norm_close(S, expected, 1e-6)
    assert_norm_close(grad_A, sqrtm_bwd(A, expected, aux, grad, inverse, "eigh"), 1e-5)


@pytest.mark.parametrize("dtype, spread", [(torch.float32, 28), (torch.float64, 70)])
@pytest.mark.parametrize("d", [5, 20])
def test_units_of_the_variables_do_not_matter(d, dtype, spread, guarded, generator):
    """D A D, definite: also variances below the rounding of the largest one have their part, and in the gradient."""
    A = covariance(d, torch.linspace(0.05, 1, d), generator, (8,)).to(dtype).double()
    D = 2.0 ** (torch.linspace(0, spread / 2, d)[torch.randperm(d, generator=generator)]).double().round()
    graded = (D.unsqueeze(-1) * A * D).to(dtype)  # exact
    R, grad_A, grad = root_and_gradient(graded, guarded, generator, True)
    inverse = torch.linalg.inv(A) / D.unsqueeze(-1) / D
    assert_norm_close(R.double() @ R.double(), inverse, 1e-4)
    values, V = torch.linalg.eigh(inverse)  # the large ones are exact, and the gradient consists of them
    values, G = values.clamp(min=1e-300), (grad + grad.mT).double() / 2
    s = values.sqrt()
    weights = values.unsqueeze(-1) * values.unsqueeze(-2) / (s.unsqueeze(-1) + s.unsqueeze(-2))
    assert_norm_close(grad_A, -V @ ((V.mT @ G @ V) * weights) @ V.mT, 1e-3)


def test_the_order_of_threads_does_not_matter(guarded, emulated, generator):
    state, results = generator.get_state(), []
    for order in range(4):
        emulated.set_order(order)
        generator.set_state(state)
        results.append([
            part for d in (5, 19)
            for part in root_and_gradient(covariance(d, torch.linspace(0, 1, d), generator, (3,)), guarded, generator)
        ])  # fmt: skip
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
