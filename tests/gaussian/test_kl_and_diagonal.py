"""Gaussian KL divergences and the diagonal Wasserstein distance: torch.distributions, closed forms, gradients."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import otkd_fast
from otkd_fast.testing import assert_close, covariance

from .cases import DTYPES


def gaussians(d, generator, batch=(3,)):
    """mean_x, cov_x, mean_y, cov_y."""
    means = torch.randn(2, *batch, d, generator=generator, dtype=torch.float64)
    covs = [covariance("geometric 1e2", d, generator=generator, batch=batch) for _ in range(2)]
    return means[0], covs[0], means[1], covs[1]


def diagonals(d, generator, batch=(3,)):
    """mean_x, std_x, mean_y, std_y."""
    values = torch.randn(4, *batch, d, generator=generator, dtype=torch.float64)
    return values[0], values[1].exp(), values[2], values[3].exp()


def gradients(function, arguments):
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    return torch.autograd.grad(function(*leaves).sum(), leaves)


@pytest.mark.parametrize("d", [1, 2, 7, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_against_torch_distributions(dtype, d, generator):
    arguments = [argument.to(dtype) for argument in gaussians(d, generator)]

    def expected(mean_x, cov_x, mean_y, cov_y):
        return kl_divergence(MultivariateNormal(mean_x, cov_x), MultivariateNormal(mean_y, cov_y))

    wide = [argument.double() for argument in arguments]
    wide[1::2] = [(cov + cov.mT) / 2 for cov in wide[1::2]]
    value = otkd_fast.gaussian_kl(*arguments)
    assert value.dtype == dtype
    assert_close(value, expected(*wide), "gaussian_kl", "value")
    grads = gradients(otkd_fast.gaussian_kl, arguments)
    for actual, exact in zip(grads, gradients(expected, wide), strict=True):
        exact = (exact + exact.mT) / 2 if actual.shape[-1] == actual.shape[-2] and actual.dim() == 3 else exact
        assert_close(actual, exact, "gaussian_kl", "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_diagonal(dtype, generator):
    arguments = [argument.to(dtype) for argument in diagonals(6, generator)]
    wide = [argument.double() for argument in arguments]
    expected = kl_divergence(Normal(*wide[:2]), Normal(*wide[2:])).sum(-1)
    assert_close(otkd_fast.gaussian_kl_diagonal(*arguments), expected, "gaussian_kl", "value")
    full = [wide[0], torch.diag_embed(wide[1] ** 2), wide[2], torch.diag_embed(wide[3] ** 2)]
    torch.testing.assert_close(otkd_fast.gaussian_kl(*full), expected)
    jittered = otkd_fast.gaussian_kl_diagonal(*wide, jitter=0.5)
    torch.testing.assert_close(jittered, otkd_fast.gaussian_kl(*full, jitter=0.5))


def test_gradchecks(generator):
    assert torch.autograd.gradcheck(otkd_fast.gaussian_kl, [a.requires_grad_() for a in gaussians(3, generator, (2,))])
    arguments = [a.requires_grad_() for a in diagonals(3, generator, (2,))]
    assert torch.autograd.gradcheck(otkd_fast.gaussian_kl_diagonal, arguments)
    assert torch.autograd.gradgradcheck(otkd_fast.gaussian_wasserstein_diagonal, arguments)


def test_nearly_equal_gaussians_keep_their_digits_in_float32(generator):
    """The divergence is of second order in the difference, and tr - d - log det cancels to it."""
    mean, cov, *_ = (argument.float() for argument in gaussians(8, generator, (4,)))
    other = (cov.double() * (1 + 1e-3)).float()
    wide = [argument.double() for argument in (mean, cov, mean, other)]
    wide[1::2] = [(c + c.mT) / 2 for c in wide[1::2]]
    expected = kl_divergence(MultivariateNormal(*wide[:2]), MultivariateNormal(*wide[2:]))
    assert float(expected.max()) < 1e-5
    actual = otkd_fast.gaussian_kl(mean, cov, mean, other)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    assert float(otkd_fast.gaussian_kl(mean, cov, mean, cov).max()) < 1e-25


def test_covariances_that_are_not_definite(generator):
    mean_x, cov_x, mean_y, cov_y = gaussians(4, generator)
    singular = cov_x.clone()
    singular[1] = covariance("rank one", 4, generator=generator)
    for name, arguments in (("cov_x", (mean_x, singular, mean_y, cov_y)), ("cov_y", (mean_x, cov_x, mean_y, singular))):
        with pytest.raises(ValueError, match=f"{name}: expected a positive definite matrix; it is not in problem 1"):
            otkd_fast.gaussian_kl(*arguments)
        assert otkd_fast.gaussian_kl(*arguments, jitter=1e-3).isfinite().all()
        # where values cannot be read, NaN in that problem alone
        values = torch.vmap(otkd_fast.gaussian_kl)(*arguments)
        assert values.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="std_y: expected variances > 0"):
        otkd_fast.gaussian_kl_diagonal(mean_x, mean_x.abs(), mean_y, 0 * mean_y)
    with pytest.raises(ValueError, match="jitter: expected a finite number"):
        otkd_fast.gaussian_kl(mean_x, cov_x, mean_y, cov_y, jitter=-1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wasserstein_diagonal(dtype, generator):
    mean_x, std_x, mean_y, std_y = (argument.to(dtype) for argument in diagonals(5, generator))
    actual = otkd_fast.gaussian_wasserstein_diagonal(mean_x, std_x, mean_y, std_y)
    full = otkd_fast.gaussian_wasserstein(mean_x, torch.diag_embed(std_x**2), mean_y, torch.diag_embed(std_y**2))
    torch.testing.assert_close(actual, full, rtol=1e-4, atol=1e-5)
    shared = otkd_fast.gaussian_wasserstein_diagonal(mean_x, std_x, mean_y[0], std_y[0])
    torch.testing.assert_close(shared[0], actual[0])
    half = otkd_fast.gaussian_wasserstein_diagonal(*(t.half() for t in (mean_x, std_x, mean_y, std_y)))
    assert half.dtype == torch.float32


def test_shared_batch_axes(generator):
    mean_x, cov_x, mean_y, cov_y = gaussians(3, generator)
    actual = otkd_fast.gaussian_kl(mean_x, cov_x[0], mean_y[0], cov_y)
    for k in range(3):
        torch.testing.assert_close(actual[k], otkd_fast.gaussian_kl(mean_x[k], cov_x[0], mean_y[0], cov_y[k]))
