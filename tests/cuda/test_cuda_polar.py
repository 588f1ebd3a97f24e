"""csrc/cuda/polar.cu, matrix_product.cu and gaussian.cu on the emulator, against singular values in float64."""

import pytest
import torch

import otkd_fast
from otkd_fast.reference import wasserstein_from_samples
from otkd_fast.reference.polar import polar_svd
from otkd_fast.testing import assert_norm_close, tolerance

DTYPES = [torch.float32, torch.float64]


def check_polar(K, guard):
    with guard:
        P, norm = otkd_fast.polar(K, backend="cpu")
    factor, nuclear_norm = polar_svd(K.double(), 1e-12)
    assert_norm_close(P, factor, tolerance("polar", "factor", K.dtype).rtol, context=f"factor {tuple(K.shape)}")
    bound = tolerance("polar", "nuclear_norm", K.dtype).rtol
    assert_norm_close(norm[..., None, None], nuclear_norm[..., None, None], bound, context=f"norm {tuple(K.shape)}")
    return P, norm


def conditioned(n, m, generator, batch=()):
    """Matrices with singular values from 1 to 1e-3."""
    U, _ = torch.linalg.qr(torch.randn(*batch, n, min(n, m), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(*batch, m, min(n, m), generator=generator, dtype=torch.float64))
    return (U * torch.logspace(0, -3, min(n, m), dtype=torch.float64)) @ V.mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (8, 3), (3, 17), (32, 32), (33, 40), (20, 70)], ids=str)
def test_polar_in_one_launch(size, dtype, guarded, emulated, generator):
    before = emulated.launches()
    check_polar(conditioned(*size, generator, (2,)).to(dtype), guarded)
    assert emulated.launches() == before + 1


def test_polar_of_the_largest_tile(guarded, emulated, generator):
    emulated.set_shared_limit(227 * 1024)
    before = emulated.launches()
    check_polar(conditioned(5, 160, generator).float(), guarded)
    check_polar(conditioned(115, 6, generator).float(), guarded)
    assert emulated.launches() == before + 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(9, 6), (6, 70), (70, 3)], ids=str)
def test_polar_in_products(size, dtype, guarded, emulated, generator):
    K = conditioned(*size, generator, (2,)).to(dtype)
    large = torch.zeros(*K.shape[:-2], 1, 162, dtype=dtype)  # more than a tile has
    large[..., 0, : K.shape[-1]] = K[..., 0, :]
    before = emulated.launches()
    check_polar(large, guarded)
    assert emulated.launches() > before + 11


def test_polar_that_does_not_fit_the_shared_memory(guarded, emulated, generator):
    K = conditioned(40, 35, generator).float()
    whole = check_polar(K, guarded)
    emulated.set_shared_limit(9 * 1024)
    before = emulated.launches()
    pieces = check_polar(K, guarded)
    assert emulated.launches() > before + 11
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [99, 9])
@pytest.mark.parametrize("scale", [1e-38, 1e37])
def test_polar_at_the_ends_of_the_range(limit, scale, guarded, emulated, generator):
    K = conditioned(40, 33, generator, (3,)).float() * scale
    K[1] = 0
    emulated.set_shared_limit(limit * 1024)
    P, norm = check_polar(K, guarded)
    assert P[1].eq(0).all() and norm[1] == 0
    for bad in (torch.nan, -torch.inf):
        K[1, 5, 32] = bad
        with guarded:
            spoilt, norms = otkd_fast.polar(K, backend="cpu")
        assert spoilt[1].isnan().all() and norms[1].isnan()
        assert torch.equal(spoilt[[0, 2]], P[[0, 2]]) and torch.equal(norms[[0, 2]], norm[[0, 2]])


def check_gaussian(x, y, guard, unbiased=False):
    """Value and gradients; the emulated ones."""
    value, *grads = check_value(x, y, guard, unbiased)
    expected = wasserstein_from_samples(x.double(), y.double(), unbiased=unbiased)
    for grad, want in zip(grads, expected[1:], strict=True):
        assert_norm_close(grad, want, tolerance("gaussian_wasserstein", "gradient", x.dtype).rtol)
    return value, *grads


def check_value(x, y, guard, unbiased=False):
    expected = wasserstein_from_samples(x.double(), y.double(), unbiased=unbiased)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    with guard:
        value = otkd_fast.gaussian_wasserstein_from_samples(*leaves, unbiased=unbiased, backend="cpu")
        grads = torch.autograd.grad(value.sum(), leaves)
    rows = ((t - t.mean(-2, keepdim=True)).double().square().sum((-2, -1)) / t.shape[-2] for t in (x, y))
    error = (value.detach().double() - expected[0]).abs() / (sum(rows) + expected[0])
    assert float(error.max()) <= tolerance("gaussian_wasserstein", "value", x.dtype).atol
    return value.detach(), *grads


