"""The debiased divergence: zero for equal clouds, the same number as geomloss, the distance of translated clouds."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import backends

BACKENDS = backends("sinkhorn_points")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cloud_and_itself(backend):
    x = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    options = {"metric": "sqeuclidean", "epsilon": 0.5, "num_iters": 20, "backend": backend}
    value = otkd_fast.sinkhorn_divergence(x, x.detach(), **options)
    (grad,) = torch.autograd.grad(value, x)
    assert value.abs() < 1e-12 and grad.abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_translation_costs_its_square(backend):
    """Both self terms equal the cross term of the centred clouds, at every epsilon."""
    x, shift = torch.randn(25, 3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    options = {"metric": "sqeuclidean", "epsilon": 0.7, "num_iters": 500, "backend": backend}
    value = otkd_fast.sinkhorn_divergence(x, x + shift, **options)
    torch.testing.assert_close(value, shift.square().sum(), rtol=1e-9, atol=0)


def test_against_geomloss():
    geomloss = pytest.importorskip("geomloss")
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64) + 1
    value = otkd_fast.sinkhorn_divergence(x, y, metric="sqeuclidean", epsilon=0.5, num_iters=500)
    # its cost is |x - y|^2 / 2 and its epsilon blur^2
    other = 2 * geomloss.SamplesLoss("sinkhorn", p=2, blur=0.5, scaling=0.99, debias=True, backend="tensorized")(x, y)
    torch.testing.assert_close(value, other, rtol=1e-3, atol=0)


def test_totals_must_agree():
    x, y = torch.randn(4, 2), torch.randn(5, 2)
    a, b = torch.full((4,), 0.25), torch.full((5,), 0.4)
    with pytest.raises(ValueError, match="^[ab]: "):
        otkd_fast.sinkhorn_divergence(x, y, a, b, metric="l2", epsilon=0.1, num_iters=5)
