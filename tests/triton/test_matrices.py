"""polar and gaussian_wasserstein_from_samples on Triton, interpreted in guarded memory, against the reference."""

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.testing import assert_norm_close, feature_rows, tolerance  # noqa: E402
from otkd_fast.testing.guarded import gradients_guarded, run_guarded  # noqa: E402

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 3), (16, 15), (9, 17)], ids=str)
def test_polar(shape, dtype, generator):
    """In registers, up to 32 x 32."""
    check_polar(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("shape", [(33, 2), (2, 65)], ids=str)
def test_polar_through_memory_and_in_launches(shape, generator):
    check_polar(torch.randn(shape, generator=generator, dtype=torch.float64).float())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (1, 49, 49), (65, 64), (2, 3, 130)], ids=str)
def test_larger_polar(shape, dtype, generator):
    check_polar(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def check_polar(K):
    P, norm = run_guarded(otkd_fast.polar, K, backend="triton")
    expected, nuclear = reference.polar(K.double(), reference.polar.__globals__["STEPS"][K.dtype])
    assert_norm_close(P, expected, tolerance("polar", "factor", K.dtype).rtol)
    rtol = tolerance("polar", "nuclear_norm", K.dtype).rtol
    torch.testing.assert_close(norm.double(), nuclear, rtol=rtol, atol=0)


def test_polar_of_zero_nan_and_tiny_matrices(generator):
    K = torch.randn(4, 3, 3, generator=generator)
    K[0], K[1, 0, 1], K[2] = 0, float("nan"), K[2] * 1e-30
    P, norm = run_guarded(otkd_fast.polar, K, backend="triton")
    assert torch.equal(P[0], torch.zeros(3, 3)) and norm[0] == 0
    assert P[1].isnan().all() and norm[1].isnan()
    assert_norm_close(P[2:], reference.polar(K[2:].double(), 11)[0], 1e-5)


def test_polar_of_nothing_and_its_gradient(generator):
    P, norm = otkd_fast.polar(torch.empty(0, 3, 2), backend="triton")
    assert P.shape == (0, 3, 2) and norm.shape == (0,)
    K = torch.randn(3, 4, generator=generator, requires_grad=True)
    P, norm = otkd_fast.polar(K, backend="triton")
    assert torch.equal(torch.autograd.grad(norm, K)[0], P)


def check_samples(x, y, unbiased=False, needs=(True, True)):
    leaves = [rows.clone().requires_grad_(need) for rows, need in zip((x, y), needs, strict=True)]
    value, grads = gradients_guarded(
        lambda x, y: otkd_fast.gaussian_wasserstein_from_samples(x, y, unbiased=unbiased, backend="triton"), leaves
    )
    wide = x.double(), y.double()
    expected, *wanted = reference.wasserstein_from_samples(*wide, unbiased=unbiased)
    scale = sum((t - t.mean(-2, keepdim=True)).square().sum((-2, -1)) / (t.shape[-2] - unbiased) for t in wide)
    error = (value.double() - expected).abs()
    assert (error <= tolerance("gaussian_wasserstein", "value", x.dtype).atol * scale + 1e-12).all()
    bound = tolerance("gaussian_wasserstein", "gradient", x.dtype).rtol
    for grad, want in zip(grads, (want for want, need in zip(wanted, needs, strict=True) if need), strict=True):
        assert_norm_close(grad, want, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 7, 9), (16, 15, 16), (9, 8, 3)], ids=str)
def test_samples(sizes, dtype, generator):
    n, m, d = sizes
    x, y = (feature_rows(2, size, d, generator=generator).to(dtype) for size in (n, m))
    check_samples(x, y)
    check_samples(x[0], y[0], unbiased=True, needs=(True, False))


def test_samples_of_one_row_and_one_feature(generator):
    x, y = torch.randn(1, 1, generator=generator), torch.randn(1, 1, generator=generator)
    value = run_guarded(otkd_fast.gaussian_wasserstein_from_samples, x, y, backend="triton")
    torch.testing.assert_close(value, (x - y).square().sum(), rtol=1e-6, atol=0)


def test_samples_through_memory_and_in_launches(generator):
    for n, m, d in ((33, 4, 17), (66, 67, 5), (3, 66, 5)):
        x, y = (feature_rows(size, d, generator=generator).float() for size in (n, m))
        check_samples(x, y, needs=(False, True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_samples_of_feature_maps(dtype, generator):
    x, y = (feature_rows(2, 49, 70, generator=generator).to(dtype) for _ in range(2))
    check_samples(x, y)


def test_identical_and_constant_samples(generator):
    x = feature_rows(2, 6, 5, generator=generator).float()
    x[1] = 3.0
    value, grads = gradients_guarded(
        lambda x, y: otkd_fast.gaussian_wasserstein_from_samples(x, y, backend="triton"),
        (x.requires_grad_(), x.detach().clone().requires_grad_()),
    )
    assert (value >= 0).all() and (value < 1e-5).all() and value[1] == 0
    assert all(grad.isfinite().all() and grad.abs().max() < 1e-4 for grad in grads)


def test_no_problems():
    x = torch.empty(0, 3, 4, requires_grad=True)
    value = otkd_fast.gaussian_wasserstein_from_samples(x, torch.empty(0, 2, 4), backend="triton")
    value.sum().backward()
    assert value.shape == (0,) and x.grad.shape == x.shape