def samples(n, m, d, generator, dtype=torch.float32, batch=(2,)):
    x = torch.randn(*batch, n, d, generator=generator, dtype=torch.float64)
    y = 0.5 + 2 * torch.randn(*batch, m, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 2, 1), (5, 9, 40), (33, 18, 65), (12, 9, 4)], ids=str)
def test_gaussian(size, dtype, unbiased, guarded, emulated, generator):
    before = emulated.launches()
    check_gaussian(*samples(*size, generator, dtype), guarded, unbiased)
    assert emulated.launches() == before + 9


def test_gaussian_of_large_samples(guarded, emulated, generator):
    """Beyond a block: the polar factor in products."""
    emulated.set_shared_limit(9 * 1024)
    check_gaussian(*samples(3, 165, 170, generator, batch=(1,)), guarded)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gaussian_of_more_rows_than_features(dtype, unbiased, guarded, emulated, generator):
    """K from d x d factors. The features may be dependent, and have any units."""
    before = emulated.launches()
    x, y = samples(20, 165, 7, generator, dtype)
    check_gaussian(x, y, guarded, unbiased)
    assert emulated.launches() == before + 18
    check_gaussian(y, x, guarded, unbiased)
    check_gaussian(x * torch.logspace(0, -2, 7, dtype=dtype), y, guarded, unbiased)
    x[..., 3] = x[..., 1] + 0.01 * x[..., 3]  # a pivot of 1e-4 counts
    check_gaussian(x, y, guarded, unbiased)


def test_gaussian_of_dependent_features(guarded, generator):
    x, y = samples(20, 165, 7, generator, torch.float64)
    x[..., 3] = x[..., 1] - 2 * x[..., 5]
    y[1, :, 2] = 0.5
    value, grad_x, _ = check_value(x, y, guarded)
    step = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    step[..., 3] = step[..., 1] - 2 * step[..., 5]  # inside the range, where the distance is smooth
    ahead, behind = (wasserstein_from_samples(x + h * step, y)[0] for h in (1e-5, -1e-5))
    torch.testing.assert_close((grad_x * step).sum((-2, -1)), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gaussian_of_more_rows_than_features_of_any_scale(scale, guarded, emulated, generator):
    x, y = samples(165, 9, 3, generator, batch=(3,))
    value, grad_x, grad_y = check_gaussian(x, y, guarded)
    leaves = [(t * scale).requires_grad_() for t in (x, y)]
    leaves[0].data[1, 2, 0] = torch.nan
    with guarded:
        scaled = otkd_fast.gaussian_wasserstein_from_samples(*leaves, backend="cpu")
        grads = torch.autograd.grad(scaled.sum(), leaves)
    assert scaled[1].isnan() and grads[1][1].isnan().any()
    for got, want in zip(grads, (grad_x, grad_y), strict=True):
        torch.testing.assert_close(got[[0, 2]] / scale, want[[0, 2]], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_gaussian_of_any_scale(scale, guarded, generator):
    x, y = samples(6, 5, 40, generator)
    value, *grads = check_gaussian(x, y, guarded)
    leaves = [(t * scale).requires_grad_() for t in (x, y)]
    with guarded:
        scaled = otkd_fast.gaussian_wasserstein_from_samples(*leaves, backend="cpu")
        scaled_grads = torch.autograd.grad(scaled.sum(), leaves)
    for got, want in zip(scaled_grads, grads, strict=True):
        torch.testing.assert_close(got / scale, want, rtol=2e-4, atol=2e-4)
    expected = (value.double() * scale**2).float()  # 0 or infinite where float32 has no such number
    torch.testing.assert_close(scaled.detach(), expected, rtol=1e-5, atol=1e-44)


def test_gaussian_of_bad_and_constant_samples(guarded, generator):
    x, y = samples(6, 5, 40, generator, batch=(3,))
    clean = check_gaussian(x, y, guarded)
    x[1, 2, 35] = torch.nan
    x[2] = 3.0
    leaf = x.requires_grad_()
    with guarded:
        value = otkd_fast.gaussian_wasserstein_from_samples(leaf, y, backend="cpu")
        (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert value[1].isnan() and grad[1].isnan().any()
    assert torch.equal(value[0], clean[0][0]) and torch.equal(grad[0], clean[1][0])
    expected = (3 - y[2].double()).square().sum() / 5  # the trace of y and the distance of the means
    torch.testing.assert_close(value[2].detach().double(), expected, rtol=1e-6, atol=0)
    assert grad[2].isfinite().all()


def test_the_order_of_threads_does_not_matter(guarded, emulated, generator):
    K, (x, y) = conditioned(19, 34, generator, (2,)).float(), samples(9, 7, 40, generator)
    for limit in (99, 9):
        emulated.set_shared_limit(limit * 1024)
        emulated.set_order(0)
        first = *check_polar(K, guarded), *check_gaussian(x, y, guarded)
        for order in (1, 2, 3):
            emulated.set_order(order)
            again = *check_polar(K, guarded), *check_gaussian(x, y, guarded)
            assert all(map(torch.equal, first, again))
