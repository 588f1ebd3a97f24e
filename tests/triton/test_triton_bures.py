"""Bures distances by Triton, under the interpreter in guarded memory, against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.ops import _library  # noqa: E402
from otkd_fast.testing import assert_norm_close, covariance, tolerance  # noqa: E402
from otkd_fast.testing.guarded import gradients_guarded, guarded, run_guarded  # noqa: E402

F32, F64 = torch.float32, torch.float64
DTYPES = [F32, F64]


def distance(A, B):
    return otkd_fast.bures_distance(A, B, backend="triton")


def pair(d, generator, dtype=F32, batch=(2,), kinds=("geometric 1e4", "geometric 1e2")):
    scales = 1.0, 3.0
    return [
        covariance(kind, d, generator=generator, batch=batch, scale=scale).to(dtype)
        for kind, scale in zip(kinds, scales, strict=True)
    ]


def value_and_gradients(A, B, needs=(True, True)):
    leaves = [X.clone().requires_grad_(need) for X, need in zip((A, B), needs, strict=True)]
    value, grads = gradients_guarded(distance, leaves)
    assert all(torch.equal(grad.nan_to_num(1e9), grad.mT.nan_to_num(1e9)) for grad in grads)
    return value.detach(), *grads


def check(A, B):
    """Value and gradients within the table's tolerances of the reference's for the entries in float64."""
    value, *grads = value_and_gradients(A, B)
    expected, *wanted = reference.bures(A.double(), B.double())
    traces = (A + B).double().diagonal(dim1=-2, dim2=-1).sum(-1)
    error = (value.double() - expected).abs() / traces
    assert value.dtype == A.dtype and float(error.max()) <= tolerance("bures_distance", "value", A.dtype).atol
    for grad, want in zip(grads, wanted, strict=True):
        assert_norm_close(grad, want, tolerance("bures_distance", "gradient", A.dtype).rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 17])
def test_sizes(d, dtype, generator):
    """In registers."""
    check(*pair(d, generator, dtype))


def test_through_memory(generator):
    check(*pair(33, generator, F32, batch=()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 32, 49, 64])
def test_larger_ones(d, dtype, generator):
    check(*pair(d, generator, dtype))


def singular_pairs(generator):
    """A definite pair; rank 2 of small integers; a negative eigenvalue; a variable without variance; zero."""
    A, B = pair(4, generator, F64, (5,), ("geometric 1e2", "geometric 1e2"))
    F = torch.randint(-3, 4, (1, 4), generator=generator).double()
    A[1] = F.mT @ F + torch.diag(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    B[2] -= 0.06 * torch.eye(4)
    B[3, 2] = B[3, :, 2] = 0
    A[4] = 0
    return A, B


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_singular_and_indefinite(dtype, generator):
    """Directions that a matrix does not have are left out; what rounding leaves of them is sqrt(eps)."""
    A, B = (X.to(dtype) for X in singular_pairs(generator))
    value, *grads = value_and_gradients(A, B)
    expected, *wanted = reference.bures(A, B)
    trace = (A + B).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert float(((value - expected).abs() / trace).max()) <= (2e-6 if dtype == F32 else 1e-8)
    for grad, want in zip(grads, wanted, strict=True):
        assert_norm_close(grad, want, tolerance("bures_distance", "gradient", F32).rtol if dtype == F32 else 1e-6)
    assert torch.equal(grads[0][4], torch.eye(4, dtype=dtype))  # of a matrix of zeros
    torch.testing.assert_close(value[4], B[4].diagonal().sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["geometric 1e4", "rank d - 1"])
def test_identical_matrices(kind, dtype, generator):
    """0 to rounding; the gradient is 0 for a regular matrix, the projection onto the null space of a singular one."""
    A = covariance(kind, 4, generator=generator).to(dtype)
    value, *grads = value_and_gradients(A, A)
    assert (value >= 0).all() and float((value / A.diagonal(dim1=-2, dim2=-1).sum(-1)).max()) <= 1e-6
    for grad in grads:
        size = float(torch.linalg.matrix_norm(grad, 2).max())
        assert size <= (1.01 if kind == "rank d - 1" else 1e-4 if dtype == F32 else 1e-9)


def test_commuting_matrices(generator):
    """sum (sqrt(a) - sqrt(b))^2, and 1 - sqrt(b / a) in the common basis."""
    a, b = torch.rand(2, 4, generator=generator, dtype=F64) + 0.1
    basis, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=F64))
    value, grad_a, grad_b = value_and_gradients((basis * a) @ basis.mT, (basis * b) @ basis.mT)
    torch.testing.assert_close(value, (a.sqrt() - b.sqrt()).square().sum(), rtol=1e-11, atol=0)
    torch.testing.assert_close(grad_a, (basis * (1 - (b / a).sqrt())) @ basis.mT)
    torch.testing.assert_close(grad_b, (basis * (1 - (a / b).sqrt())) @ basis.mT)


def test_what_is_not_finite_stays_in_its_pair(generator):
    A, B = pair(3, generator, batch=(4,))
    clean = value_and_gradients(A, B)
    A[1, 0, 2], B[2, 1, 1] = torch.nan, torch.inf
    for found, right in zip(value_and_gradients(A, B), clean, strict=True):
        assert found[1].isnan().all() and found[2].isnan().all()
        assert torch.equal(found[0], right[0]) and torch.equal(found[3], right[3])


@pytest.mark.parametrize("scales", [(1e-30, 1e-30), (1e30, 1e30), (1e-12, 1e12)], ids=str)
def test_scales(scales, generator):
    A, B = (X * scale for X, scale in zip(pair(4, generator), scales, strict=True))
    check(A, B)


def test_variances_of_very_different_size():
    """No pivot is small or large but in the units of its own variable."""
    variances = torch.tensor([1.0, 1e-8, 1e-16, 1e8])
    A, B = torch.diag(variances), torch.diag(4 * variances)
    B[0, 3] = B[3, 0] = 0.5 * (B[0, 0] * B[3, 3]).sqrt()
    A[1, 2] = A[2, 1] = 0.9 * (A[1, 1] * A[2, 2]).sqrt()
    value = run_guarded(distance, A, B)
    assert float(value) == pytest.approx(float(reference.bures(A, B)[0]), rel=1e-5)


def test_half_precision_is_computed_in_float32(generator):
    dtype = torch.bfloat16
    A, B = (X.to(dtype) for X in pair(3, generator, kinds=("two clusters", "geometric 1e2")))
    value, *grads = value_and_gradients(A, B)
    wide, *wide_grads = value_and_gradients(A.float(), B.float())
    assert value.dtype == F32 and torch.equal(value, wide)
    for grad, want in zip(grads, wide_grads, strict=True):
        assert grad.dtype == dtype and torch.equal(grad, want.to(dtype))


def test_one_gradient_or_none(generator):
    A, B = pair(3, generator)
    value, grad_a, grad_b = value_and_gradients(A, B)
    for needs, wanted in (((True, False), grad_a), ((False, True), grad_b)):
        again, grad = value_and_gradients(A, B, needs)
        assert torch.equal(again, value) and torch.equal(grad, wanted)
    with guarded() as guards:
        assert torch.equal(distance(guards.input(A), guards.input(B)), value)
    assert guards.launches == 2


def test_layouts_repeatability_and_no_pairs(generator):
    A, B = pair(2, generator, F64, batch=(2, 2))
    value, grad, _ = value_and_gradients(A, B)
    assert value.shape == (2, 2) and torch.equal(value_and_gradients(A, B)[1], grad)
    strided = A.movedim(0, -1).contiguous().movedim(-1, 0)
    assert torch.equal(run_guarded(distance, strided, B), value)
    assert torch.equal(distance(A[1, 1:], B[1, 1:]), value[1, 1:])  # the same bits in any batch
    skew = torch.randn(2, 2, generator=generator, dtype=F64)
    torch.testing.assert_close(distance(A + (skew - skew.mT), B), value)
    teacher = B[0, 0].clone().requires_grad_()
    distance(A, teacher).sum().backward()  # a gradient of stride 0
    assert_norm_close(teacher.grad, value_and_gradients(A, B[:1, :1].expand_as(B))[2].sum((0, 1)), 1e-12)
    A = A[:0].requires_grad_()
    none = distance(A, B[:0])
    none.sum().backward()
    assert none.shape == (0, 2) and A.grad.shape == A.shape


class TestByProducts:
    @pytest.fixture(autouse=True)
    def small_ones_too(self, monkeypatch):
        """Matrices that one program would hold go the way of large ones, in small tiles."""
        from otkd_fast.triton_kernels import _matrix, _sqrtm_products, bures

        monkeypatch.setattr(bures, "LARGEST", 0)
        tiles = _sqrtm_products.factor_tiles
        monkeypatch.setattr(_sqrtm_products, "factor_tiles", lambda d: tiles(d) | {"ROWS": 4})
        monkeypatch.setattr(_matrix, "product_tiles", lambda dtype: {"TILE": 16, "DEPTH": 16, "num_warps": 4})

    @pytest.fixture
    def alone(self, monkeypatch):
        """The reference does not run."""
        from otkd_fast.triton_kernels import bures

        monkeypatch.setattr(bures, "reference", None)

    @pytest.mark.parametrize("d, dtype", [(1, F32), (5, F32), (5, F64)], ids=str)
    def test_sizes(self, d, dtype, generator, alone):
        check(*pair(d, generator, dtype))

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_several_tiles(self, dtype, generator, alone):
        check(*pair(37, generator, dtype))

    @pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=pytest.mark.slow)], ids=str)
    def test_singular_and_indefinite(self, dtype, generator):
        A, B = (X.to(dtype) for X in singular_pairs(generator))
        found = value_and_gradients(A, B)
        for out, want in zip(found, reference.bures(A, B), strict=True):
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-6)
        with guarded():
            value = distance(A, B)  # without a gradient only indefinite ones need eigenvalues
        torch.testing.assert_close(value, found[0], rtol=1e-5, atol=1e-5 if dtype == F32 else 1e-7)

    def test_what_is_not_finite_stays_in_its_pair(self, generator):
        A, B = pair(3, generator, batch=(4,))
        A[1, 0, 2], B[2, 1, 1] = torch.nan, torch.inf
        for found in value_and_gradients(A, B):
            assert found[1].isnan().all() and found[2].isnan().all()
            assert found[0].isfinite().all() and found[3].isfinite().all()

    def test_still_larger_ones_are_the_references(self, generator, monkeypatch):
        from otkd_fast.triton_kernels import _sqrtm_products

        monkeypatch.setattr(_sqrtm_products, "LARGEST", 2)
        A, B = pair(3, generator)
        with guarded() as guards:
            assert torch.equal(distance(A, B), reference.bures(A, B)[0])
        assert guards.launches == 0
        with otkd_fast.backend("triton"):
            assert "bures_distance beyond 1024 x 1024" in otkd_fast.explain("gaussian_wasserstein", A)


def test_registration_and_compiler(generator):
    A, B = pair(2, generator)
    op = _library.operators("bures_distance")["triton"]
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    for needs in ((True, False), (False, True)):
        torch.library.opcheck(op, (A, B, *needs), test_utils=utilities)

    def loss(A, B):
        return distance(A, B).square().sum()

    leaves = [X.requires_grad_() for X in (A, B)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(map(torch.equal, found, expected))
