"""Which directions sqrtm takes for zeros: all of those of exactly singular matrices, none of graded definite ones."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import assert_norm_close, backends, covariance, root_tolerance, spectrum

from .cases import DTYPES, RUNS, root

# Triton's interpreter takes seconds a batch
COMPILED = [run for run in RUNS if run[0] != "triton"]
BY_PIVOTS = [run for run in COMPILED if run[1] == "polar" or run == ("cpu", "jacobi")]


def of_rank_one_less(d, dtype, generator, count=300):
    """G G^T, G (d, d - 1) of small integers: exactly singular. Those of moderate condition on their range."""
    G = torch.randint(-3, 4, (count, d, d - 1), generator=generator).double()
    A = G @ G.mT
    values = torch.linalg.eigvalsh(A)  # ascending
    return A[values[:, 1] > 1e-4 * values[:, -1]].to(dtype)


def pseudo_inverse_root(A):
    values, V = torch.linalg.eigh(A.double())
    weights = torch.cat((0 * values[:, :1], values[:, 1:].rsqrt()), -1)
    return (V * weights.unsqueeze(-2)) @ V.mT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", COMPILED)
def test_no_null_direction_of_singular_matrices_is_kept(backend, algorithm, dtype, generator):
    for d in (2, 3, 4, 6, 8, 12, 16, 24, 32):
        A = of_rank_one_less(d, dtype, generator)
        assert len(A) > 100
        R = otkd_fast.sqrtm(A, inverse=True, algorithm=algorithm, backend=backend)
        # the null direction turns by the rounding times the condition of the range, 1e4 at most
        bound = 2e-5 if dtype == torch.float32 else 1e-11
        assert_norm_close(R, pseudo_inverse_root(A), bound, context=f"{d}")


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("backend, algorithm", COMPILED)
def test_gradients_leave_it_out(backend, algorithm, inverse, generator):
    for d in (4, 8, 16):
        A = of_rank_one_less(d, torch.float64, generator, 200).requires_grad_()
        G = torch.randn(A.shape, generator=generator, dtype=A.dtype)
        S = otkd_fast.sqrtm(A, inverse=inverse, algorithm=algorithm, backend=backend)
        (actual,) = torch.autograd.grad(S, A, G)
        root_, aux = reference.sqrtm_fwd(A.detach(), inverse, "eigh")
        expected = reference.sqrtm_bwd(A.detach(), root_, aux, G, inverse, "eigh")
        assert_norm_close(actual, expected, 1e-5, context=f"{d}")  # a rounded zero has a root of 1e-8, others 1e-2


@pytest.mark.parametrize("backend, algorithm", COMPILED)
def test_every_direction_of_definite_matrices_is_kept(backend, algorithm, generator):
    for dtype, name in [(torch.float32, f"geometric 1e{k}") for k in (4, 6)] + [
        (torch.float64, f"geometric 1e{k}") for k in (4, 8, 10, 12)
    ]:
        for d in (2, 8, 24):
            A = covariance(name, d, generator=generator, batch=(50,)).to(dtype)
            R = otkd_fast.sqrtm(A, inverse=True, algorithm=algorithm, backend=backend)
            condition = 1 / float(spectrum(name, d)[-1])
            bound = 2 * root_tolerance(dtype, condition) * condition**0.5  # 2: that of the expectation
            assert_norm_close(R, root(A, -0.5), bound, context=f"{name} {d} {dtype}")


@pytest.mark.parametrize(
    "dtype, spread", [(torch.float32, 8), (torch.float32, 16), (torch.float64, 16), (torch.float64, 40)]
)
@pytest.mark.parametrize("backend, algorithm", BY_PIVOTS)
def test_units_of_the_variables_do_not_matter(backend, algorithm, dtype, spread, generator):
    """D A D: variances beside each other that differ by up to 2^spread, in any order."""
    for d in (3, 8, 24):
        A = covariance("geometric 1e2", d, generator=generator, batch=(40,)).to(dtype).double()
        D = 2.0 ** (torch.rand(40, d, generator=generator, dtype=torch.float64) * spread / 2).round()
        graded = (D.unsqueeze(-1) * A * D.unsqueeze(-2)).to(dtype)  # exact
        R = otkd_fast.sqrtm(graded, inverse=True, algorithm=algorithm, backend=backend).double()
        inverse = torch.linalg.inv(A) / D.unsqueeze(-1) / D.unsqueeze(-2)
        assert_norm_close(R @ R, inverse, 1e-2 if dtype == torch.float32 else 1e-6, context=f"{d}")


@pytest.mark.parametrize("backend, algorithm", [run for run in BY_PIVOTS if run[0] == "cpu"])
def test_every_entry_of_the_gradient_has_its_part_where_the_matrix_is_definite(backend, algorithm):
    """Also those between two variances that are below the rounding of the largest one."""
    variances = torch.tensor([2.0**-56, 1.0, 2.0**-60], dtype=torch.float64)
    A = torch.diag(variances).expand(32, 3, 3).clone().requires_grad_()
    S = otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)
    (grad,) = torch.autograd.grad(S, A, torch.ones_like(A))
    roots = variances.sqrt()
    torch.testing.assert_close(grad, (1 / (roots + roots.unsqueeze(-1))).expand_as(A), rtol=1e-6, atol=0)


@pytest.mark.skipif("cpu" not in backends("sqrtm"), reason="no native module")
@pytest.mark.parametrize("dtype, name", [(torch.float32, "geometric 1e6"), (torch.float64, "geometric 1e12")])
def test_products_serve_the_gradient_of_graded_matrices(dtype, name, generator):
    """The bounds that 'polar' leaves for its backward: the lower one is 0 where eigenvalues must serve instead."""
    for d in (2, 8, 24):
        A = covariance(name, d, generator=generator, batch=(64,)).to(dtype)
        smallest = float(spectrum(name, d)[-1]) ** 0.5
        _, bounds = torch.ops.otkd_fast.sqrtm_fwd(A, False, "polar")
        lower = bounds[:, 1].double() / smallest
        assert float(lower.min()) > 0.2 and float(lower.max()) < 1.1
        singular = of_rank_one_less(d, dtype, generator, 100)
        _, bounds = torch.ops.otkd_fast.sqrtm_fwd(singular, False, "polar")
        assert (bounds[:, 1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", BY_PIVOTS)
def test_the_level_of_pivots(backend, algorithm, dtype):
    """[[1, b], [b, 1]] has the pivots 1 and 1 - b^2: kept well above the documented level, left out well below."""
    unit = torch.finfo(dtype).eps
    level = 32 if dtype == torch.float64 else 0.25
    for units, kept in ((4 * level, True), (level / 4, False)):
        b = 1 - units * unit / 2
        A = torch.tensor([[1, b], [b, 1]], dtype=dtype)  # float32: b = 1 below the level
        R = otkd_fast.sqrtm(A, inverse=True, algorithm=algorithm, backend=backend).double()
        along = float(R[0, 0] - R[0, 1])  # eigenvalue of (1, -1)
        expected = (1 - float(A[0, 1])) ** -0.5 if kept else 0
        assert abs(along - expected) <= 1e-2 * expected + 1e-6, units
