"""csrc/cuda/bures.cu on the emulator, against factors from eigenvalues in float64."""

import pytest
import torch

import otkd_fast
from otkd_fast.reference.polar import polar_svd
from otkd_fast.testing import assert_norm_close, tolerance

DTYPES = [torch.float32, torch.float64]


def covariance(d, values, generator, batch=()):
    basis, _ = torch.linalg.qr(torch.randn(*batch, d, d, generator=generator, dtype=torch.float64))
    matrix = (basis * values.double()) @ basis.mT
    return (matrix + matrix.mT) / 2


def factor(A, dtype):
    """F with A = F F^T and its pseudo-inverse, of the eigenvalues above the rounding of `dtype`."""
    values, V = torch.linalg.eigh((A + A.mT) / 2)
    kept = values > 100 * torch.finfo(dtype).eps * values.abs().amax(-1, keepdim=True)
    roots = torch.where(kept, values, 0).sqrt()
    return V * roots.unsqueeze(-2), torch.where(kept, 1 / roots, 0).unsqueeze(-1) * V.mT


def bures(A, B, dtype):
    """Value and gradients by singular values, in float64."""
    (F, F_inverse), (G, G_inverse) = factor(A.double(), dtype), factor(B.double(), dtype)
    P, norm = polar_svd(F.mT @ G, 1e-7)
    grads = []
    for image, own, inverse in ((G @ P.mT, F, F_inverse), (F @ P, G, G_inverse)):
        N = image @ inverse
        T = N + (N - own @ (inverse @ N)).mT
        grads.append(torch.eye(A.shape[-1], dtype=torch.float64) - (T + T.mT) / 2)
    return F.square().sum((-2, -1)) + G.square().sum((-2, -1)) - 2 * norm, *grads


def distance_and_gradients(A, B, guard):
    leaves = [A.clone().requires_grad_(), B.clone().requires_grad_()]
    with guard:
        value = otkd_fast.bures_distance(*leaves, backend="cpu")
        grads = torch.autograd.grad(value.sum(), leaves)
    return value.detach(), *grads


def check(A, B, guard):
    value, *grads = distance_and_gradients(A, B, guard)
    expected, *wanted = bures(A, B, A.dtype)
    traces = (A + B).double().diagonal(dim1=-2, dim2=-1).clamp(min=0).sum(-1)
    error = (value.double() - expected).abs() / traces
    assert float(error.max()) <= tolerance("bures_distance", "value", A.dtype).atol
    for grad, want in zip(grads, wanted, strict=True):
        assert torch.equal(grad, grad.mT)
        assert_norm_close(grad, want, tolerance("bures_distance", "gradient", A.dtype).rtol)
    return value, *grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 7, 33])
def test_definite(d, dtype, guarded, emulated, generator):
    before = emulated.launches()
    A = covariance(d, torch.logspace(0, -4, d), generator, (2,)).to(dtype)
    B = covariance(d, torch.logspace(1, -1, d), generator, (2,)).to(dtype)
    check(A, B, guarded)
    assert emulated.launches() == before + 15


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_singular_and_indefinite(dtype, guarded, generator):
    A = covariance(7, torch.tensor([-0.5, 0.3, 0.5, 0.7, 1, 2, 3]), generator, (3,))
    B = covariance(7, torch.tensor([1.0, 0.3, 0.5, 0.7, 1, 2, 3]), generator, (3,))
    F = torch.randint(-3, 4, (4, 7), generator=generator).double()
    A[1] = F.mT @ F
    A[2], B[2] = B[2].clone(), A[2].clone()
    check(A.to(dtype), B.to(dtype), guarded)


def test_more_entries_than_a_block_finishes(guarded, generator):
    """In the factor more columns than threads have, in the products several tiles."""
    A, B = (covariance(130, torch.logspace(0, -2, 130), generator, (1,)).float() for _ in range(2))
    check(A, B, guarded)


def test_more_problems_than_a_warp_has_threads(guarded, generator):
    A, B = (torch.rand(34, 1, 1, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    value, *_ = check(A, B, guarded)
    torch.testing.assert_close(value, (A.sqrt() - B.sqrt()).square().flatten(), rtol=1e-12, atol=1e-15)


def test_zero_equal_and_bad_matrices_and_any_scale(guarded, generator):
    A = covariance(5, torch.linspace(0.5, 1, 5), generator, (6,)).float()
    B = covariance(5, torch.linspace(0.5, 2, 5), generator, (6,)).float()
    clean, *clean_grads = check(A, B, guarded)
    A[1] = 0
    A[2] = B[2]
    A[3, 1, 2], B[4, 0, 0] = torch.nan, torch.inf
    A[5:] *= 2.0**-100
    B[5:] *= 2.0**-100
    value, grad_a, grad_b = distance_and_gradients(A, B, guarded)
    trace = B[1].diagonal().sum()
    torch.testing.assert_close(value[1], trace)
    assert torch.equal(grad_a[1], torch.eye(5)) and torch.equal(grad_b[1], torch.eye(5))
    assert value[2] <= 1e-6 and grad_a[2].abs().max() <= 1e-6
    for k in (3, 4):
        assert value[k].isnan() and grad_a[k].isnan().all() and grad_b[k].isnan().all()
    assert torch.equal(value[0], clean[0]) and torch.equal(grad_a[0], clean_grads[0][0])
    assert torch.equal(value[5:], clean[5:] * 2.0**-100) and torch.equal(grad_b[5:], clean_grads[1][5:])


def test_matrices_of_different_sizes_and_one_gradient(guarded, emulated, generator):
    A = covariance(5, torch.linspace(0.5, 1, 5), generator, (2,)).float()
    B = covariance(5, torch.linspace(0.5, 2, 5), generator, (2,)).float()
    for scales in ((2.0**20, 1.0), (1.0, 2.0**20)):
        check(A * scales[0], B * scales[1], guarded)
    _, grad_a, grad_b = check(A, B, guarded)
    before = emulated.launches()
    for k, want in enumerate((grad_a, grad_b)):
        operands = [A.clone(), B.clone()]
        leaf = operands[k].requires_grad_()
        with guarded:
            (grad,) = torch.autograd.grad(otkd_fast.bures_distance(*operands, backend="cpu").sum(), leaf)
        assert torch.equal(grad, want)
    assert emulated.launches() == before + 2 * 10


def test_the_order_of_threads_does_not_matter(guarded, emulated, generator):
    A = covariance(11, torch.logspace(0, -1, 11), generator, (1,))
    B = covariance(11, torch.linspace(-0.1, 1, 11), generator, (1,))
    first = distance_and_gradients(A, B, guarded)
    for order in (1, 2, 3):
        emulated.set_order(order)
        assert all(map(torch.equal, first, distance_and_gradients(A, B, guarded)))
