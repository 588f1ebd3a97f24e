"""csrc/cuda/sqrtm_large.cu on the emulator: roots by products, and by eigenvectors what these do not serve."""

import pytest
import torch

import otkd_fast
from otkd_fast.ops.sqrtm import _fwd_cuda
from otkd_fast.testing import assert_norm_close, equicorrelated, root_tolerance, tolerance

DTYPES = [torch.float32, torch.float64]


def covariance(d, values, generator, batch=()):
    basis, _ = torch.linalg.qr(torch.randn(*batch, d, d, generator=generator, dtype=torch.float64))
    matrix = (basis * values.double()) @ basis.mT
    return (matrix + matrix.mT) / 2


def low_rank(d, rank, generator, batch=()):
    """Integers, so that the rank is exact in every dtype."""
    F = torch.randint(-3, 4, (*batch, rank, d), generator=generator).double()
    return F.mT @ F


def by_eigenvalues(A, grad, inverse, dtype):
    """Root and gradient in float64, eigenvalues below 100 eps count as 0."""
    values, V = torch.linalg.eigh(A.double())
    kept = values > 100 * torch.finfo(dtype).eps * values.abs().amax(-1, keepdim=True)
    s = torch.where(kept, values, 0).sqrt()
    reciprocal = torch.where(kept, 1 / s, 0)
    G = (V.mT @ (grad + grad.mT) / 2 @ V).double()
    pairs = kept[..., None] & kept[..., None, :] if inverse else kept[..., None] | kept[..., None, :]
    X = torch.where(pairs, G / (s[..., None] + s[..., None, :]), 0)
    if inverse:
        X = -X * reciprocal[..., None] * reciprocal[..., None, :]
    return (V * (reciprocal if inverse else s).unsqueeze(-2)) @ V.mT, V @ X @ V.mT


def root_and_gradient(A, guard, generator, inverse=False, algorithm="polar"):
    leaf = A.clone().requires_grad_()
    grad = torch.randn(A.shape, generator=generator, dtype=torch.float64).to(A.dtype)
    with guard:
        S = otkd_fast.sqrtm(leaf, inverse=inverse, algorithm=algorithm, backend="cpu")
        (grad_A,) = torch.autograd.grad(S, leaf, grad)
    return S.detach(), grad_A, grad


def check(A, guard, generator, inverse=False, algorithm="polar", condition=1.0, singular=False):
    S, grad_A, grad = root_and_gradient(A, guard, generator, inverse, algorithm)
    assert torch.equal(S, S.mT) and torch.equal(grad_A, grad_A.mT)
    root, wanted = by_eigenvalues(A, grad.double(), inverse, A.dtype)
    # the inverse of a matrix of this condition number has the error of its smallest root, relative
    bound = root_tolerance(A.dtype, torch.inf if singular else condition * (condition if inverse else 1))
    assert_norm_close(S, root, bound, context=f"root {tuple(A.shape)}")
    near = tolerance("sqrtm", "gradient", A.dtype).rtol
    assert_norm_close(grad_A, wanted, max(near, root_tolerance(torch.float64, torch.inf)) if singular else near)
    return S, grad_A


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 9, 33])
def test_definite(d, dtype, inverse, guarded, emulated, generator):
    before = emulated.launches()
    A = covariance(d, torch.logspace(0, -2, d), generator, (2,)).to(dtype)
    check(A, guarded, generator, inverse, "polar" if d < 33 else "auto", condition=1e2)
    assert emulated.launches() - before > 5


def test_more_columns_than_threads_have(guarded, generator):
    """And more entries than a block finishes; products of several tiles."""
    A = covariance(131, torch.logspace(0, -1, 131), generator, (1,)).float()
    check(A, guarded, generator, algorithm="auto", condition=10)


