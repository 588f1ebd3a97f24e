"""Wrong arguments: the exception says which one, what was expected and what came."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import backends

ALL = backends("cost_matrix")


def rows(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": [[1.0]]}, TypeError, ("x:", "tensor", "list")),
        ({"y": None}, TypeError, ("y:", "tensor", "NoneType")),
        ({"x": rows(3)}, ValueError, ("x:", "(..., n, d)", "(3,)")),
        ({"y": rows()}, ValueError, ("y:", "(..., m, d)", "()")),
        ({"x": rows(3, 4, dtype=torch.int64)}, TypeError, ("x:", "float32", "torch.int64")),
        ({"x": rows(3, 4, dtype=torch.complex64)}, TypeError, ("x:", "float32", "torch.complex64")),
        ({"y": rows(2, 4, dtype=torch.bool)}, TypeError, ("y:", "float32", "torch.bool")),
        ({"x": rows(3, 4).to_sparse()}, TypeError, ("x:", "strided", "sparse")),
        ({"y": rows(2, 4, dtype=torch.float64)}, ValueError, ("y:", "torch.float32", "torch.float64")),
        ({"y": rows(2, 4, device="meta")}, ValueError, ("y:", "cpu", "meta")),
        ({"y": rows(2, 5)}, ValueError, ("y:", "4 features", "(2, 5)")),
        ({"x": rows(2, 3, 4), "y": rows(3, 2, 4)}, ValueError, ("y:", "(2,)", "(3, 2, 4)")),
        ({"x": rows(2, 3, 4), "y": rows(5, 2, 2, 4)}, ValueError, ("y:", "(2,)", "(5, 2, 2, 4)")),
        ({"metric": "manhattan"}, ValueError, ("metric:", "'l1'", "'manhattan'")),
        ({"metric": 2}, TypeError, ("metric:", "'l1'", "int 2")),
        ({"softmax_temperature": 0.0}, ValueError, ("softmax_temperature:", "> 0", "0.0")),
        ({"softmax_temperature": -1}, ValueError, ("softmax_temperature:", "> 0", "-1")),
        ({"softmax_temperature": float("nan")}, ValueError, ("softmax_temperature:", "finite", "nan")),
        ({"softmax_temperature": float("inf")}, ValueError, ("softmax_temperature:", "finite", "inf")),
        ({"softmax_temperature": "2"}, TypeError, ("softmax_temperature:", "number", "str")),
        ({"softmax_temperature": True}, TypeError, ("softmax_temperature:", "number", "bool")),
        ({"softmax_temperature": torch.tensor(2.0)}, TypeError, ("softmax_temperature:", "number", "Tensor")),
        ({"x": rows(3, 0), "y": rows(2, 0), "metric": "cosine"}, ValueError, ("x:", "feature", "'cosine'", "(3, 0)")),
        (
            {"x": rows(3, 0), "y": rows(2, 0), "softmax_temperature": 1.0},
            ValueError,
            ("x:", "feature", "softmax_temperature", "(3, 0)"),
        ),
        ({"backend": "numpy"}, ValueError, ("backend:", "'reference'", "'numpy'")),
        ({"backend": "cuda"}, RuntimeError, ("'cuda'", "cost_matrix", "not available")),
    ],
)
def test_wrong_argument(changes, error, words):
    arguments = {"x": rows(3, 4), "y": rows(2, 4), "metric": "l1"} | changes
    with pytest.raises(error) as caught:
        otkd_fast.cost_matrix(arguments.pop("x"), arguments.pop("y"), **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("backend", ALL)
def test_accepts_numbers_that_are_not_float(backend):
    numpy = pytest.importorskip("numpy")
    x = torch.tensor([[1.0, 3.0], [0.0, 1.0]])
    expected = otkd_fast.cost_matrix(x, x, metric="l1", softmax_temperature=2.0, backend=backend)
    for temperature in (2, numpy.float32(2), numpy.int64(2)):
        actual = otkd_fast.cost_matrix(x, x, metric="l1", softmax_temperature=temperature, backend=backend)
        assert torch.equal(actual, expected)
