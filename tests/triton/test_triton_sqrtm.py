"""Matrix roots by Triton, under the interpreter in guarded memory, against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.ops import _library  # noqa: E402
from otkd_fast.testing import assert_norm_close, tolerance  # noqa: E402
from otkd_fast.testing.guarded import gradients_guarded, guarded, run_guarded  # noqa: E402

F32, F64 = torch.float32, torch.float64


def matrices(d, values, generator, count=2):
    """(count, d, d) float64, with these eigenvalues, repeated as needed."""
    spectrum = torch.tensor(values, dtype=F64).repeat(d)[:d]
    Q, _ = torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=F64))
    return (Q * spectrum) @ Q.mT


def check(A, generator, **options):
    """S and the gradient for weights that are not symmetric; the reference is told the same entries and dtype."""
    weights = torch.randn(A.shape, generator=generator, dtype=F64)
    S, (grad,) = gradients_guarded(
        lambda x: otkd_fast.sqrtm(x, backend="triton", **options), (A.clone().requires_grad_(),),
        lambda _: weights.to(A.dtype),
    )  # fmt: skip
    inverse = options.get("inverse", False)
    want, aux = reference.sqrtm_fwd(A, inverse, "eigh")
    wanted = reference.sqrtm_bwd(A, want, aux, weights.to(A.dtype).double(), inverse, "eigh")
    for value, exact in ((S, want), (grad, wanted)):
        assert value.dtype == A.dtype and torch.equal(value.mT, value)
        assert_norm_close(value, exact.double(), tolerance("sqrtm", "gradient", A.dtype).rtol)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_sizes(d, dtype, inverse, generator):
    """Odd and even tournaments; eigenvalues that repeat."""
    check(matrices(d, (1.0, 0.3, 2.0, 0.3), generator).to(dtype), generator, inverse=inverse)


def test_more_than_one_block_of_rows(generator):
    """Nearly diagonal, so that it takes few sweeps."""
    A = torch.diag(torch.linspace(1, 2, 17, dtype=F64))[None] + matrices(17, (0.02,), generator, 1)
    A[0, 3, 12] += 0.01
    A[0, 12, 3] += 0.01
    check(A.to(F32), generator)


@pytest.mark.parametrize("inverse", [False, True])
def test_singular_and_indefinite(inverse, generator):
    """Directions of exact zeros; a negative eigenvalue counts as 0; a matrix of zeros."""
    A = torch.zeros(3, 4, 4, dtype=F64)
    A[0, 1:, 1:] = matrices(3, (1.0, 0.5, 2.0), generator, 1)[0]
    A[1, :3, :3] = matrices(3, (1.0, -0.5, 2.0), generator, 1)[0]
    check(A, generator, inverse=inverse)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_vanish_nor_overflow(scale, generator):
    A = (matrices(3, (1.0, 0.5, 2.0), generator) * scale).to(F32)
    S = run_guarded(lambda x: otkd_fast.sqrtm(x, backend="triton"), A)
    assert_norm_close(S, reference.sqrtm_fwd(A, False, "eigh")[0].double(), 1e-6)


def test_wide_spectrum(generator):
    A = matrices(4, (1.0, 1e-2, 1e-5, 1e-8), generator)
    for dtype in (F32, F64):
        S = run_guarded(lambda x: otkd_fast.sqrtm(x, backend="triton"), A.to(dtype)).double()
        assert_norm_close(S @ S, A.to(dtype).double(), tolerance("sqrtm", "residual", dtype).rtol)


def test_what_is_not_finite_stays_in_its_matrix(generator):
    A = matrices(3, (1.0, 0.5, 2.0), generator, 3)
    A[0, 1, 2], A[2, 0, 0] = torch.nan, torch.inf
    for inverse in (False, True):
        S = otkd_fast.sqrtm(A, inverse=inverse, backend="triton")
        assert S[0].isnan().all() and S[2].isnan().all() and S[1].isfinite().all()


def test_still_larger_matrices_and_other_algorithms_are_the_references(generator, monkeypatch):
    from otkd_fast.triton_kernels import _sqrtm_products, sqrtm

    A = matrices(65, (1.0, 0.5), generator, 1)
    assert sqrtm.by_products("auto", 65) and sqrtm.by_products("auto", 1024) and not sqrtm.by_products("auto", 1025)
    monkeypatch.setattr(_sqrtm_products, "LARGEST", 64)
    with guarded() as guards:
        S = otkd_fast.sqrtm(A, backend="triton")
        assert torch.equal(S, otkd_fast.sqrtm(A, backend="reference"))
        assert otkd_fast.sqrtm(A[:, :3, :3], algorithm="polar", backend="triton").shape == (1, 3, 3)
    assert guards.launches == 0 and sqrtm.on_chip("auto", 64) and not sqrtm.on_chip("auto", 65)
    with pytest.raises(
        ValueError, match=r"algorithm: 'jacobi' on backend 'triton' takes matrices up to 64 x 64, got 65"
    ):
        otkd_fast.sqrtm(A, algorithm="jacobi", backend="triton")
    with otkd_fast.backend("triton"):
        assert "beyond 64 x 64 indefinite matrices and" in otkd_fast.explain("sqrtm", A)


def test_layouts_repeatability_and_no_matrices(generator):
    A = matrices(3, (1.0, 0.5, 2.0), generator)
    skew = torch.randn(3, 3, generator=generator, dtype=F64)
    results = [otkd_fast.sqrtm(x, backend="triton") for x in (A, A, A.mT, A.mT.contiguous(), A + (skew - skew.mT))]
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])
    torch.testing.assert_close(results[4], results[0])
    assert otkd_fast.sqrtm(torch.zeros(0, 3, 3), backend="triton").shape == (0, 3, 3)
    leaf = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(otkd_fast.sqrtm(leaf, backend="triton").sum(), leaf)  # a gradient of stride 0
    assert grad.isfinite().all()


@pytest.mark.parametrize("algorithm", ["auto", "polar"])
def test_registration_and_compiler(algorithm, generator):
    A = matrices(2, (1.0, 0.5), generator, 1).to(F32)
    forward, backward = (_library.operators(f"sqrtm_{name}")["triton"] for name in ("fwd", "bwd"))
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, (A, False, algorithm), test_utils=utilities)
    S, aux = forward(A, False, algorithm)
    torch.library.opcheck(backward, (A, S, aux, torch.ones_like(A), False, algorithm), test_utils=utilities)

    def loss(x):
        return otkd_fast.sqrtm(x, algorithm=algorithm, backend="triton").square().sum()

    leaf = A.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), leaf)
    assert torch.equal(found, expected)
