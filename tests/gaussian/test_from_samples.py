"""gaussian_wasserstein_from_samples: closed forms, the float64 answer, the accuracy contract, degenerate features."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import assert_norm_close, backends, tolerance

from .cases import DTYPES, bures, centred, feature_pair, sample_covariance, wasserstein_from_samples

ALL = backends("gaussian_wasserstein")
# (n, m, d): fewer rows than features, many of each, more rows than features, single rows
SHAPES = [(1, 1, 1), (1, 4, 3), (2, 2, 7), (5, 3, 4), (16, 16, 40), (17, 33, 50), (49, 49, 64), (64, 64, 64)]
SHAPES += [(9, 7, 1), (40, 30, 8), (70, 100, 33), (20, 200, 33)]


def distance(x, y, backend, **options):
    return otkd_fast.gaussian_wasserstein_from_samples(x, y, backend=backend, **options)


def check(x, y, backend, unbiased=False, gradients=True):
    expected = wasserstein_from_samples(x, y, unbiased)
    value, grad_x, grad_y, traces, _ = expected
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    actual = distance(x, y, backend, unbiased=unbiased)
    assert actual.dtype == x.dtype and actual.shape == x.shape[:-2]
    assert (actual >= 0).all()
    error = (actual.detach().double() - value).abs() / (traces + value)
    assert float(error.max()) <= tolerance("gaussian_wasserstein", "value", x.dtype).atol
    if not gradients:
        return
    bound = tolerance("gaussian_wasserstein", "gradient", x.dtype).rtol
    for grad, exact in zip(torch.autograd.grad(actual.sum(), (x, y)), (grad_x, grad_y), strict=True):
        assert_norm_close(grad, exact, bound, context=f"{tuple(x.shape)} {tuple(y.shape)}")


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_against_singular_values(backend, dtype, shape, unbiased, generator):
    n, m, d = shape
    if unbiased and 1 in (n, m):
        pytest.skip("a single row has no unbiased covariance")
    x = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    y = 0.5 + 2 * torch.randn(3, m, d, generator=generator, dtype=torch.float64)
    check(x.to(dtype), y.to(dtype), backend, unbiased)


@pytest.mark.parametrize("shape", [(49, 49, 128), (16, 16, 256), (64, 50, 64), (196, 150, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_accuracy_contract_on_features(backend, dtype, shape, generator):
    x, y = feature_pair(*shape, generator, (3,), dtype)
    condition = wasserstein_from_samples(x, y)[-1]
    check(x, y, backend, gradients=bool((condition < 1e4).all()))


@pytest.mark.parametrize("backend", ALL)
def test_nearly_equal_distributions_keep_their_digits_in_float32(backend, generator):
    """1e-4 of the traces is left after the cancellation; products of float32 rounding would spoil it."""
    x, _ = feature_pair(49, 49, 96, generator, (4,), torch.float32)
    y = x + 0.01 * x.std() * torch.randn(x.shape, generator=generator)
    value, *_, traces, _ = wasserstein_from_samples(x, y)
    assert float((value / traces).max()) < 1e-3
    torch.testing.assert_close(distance(x, y, backend).double(), value, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_it_is_the_distance_of_the_fitted_gaussians(backend, dtype, generator):
    for n, m, d in ((30, 40, 6), (12, 9, 5)):
        x, y = feature_pair(n, m, d, generator, (2,))
        means = (x.mean(-2) - y.mean(-2)).square().sum(-1)
        for unbiased in (False, True):
            expected = means + bures(sample_covariance(x, unbiased), sample_covariance(y, unbiased))
            actual = distance(x.to(dtype), y.to(dtype), backend, unbiased=unbiased)
            torch.testing.assert_close(actual.double(), expected, rtol=2e-6 if dtype == torch.float32 else 1e-9, atol=0)


@pytest.mark.parametrize("backend", ALL)
def test_closed_forms(backend, generator):
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    shift = torch.arange(6, dtype=torch.float64)
    traces = centred(x).square().sum() / 20
    torch.testing.assert_close(distance(x, x + shift, backend), shift.square().sum())
    torch.testing.assert_close(distance(x, 3 * x - 2 * x.mean(0), backend), 4 * traces)
    order = torch.randperm(20, generator=generator)
    assert float(distance(x, x[order], backend)) < 1e-12 * float(traces)
    one = torch.randn(9, 1, generator=generator, dtype=torch.float64)
    other = torch.randn(14, 1, generator=generator, dtype=torch.float64)
    expected = (one.mean() - other.mean()) ** 2 + (one.std(correction=0) - other.std(correction=0)) ** 2
    torch.testing.assert_close(distance(one, other, backend), expected)
    single = torch.ones(1, 3)
    torch.testing.assert_close(distance(single, 4 * single, backend), torch.tensor(27.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_symmetric_in_its_arguments(backend, dtype, generator):
    for n, m, d in ((10, 14, 30), (40, 30, 7)):
        x, y = feature_pair(n, m, d, generator, (2,), dtype)
        traces = wasserstein_from_samples(x, y)[3]
        difference = (distance(x, y, backend) - distance(y, x, backend)).abs().double()
        assert float((difference / traces).max()) <= 2 * tolerance("gaussian_wasserstein", "value", dtype).atol


@pytest.mark.parametrize("shape", [(6, 6, 9), (30, 20, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_degenerate_features(backend, dtype, shape, generator):
    """Identical, constant and zero features: values are exact, gradients finite and bounded."""
    n, m, d = shape
    x, y = feature_pair(n, m, d, generator, dtype=dtype)
    dead = y.clone()
    dead[:, : d // 2] = 0.25
    constant, zero = torch.full_like(x, 3.0), torch.zeros_like(x)
    pairs = [
        (x, x[:m] if m <= n else x),
        (constant, y),
        (zero, y),
        (zero, zero[:m]),
        (constant, constant[:m]),
        (x, dead),
    ]
    for left, right in pairs:
        left, right = left.clone().requires_grad_(), right.clone().requires_grad_()
        value = distance(left, right, backend)
        expected, *_, traces, _ = wasserstein_from_samples(left.detach(), right.detach())
        unit = float(traces.clamp(min=1e-30)) + float(expected)
        assert abs(float(value.detach()) - float(expected)) <= 1e-6 * unit
        grad_left, grad_right = torch.autograd.grad(value, (left, right))
        assert grad_left.isfinite().all() and grad_right.isfinite().all()
        offset = torch.linalg.vector_norm(left.detach().double().mean(0) - right.detach().double().mean(0))
        # |dW2^2 / dx| <= 2 (|X| + |Y|) / sqrt(n) + 2 |offset| / sqrt(n)
        bound = 2 * (2 * traces.sqrt() + offset) / n**0.5
        assert float(torch.linalg.matrix_norm(grad_left.double())) <= 1.001 * float(bound) + 1e-30


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("backend", ALL)
def test_scale_does_not_matter(backend, scale, generator):
    x, y = feature_pair(8, 9, 12, generator, dtype=torch.float32)
    x, y = x * scale, y * scale
    check(x, y, backend)


@pytest.mark.parametrize("shape", [(4, 3, 6), (9, 8, 3), (1, 5, 2)])
@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend, shape, generator):
    n, m, d = shape
    x = torch.randn(2, n, d, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, m, d, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: distance(x, y, backend), (x, y))


@pytest.mark.parametrize("backend", ALL)
def test_teacher_without_gradient_shared_batch_and_layouts(backend, generator):
    x, y = feature_pair(5, 6, 8, generator, (2, 3))
    value, grad_x, grad_y, *_ = wasserstein_from_samples(x, y)
    student = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(distance(student, y, backend).sum(), student)[0], grad_x)
    student = y.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(distance(x, student, backend).sum(), student)[0], grad_y)
    strided = y.movedim(0, -1).contiguous().movedim(-1, 0)
    torch.testing.assert_close(distance(x.mT.contiguous().mT, strided, backend), value)
    # a teacher without batch axes is shared: its gradient is the sum
    teacher = y[0, 0].clone().requires_grad_()
    values = distance(x, teacher, backend)
    expected = wasserstein_from_samples(x, y[:1, :1].expand_as(y))
    torch.testing.assert_close(values.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(values.sum(), teacher)[0], expected[2].sum((0, 1)))
    assert distance(x[:0], y[:0], backend).shape == (0, 3)


@pytest.mark.parametrize("backend", ALL)
def test_a_bad_sample_stays_in_its_problem(backend, generator):
    for shape in ((5, 6, 8), (9, 8, 4)):
        x, y = feature_pair(*shape, generator, (3,), torch.float32)
        clean = distance(x, y, backend)
        for bad in (torch.nan, torch.inf):
            spoilt = x.clone()
            spoilt[1, 2, 3] = bad
            spoilt.requires_grad_()
            value = distance(spoilt, y, backend)
            (grad,) = torch.autograd.grad(value.sum(), spoilt)
            assert value[1].isnan() and torch.equal(value[[0, 2]], clean[[0, 2]])
            assert grad[1].isnan().any() and grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ALL)
def test_half_precision_is_computed_in_float32(backend, dtype, generator):
    x, y = feature_pair(5, 6, 8, generator, dtype=dtype)
    x.requires_grad_()
    value = distance(x, y, backend)
    assert value.dtype == torch.float32
    assert torch.equal(value, distance(x.float(), y.float(), backend))
    assert torch.autograd.grad(value, x)[0].dtype == dtype
