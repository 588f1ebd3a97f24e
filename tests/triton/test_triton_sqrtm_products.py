"""Matrix roots by batched products, under the interpreter in guarded memory, against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.ops import _library  # noqa: E402
from otkd_fast.testing import (  # noqa: E402
    assert_norm_close,
    covariance,
    root_tolerance,
    spectrum,
    tolerance,
)
from otkd_fast.testing.guarded import gradients_guarded, run_guarded  # noqa: E402

F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    """Matrices that one program would hold go the way of large ones, in small tiles."""
    from otkd_fast.triton_kernels import _matrix, _sqrtm_products, sqrtm

    monkeypatch.setattr(sqrtm, "LARGEST", 0)
    tiles = _sqrtm_products.factor_tiles
    monkeypatch.setattr(_sqrtm_products, "factor_tiles", lambda d: tiles(d) | {"ROWS": 4})
    monkeypatch.setattr(_matrix, "product_tiles", lambda dtype: {"TILE": 16, "DEPTH": 16, "num_warps": 4})


@pytest.fixture
def alone(monkeypatch):
    """No eigenvalues: the reference does not run."""
    from otkd_fast.triton_kernels import _sqrtm_products

    monkeypatch.setattr(_sqrtm_products, "reference", None)


def root_of(A, **options):
    return run_guarded(lambda x: otkd_fast.sqrtm(x, backend="triton", **options), A)


def exact(A, G=None, inverse=False):
    """The float64 root of the given entries, or the gradient of A for the gradient G of the root."""
    S, aux = reference.sqrtm_fwd(A.double(), inverse, "eigh")
    return S if G is None else reference.sqrtm_bwd(A.double(), S, aux, G.double(), inverse, "eigh")


SIZES = [(1, 2, F32, True), (5, 2, F32, False), (5, 2, F32, True), (5, 2, F64, False)]
SLOW_SIZES = [(1, 2, F32, False), (5, 2, F64, True)]


@pytest.mark.parametrize(
    "d, count, dtype, inverse", SIZES + [pytest.param(*size, marks=pytest.mark.slow) for size in SLOW_SIZES], ids=str
)
def test_sizes(d, count, dtype, inverse, generator, alone):
    A = covariance("geometric 1e2", d, generator=generator, batch=(count,)).to(dtype)
    G = torch.randn(A.shape, generator=generator, dtype=F64).to(dtype)
    S, (grad,) = gradients_guarded(
        lambda x: otkd_fast.sqrtm(x, backend="triton", inverse=inverse), (A.clone().requires_grad_(),), lambda _: G
    )
    bound = tolerance("sqrtm", "gradient", dtype).rtol * (10 if inverse else 1)  # sqrt(condition)
    assert S.dtype == grad.dtype == dtype and torch.equal(S.mT, S) and torch.equal(grad.mT, grad)
    assert_norm_close(S, exact(A, inverse=inverse), root_tolerance(dtype, 1e2))
    assert_norm_close(grad, exact(A, G, inverse), bound)


def test_a_large_one(generator, alone, monkeypatch):
    """By what the size alone decides; several tiles of products."""
    monkeypatch.undo()
    A = covariance("power law", 67, generator=generator).float()
    S, (grad,) = gradients_guarded(lambda x: otkd_fast.sqrtm(x, backend="triton"), (A.clone().requires_grad_(),))
    assert_norm_close(S, exact(A), root_tolerance(F32, 67.0**2))
    assert_norm_close(grad, exact(A, torch.ones_like(A)), tolerance("sqrtm", "gradient", F32).rtol)


SPECTRA = {"rank one": F32, "rank d - 1": F64, "two clusters": F32, "geometric 1e6": F32, "geometric 1e8": F64}


@pytest.mark.parametrize("name, dtype", SPECTRA.items())
def test_conditions_and_ranks(name, dtype, generator, alone):
    A = covariance(name, 9, generator=generator).to(dtype)
    values = spectrum(name, 9)
    S = root_of(A)
    assert_norm_close(S, exact(A), root_tolerance(dtype, float(values[0] / values[-1])))
    assert_norm_close(S.double() @ S.double(), A.double(), tolerance("sqrtm", "residual", dtype).rtol)


@pytest.mark.parametrize("name", ["two clusters", "geometric 1e6"])
def test_gradients_of_high_conditions(name, generator, alone):
    """Five times closer than eigenvectors in float32."""
    A = covariance(name, 12, generator=generator).float()
    G = torch.randn(A.shape, generator=generator)
    leaf = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(otkd_fast.sqrtm(leaf, backend="triton"), leaf, G)
    want = exact(A, G)
    values, V = torch.linalg.eigh(A)
    roots = values.clamp(min=0).sqrt()
    naive = V @ ((V.mT @ ((G + G.mT) / 2) @ V) / (roots.unsqueeze(-1) + roots.unsqueeze(-2))) @ V.mT
    assert_norm_close(grad, want, float((naive - want).norm() / want.norm()) / 5)


@pytest.mark.parametrize("inverse", [False, True])
def test_what_needs_eigenvalues(inverse, generator):
    """Indefinite, singular and ordinary matrices side by side, a matrix of zeros, pairs beside a variance of 0."""
    A = covariance("geometric 1e2", 3, generator=generator, batch=(6,)).float()
    A[1] = 1
    A[2] -= 0.2 * torch.eye(3)
    A[3] = 0
    A[4, 1, 1] = 0
    A[5] = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # no negative variance
    G = torch.randn(A.shape, generator=generator)
    S, (grad,) = gradients_guarded(
        lambda x: otkd_fast.sqrtm(x, backend="triton", inverse=inverse), (A.clone().requires_grad_(),), lambda _: G
    )
    for k in range(6):
        bound = root_tolerance(F32, torch.inf if k == 1 and not inverse else 1e2)
        wanted = exact(A[k], inverse=inverse), exact(A[k], G[k], inverse)
        for found, want, size in zip((S[k], grad[k]), wanted, (bound, 2e-5 * (10 if inverse else 1)), strict=True):
            assert (found - want).norm() <= size * want.norm()


def test_what_is_not_finite_stays_in_its_matrix(generator):
    A = covariance("geometric 1e2", 3, generator=generator, batch=(3,)).float()
    A[0, 1, 2], A[2, 0, 0] = torch.nan, torch.inf
    leaf = A.clone().requires_grad_()
    S = otkd_fast.sqrtm(leaf, backend="triton")
    (grad,) = torch.autograd.grad(S.sum(), leaf)
    for found in (S, grad):
        assert found[0].isnan().all() and found[2].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_vanish_nor_overflow(scale, generator, alone):
    A = (covariance("geometric 1e2", 5, generator=generator) * scale).float()
    leaf = A.clone().requires_grad_()
    S = otkd_fast.sqrtm(leaf, backend="triton")
    (grad,) = torch.autograd.grad(S.sum(), leaf)
    assert_norm_close(S, exact(A), root_tolerance(F32, 1e2))
    assert_norm_close(grad, exact(A, torch.ones_like(A)), 2e-5)


def test_the_same_bits_twice_and_in_any_batch(generator):
    A = covariance("power law", 3, generator=generator, batch=(2, 2)).float()
    first = otkd_fast.sqrtm(A, backend="triton")
    assert torch.equal(first[1], otkd_fast.sqrtm(A.mT[1], backend="triton"))


@pytest.mark.parametrize("d", [3, 0])
def test_registration(d, generator):
    A = torch.eye(d).expand(2, d, d).contiguous()
    forward, backward = (_library.operators(f"sqrtm_{way}")["triton"] for way in ("fwd", "bwd"))
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, (A, False, "auto"), test_utils=utilities)
    torch.library.opcheck(backward, (A, *forward(A, False, "auto"), A, False, "auto"), test_utils=utilities)
