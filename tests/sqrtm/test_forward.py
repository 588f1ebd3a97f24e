"""sqrtm: the accuracy contract on every spectrum, closed forms, scales, awkward input."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import SPECTRA, assert_norm_close, backends, covariance, root_tolerance, tolerance

from .cases import DTYPES, RUNS, condition, root

SIZES = (1, 2, 3, 8, 16, 17, 33, 64, 100, 130)


def residual(S, A):
    """|S S - A| <= bound |A|."""
    bound = tolerance("sqrtm", "residual", S.dtype).rtol
    assert_norm_close(S.double() @ S.double(), A.double(), bound, context="residual")


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_accuracy_contract(backend, algorithm, dtype, name, generator):
    for d in (2, 16, 65):
        A = covariance(name, d, generator=generator, batch=(3,)).to(dtype)
        S = otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)
        assert S.dtype == dtype and torch.equal(S, S.mT)
        assert_norm_close(S, root(A), root_tolerance(dtype, condition(name, d)), context=f"{name} {d}")
        if condition(name, d) <= 1e8:
            residual(S, A)


@pytest.mark.parametrize("name", ["identity", "two clusters", "geometric 1e2", "geometric 1e4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_inverse_root(backend, algorithm, dtype, name, generator):
    for d in (1, 5, 32):
        A = covariance(name, d, generator=generator, batch=(2,)).to(dtype)
        R = otkd_fast.sqrtm(A, inverse=True, algorithm=algorithm, backend=backend)
        assert torch.equal(R, R.mT)
        # the relative perturbation of the inverse root is that of the root times sqrt(condition)
        bound = root_tolerance(dtype, condition(name, d)) * condition(name, d) ** 0.5
        assert_norm_close(R, root(A, -0.5), bound, context=f"{name} {d}")


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_sizes(backend, algorithm, dtype, d, generator):
    A = covariance("geometric 1e4", d, generator=generator, batch=(5,)).to(dtype)
    S = otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)
    assert_norm_close(S, root(A), root_tolerance(dtype, 1e4))
    residual(S, A)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_closed_forms(backend, algorithm, dtype):
    values = torch.tensor([4.0, 0.0, 1e-6, 9.0], dtype=dtype)
    a, b = 3.0, 1.0  # [[a, b], [b, a]] has the eigenvalues a + b and a - b
    plus, minus = (a + b) ** 0.5 / 2, (a - b) ** 0.5 / 2
    cases = [
        (torch.diag(values), torch.diag(values.sqrt())),
        (torch.eye(7), torch.eye(7)),
        (torch.tensor([[a, b], [b, a]]), torch.tensor([[plus + minus, plus - minus], [plus - minus, plus + minus]])),
        (torch.ones(5, 5), torch.ones(5, 5) / 5**0.5),
        (torch.tensor([[2.25]]), torch.tensor([[1.5]])),
    ]
    for A, S in cases:
        actual = otkd_fast.sqrtm(A.to(dtype), algorithm=algorithm, backend=backend)
        torch.testing.assert_close(actual, S.to(dtype), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_scale_does_not_matter(backend, algorithm, scale, generator):
    for name in ("geometric 1e4", "rank d - 1", "rank one"):
        A = covariance(name, 20, generator=generator, batch=(2,), scale=scale).float()
        S = otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)
        assert_norm_close(S, root(A), root_tolerance(torch.float32, condition(name, 20)), context=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_zero_matrix(backend, algorithm, dtype):
    zero = torch.zeros(3, 4, 4, dtype=dtype)
    for inverse in (False, True):
        assert torch.equal(otkd_fast.sqrtm(zero, inverse=inverse, algorithm=algorithm, backend=backend), zero)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_slightly_indefinite_input_gives_the_semidefinite_root(backend, algorithm, dtype, generator):
    A = covariance("rank d - 1", 12, generator=generator, batch=(2,)).to(dtype)
    A = A - 4 * torch.finfo(dtype).eps * torch.eye(12, dtype=dtype)
    S = otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)
    assert_norm_close(S, root(A), root_tolerance(dtype, torch.inf))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_negative_eigenvalues_count_as_0(backend, algorithm, dtype, generator):
    A = covariance("geometric 1e2", 7, generator=generator, batch=(8,)).to(dtype)
    A[::2] -= 0.15 * torch.eye(7, dtype=dtype)
    A[5:7, 3, 3] = 0  # beside entries that are not
    S = otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)
    assert_norm_close(S, root(A), 2 * root_tolerance(dtype, 1e2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_a_bad_matrix_stays_alone(backend, algorithm, inverse, bad, generator):
    A = covariance("geometric 1e2", 6, generator=generator, batch=(4,)).float()
    clean = otkd_fast.sqrtm(A, inverse=inverse, algorithm=algorithm, backend=backend)
    A[1, 2, 4] = bad
    S = otkd_fast.sqrtm(A, inverse=inverse, algorithm=algorithm, backend=backend)
    assert S[1].isnan().any()
    assert torch.equal(S[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_layouts_and_batches(backend, algorithm, generator):
    A = covariance("geometric 1e2", 5, generator=generator, batch=(2, 3))

    def call(A):
        return otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)

    S = call(A)
    torch.testing.assert_close(call(A.movedim(0, -1).contiguous().movedim(-1, 0)), S)
    torch.testing.assert_close(call(A[0, 0].expand(2, 3, 5, 5)), S[:1, :1].expand_as(S))
    torch.testing.assert_close(call(A[0, 1]), S[0, 1])
    assert call(A[:0]).shape == (0, 3, 5, 5)


@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_only_the_symmetric_part_counts(backend, algorithm, generator):
    A = covariance("geometric 1e2", 7, generator=generator)
    skew = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    tilted = A + skew - skew.mT
    S = otkd_fast.sqrtm(tilted, algorithm=algorithm, backend=backend)
    torch.testing.assert_close(S, root(A), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_half_precision_is_computed_in_float32(backend, algorithm, dtype, generator):
    A = covariance("two clusters", 9, generator=generator).to(dtype)
    S = otkd_fast.sqrtm(A, algorithm=algorithm, backend=backend)
    assert S.dtype == dtype
    assert torch.equal(S, otkd_fast.sqrtm(A.float(), algorithm=algorithm, backend=backend).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends("sqrtm"))
def test_newton_schulz_on_well_conditioned_matrices(backend, dtype, generator):
    A = covariance("geometric 1e2", 24, generator=generator, batch=(3,)).to(dtype)
    for inverse in (False, True):
        S = otkd_fast.sqrtm(A, inverse=inverse, algorithm="newton_schulz", backend=backend)
        assert_norm_close(S, root(A, -0.5 if inverse else 0.5), 2e-5 if dtype == torch.float32 else 1e-9)
