"""Compiled kernels against the float64 reference, output by output."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import assert_close, backends, instruction_sets, random_problem, use_instruction_set

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129)
SHAPES = [(n, SIZES[(5 * i + 3) % len(SIZES)]) for i, n in enumerate(SIZES)]
COMPILED = backends("sinkhorn", compiled_only=True)
ALL = backends("sinkhorn")
QUANTITIES = {
    "transport_cost": "transport_cost",
    "regularized_cost": "regularized_cost",
    "f": "potential",
    "g": "potential",
}


def check(problem, dtype, backend, **options):
    problem = problem.to(dtype)
    actual = otkd_fast.sinkhorn(*problem, backend=backend, **options)
    expected = reference.sinkhorn(*problem.to(torch.float64), **options)
    context = f"{backend} {tuple(problem.cost.shape)} {options}"
    # potentials may all be 0, so their unit is the largest cost
    finite = problem.cost[problem.cost.isfinite()]
    unit = max(float(finite.max()) if len(finite) else 0.0, options["epsilon"])
    for name, quantity in QUANTITIES.items():
        got, want = getattr(actual, name), getattr(expected, name)
        assert got.dtype == (torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
        scale = unit if quantity == "potential" else None
        assert_close(got, want, "sinkhorn", quantity, scale=scale, context=f"{context} {name}")
    errors = actual.marginal_error, expected.marginal_error
    assert_close(*errors, "sinkhorn", "marginal_error", scale=1.0, context=context)
    assert torch.equal(actual.num_iters, torch.full(problem.cost.shape[:-2], options["num_iters"]))
    return actual


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("update_first", ["a", "b"])
@pytest.mark.parametrize("backend", ALL)
def test_every_tail(backend, update_first, dtype, generator):
    for n, m in SHAPES:
        problem = random_problem(n, m, generator=generator, zeros=True)
        check(problem, dtype, backend, epsilon=0.1, num_iters=7, update_first=update_first)
        check(problem._replace(a=None, b=None), dtype, backend, epsilon=0.1, num_iters=7, update_first=update_first)


@pytest.mark.parametrize("backend", ALL)
def test_one_marginal_given(backend, generator):
    cost, a, b = random_problem(9, 13, batch=(3,), generator=generator)
    for marginals in ((a, None), (None, b)):
        for dtype in (torch.float64, torch.float32):
            problem = random_problem(9, 13, batch=(3,), generator=generator)._replace(a=marginals[0], b=marginals[1])
            check(problem, dtype, backend, epsilon=0.2, num_iters=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon", [10.0, 1.0, 0.1, 0.03, 0.01, 0.001])
@pytest.mark.parametrize("backend", ALL)
def test_every_epsilon(backend, epsilon, dtype, generator):
    """Cost up to 1: from plans that are nearly a b^T to plans that underflow without the log domain."""
    if backend == "reference" and dtype == torch.float32 and epsilon < 0.03:
        pytest.skip("the reference in float32 rounds exponents of 1 / epsilon")
    for num_iters in (1, 20):
        for zeros, infinite in ((False, False), (True, False), (False, True)):
            problem = random_problem(19, 23, batch=(2,), zeros=zeros, infinite=infinite, generator=generator)
            check(problem, dtype, backend, epsilon=epsilon, num_iters=num_iters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_half_precision_is_solved_in_float32(backend, dtype, generator):
    problem = random_problem(17, 9, batch=(2,), generator=generator)
    check(problem._replace(a=None, b=None), dtype, backend, epsilon=0.1, num_iters=10)
    check(problem, dtype, backend, epsilon=0.1, num_iters=10)


@pytest.mark.parametrize("backend", ALL)
def test_batch_axes(backend, generator):
    problem = random_problem(6, 17, batch=(2, 3), zeros=True, generator=generator)
    result = check(problem, torch.float32, backend, epsilon=0.1, num_iters=10)
    assert result.transport_cost.shape == (2, 3) and result.plan().shape == (2, 3, 6, 17)
    shared = problem._replace(a=problem.a[0, 0], b=problem.b[0, 0])
    expanded = problem._replace(a=problem.a[:1, :1].expand(2, 3, 6), b=problem.b[:1, :1].expand(2, 3, 17))
    options = {"epsilon": 0.1, "num_iters": 10, "backend": backend}
    for actual, expected in zip(*(otkd_fast.sinkhorn(*p, **options).plan() for p in (shared, expanded)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("backend", COMPILED)
def test_instruction_sets_and_threads(backend, instruction_set, threads, generator):
    torch.set_num_threads(threads)
    with use_instruction_set(instruction_set):
        for n, m in ((3, 5), (17, 9), (64, 100)):
            for epsilon in (0.1, 0.01, 0.001):
                problem = random_problem(n, m, batch=(3,), zeros=True, infinite=True, generator=generator)
                for dtype in (torch.float64, torch.float32):
                    check(problem, dtype, backend, epsilon=epsilon, num_iters=8)
                    check(problem, dtype, backend, epsilon=epsilon, num_iters=8, update_first="b")


@pytest.mark.parametrize("backend", ALL)
def test_plan(backend, generator):
    problem = random_problem(8, 6, batch=(2,), zeros=True, infinite=True, generator=generator)
    result = otkd_fast.sinkhorn(*problem, epsilon=0.3, num_iters=500, backend=backend)
    plan = result.plan()
    assert (plan >= 0).all() and (plan[problem.cost.isinf()] == 0).all()
    assert ((plan == 0) | (problem.a[..., None] > 0) & (problem.b[:, None] > 0)).all()
    product = plan * torch.where(problem.cost.isinf(), 0, problem.cost)
    torch.testing.assert_close(product.sum((-2, -1)), result.transport_cost)
    errors = (plan.sum(-1) - problem.a).abs().sum(-1) + (plan.sum(-2) - problem.b).abs().sum(-1)
    torch.testing.assert_close(errors, result.marginal_error, rtol=1e-6, atol=1e-14)