@pytest.mark.parametrize("inverse", [False, True])
def test_small_shared_memory(inverse, guarded, emulated, generator):
    A = covariance(35, torch.logspace(0, -2, 35), generator, (2,)).float()
    whole = check(A, guarded, generator.manual_seed(1), inverse, condition=1e2)
    emulated.set_shared_limit(9 * 1024)
    pieces = check(A, guarded, generator.manual_seed(1), inverse, condition=1e2)
    for one, other in zip(whole, pieces, strict=True):
        assert_norm_close(one, other, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_for_the_adjoint(dtype, guarded, generator):
    """Of the eigenvalues of the root; 0 where the adjoint takes eigenvectors, which definite matrices do not need."""
    powers = (0, 2, 5) if dtype == torch.float32 else (0, 5, 12)
    A = torch.stack([covariance(6, torch.logspace(0, -power, 6), generator) for power in powers]).to(dtype)
    with guarded:
        _, bounds = _fwd_cuda(A, False, "polar")
        _, singular = _fwd_cuda(low_rank(6, 3, generator, (1,)).to(dtype), False, "polar")
    roots = torch.linalg.eigvalsh(A.double()).sqrt()
    upper, lower = bounds.double().unbind(-1)
    assert (upper >= roots[:, -1]).all() and (upper <= 6**0.5 * roots[:, -1]).all()
    assert (lower <= roots[:, 0] * (1 + 1e-3)).all() and (lower >= roots[:, 0] / 3).all()
    assert singular[0, 1] == 0


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conditions_that_differ_in_a_batch(dtype, inverse, guarded, generator):
    """Each matrix takes its own number of doublings; the root to its own bound."""
    A = torch.stack([covariance(11, torch.logspace(0, -power, 11), generator) for power in (0, 2, 4)]).to(dtype)
    S, grad_A, grad = root_and_gradient(A, guarded, generator, inverse)
    root, wanted = by_eigenvalues(A, grad.double(), inverse, dtype)
    for k, condition in enumerate((1.0, 1e2, 1e4)):
        bound = root_tolerance(dtype, condition**2 if inverse else condition)
        assert_norm_close(S[k : k + 1], root[k : k + 1], bound)
        near = tolerance("sqrtm", "gradient", dtype).rtol
        assert_norm_close(grad_A[k : k + 1], wanted[k : k + 1], near)
    alone, grad_alone, _ = root_and_gradient(A[2:], guarded, generator, inverse)
    assert torch.equal(alone[0], S[2])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 1), (9, 4), (12, 11)], ids=str)
def test_singular(size, dtype, inverse, guarded, generator):
    """An odd and an even number of rows: in the first a row rests in each round of rotations."""
    check(low_rank(*size, generator, (2,)).to(dtype), guarded, generator, inverse, singular=True)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indefinite(dtype, inverse, guarded, generator):
    values = torch.tensor([-0.7, -0.3, 0.2, 0.5, 0.9, 1.0, 1.1])
    A = covariance(7, values, generator, (2,))
    A[1] = torch.eye(7, dtype=A.dtype)
    A[1, :2, :2] = torch.tensor([[0.0, 0.5], [0.5, 0.0]])  # a covariance beside a variance of 0
    check(A.to(dtype), guarded, generator, inverse, condition=1e2)


