"""Properties that hold for any problem."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import otkd_fast
from otkd_fast.testing import assert_close, backends, random_problem

ALL = backends("sinkhorn")
few = settings(max_examples=12, deadline=None, derandomize=True)


@st.composite
def problems(draw, infinite=True):
    """A problem, epsilon, and the generator that made it."""
    n, m = draw(st.integers(1, 18)), draw(st.integers(1, 18))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    options = {"zeros": draw(st.booleans()), "infinite": infinite and draw(st.booleans())}
    problem = random_problem(n, m, generator=generator, **options)
    return problem, draw(st.sampled_from([3.0, 0.5, 0.1, 0.02])), generator


def solve(problem, epsilon, backend, num_iters=6, **options):
    return otkd_fast.sinkhorn(*problem, epsilon=epsilon, num_iters=num_iters, backend=backend, **options)


def same(actual, expected, f, g, context=""):
    assert_close(actual.transport_cost, expected.transport_cost, "sinkhorn", "transport_cost", context=context)
    assert_close(actual.f, f, "sinkhorn", "potential", scale=10.0, context=f"{context} f")
    assert_close(actual.g, g, "sinkhorn", "potential", scale=10.0, context=f"{context} g")


@pytest.mark.parametrize("backend", ALL)
@given(case=problems())
@few
def test_the_marginal_updated_last_holds(backend, case):
    problem, epsilon, _ = case
    plan = solve(problem, epsilon, backend).plan()
    reached = plan.sum(-2) > 0
    torch.testing.assert_close(plan.sum(-2), torch.where(reached, problem.b, 0), rtol=1e-9, atol=1e-12)
    plan = solve(problem, epsilon, backend, update_first="b").plan()
    reached = plan.sum(-1) > 0
    torch.testing.assert_close(plan.sum(-1), torch.where(reached, problem.a, 0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ALL)
@given(case=problems(infinite=False))
@few
def test_both_marginals_hold_at_convergence(backend, case):
    problem, _, _ = case
    result = solve(problem, 0.5, backend, num_iters=200)
    assert result.marginal_error < 1e-9
    torch.testing.assert_close(result.plan().sum(-1), problem.a, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ALL)
@given(case=problems())
@few
def test_transpose_exchanges_the_marginals(backend, case):
    (cost, a, b), epsilon, _ = case
    expected = solve((cost, a, b), epsilon, backend)
    actual = solve((cost.mT, b, a), epsilon, backend, update_first="b")
    same(actual, expected, expected.g, expected.f)


@pytest.mark.parametrize("backend", ALL)
@given(case=problems())
@few
def test_permutation(backend, case):
    (cost, a, b), epsilon, generator = case
    rows, columns = (torch.randperm(size, generator=generator) for size in cost.shape)
    expected = solve((cost, a, b), epsilon, backend)
    actual = solve((cost[rows][:, columns], a[rows], b[columns]), epsilon, backend)
    same(actual, expected, expected.f[rows], expected.g[columns])


@pytest.mark.parametrize("backend", ALL)
@given(case=problems(infinite=False))
@few
def test_shifts_of_the_cost(backend, case):
    """C + r_i + s_j moves the potentials at convergence and leaves the plan; a constant does so at any iteration."""
    (cost, a, b), epsilon, generator = case
    expected = solve((cost, a, b), epsilon, backend)
    actual = solve((cost + 0.7, a, b), epsilon, backend)
    torch.testing.assert_close(actual.plan(), expected.plan(), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(actual.transport_cost, expected.transport_cost + 0.7 * expected.plan().sum())
    row, column = (torch.rand(size, generator=generator, dtype=torch.float64) for size in cost.shape)
    converged = [solve((c, a, b), 0.5, backend, 200).plan() for c in (cost, cost + row[:, None] + column)]
    torch.testing.assert_close(*converged, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("backend", ALL)
@given(case=problems(), factor=st.sampled_from([1e-3, 0.5, 40.0]))
@few
def test_scale_of_cost_and_epsilon(backend, case, factor):
    (cost, a, b), epsilon, _ = case
    expected = solve((cost, a, b), epsilon, backend)
    actual = solve((factor * cost, a, b), factor * epsilon, backend)
    torch.testing.assert_close(actual.transport_cost, factor * expected.transport_cost, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(actual.f, factor * expected.f, rtol=1e-9, atol=1e-12 * factor)


@pytest.mark.parametrize("backend", ALL)
@given(case=problems(), batch=st.integers(1, 4))
@few
def test_batch_is_a_loop(backend, case, batch):
    (cost, a, b), epsilon, generator = case
    costs = torch.stack([cost * (k + 1) / 2 for k in range(batch)])
    order = [torch.randperm(len(a), generator=generator) for _ in range(batch)]
    masses = torch.stack([a[p] for p in order])
    whole = solve((costs, masses, b), epsilon, backend)
    for k in range(batch):
        one = solve((costs[k], masses[k], b), epsilon, backend)
        assert_close(whole.transport_cost[k], one.transport_cost, "sinkhorn", "transport_cost")
        assert_close(whole.f[k], one.f, "sinkhorn", "potential", scale=10.0)


@pytest.mark.parametrize("backend", ALL)
@given(case=problems(infinite=False))
@few
def test_duality_gap_is_not_negative(backend, case):
    """The dual value never exceeds the value of a plan with the right marginals, rises, and meets it."""
    problem, _, _ = case
    product = problem.a[:, None] * problem.b
    primal = (product * problem.cost).sum()  # the plan a b^T, whose KL is 0
    values = [solve(problem, 0.3, backend, num_iters=t).regularized_cost for t in (1, 2, 5, 200)]
    for value, following in zip(values, [*values[1:], primal], strict=True):
        assert value <= following + 1e-12
    result = solve(problem, 0.3, backend, num_iters=200)
    plan = result.plan()
    kl = torch.where(plan > 0, plan * (plan / torch.where(product > 0, product, 1)).log(), 0).sum()
    torch.testing.assert_close(result.regularized_cost, (plan * problem.cost).sum() + 0.3 * kl, rtol=1e-8, atol=1e-10)
    assert result.transport_cost <= result.regularized_cost + 1e-12
