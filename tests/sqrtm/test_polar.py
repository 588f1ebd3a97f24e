"""polar: closed forms, singular value decomposition, ranges, gradients, and the polynomials themselves."""

import math

import pytest
import torch

import otkd_fast
from otkd_fast.reference.polar import SCHEDULES, polar_svd
from otkd_fast.testing import assert_norm_close, backends, tolerance

ALL = backends("polar")
DTYPES = (torch.float64, torch.float32)
SHAPES = ((1, 1), (1, 5), (4, 1), (3, 3), (7, 4), (5, 33), (16, 16), (17, 17), (49, 49), (64, 65), (96, 130))


def with_singular_values(n, m, values, generator, batch=()):
    """Matrices (*batch, n, m) with these singular values, as many as min(n, m)."""
    U, _ = torch.linalg.qr(torch.randn(*batch, n, len(values), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(*batch, m, len(values), generator=generator, dtype=torch.float64))
    return (U * torch.as_tensor(values, dtype=torch.float64)) @ V.mT


def check(K, backend, context=""):
    """Against the singular value decomposition, in float64, of the matrices as they are."""
    P, norm = otkd_fast.polar(K, backend=backend)
    assert P.dtype == norm.dtype == K.dtype
    expected_factor, expected_norm = polar_svd(K.double(), 1e-12)
    assert_norm_close(P, expected_factor, tolerance("polar", "factor", K.dtype).rtol, context=f"{context} factor")
    bound = tolerance("polar", "nuclear_norm", K.dtype).rtol
    assert_norm_close(norm[..., None, None], expected_norm[..., None, None], bound, context=f"{context} norm")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_against_svd(backend, dtype, shape, generator):
    values = torch.logspace(0, -4, min(shape)) if min(shape) > 1 else [3.0]
    check(with_singular_values(*shape, values, generator, (3,)).to(dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_closed_forms(backend, dtype):
    cos, sin = math.cos(0.3), math.sin(0.3)
    rotation = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    cases = [
        (torch.eye(4), torch.eye(4), 4.0),
        (torch.diag(torch.tensor([2.0, -3.0, 0.5])), torch.diag(torch.tensor([1.0, -1.0, 1.0])), 5.5),
        (5 * rotation, rotation, 10.0),
        (torch.ones(3, 4), torch.full((3, 4), 12**-0.5, dtype=torch.float64), 12**0.5),  # rank one: u v^T
        (torch.tensor([[-7.0]]), torch.tensor([[-1.0]]), 7.0),
    ]
    bound = 10 * torch.finfo(dtype).eps
    for K, factor, norm in cases:
        P, nuclear_norm = otkd_fast.polar(K.to(dtype), backend=backend)
        torch.testing.assert_close(P, factor.to(dtype), rtol=bound, atol=bound)
        assert float(nuclear_norm) == pytest.approx(norm, rel=bound)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("backend", ALL)
def test_scale_does_not_matter(backend, scale, generator):
    K = with_singular_values(9, 6, [1.0, 0.9, 0.5, 0.1, 0.01, 0.001], generator).float() * scale
    check(K, backend, context=str(scale))


def test_scale_does_not_matter_in_float64(generator):
    K = with_singular_values(9, 6, [1.0, 0.9, 0.5, 0.1, 0.01, 0.001], generator)
    for scale in (1e-300, 1e300):
        P, norm = otkd_fast.polar(K * scale)
        torch.testing.assert_close(P, otkd_fast.polar(K)[0], rtol=0, atol=1e-12)
        assert float(norm / scale) == pytest.approx(2.511, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_singular_and_zero_matrices(backend, dtype, generator):
    """Exact on the range; beyond it, rounding noise of K is damped by the range of the polynomials."""
    K = with_singular_values(12, 8, [1.0, 0.5, 0.25], generator, (2,)).to(dtype)
    P, norm = otkd_fast.polar(K, backend=backend)
    expected_factor, expected_norm = polar_svd(K.double(), 1e-5)
    left, right = expected_factor @ expected_factor.mT, expected_factor.mT @ expected_factor
    assert_norm_close(left @ P.double() @ right, expected_factor, tolerance("polar", "factor", dtype).rtol)
    assert_norm_close(P, expected_factor, 0.05)
    bound = tolerance("polar", "nuclear_norm", dtype).rtol
    assert_norm_close(norm[..., None, None], expected_norm[..., None, None], bound)
    zero = torch.zeros(2, 3, 5, dtype=dtype)
    P, norm = otkd_fast.polar(zero, backend=backend)
    assert torch.equal(P, zero) and torch.equal(norm, torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_a_bad_entry_stays_in_its_matrix(backend, dtype, bad, generator):
    K = torch.randn(5, 6, 7, generator=generator, dtype=torch.float64).to(dtype)
    clean = otkd_fast.polar(K, backend=backend)
    K[2, 1, 3] = bad
    P, norm = otkd_fast.polar(K, backend=backend)
    assert P[2].isnan().any() and norm[2].isnan()
    others = [0, 1, 3, 4]
    assert torch.equal(P[others], clean[0][others]) and torch.equal(norm[others], clean[1][others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_below_the_range_the_factor_is_damped_not_noise(backend, dtype, generator):
    tiny = 1e-9 if dtype == torch.float32 else 1e-18
    K = torch.diag(torch.tensor([1.0, tiny], dtype=torch.float64)).to(dtype)
    P, _ = otkd_fast.polar(K, backend=backend)
    assert 0 < float(P[1, 1]) < 1e-2
    assert float(torch.linalg.matrix_norm(P, 2)) <= 1 + 1e-5


@pytest.mark.parametrize("backend", ALL)
def test_layouts_batches_and_half_precision(backend, generator):
    K = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    P, norm = otkd_fast.polar(K, backend=backend)
    assert P.shape == K.shape and norm.shape == (2, 3)
    for same in (K.mT.contiguous().mT, K.movedim(0, -1).contiguous().movedim(-1, 0)):
        torch.testing.assert_close(otkd_fast.polar(same, backend=backend), (P, norm))
    shared = K[:1, :1].expand(2, 3, 4, 5)
    torch.testing.assert_close(otkd_fast.polar(shared, backend=backend)[0], P[:1, :1].expand_as(P))
    transposed, same_norm = otkd_fast.polar(K.mT, backend=backend)
    torch.testing.assert_close((transposed.mT, same_norm), (P, norm))
    empty, none = otkd_fast.polar(K[:0], backend=backend)
    assert empty.shape == (0, 3, 4, 5) and none.shape == (0, 3)
    for dtype in (torch.float16, torch.bfloat16):
        half, half_norm = otkd_fast.polar(K.to(dtype), backend=backend)
        assert half.dtype == half_norm.dtype == torch.float32
        torch.testing.assert_close(half, otkd_fast.polar(K.to(dtype).float(), backend=backend)[0])


@pytest.mark.parametrize("shape", [(3, 3), (5, 2), (2, 6)])
@pytest.mark.parametrize("backend", ALL)
def test_gradcheck_of_the_nuclear_norm(backend, shape, generator):
    K = torch.randn(2, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda K: otkd_fast.polar(K, backend=backend)[1], K)


@pytest.mark.parametrize("backend", ALL)
def test_the_factor_itself_is_not_differentiated(backend, generator):
    K = torch.randn(3, 3, generator=generator, requires_grad=True)
    P, norm = otkd_fast.polar(K, backend=backend)
    with pytest.raises(RuntimeError, match="polar factor, which is not differentiated"):
        (P.sum() + norm).backward()
    (grad,) = torch.autograd.grad(norm, K, create_graph=True)
    torch.testing.assert_close(grad, P)
    with pytest.raises(RuntimeError, match="polar: there is no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("steps", SCHEDULES)
def test_polynomials_reach_one_and_stay_in_range(steps):
    """In exact arithmetic, and with the rounding of float32 added to every step."""
    lower = 10.0 ** ((1 - steps) / 2)
    x = torch.logspace(math.log10(lower), 0, 20001, dtype=torch.float64)
    y, rounded = x.clone(), x.float() * (1 + 1e-6)
    for a, b, c in SCHEDULES[steps]:
        y = a * y + b * y**3 + c * y**5
        rounded = (a * rounded + b * rounded**3 + c * rounded**5) * (1 + 1e-6)
        assert float(y.abs().max()) < 2 and float(rounded.abs().max()) < 2.01
    assert float((y - 1).abs().max()) < {7: 1e-6, 9: 1e-8}.get(steps, 1e-10)
    assert float((rounded - 1).abs().max()) < 1e-5


def test_polynomials_are_the_published_ones():
    """The first steps for [1e-3, 1] with cushion 0.1 and safety 1.01."""
    expected = [(7.605393, -18.47181, 12.69483), (3.776, -2.3105, 0.4000)]
    for actual, published in zip(SCHEDULES[7], expected, strict=False):
        assert actual == pytest.approx(published, rel=2e-4)
    assert SCHEDULES[21][-1] == pytest.approx((15 / 8, -10 / 8, 3 / 8), abs=1e-4)