def test_singular_beyond_rotations_by_a_warp(guarded, generator):
    check(low_rank(34, 20, generator).float(), guarded, generator, algorithm="auto", singular=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_of_the_variables_and_variances_of_zero(dtype, guarded, generator):
    """The factor is that of the correlations: units far apart do not make a matrix singular."""
    A = covariance(9, torch.linspace(0.5, 1, 9), generator)
    units = torch.logspace(0, -4, 9, dtype=torch.float64)
    A = A * units * units.unsqueeze(-1)
    A[3] = A[:, 3] = 0
    A = A.to(dtype)[None]
    S, _, _ = root_and_gradient(A, guarded, generator)
    assert S[0, 3].eq(0).all()
    residual = (S.double() @ S.double() - A.double()) / units / units.unsqueeze(-1)
    assert float(residual.abs().max()) <= (2e-3 if dtype == torch.float32 else 1e-10)
    kept = [k for k in range(9) if k != 3]
    part = A[:, kept][:, :, kept]
    R, _, _ = root_and_gradient(part, guarded, generator, inverse=True)
    root, _ = by_eigenvalues(part, torch.zeros_like(part).double(), True, torch.float64)
    assert_norm_close(R, root, root_tolerance(dtype, torch.inf))


def test_only_the_symmetric_part_counts(guarded, generator):
    A = covariance(9, torch.linspace(0.5, 1, 9), generator, (2,))
    skew = torch.randn(2, 9, 9, generator=generator, dtype=torch.float64)
    A[1] = A[1] - 0.9 * torch.eye(9)  # indefinite
    clean = root_and_gradient(A, guarded, generator.manual_seed(1))
    other = root_and_gradient(A + skew - skew.mT, guarded, generator.manual_seed(1))
    torch.testing.assert_close(other[:2], clean[:2], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_zero_and_bad_matrices_and_any_scale(inverse, dtype, guarded, generator):
    A = covariance(7, torch.linspace(0.1, 1, 7), generator, (5,)).to(dtype)
    A[4] = covariance(7, torch.tensor([-1, 1, 2, 3, 4, 5, 6]), generator)
    clean, clean_grad, _ = root_and_gradient(A, guarded, generator.manual_seed(1), inverse)
    power = 60 if dtype == torch.float32 else 400
    A[1] = 0
    A[2, 3, 4] = torch.nan
    A[3:] *= 2.0**-power
    S, grad_A, _ = root_and_gradient(A, guarded, generator.manual_seed(1), inverse)
    assert torch.equal(S[0], clean[0]) and torch.equal(grad_A[0], clean_grad[0])
    assert S[1].eq(0).all() and grad_A[1].eq(0).all()
    assert S[2].isnan().all() and grad_A[2].isnan().all()
    assert torch.equal(S[3:], clean[3:] * 2.0 ** (power / 2 if inverse else -power / 2))
    back = -3 * power / 2 if inverse else -power / 2
    torch.testing.assert_close(grad_A[3:] * 2.0**back, clean_grad[3:], rtol=1e-5, atol=1e-6)


def test_other_words_are_the_references(emulated, generator):
    before = emulated.launches()
    A = covariance(5, torch.linspace(0.5, 1, 5), generator).requires_grad_()
    for algorithm in ("eigh", "newton_schulz"):
        S = otkd_fast.sqrtm(A, algorithm=algorithm, backend="cpu")
        torch.testing.assert_close(S @ S, A)
        torch.autograd.grad(S.sum(), A)
    assert emulated.launches() == before


@pytest.mark.parametrize("where", [(11, 99, True), (24, 9, False)], ids=str)  # the factor in shared memory, and not
def test_the_order_of_threads_does_not_matter(where, guarded, emulated, generator):
    d, limit, inverse = where
    A = covariance(d, torch.logspace(0, -1, d), generator, (2,)).float()
    A[1, 0, 0] = 0  # indefinite
    emulated.set_shared_limit(limit * 1024)
    results = []
    for order in range(4):
        emulated.set_order(order)
        results.append(root_and_gradient(A, guarded, generator.manual_seed(1), inverse))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("d, limit", [(64, 99), (80, 99), (112, 227), (150, 227), (162, 227)])
def test_equal_terms(d, limit, emulated):
    """I + rho 1 1^T, all of whose sums are rounded to one side: by the tiles of polar_tile.h and by products."""
    emulated.set_shared_limit(limit * 1024)
    for rho in (10.0, 25.0, 63.0):
        A, root, condition = equicorrelated(rho, d)
        S, _ = _fwd_cuda(A.unsqueeze(0), False, "polar")
        assert_norm_close(S[0], root, root_tolerance(A.dtype, condition), context=f"{rho}")
