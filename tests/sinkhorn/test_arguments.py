"""Wrong arguments: the exception says which one, what was expected and what came."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import backends

ALL = backends("sinkhorn")
F32, NAN, INF = torch.float32, float("nan"), float("inf")


def cost(*shape, dtype=F32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def mass(*shape, dtype=F32, device="cpu"):
    return torch.full(shape, 1 / shape[-1], dtype=dtype, device=device)


WRONG = [
    ({"cost": [[1.0]]}, TypeError, ("cost:", "tensor", "list")),
    ({"cost": cost(3)}, ValueError, ("cost:", "(..., n, m)", "(3,)")),
    ({"cost": cost(0, 4)}, ValueError, ("cost:", "at least one row", "(0, 4)")),
    ({"cost": cost(2, 3, 0)}, ValueError, ("cost:", "one column", "(2, 3, 0)")),
    ({"cost": cost(3, 4, dtype=torch.int32)}, TypeError, ("cost:", "float32", "torch.int32")),
    ({"cost": cost(3, 4, dtype=torch.complex128)}, TypeError, ("cost:", "float32", "torch.complex128")),
    ({"a": [0.5, 0.5]}, TypeError, ("a:", "tensor", "list")),
    ({"a": torch.tensor(1.0)}, ValueError, ("a:", "(..., n)", "()")),
    ({"a": torch.ones(3, dtype=torch.int64)}, TypeError, ("a:", "float32", "torch.int64")),
    ({"a": mass(4)}, ValueError, ("a:", "3 masses", "rows", "(4,)")),
    ({"b": mass(3)}, ValueError, ("b:", "4 masses", "columns", "(3,)")),
    ({"a": mass(3, dtype=torch.float64)}, ValueError, ("a:", "torch.float32", "torch.float64")),
    ({"b": mass(4, device="meta")}, ValueError, ("b:", "cpu", "meta")),
    ({"cost": cost(2, 3, 4), "a": mass(5, 3)}, ValueError, ("a:", "(2, 3)", "(5, 3)")),
    ({"cost": cost(2, 3, 4), "b": mass(1, 2, 4)}, ValueError, ("b:", "(2, 4)", "(1, 2, 4)")),
    ({"a": torch.tensor([0.5, 0.7, -0.2])}, ValueError, ("a:", ">= 0", "-0.2")),
    ({"b": torch.tensor([0.5, NAN, 0.2, 0.3])}, ValueError, ("b:", ">= 0", "nan")),
    ({"b": torch.tensor([0.5, INF, 0.2, 0.3])}, ValueError, ("b:", "finite", "inf")),
    ({"a": torch.zeros(3)}, ValueError, ("a:", "> 0", "got 0")),
    ({"a": torch.full((3,), 0.5)}, ValueError, ("a:", "total mass 1", "uniform b", "1.5")),
    ({"b": torch.full((4,), 0.5)}, ValueError, ("b:", "total mass 1", "uniform a", "got 2")),
    ({"a": torch.full((3,), 1.0), "b": torch.full((4,), 0.5)}, ValueError, ("b:", "total mass 3", "of a", "got 2")),
    (
        {"cost": cost(2, 3, 4), "a": torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.6]])},
        ValueError,
        ("a:", "total mass 1", "1.1", "problem 1"),
    ),
    ({"epsilon": 0.0}, ValueError, ("epsilon:", "> 0", "0.0")),
    ({"epsilon": -0.1}, ValueError, ("epsilon:", "> 0", "-0.1")),
    ({"epsilon": NAN}, ValueError, ("epsilon:", "finite", "nan")),
    ({"epsilon": INF}, ValueError, ("epsilon:", "finite", "inf")),
    ({"epsilon": "0.1"}, TypeError, ("epsilon:", "number", "str")),
    ({"epsilon": torch.tensor(0.1)}, TypeError, ("epsilon:", "number", "Tensor")),
    ({"num_iters": 0}, ValueError, ("num_iters:", ">= 1", "0")),
    ({"num_iters": -3}, ValueError, ("num_iters:", ">= 1", "-3")),
    ({"num_iters": 2.5}, TypeError, ("num_iters:", "int", "float")),
    ({"num_iters": True}, TypeError, ("num_iters:", "int", "bool")),
    ({"update_first": "rows"}, ValueError, ("update_first:", "'a', 'b'", "'rows'")),
    ({"gradient": "auto"}, ValueError, ("gradient:", "'unroll'", "'implicit'", "'auto'")),
    ({"gradient": None}, TypeError, ("gradient:", "'unroll'", "NoneType")),
    ({"backend": "numpy"}, ValueError, ("backend:", "'reference'", "'numpy'")),
    ({"backend": "cuda"}, RuntimeError, ("'cuda'", "sinkhorn", "not available")),
    ({"tol": 0.0}, ValueError, ("tol:", "> 0", "0.0")),
    ({"tol": -1.0}, ValueError, ("tol:", "> 0", "-1.0")),
    ({"tol": INF}, ValueError, ("tol:", "finite", "inf")),
    ({"tol": "1e-6"}, TypeError, ("tol:", "number", "str")),
    ({"relaxation": 0.0}, ValueError, ("relaxation:", "between 0 and 2", "'auto'", "got 0.0")),
    ({"relaxation": 2}, ValueError, ("relaxation:", "between 0 and 2", "got 2")),
    ({"relaxation": NAN}, ValueError, ("relaxation:", "between 0 and 2", "nan")),
    ({"relaxation": "fast"}, ValueError, ("relaxation:", "'auto'", "'fast'")),
    ({"relaxation": None}, TypeError, ("relaxation:", "number", "NoneType")),
    ({"relaxation": True}, TypeError, ("relaxation:", "number", "bool")),
    (
        {"relaxation": 1.5, "cost": cost(3, 4).requires_grad_()},
        ValueError,
        ("relaxation:", "gradient='unroll'", "1.5", "'implicit'"),
    ),
    ({"relaxation": "auto", "a": mass(3).requires_grad_()}, ValueError, ("relaxation:", "gradient='unroll'", "'auto'")),
    (
        {"relaxation": 1.5, "gradient": "last_step", "b": mass(4).requires_grad_()},
        ValueError,
        ("relaxation:", "gradient='last_step'"),
    ),
    ({"marginal_penalty": 0.0}, ValueError, ("marginal_penalty:", "> 0", "got 0.0")),
    ({"marginal_penalty": (1.0, -2.0)}, ValueError, ("marginal_penalty[1]:", "> 0", "-2.0")),
    ({"marginal_penalty": (NAN, None)}, ValueError, ("marginal_penalty[0]:", "> 0", "nan")),
    ({"marginal_penalty": (1.0, 2.0, 3.0)}, ValueError, ("marginal_penalty:", "pair", "3.0")),
    ({"marginal_penalty": "kl"}, TypeError, ("marginal_penalty:", "number", "str")),
    ({"marginal_penalty": torch.tensor(1.0)}, TypeError, ("marginal_penalty:", "number", "Tensor")),
    ({"marginal_penalty": 1.0, "a": torch.zeros(3)}, ValueError, ("a:", "> 0", "got 0")),
    ({"marginal_penalty": 1.0, "b": torch.tensor([0.5, -0.5, 0.2, 0.3])}, ValueError, ("b:", ">= 0", "-0.5")),
    ({"marginal_penalty": INF, "a": torch.full((3,), 0.5)}, ValueError, ("a:", "total mass 1", "1.5")),
    ({"initial_potentials": torch.zeros(3)}, TypeError, ("initial_potentials:", "pair (f, g)", "Tensor")),
    ({"initial_potentials": (torch.zeros(3),)}, TypeError, ("initial_potentials:", "pair (f, g)", "tuple")),
    ({"initial_potentials": (torch.zeros(4), None)}, ValueError, ("initial_potentials[0]:", "(3,)", "(4,)")),
    ({"initial_potentials": (None, torch.zeros(2, 4))}, ValueError, ("initial_potentials[1]:", "(4,)", "(2, 4)")),
    ({"initial_potentials": (None, torch.zeros(4).double())}, ValueError, ("initial_potentials[1]:", "float32", "64")),
    (
        {"initial_potentials": (torch.zeros(3, device="meta"), None)},
        ValueError,
        ("initial_potentials[0]:", "cpu", "meta"),
    ),
    ({"initial_potentials": (0.0, None)}, TypeError, ("initial_potentials[0]:", "tensor", "float")),
    (
        {"cost": cost(2, 3, 4), "initial_potentials": (torch.zeros(1, 3), None)},
        ValueError,
        ("initial_potentials[0]:", "(2, 3) or (3,)", "(1, 3)"),
    ),
    (
        {"cost": cost(3, 4).half(), "initial_potentials": (torch.zeros(3).half(), None)},
        ValueError,
        ("initial_potentials[0]:", "torch.float32, the dtype of the result", "torch.float16"),
    ),
    ({"epsilon_schedule": 1.0}, TypeError, ("epsilon_schedule:", "sequence", "float")),
    ({"epsilon_schedule": "geometric"}, TypeError, ("epsilon_schedule:", "sequence", "str")),
    ({"epsilon_schedule": torch.ones(3)}, TypeError, ("epsilon_schedule:", "sequence", "Tensor")),
    ({"epsilon_schedule": [1.0, 0.0]}, ValueError, ("epsilon_schedule[1]:", "> 0", "0.0")),
    ({"epsilon_schedule": [1.0, (0.5,)]}, ValueError, ("epsilon_schedule[1]:", "pair", "(0.5,)")),
    ({"epsilon_schedule": [(0.5, 2.5)]}, TypeError, ("epsilon_schedule[0][1]:", "int", "float")),
    ({"epsilon_schedule": [(-0.5, 2)]}, ValueError, ("epsilon_schedule[0][0]:", "> 0", "-0.5")),
    ({"a": mass(5, 3), "b": mass(2, 4)}, ValueError, ("b:", "(5, 4)", "(4,)", "(2, 4)")),
]


@pytest.mark.parametrize(("changes", "error", "words"), WRONG)
def test_wrong_argument(changes, error, words):
    arguments = {"cost": cost(3, 4), "a": None, "b": None, "epsilon": 0.1, "num_iters": 3} | changes
    positional = [arguments.pop(name) for name in ("cost", "a", "b")]
    with pytest.raises(error) as caught:
        otkd_fast.sinkhorn(*positional, **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_rounded_softmax_is_a_marginal(backend, dtype):
    """Totals may differ by the rounding of their dtype; so may those of float32 softmaxes handed over as float64."""
    logits = 3 * torch.randn(20, 1000)
    c = torch.ones(20, 1000, 3, dtype=dtype)
    options = {"epsilon": 0.5, "num_iters": 2, "backend": backend}
    assert otkd_fast.sinkhorn(c, logits.to(dtype).softmax(-1), **options).transport_cost.isfinite().all()
    assert otkd_fast.sinkhorn(c, logits.softmax(-1).to(dtype), **options).transport_cost.isfinite().all()


@pytest.mark.parametrize("backend", ALL)
def test_accepts_numbers_that_are_not_float_or_int(backend):
    numpy = pytest.importorskip("numpy")
    c = torch.rand(3, 4)
    expected = otkd_fast.sinkhorn(c, epsilon=2.0, num_iters=3, backend=backend).transport_cost
    for epsilon, num_iters in ((2, 3), (numpy.float32(2), numpy.int64(3))):
        actual = otkd_fast.sinkhorn(c, epsilon=epsilon, num_iters=num_iters, backend=backend).transport_cost
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("gradient", ["unroll", "last_step"])
@pytest.mark.parametrize("backend", ALL)
def test_relaxation_where_no_gradient_is_asked_for(backend, gradient):
    """The modes that differentiate the path take it without a gradient, and refuse it under a transform."""
    generator = torch.Generator().manual_seed(0)
    problem = torch.rand(5, 4, generator=generator).requires_grad_()
    options = {"epsilon": 0.05, "num_iters": 30, "relaxation": "auto", "backend": backend}
    expected = otkd_fast.sinkhorn(problem, gradient="envelope", **options)
    constant = otkd_fast.sinkhorn(problem.detach(), gradient=gradient, **options)
    with torch.no_grad():
        disabled = otkd_fast.sinkhorn(problem, gradient=gradient, **options)
    for result in (constant, disabled):
        torch.testing.assert_close(result.f, expected.f.detach())
        torch.testing.assert_close(result.transport_cost, expected.transport_cost.detach())
    with pytest.raises(ValueError, match="^relaxation: "):
        torch.func.grad(lambda c: otkd_fast.sinkhorn(c, gradient=gradient, **options).transport_cost)(problem.detach())
