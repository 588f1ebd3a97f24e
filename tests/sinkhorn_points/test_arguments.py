"""Wrong arguments between points: the exception says which one, what was expected and what came."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import backends

ALL = backends("sinkhorn_points")
F64, NAN = torch.float64, float("nan")


def points(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def mass(*shape, dtype=torch.float32, total=1.0):
    return torch.full(shape, total / shape[-1], dtype=dtype)


WRONG = [
    ({"x": [[1.0]]}, TypeError, ("x:", "tensor", "list")),
    ({"y": None}, TypeError, ("y:", "tensor", "NoneType")),
    ({"x": points(3)}, ValueError, ("x:", "(3,)")),
    ({"x": points(3, 2, dtype=torch.int64)}, TypeError, ("x:", "float32", "torch.int64")),
    ({"y": points(4, 2, dtype=F64)}, ValueError, ("y:", "torch.float32", "torch.float64")),
    ({"y": points(4, 3)}, ValueError, ("y:", "2", "3")),
    ({"x": points(0, 2)}, ValueError, ("x:", "at least one row", "(0, 2)")),
    ({"y": points(0, 2)}, ValueError, ("y:", "at least one row", "(0, 2)")),
    ({"x": points(5, 3, 2), "y": points(6, 4, 2)}, ValueError, ("y:", "(6, 4, 2)")),
    ({"x": points(3, 0), "y": points(4, 0), "metric": "cosine"}, ValueError, ("x:", "cosine", "(3, 0)")),
    ({"metric": "l3"}, ValueError, ("metric:", "'sqeuclidean'", "'l3'")),
    ({"a": mass(4)}, ValueError, ("a:", "3 masses", "rows of x", "(4,)")),
    ({"b": mass(3)}, ValueError, ("b:", "4 masses", "rows of y", "(3,)")),
    ({"a": mass(3, dtype=F64)}, ValueError, ("a:", "torch.float32", "torch.float64")),
    ({"a": torch.tensor([0.6, 0.6, -0.2])}, ValueError, ("a:", ">= 0", "-0.2")),
    ({"b": torch.tensor([0.5, NAN, 0.2, 0.3])}, ValueError, ("b:", ">= 0", "nan")),
    ({"a": torch.zeros(3)}, ValueError, ("a:", "> 0", "got 0")),
    ({"a": mass(3, total=1.5)}, ValueError, ("a:", "total mass 1", "uniform b", "1.5")),
    ({"a": mass(3, total=3.0), "b": mass(4, total=2.0)}, ValueError, ("b:", "total mass 3", "got 2")),
    ({"x": points(2, 3, 2), "b": mass(5, 4)}, ValueError, ("b:", "(5, 4)")),
    ({"epsilon": 0.0}, ValueError, ("epsilon:", "> 0", "0.0")),
    ({"epsilon": NAN}, ValueError, ("epsilon:", "finite", "nan")),
    ({"epsilon": "1"}, TypeError, ("epsilon:", "number", "str")),
    ({"num_iters": 0}, ValueError, ("num_iters:", ">= 1", "0")),
    ({"num_iters": 1.0}, TypeError, ("num_iters:", "int", "float")),
    ({"tol": 0.0}, ValueError, ("tol:", "> 0", "0.0")),
    ({"tol": -1e-3}, ValueError, ("tol:", "> 0", "-0.001")),
    ({"update_first": "x"}, ValueError, ("update_first:", "'a', 'b'", "'x'")),
    ({"epsilon_schedule": [1.0, -0.5]}, ValueError, ("epsilon_schedule", "-0.5")),
    ({"relaxation": 2.0, "gradient": "envelope"}, ValueError, ("relaxation:", "2.0")),
    ({"marginal_penalty": 0.0}, ValueError, ("marginal_penalty", "> 0", "0.0")),
    ({"storage": "disk"}, ValueError, ("storage:", "'streamed'", "'disk'")),
    ({"backend": "gpu"}, ValueError, ("backend", "gpu")),
]
POINTS_ONLY = [
    ({"gradient": "auto"}, ValueError, ("gradient:", "'unroll'", "'auto'")),
    ({"initial_potentials": torch.zeros(3)}, TypeError, ("initial_potentials", "Tensor")),
    ({"initial_potentials": (torch.zeros(4), None)}, ValueError, ("initial_potentials", "(3,)", "(4,)")),
    ({"initial_potentials": (None, torch.zeros(3))}, ValueError, ("initial_potentials", "(4,)", "(3,)")),
    ({"gradient": "detach", "a": mass(3).requires_grad_()}, ValueError, ("a:", "detach")),
    ({"relaxation": 1.5, "x": points(3, 2).requires_grad_()}, ValueError, ("relaxation", "unroll")),
]
DIVERGENCE_ONLY = [
    ({"gradient": "detach"}, ValueError, ("gradient:", "'envelope'", "'detach'")),
    ({"marginal_penalty": (1.0, 2.0)}, TypeError, ("marginal_penalty:", "one number", "pair")),
]


def check(function, wrong, error, words, backend):
    good = {"x": points(3, 2), "y": points(4, 2), "metric": "l2", "epsilon": 0.5, "num_iters": 2, "backend": backend}
    with pytest.raises(error) as caught:
        function(**good | wrong)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


@pytest.mark.parametrize("wrong, error, words", WRONG + POINTS_ONLY)
@pytest.mark.parametrize("backend", ALL)
def test_points(backend, wrong, error, words):
    check(otkd_fast.sinkhorn_points, wrong, error, words, backend)


@pytest.mark.parametrize("wrong, error, words", WRONG + DIVERGENCE_ONLY)
@pytest.mark.parametrize("backend", ALL)
def test_divergence(backend, wrong, error, words):
    check(otkd_fast.sinkhorn_divergence, wrong, error, words, backend)


@pytest.mark.parametrize("backend", ALL)
def test_totals_of_the_divergence_may_differ_under_a_penalty_only(backend):
    """Each problem of a batch is looked at: the second pair of totals differs here."""
    a, b = mass(2, 3), torch.stack([mass(4), mass(4, total=1.6)])
    options = {"x": points(2, 3, 2), "y": points(2, 4, 2), "a": a, "b": b, "metric": "l2", "epsilon": 0.5}
    with pytest.raises(ValueError, match=r"^b: .*total mass 1.*1\.6.*problem 1"):
        otkd_fast.sinkhorn_divergence(**options, num_iters=2, backend=backend)
    value = otkd_fast.sinkhorn_divergence(**options, num_iters=200, backend=backend, marginal_penalty=1.0)
    # every cost is 0: the plan is mass to mass, and the value is that of two atoms with the totals 1 and t
    atom, options = torch.zeros(1, 1), {"metric": "l2", "epsilon": 0.5, "num_iters": 200, "marginal_penalty": 1.0}
    expected = otkd_fast.sinkhorn_divergence(atom, atom, mass(1), mass(1, total=1.6), backend="reference", **options)
    torch.testing.assert_close(value, torch.stack([torch.zeros_like(expected), expected]))
    assert expected > 0.01
