"""SciPy and POT on Gaussians, where they are right, and the released KD2M formula."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import backends, covariance

from .cases import bures, feature_pair, sample_covariance, wasserstein_from_samples

ALL = backends("gaussian_wasserstein")


@pytest.mark.parametrize("backend", ALL)
def test_scipy(backend, generator):
    linalg = pytest.importorskip("scipy.linalg")
    A, B = (covariance("geometric 1e2", 7, generator=generator) for _ in range(2))
    root = linalg.sqrtm(A.numpy())
    expected = A.trace() + B.trace() - 2 * linalg.sqrtm(root @ B.numpy() @ root).real.trace()
    torch.testing.assert_close(otkd_fast.bures_distance(A, B, backend=backend), expected)


@pytest.mark.parametrize("backend", ALL)
def test_pot(backend, generator):
    """ot.gaussian gives the distance, not its square."""
    ot = pytest.importorskip("ot")
    A, B = (covariance("geometric 1e2", 7, generator=generator) for _ in range(2))
    means = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    expected = ot.gaussian.bures_wasserstein_distance(*means, A, B).squeeze() ** 2
    torch.testing.assert_close(otkd_fast.gaussian_wasserstein(means[0], A, means[1], B, backend=backend), expected)
    x, y = feature_pair(40, 50, 6, generator)
    expected = ot.gaussian.empirical_bures_wasserstein_distance(x, y, reg=0).squeeze() ** 2
    for unbiased in (False, True):  # POT divides by n
        actual = otkd_fast.gaussian_wasserstein_from_samples(x, y, unbiased=unbiased, backend=backend)
        assert torch.isclose(actual, expected, rtol=1e-6) == (not unbiased)


@pytest.mark.parametrize("backend", ALL)
def test_pot_in_float32_on_rank_deficient_covariances_is_no_oracle(backend, generator):
    """Fewer rows than features: a root of the float32 covariance loses half the digits, the samples do not."""
    ot = pytest.importorskip("ot")
    x, y = feature_pair(20, 20, 64, generator, dtype=torch.float32)
    value, *_, traces, _ = wasserstein_from_samples(x, y)
    theirs = ot.gaussian.bures_wasserstein_distance(x.mean(0), y.mean(0), sample_covariance(x), sample_covariance(y))
    ours = otkd_fast.gaussian_wasserstein_from_samples(x, y, backend=backend)
    error = abs(float(ours) - float(value)) / float(traces)
    assert error <= 1e-6
    assert not abs(float(theirs) ** 2 - float(value)) / float(traces) <= 10 * error + 1e-6


@pytest.mark.parametrize("backend", ALL)
def test_torch_autograd_through_eigh_agrees_where_it_is_defined(backend, generator):
    A = covariance("geometric 1e2", 5, generator=generator).requires_grad_()
    B = covariance("two clusters", 5, generator=generator)
    L = torch.linalg.cholesky(B)
    expected = A.trace() + B.trace() - 2 * torch.linalg.eigvalsh(L.mT @ A @ L).sqrt().sum()
    actual = otkd_fast.bures_distance(A, B, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual.detach(), bures(A.detach(), B))
    grads = [torch.autograd.grad(value, A)[0] for value in (actual, expected)]
    torch.testing.assert_close(grads[0], (grads[1] + grads[1].mT) / 2, rtol=1e-6, atol=1e-8)


def test_released_kd2m_formula(generator):
    """gaussian_w2 of the released code: mean and biased standard deviation over the batch, squared norms."""
    x, y = torch.randn(2, 16, 32, generator=generator)
    expected = (x.mean(0) - y.mean(0)).square().sum() + (x.std(0, correction=0) - y.std(0, correction=0)).square().sum()
    moments = [*otkd_fast.feature_moments(x, dim=0), *otkd_fast.feature_moments(y, dim=0)]
    torch.testing.assert_close(otkd_fast.gaussian_wasserstein_diagonal(*moments), expected)


@pytest.mark.parametrize("backend", ALL)
def test_ott(backend, generator):
    """Right for well-conditioned covariances; its Bures cost stops after ten iterations, so it is no oracle beyond."""
    costs, jax = pytest.importorskip("ott.geometry.costs"), pytest.importorskip("jax")
    d, errors = 8, []
    for name in ("two clusters", "identity"):
        A, B = (covariance(kind, d, generator=generator).float() for kind in (name, "identity"))
        mean = torch.zeros(d)
        points = [costs.mean_and_cov_to_x(mean.numpy(), cov.numpy(), d) for cov in (A, B)]
        theirs = float(jax.device_get(costs.Bures(d)(*points)))
        ours = float(otkd_fast.gaussian_wasserstein(mean, A, mean, B, backend=backend))
        assert abs(ours - float(bures(A, B))) <= 1e-6 * float(A.trace() + B.trace())
        errors.append(abs(theirs - ours) / float(A.trace() + B.trace()))
    assert errors[1] < 1e-5 < errors[0]
