"""Wrong arguments: the exception says which one, what was expected and what came."""

import pytest
import torch

import otkd_fast


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def check(function, arguments, changes, error, words):
    arguments = arguments | changes
    with pytest.raises(error) as caught:
        function(**arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": None}, TypeError, ("x:", "tensor", "NoneType")),
        ({"y": ones(4)}, ValueError, ("y:", "(..., m, d)", "(4,)")),
        ({"x": ones(5, 4, dtype=torch.int64)}, TypeError, ("x:", "float32", "torch.int64")),
        ({"y": ones(5, 4, dtype=torch.float64)}, ValueError, ("y:", "torch.float32", "torch.float64")),
        ({"y": ones(5, 4, device="meta")}, ValueError, ("y:", "cpu", "meta")),
        ({"y": ones(5, 3)}, ValueError, ("y:", "size 4", "(5, 3)")),
        ({"x": ones(0, 4)}, ValueError, ("x:", "at least one", "(0, 4)")),
        ({"x": ones(5, 0), "y": ones(5, 0)}, ValueError, ("x:", "at least one", "(5, 0)")),
        ({"x": ones(2, 5, 4), "y": ones(3, 5, 4)}, ValueError, ("y:", "(2,)", "(3, 5, 4)")),
        ({"unbiased": 1}, TypeError, ("unbiased:", "bool", "int")),
        ({"x": ones(1, 4), "unbiased": True}, ValueError, ("x:", "two rows", "(1, 4)")),
        ({"backend": "numpy"}, ValueError, ("backend:", "'numpy'")),
        ({"backend": "cuda"}, RuntimeError, ("'cuda'", "not available")),
    ],
)
def test_from_samples(changes, error, words):
    arguments = {"x": ones(5, 4), "y": ones(6, 4)}
    check(otkd_fast.gaussian_wasserstein_from_samples, arguments, changes, error, words)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"A": ones(3, 4)}, ValueError, ("A:", "square", "(3, 4)")),
        ({"B": ones(4, 4)}, ValueError, ("B:", "size 3", "(4, 4)")),
        ({"B": ones(3, 3, dtype=torch.float64)}, ValueError, ("B:", "torch.float32", "torch.float64")),
        ({"A": ones(0, 0), "B": ones(0, 0)}, ValueError, ("A:", "at least one", "(0, 0)")),
        ({"A": ones(2, 3, 3), "B": ones(4, 3, 3)}, ValueError, ("B:", "(2,)", "(4, 3, 3)")),
        ({"A": ones(3, 3, dtype=torch.bool)}, TypeError, ("A:", "float32", "torch.bool")),
    ],
)
def test_bures_distance(changes, error, words):
    check(otkd_fast.bures_distance, {"A": ones(3, 3), "B": ones(3, 3)}, changes, error, words)


@pytest.mark.parametrize("function", ["gaussian_wasserstein", "gaussian_kl"])
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"mean_x": 1.0}, TypeError, ("mean_x:", "tensor", "float")),
        ({"mean_y": ones()}, ValueError, ("mean_y:", "(..., d)", "()")),
        ({"mean_y": ones(4)}, ValueError, ("mean_y:", "size 3", "(4,)")),
        ({"cov_x": ones(3)}, ValueError, ("cov_x:", "(..., d, d)", "(3,)")),
        ({"cov_x": ones(3, 2)}, ValueError, ("cov_x:", "square", "(3, 2)")),
        ({"cov_y": ones(2, 2)}, ValueError, ("cov_y:", "size 3", "(2, 2)")),
        ({"cov_y": ones(3, 3, dtype=torch.float64)}, ValueError, ("cov_y:", "torch.float32", "torch.float64")),
        ({"mean_x": ones(2, 3), "cov_y": ones(5, 3, 3)}, ValueError, ("cov_y:", "mean_x", "(2,)", "(5, 3, 3)")),
    ],
)
def test_full_gaussians(function, changes, error, words):
    arguments = {"mean_x": ones(3), "cov_x": torch.eye(3), "mean_y": ones(3), "cov_y": torch.eye(3)}
    check(getattr(otkd_fast, function), arguments, changes, error, words)


@pytest.mark.parametrize("function", ["gaussian_wasserstein_diagonal", "gaussian_kl_diagonal"])
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"std_x": None}, TypeError, ("std_x:", "tensor", "NoneType")),
        ({"std_x": ones(2)}, ValueError, ("std_x:", "size 3", "(2,)")),
        ({"std_y": ones(3, dtype=torch.int32)}, TypeError, ("std_y:", "float32", "torch.int32")),
        ({"mean_y": ones(3, dtype=torch.float16)}, ValueError, ("mean_y:", "torch.float32", "torch.float16")),
        ({"std_x": ones(2, 3), "std_y": ones(4, 3)}, ValueError, ("std_y:", "std_x", "(2,)", "(4, 3)")),
    ],
)
def test_diagonal_gaussians(function, changes, error, words):
    arguments = {"mean_x": ones(3), "std_x": ones(3), "mean_y": ones(3), "std_y": ones(3)}
    check(getattr(otkd_fast, function), arguments, changes, error, words)
