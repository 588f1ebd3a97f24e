"""Wrong arguments of sqrtm and polar: the exception says which one, what was expected and what came."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import backends


def matrix(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"A": [[1.0]]}, TypeError, ("A:", "tensor", "list")),
        ({"A": matrix(3)}, ValueError, ("A:", "(..., d, d)", "(3,)")),
        ({"A": matrix(3, 4)}, ValueError, ("A:", "square", "(3, 4)")),
        ({"A": matrix(2, 0, 0)}, ValueError, ("A:", "at least one", "(2, 0, 0)")),
        ({"A": matrix(3, 3, dtype=torch.int64)}, TypeError, ("A:", "float32", "torch.int64")),
        ({"A": matrix(3, 3, dtype=torch.complex64)}, TypeError, ("A:", "float32", "torch.complex64")),
        ({"A": matrix(3, 3).to_sparse()}, TypeError, ("A:", "strided", "sparse")),
        ({"inverse": 1}, TypeError, ("inverse:", "bool", "int")),
        ({"check": None}, TypeError, ("check:", "bool", "NoneType")),
        ({"algorithm": "qr"}, ValueError, ("algorithm:", "'eigh'", "'qr'")),
        ({"algorithm": 3}, TypeError, ("algorithm:", "'eigh'", "int 3")),
        ({"algorithm": "jacobi", "backend": "reference"}, ValueError, ("algorithm:", "compiled", "'reference'")),
        ({"backend": "numpy"}, ValueError, ("backend:", "'reference'", "'numpy'")),
        ({"backend": "cuda"}, RuntimeError, ("'cuda'", "sqrtm", "not available")),
    ],
)
def test_wrong_argument_of_sqrtm(changes, error, words):
    arguments = {"A": matrix(3, 3)} | changes
    with pytest.raises(error) as caught:
        otkd_fast.sqrtm(arguments.pop("A"), **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("backend", backends("sqrtm"))
def test_check(backend):
    good = torch.stack([torch.eye(3), torch.ones(3, 3), torch.zeros(3, 3)])
    assert otkd_fast.sqrtm(good, check=True, backend=backend).isfinite().all()
    # rounding of a singular matrix is no reason to complain
    rows = torch.randn(3, 40)
    otkd_fast.sqrtm(rows.mT @ rows, check=True, backend=backend)
    for value, words in ((-0.5, ("eigenvalues >= 0", "-0.5", "matrix 1")), (torch.nan, ("finite",))):
        bad = good.clone()
        bad[1] = torch.diag(torch.tensor([1.0, value, 2.0]))
        otkd_fast.sqrtm(bad, backend=backend)
        with pytest.raises(ValueError) as caught:
            otkd_fast.sqrtm(bad, check=True, backend=backend)
        for word in ("A:", *words):
            assert word in str(caught.value)
    with pytest.raises(ValueError, match="check: expected False under torch.compile and torch.func"):
        torch.vmap(lambda A: otkd_fast.sqrtm(A, check=True, backend=backend))(good)


@pytest.mark.parametrize(
    ("K", "error", "words"),
    [
        (None, TypeError, ("K:", "tensor", "NoneType")),
        (matrix(3), ValueError, ("K:", "(..., n, m)", "(3,)")),
        (matrix(0, 3), ValueError, ("K:", "at least one", "(0, 3)")),
        (matrix(2, 3, 0), ValueError, ("K:", "at least one", "(2, 3, 0)")),
        (matrix(3, 3, dtype=torch.int32), TypeError, ("K:", "float32", "torch.int32")),
    ],
)
def test_wrong_argument_of_polar(K, error, words):
    with pytest.raises(error) as caught:
        otkd_fast.polar(K)
    for word in words:
        assert word in str(caught.value)
