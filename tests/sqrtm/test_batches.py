"""sqrtm on batches that fill the lanes of the CPU kernels, with matrices of every kind side by side."""

import pytest
import torch

import otkd_fast
from otkd_fast.ops.sqrtm import (
    ALONE,
    ALONE_MIDDLE,
    JACOBI_LIMIT,
    LANES_BATCH,
    LANES_LIMIT,
    chosen,
    chosen_alone,
)
from otkd_fast.testing import assert_norm_close, backends, covariance, root_tolerance, tolerance

from .cases import condition, lyapunov, root

KINDS = ("geometric 1e2", "geometric 1e4", "geometric 1e8", "rank d - 1", "identity", "power law")
compiled = pytest.mark.parametrize("backend", backends("sqrtm", compiled_only=True))


def mixture(d, batch, generator, dtype=torch.float32):
    """Kind k in the places k, k + 7, ... of a batch; every seventh is 0."""
    A = torch.zeros(batch, d, d, dtype=torch.float64)
    for k, kind in enumerate(KINDS):
        A[k::7] = covariance(kind, d, generator=generator, batch=A[k::7].shape[:1], scale=10.0 ** (3 * k))
    return A.to(dtype)


def test_what_auto_means():
    def of(d, batch, dtype=torch.float32):
        A = torch.empty(batch, d, d, dtype=dtype)
        return chosen("auto", A), chosen_alone("auto", A)

    many, middle = LANES_BATCH, ALONE_MIDDLE
    assert of(ALONE[0] - 1, many) == ("jacobi", "auto") and of(ALONE[0], many) == ("jacobi", "polar")
    assert of(ALONE[0], 1) == ("jacobi", "auto") == of(ALONE[0], many, torch.float64)
    assert of(JACOBI_LIMIT + 1, many) == ("tridiagonal", "auto") == of(middle[0] - 1, many)
    assert of(middle[0], many) == ("tridiagonal", "polar") == of(LANES_LIMIT, many) == of(LANES_LIMIT + 1, 1)
    assert of(LANES_LIMIT, many - 1) == ("polar", "polar") and of(middle[0] - 1, many - 1) == ("polar", "auto")
    assert of(middle[-1], 1) == ("tridiagonal", "polar") and of(middle[-1] + 1, 1) == ("tridiagonal", "auto")
    assert of(40, many, torch.float64) == ("polar", "auto") == of(500, many, torch.float64)
    assert chosen("eigh", torch.empty(3, 3)) == "eigh" == chosen_alone("eigh", torch.empty(40, 16, 16))


@pytest.mark.parametrize("algorithm", ["auto", "jacobi", "tridiagonal", "polar"])
@pytest.mark.parametrize("d", [2, 13, 24, 41])
@compiled
def test_contract_in_a_mixed_batch(backend, d, algorithm, generator):
    A = mixture(d, 37, generator)
    options = {"algorithm": algorithm, "backend": backend}
    G = torch.randn(37, d, d, generator=generator)
    leaf = A.clone().requires_grad_()
    S = otkd_fast.sqrtm(leaf, **options)
    (grad,) = torch.autograd.grad(S, leaf, G)
    alone = otkd_fast.sqrtm(A, **options)
    for k, kind in enumerate(KINDS):
        for roots in (S.detach(), alone):
            assert torch.equal(roots, roots.mT)
            assert_norm_close(roots[k::7], root(A[k::7]), root_tolerance(A.dtype, condition(kind, d)), context=kind)
    assert not S[6::7].any() and not alone[6::7].any() and not grad[6::7].any()
    assert grad.isfinite().all()
    easy = A[::7].double()
    assert_norm_close(grad[::7], lyapunov(easy, G[::7].double()), tolerance("sqrtm", "gradient", A.dtype).rtol)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("algorithm, d", [("jacobi", 11), ("tridiagonal", 11), ("tridiagonal", 35), ("polar", 16)])
