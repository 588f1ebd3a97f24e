"""bures_distance and gaussian_wasserstein: closed forms, float64 answers, singular matrices, gradients."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import SPECTRA, assert_norm_close, backends, covariance, spectrum, tolerance

from .cases import DTYPES, bures

ALL = backends("gaussian_wasserstein")


def traces(A, B):
    return A.double().diagonal(dim1=-2, dim2=-1).sum(-1) + B.double().diagonal(dim1=-2, dim2=-1).sum(-1)


def transport_gradient(A, B):
    """Gradient I - B^-1/2 (B^1/2 A B^1/2)^1/2 B^-1/2 of the distance in a regular B, float64."""
    values, V = torch.linalg.eigh(B.double())
    root, inverse = ((V * values.pow(power).unsqueeze(-2)) @ V.mT for power in (0.5, -0.5))
    values, V = torch.linalg.eigh(root @ A.double() @ root)
    middle = (V * values.clamp(min=0).sqrt().unsqueeze(-2)) @ V.mT
    return torch.eye(A.shape[-1], dtype=torch.float64) - inverse @ middle @ inverse


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_value_on_every_spectrum(backend, dtype, name, generator):
    """The answer for the rounded input; a singular one is only known to sqrt(u) of the traces."""
    for d in (1, 2, 16, 40):
        A = covariance(name, d, generator=generator, batch=(3,)).to(dtype)
        B = covariance("geometric 1e2", d, generator=generator, batch=(3,)).to(dtype)
        actual = otkd_fast.bures_distance(A, B, backend=backend)
        assert actual.dtype == dtype and (actual >= 0).all()
        error = ((actual.double() - bures(A, B)) / traces(A, B)).abs().max()
        regular = spectrum(name, d)[-1] > 1e-6 or name == "identity"
        bound = tolerance("bures_distance", "value", dtype).atol if regular else torch.finfo(dtype).eps ** 0.5
        assert float(error) <= bound, (name, d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_closed_forms(backend, dtype, generator):
    a = torch.rand(3, 6, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    b[:, 0] = 0
    commuting, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    for basis in (torch.eye(6, dtype=torch.float64), commuting):
        A, B = ((basis * values.unsqueeze(-2)) @ basis.mT for values in (a, b))
        expected = (a.sqrt() - b.sqrt()).square().sum(-1)
        actual = otkd_fast.bures_distance(A.to(dtype), B.to(dtype), backend=backend)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3 if dtype == torch.float32 else 1e-7, atol=0)
    # 2 x 2: tr (A^1/2 B A^1/2)^1/2 = sqrt(tr AB + 2 sqrt(det A det B))
    A, B = (covariance("geometric 1e2", 2, generator=generator, batch=(5,)) for _ in range(2))
    trace = (A * B).sum((-2, -1))
    fidelity = (trace + 2 * (torch.linalg.det(A) * torch.linalg.det(B)).sqrt()).sqrt()
    actual = otkd_fast.bures_distance(A.to(dtype), B.to(dtype), backend=backend)
    torch.testing.assert_close(actual.double(), traces(A, B) - 2 * fidelity, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_equal_matrices_have_distance_zero_and_a_finite_gradient(backend, dtype, name, generator):
    A = covariance(name, 20, generator=generator, batch=(3,)).to(dtype).requires_grad_()
    B = A.detach().clone().requires_grad_()
    value = otkd_fast.bures_distance(A, B, backend=backend)
    assert float((value.detach().double() / traces(A.detach(), B.detach())).max()) <= 1e-6
    for grad in torch.autograd.grad(value.sum(), (A, B)):
        assert grad.isfinite().all() and torch.equal(grad, grad.mT)
        # 0 for a regular matrix, the projection onto the null space for a singular one
        assert float(torch.linalg.matrix_norm(grad, 2).max()) <= 1.01
        if spectrum(name, 20)[-1] >= 1e-4:
            assert float(torch.linalg.matrix_norm(grad, 2).max()) <= (1e-2 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_one_tensor_for_both_arguments(backend, dtype, generator):
    A = covariance("geometric 1e2", 5, generator=generator).to(dtype).requires_grad_()
    value = otkd_fast.bures_distance(A, A, backend=backend)
    assert float(value.detach()) <= 1e-6
    assert float(torch.autograd.grad(value, A)[0].abs().max()) <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_symmetric_in_its_arguments(backend, dtype, generator):
    for first, second in (("geometric 1e4", "power law"), ("rank d - 1", "two clusters")):
        A, B = (covariance(name, 12, generator=generator, batch=(3,)).to(dtype) for name in (first, second))
        forth, back = (otkd_fast.bures_distance(*pair, backend=backend) for pair in ((A, B), (B, A)))
        difference = (forth - back).abs().double() / traces(A, B)
        assert float(difference.max()) <= 2 * tolerance("bures_distance", "value", dtype).atol


@pytest.mark.parametrize("d", [1, 2, 7, 16, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_gradient_is_the_transport_map(backend, dtype, d, generator):
    A = covariance("geometric 1e2", d, generator=generator, batch=(3,), scale=3.0).to(dtype)
    B = covariance("geometric 1e4", d, generator=generator, batch=(3,)).to(dtype)
    A.requires_grad_(), B.requires_grad_()
    grads = torch.autograd.grad(otkd_fast.bures_distance(A, B, backend=backend).sum(), (A, B))
    bound = tolerance("bures_distance", "gradient", dtype).rtol
    A, B = A.detach(), B.detach()
    for grad, expected in zip(grads, (transport_gradient(B, A), transport_gradient(A, B)), strict=True):
        assert torch.equal(grad, grad.mT)
        assert_norm_close(grad, expected, bound)


@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend, generator):
    for d in (1, 3, 4):
        A = covariance("geometric 1e2", d, generator=generator, batch=(2,)).requires_grad_()
        B = covariance("two clusters", d, generator=generator, batch=(2,)).requires_grad_()
        assert torch.autograd.gradcheck(lambda A, B: otkd_fast.bures_distance(A, B, backend=backend), (A, B), atol=1e-4)


@pytest.mark.parametrize("backend", ALL)
def test_gradient_of_a_singular_covariance_is_that_of_its_samples(backend, generator):
    """Through B = Y^T Y / m with m < d the chain rule needs the part of the gradient that the range determines."""
    x = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    y = (y - y.mean(0)).requires_grad_()
    A = (x - x.mean(0)).mT @ (x - x.mean(0)) / 30
    (through_covariance,) = torch.autograd.grad(otkd_fast.bures_distance(A, y.mT @ y / 5, backend=backend), y)
    (direct,) = torch.autograd.grad(otkd_fast.gaussian_wasserstein_from_samples(x, y, backend=backend), y)
    centred = through_covariance - through_covariance.mean(0)
    mean_part = 2 * (y.detach().mean(0) - x.mean(0)) / 5
    assert_norm_close(centred, direct - mean_part, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_zero_and_singular_matrices(backend, dtype, generator):
    A = covariance("geometric 1e2", 6, generator=generator, batch=(2,)).to(dtype)
    singular = covariance("rank one", 6, generator=generator, batch=(2,)).to(dtype)
    zero = torch.zeros_like(A)
    trace = A.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(otkd_fast.bures_distance(A, zero, backend=backend), trace)
    torch.testing.assert_close(otkd_fast.bures_distance(zero, A, backend=backend), trace)
    assert torch.equal(otkd_fast.bures_distance(zero, zero, backend=backend), torch.zeros(2, dtype=dtype))
    for left, right in ((A, zero), (zero, zero), (A, singular), (singular, singular.flip(0))):
        left, right = left.clone().requires_grad_(), right.clone().requires_grad_()
        for grad in torch.autograd.grad(otkd_fast.bures_distance(left, right, backend=backend).sum(), (left, right)):
            assert grad.isfinite().all()
            # |T| <= |A^1/2| / (the smallest root that rounding leaves)
            assert float(grad.abs().max()) <= 1 + 10 / torch.finfo(dtype).eps ** 0.5


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("backend", ALL)
def test_scale_does_not_matter(backend, scale, generator):
    A, B = (covariance("geometric 1e2", 9, generator=generator, scale=scale).float() for _ in range(2))
    A.requires_grad_()
    value = otkd_fast.bures_distance(A, B, backend=backend)
    assert abs(float(value.detach()) - float(bures(A.detach(), B))) <= 1e-6 * float(traces(A.detach(), B))
    expected = transport_gradient(B / scale, A.detach() / scale)
    assert_norm_close(torch.autograd.grad(value, A)[0], expected, tolerance("bures_distance", "gradient", A.dtype).rtol)


@pytest.mark.parametrize("backend", ALL)
def test_variances_of_very_different_size(backend):
    """No pivot is small or large but in the units of its own variable."""
    variances = torch.tensor([1.0, 1e-8, 1e-16, 1e8])
    A, B = torch.diag(variances), torch.diag(4 * variances)
    B[0, 3] = B[3, 0] = 0.5 * (B[0, 0] * B[3, 3]).sqrt()
    A[1, 2] = A[2, 1] = 0.9 * (A[1, 1] * A[2, 2]).sqrt()
    assert float(otkd_fast.bures_distance(A, B, backend=backend)) == pytest.approx(float(bures(A, B)), rel=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_layouts_shared_matrices_and_bad_ones(backend, generator):
    A = covariance("geometric 1e2", 5, generator=generator, batch=(2, 3))
    B = covariance("two clusters", 5, generator=generator, batch=(2, 3))
    value = otkd_fast.bures_distance(A, B, backend=backend)
    torch.testing.assert_close(value, bures(A, B))
    strided = A.movedim(0, -1).contiguous().movedim(-1, 0)
    torch.testing.assert_close(otkd_fast.bures_distance(strided, B, backend=backend), value)
    teacher = B[0, 0].clone().requires_grad_()
    values = otkd_fast.bures_distance(A, teacher, backend=backend)
    torch.testing.assert_close(values.detach(), bures(A, teacher.detach().expand_as(A)))
    expected = transport_gradient(A, B[:1, :1].expand_as(B)).sum((0, 1))
    torch.testing.assert_close(torch.autograd.grad(values.sum(), teacher)[0], expected, rtol=1e-6, atol=1e-6)
    assert otkd_fast.bures_distance(A[:0], B[:0], backend=backend).shape == (0, 3)
    for bad in (torch.nan, torch.inf):
        spoilt = A.clone()
        spoilt[1, 1, 0, 2] = bad
        spoilt.requires_grad_()
        result = otkd_fast.bures_distance(spoilt, B, backend=backend)
        (grad,) = torch.autograd.grad(result.sum(), spoilt)
        assert result[1, 1].isnan() and result.isnan().sum() == 1
        assert grad[1, 1].isnan().any() and grad[0].isfinite().all() and grad[1, 2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ALL)
def test_half_precision_and_the_symmetric_part(backend, dtype, generator):
    A, B = (covariance("two clusters", 6, generator=generator) for _ in range(2))
    half = otkd_fast.bures_distance(A.to(dtype), B.to(dtype), backend=backend)
    assert half.dtype == torch.float32
    assert torch.equal(half, otkd_fast.bures_distance(A.to(dtype).float(), B.to(dtype).float(), backend=backend))
    skew = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    tilted = otkd_fast.bures_distance(A + skew - skew.mT, B, backend=backend)
    torch.testing.assert_close(tilted, otkd_fast.bures_distance(A, B, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_gaussian_wasserstein(backend, dtype, generator):
    A, B = (covariance("geometric 1e2", 5, generator=generator, batch=(3,)).to(dtype) for _ in range(2))
    mean_x, mean_y = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).to(dtype)
    expected = (mean_x - mean_y).square().sum(-1) + otkd_fast.bures_distance(A, B, backend=backend)
    mean_x.requires_grad_()
    actual = otkd_fast.gaussian_wasserstein(mean_x, A, mean_y, B, backend=backend)
    torch.testing.assert_close(actual.detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), mean_x)[0], 2 * (mean_x.detach() - mean_y))
    # one of the two without batch axes
    shared = otkd_fast.gaussian_wasserstein(mean_x, A, mean_y[0], B[0], backend=backend)
    again = otkd_fast.gaussian_wasserstein(mean_x, A, mean_y[:1].expand(3, 5), B[:1].expand(3, 5, 5), backend=backend)
    torch.testing.assert_close(shared, again)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("d", [3, 20, 45])
@pytest.mark.parametrize("backend", backends("gaussian_wasserstein", compiled_only=True))
def test_float32_batches_of_mixed_kinds_keep_the_digits_of_float64(backend, d, needs, generator):
    """Regular pairs are computed from one Cholesky factor in float64; singular ones as the reference does."""
    names = ("geometric 1e4", "geometric 1e2", "rank one", "identity", "geometric 1e6")
    A = torch.stack([covariance(name, d, generator=generator) for name in names]).float()
    B = torch.stack([covariance(name, d, generator=generator) for name in (*names[1:], names[0])]).float()
    A.requires_grad_(needs[0]), B.requires_grad_(needs[1])
    leaves = [leaf for leaf in (A, B) if leaf.requires_grad]
    values, grads = [], []
    for run in (backend, "reference"):
        value = otkd_fast.bures_distance(A, B, backend=run)
        values.append(value.detach())
        grads.append(torch.autograd.grad(value.sum(), leaves))
    error = (values[0] - values[1]).abs() / traces(A.detach(), B.detach())
    for k in range(len(names)):
        singular = "rank one" in (names[k], names[(k + 1) % len(names)])
        bound = tolerance("bures_distance", "value", torch.float32).atol
        assert float(error[k]) <= (torch.finfo(torch.float32).eps ** 0.5 if singular else bound)
        for ours, reference in zip(*grads, strict=True):
            assert_norm_close(ours[k], reference[k], 2e-3 if singular else 1e-5, context=f"{names[k]}")


@pytest.mark.parametrize("backend", backends("gaussian_wasserstein", compiled_only=True))
def test_float32_gradient_is_closer_than_eigh_and_autograd(backend, generator):
    A, B = (covariance("geometric 1e4", 32, generator=generator, batch=(4,)).float() for _ in range(2))
    expected = transport_gradient(B, A)

    def by_eigh(A):
        values, V = torch.linalg.eigh(B)
        root = (V * values.clamp(min=0).sqrt().unsqueeze(-2)) @ V.mT
        return traces(A, B).float() - 2 * torch.linalg.eigvalsh(root @ A @ root).clamp(min=0).sqrt().sum(-1)

    errors = []
    for distance in (lambda A: otkd_fast.bures_distance(A, B, backend=backend), by_eigh):
        leaf = A.clone().requires_grad_()
        (grad,) = torch.autograd.grad(distance(leaf).sum(), leaf)
        errors.append(float(torch.linalg.matrix_norm((grad + grad.mT) / 2 - expected).mean()))
    assert errors[0] < errors[1] / 5


@pytest.mark.parametrize("d, batch", [(12, 5), (12, 40), (40, 9), (130, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends("gaussian_wasserstein", compiled_only=True))
def test_pairs_of_every_condition_side_by_side(backend, dtype, d, batch, generator):
    """Larger than what is computed at a time; pairs that need few steps, many, and eigenvalues."""
    kinds = ("geometric 1e2", "geometric 1e6", "rank d - 1", "power law", "identity")
    A, B = torch.empty(2, batch, d, d, dtype=torch.float64)
    for k, kind in enumerate(kinds):
        A[k::5] = covariance(kind, d, generator=generator, batch=A[k::5].shape[:1], scale=10.0**k)
        B[k::5] = covariance("geometric 1e4", d, generator=generator, batch=A[k::5].shape[:1])
    A, B = A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()
    value = otkd_fast.bures_distance(A, B, backend=backend)
    grads = torch.autograd.grad(value.sum(), (A, B))
    (alone,) = torch.autograd.grad(otkd_fast.bures_distance(A, B.detach(), backend=backend).sum(), A)
    A, B = A.detach(), B.detach()
    error = (value.detach().double() - bures(A, B)).abs() / traces(A, B)
    singular = torch.arange(batch) % 5 == 2
    assert float(error[~singular].max()) <= tolerance("bures_distance", "value", dtype).atol
    assert float(error[singular].max()) <= torch.finfo(dtype).eps ** 0.5
    bound = tolerance("bures_distance", "gradient", dtype).rtol
    for grad in (*grads, alone):
        assert torch.equal(grad, grad.mT) and grad.isfinite().all()
    for k in (0, 4):  # condition numbers up to 1e4
        to_b, to_a = transport_gradient(B[k::5], A[k::5]), transport_gradient(A[k::5], B[k::5])
        for grad, expected in ((grads[0], to_b), (alone, to_b), (grads[1], to_a)):
            assert_norm_close(grad[k::5], expected, bound, context=kinds[k])
    if dtype == torch.float64:  # singular: what its range does not determine is left out
        leaf = A[2::5].clone().requires_grad_()
        (left_out,) = torch.autograd.grad(otkd_fast.bures_distance(leaf, B[2::5], backend="reference").sum(), leaf)
        assert_norm_close(grads[0][2::5], left_out, 1e-9)
    smaller = otkd_fast.bures_distance(A[:2], B[:2], backend=backend)
    torch.testing.assert_close(smaller, value[:2].detach(), rtol=1e-6 if dtype == torch.float32 else 1e-11, atol=0)


@pytest.mark.parametrize("backend", backends("gaussian_wasserstein", compiled_only=True))
def test_large_float32_values_without_a_gradient(backend, generator):
    A, B = (covariance(kind, 512, generator=generator, batch=(2,)).float() for kind in ("geometric 1e2", "power law"))
    B[1] = A[1]
    value = otkd_fast.bures_distance(A, B, backend=backend)
    assert float(((value.double() - bures(A, B)) / traces(A, B)).abs().max()) <= 1e-6
    with_gradient = otkd_fast.bures_distance(A.requires_grad_(), B, backend=backend)
    assert float(((value - with_gradient.detach()) / traces(A.detach(), B)).abs().max()) <= 1e-6
    broken = A.detach().clone()
    broken[0, 3, 5] = torch.nan
    spoilt = otkd_fast.bures_distance(broken, B, backend=backend)
    assert spoilt[0].isnan() and torch.equal(spoilt[1], value[1])
