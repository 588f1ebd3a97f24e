"""The reference against closed forms, SciPy's linear program, POT, and finite differences."""

import math

import pytest
import torch

from otkd_fast.reference import sinkhorn
from otkd_fast.testing import random_problem

F64 = torch.float64


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=rtol, atol=atol)


def test_one_by_one():
    """P = a b = 1: the cost is C, and f + g = C."""
    out = sinkhorn(torch.tensor([[0.7]], dtype=F64), epsilon=0.3, num_iters=2)
    close(out.transport_cost, 0.7)
    close(out.regularized_cost, 0.7)
    close(out.f + out.g, [0.7])
    close(out.marginal_error, 0.0)


def test_one_row():
    """One row: the plan is b^T, whatever the cost."""
    cost, b = torch.tensor([[1.0, 4.0, 2.0]], dtype=F64), torch.tensor([0.5, 0.2, 0.3], dtype=F64)
    out = sinkhorn(cost, None, b, epsilon=0.05, num_iters=3)
    close(out.transport_cost, 1.0 * 0.5 + 4.0 * 0.2 + 2.0 * 0.3)
    close(out.regularized_cost, out.transport_cost)  # KL(P | a b^T) = 0


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_two_by_two(epsilon):
    """C = [[0, c], [c, 0]], uniform marginals: P_11 = 1 / (2 (1 + exp(-c / epsilon)))."""
    c = 0.4
    out = sinkhorn(torch.tensor([[0.0, c], [c, 0.0]], dtype=F64), epsilon=epsilon, num_iters=50)
    off = 0.5 / (1 + math.exp(c / epsilon))
    close(out.transport_cost, 2 * c * off)
    kl = 2 * off * math.log(4 * off) + 2 * (0.5 - off) * math.log(4 * (0.5 - off))
    close(out.regularized_cost, 2 * c * off + epsilon * kl)


@pytest.mark.parametrize("update_first", ["a", "b"])
def test_first_iteration_by_hand(update_first):
    """The start (potentials 0) and the order of the updates are part of the result."""
    cost = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.5, 1.0]], dtype=F64)
    a, b, epsilon = torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64), 0.8
    out = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=1, update_first=update_first)
    kernel = (-cost / epsilon).exp()
    if update_first == "a":
        u = a / kernel.sum(1)
        v = b / (kernel.T @ u)
    else:
        v = b / kernel.sum(0)
        u = a / (kernel @ v)
    close(out.f, epsilon * u.log())
    close(out.g, epsilon * v.log())
    plan = u[:, None] * kernel * v
    close(out.transport_cost, (plan * cost).sum())
    close(out.marginal_error, (plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum())
    dual = (out.f * a).sum() + (out.g * b).sum() - epsilon * ((a * a.log()).sum() + (b * b.log()).sum())
    close(out.regularized_cost, dual - epsilon * plan.sum() + epsilon)


def test_permutation_cost_at_small_epsilon():
    """Zero cost on a permutation, 1 elsewhere: all mass goes along the permutation."""
    order = [2, 0, 3, 1]
    cost = torch.ones(4, 4, dtype=F64)
    cost[torch.arange(4), order] = 0
    out = sinkhorn(cost, epsilon=0.01, num_iters=10)
    assert 0 <= out.transport_cost < 1e-15
    close(out.regularized_cost, 0.01 * math.log(4))  # KL(P | a b^T) = log 4


def test_regularized_cost_is_the_primal_value_at_convergence(generator):
    cost, a, b = random_problem(6, 5, zeros=True, generator=generator)
    out = sinkhorn(cost, a, b, epsilon=0.2, num_iters=300)
    plan = ((out.f[:, None] + out.g - cost) / 0.2).exp()
    product = a[:, None] * b
    kl = torch.where(plan > 0, plan * (plan / torch.where(product > 0, product, 1)).log(), 0).sum()
    close(out.regularized_cost, (plan * cost).sum() + 0.2 * kl)
    close(plan.sum(1), a)
    close(plan.sum(0), b)


def test_against_linear_program(generator):
    """At a small epsilon the transport cost is that of optimal transport, up to epsilon log(n m)."""
    linprog = pytest.importorskip("scipy.optimize").linprog
    n, m = 5, 6
    cost, a, b = random_problem(n, m, generator=generator)
    rows = torch.kron(torch.eye(n), torch.ones(m))
    columns = torch.kron(torch.ones(n), torch.eye(m))
    constraints, masses = torch.cat([rows, columns]).numpy(), torch.cat([a, b]).numpy()
    solved = linprog(cost.flatten().numpy(), A_eq=constraints, b_eq=masses, bounds=(0, None))
    epsilon = 1e-3
    out = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=20000)
    assert out.marginal_error < 1e-6
    assert -1e-6 <= out.transport_cost - solved.fun <= epsilon * math.log(n * m)
    assert abs(out.regularized_cost - solved.fun) <= epsilon * math.log(n * m)


@pytest.mark.parametrize("epsilon", [1.0, 0.05])
def test_against_pot(epsilon, generator):
    ot = pytest.importorskip("ot")
    cost, a, b = random_problem(7, 5, generator=generator)
    plan = ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", numItermax=10000, stopThr=1e-13)
    out = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=3000)
    torch.testing.assert_close(((out.f[:, None] + out.g - cost) / epsilon).exp(), plan, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("output", ["transport_cost", "regularized_cost", "f", "g"])
@pytest.mark.parametrize("update_first", ["a", "b"])
def test_unrolled_gradients_against_finite_differences(update_first, output, generator):
    cost, a, b = random_problem(4, 3, batch=(2,), generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (cost, a, b)]

    def solve(*tensors):
        return getattr(sinkhorn(*tensors, epsilon=0.3, num_iters=3, update_first=update_first), output)

    assert torch.autograd.gradcheck(solve, leaves)
    assert torch.autograd.gradgradcheck(solve, leaves)


@pytest.mark.parametrize("gradient", ["unroll", "envelope"])
def test_gradients_are_finite_where_nothing_moves(gradient):
    """A zero mass, an infinite cost and a row that cannot be served: gradient 0 there, finite elsewhere."""
    inf = torch.inf
    cost = torch.tensor([[0.1, inf, 0.3], [inf, inf, 0.9], [0.2, 0.4, 0.5], [0.3, 0.1, inf]], dtype=F64)
    a = torch.tensor([0.3, 0.3, 0.4, 0.0], dtype=F64)
    b = torch.tensor([0.6, 0.4, 0.0], dtype=F64)  # so row 1 has nowhere to go
    leaves = [tensor.requires_grad_() for tensor in (cost, a, b)]
    out = sinkhorn(*leaves, epsilon=0.1, num_iters=5, gradient=gradient)
    assert out.f.tolist()[1] == -inf and out.f.tolist()[3] == -inf and out.g.tolist()[2] == -inf
    close(out.marginal_error.detach(), 0.6, rtol=0, atol=0.05)  # 0.3 is not sent, and 0.3 does not arrive
    values = [out.regularized_cost] + ([out.transport_cost] if gradient == "unroll" else [])
    for value in values:
        assert value.isfinite()
        grad_cost, grad_a, grad_b = torch.autograd.grad(value, leaves, retain_graph=True)
        for grad in (grad_cost, grad_a, grad_b):
            assert grad.isfinite().all()
        assert (grad_cost[cost.isinf()] == 0).all()
        assert (grad_cost[[1, 3]] == 0).all() and (grad_cost[:, 2] == 0).all()
        assert grad_a[3] == 0 and grad_b[2] == 0
        assert grad_cost[0, 0] != 0 and grad_a[0] != 0