@compiled
def test_bits_depend_on_neither_neighbours_nor_threads(backend, algorithm, d, inverse, generator):
    A = mixture(d, 40, generator)
    A[9] -= A[9].diagonal().max() * torch.eye(d)  # indefinite
    clean = otkd_fast.sqrtm(A, inverse=inverse, algorithm=algorithm, backend=backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        again = otkd_fast.sqrtm(A, inverse=inverse, algorithm=algorithm, backend=backend)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, clean)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(otkd_fast.sqrtm(A[order], inverse=inverse, algorithm=algorithm, backend=backend), clean[order])
    A[5, 0, 1] = torch.nan
    spoilt = otkd_fast.sqrtm(A, inverse=inverse, algorithm=algorithm, backend=backend)
    others = torch.arange(40) != 5
    assert spoilt[5].isnan().all() and torch.equal(spoilt[others], clean[others])


@pytest.mark.parametrize("algorithm", ["tridiagonal", "polar"])
@compiled
def test_large_entries_and_sizes_between_panels(backend, algorithm, generator):
    for d, scale in ((31, 1e36), (33, 1e-36), (97, 1.0)):
        A = covariance("geometric 1e4", d, generator=generator, batch=(17,), scale=scale).float()
        S = otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)
        assert_norm_close(S, root(A), root_tolerance(torch.float32, 1e4), context=str(d))


@compiled
def test_diagonal_and_tridiagonal_matrices(backend, generator):
    """Nothing to reflect, nothing to rotate, or all eigenvalues nearly equal in pairs (Wilkinson's matrix)."""
    values = torch.rand(20, 30, generator=generator)
    diagonal = otkd_fast.sqrtm(torch.diag_embed(values), algorithm="tridiagonal", backend=backend)
    torch.testing.assert_close(diagonal, torch.diag_embed(values.sqrt()), rtol=2e-7, atol=0)
    wilkinson = torch.diag((torch.arange(31) - 15.0).abs() + 2) + torch.diag(torch.ones(30), 1)
    wilkinson = (wilkinson + torch.diag(torch.ones(30), -1)).expand(18, 31, 31)
    S = otkd_fast.sqrtm(wilkinson, algorithm="tridiagonal", backend=backend)
    assert_norm_close(S, root(wilkinson), root_tolerance(torch.float32, 1e2))


@compiled
def test_large_power_law_in_float64(backend, generator):
    """Its small eigenvalues ask most of the reduction: eight in one call, one in each lane."""
    A = covariance("power law", 257, generator=generator, batch=(8,))
    S = otkd_fast.sqrtm(A, algorithm="tridiagonal", backend=backend)
    for own, expected in zip(S, root(A), strict=True):
        assert_norm_close(own, expected, root_tolerance(torch.float64, condition("power law", 257)))


@pytest.mark.parametrize(
    "backend, algorithm",
    [
        ("reference", "eigh"),
        ("reference", "polar"),
        *((b, "tridiagonal") for b in backends("sqrtm", compiled_only=True)),
    ],
)
@pytest.mark.parametrize("d, rank", [(3, 2), (8, 7), (32, 31), (64, 40)])
def test_null_directions_of_exactly_singular_matrices(backend, algorithm, d, rank, generator):
    """Products of integers have no rounding; what the eigenvalues are rounded by must not pass for a direction."""
    F = torch.randint(-5, 6, (60, d, rank), generator=generator).double()
    U, s, _ = torch.linalg.svd(F, full_matrices=False)
    chosen_ones = s[:, -1] > 1e-3 * s[:, 0]
    inverse = otkd_fast.sqrtm(F @ F.mT, inverse=True, algorithm=algorithm, backend=backend)
    expected = (U / s.unsqueeze(-2)) @ U.mT
    assert chosen_ones.sum() > 40
    error = (inverse - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert error[chosen_ones].max() < 1e-7
