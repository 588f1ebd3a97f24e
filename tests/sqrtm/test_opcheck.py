"""Registration of the operators of matrix roots, Gaussian distances and moments: schema, fake, dispatch."""

import pytest
import torch

import otkd_fast  # noqa: F401  registers the operators
from otkd_fast.testing import backends, covariance

pytestmark = pytest.mark.skipif("cpu" not in backends("sqrtm"), reason="no compiled kernels")


def calls(generator):
    A, big = (covariance("geometric 1e2", d, generator=generator, batch=(3,)).float() for d in (5, 30))
    x, y = torch.randn(2, 3, 4, 6, generator=generator)
    maps = torch.randn(2, 3, 5, 7, generator=generator)
    yield "polar_fwd", (x, 0)
    many = covariance("geometric 1e2", 26, generator=generator, batch=(33,)).float()
    kinds = ((A, "jacobi"), (big, "polar"), (big, "tridiagonal"), (many, "auto"), (A, "eigh"), (A, "newton_schulz"))
    for matrices, algorithm in kinds:
        yield "sqrtm_fwd", (matrices, False, algorithm)
        S, aux = torch.ops.otkd_fast.sqrtm_fwd(matrices, False, algorithm)
        yield "sqrtm_bwd", (matrices, S, aux, S.mT, False, algorithm)
    for needs in ((True, True), (False, True)):
        yield "gaussian_wasserstein_from_samples", (x, y.mT.contiguous().mT, False, *needs)
        yield "bures_distance", (A, A.flip(0), *needs)
        yield "bures_distance", (big, torch.zeros_like(big), *needs)
    for axes, grid in (((2, 3), (2, 3)), ((3, 1), (1, 2)), ((0,), (1,))):
        yield "feature_moments_fwd", (maps, axes, grid, False, 1e-3)
        mean, std = torch.ops.otkd_fast.feature_moments_fwd(maps, axes, grid, False, 1e-3)
        yield "feature_moments_bwd", (maps, mean, std[:1].expand_as(std), axes, grid, False, 1e-3)


def test_opcheck(generator):
    for name, arguments in calls(generator):
        torch.library.opcheck(getattr(torch.ops.otkd_fast, name).default, arguments)
