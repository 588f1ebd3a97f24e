"""The reference's options (stop, relaxation, penalties, warm start, shared cost) against closed forms and others."""

import math

import pytest
import torch

from otkd_fast.reference import sinkhorn
from otkd_fast.testing import random_problem

F64, INF = torch.float64, torch.inf


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=rtol, atol=atol)


def plan_of(cost, out, epsilon):
    return ((out.f.unsqueeze(-1) + out.g.unsqueeze(-2) - cost) / epsilon).exp()


def kl(p, q):
    """sum p log(p / q) - p + q"""
    return (torch.where(p > 0, p * (torch.where(p > 0, p, 1) / torch.where(q > 0, q, 1)).log(), 0) - p + q).sum()


def test_assignment_at_a_small_epsilon(generator):
    """Uniform marginals, n = m: the best permutation, up to epsilon log n."""
    assign = pytest.importorskip("scipy.optimize").linear_sum_assignment
    n, epsilon = 8, 5e-3
    cost = torch.rand(n, n, generator=generator, dtype=F64)
    rows, columns = assign(cost.numpy())
    out = sinkhorn(cost, epsilon=epsilon, num_iters=3000, tol=1e-3)
    assert out.marginal_error <= 1e-3
    best = cost[rows, columns].mean()
    assert -1e-3 <= out.transport_cost - best <= epsilon * math.log(n)


@pytest.mark.parametrize("epsilon", [0.5, 0.2])
def test_gaussians_on_a_grid(epsilon):
    """Entropic transport between N(m, s^2) and N(k, t^2), cost |x - y|^2 (Janati et al. 2020; Mallasto et al. 2021)."""
    mean, s, other, t = 0.1, 0.5, -0.2, 0.4
    x = torch.linspace(-4, 4, 120, dtype=F64)
    a, b = ((-((x - center) ** 2) / (2 * width**2)).exp() for center, width in ((mean, s), (other, t)))
    a, b = a / a.sum(), b / b.sum()
    out = sinkhorn((x[:, None] - x).square(), a, b, epsilon=epsilon, num_iters=400, tol=1e-12)
    half = epsilon / 2
    root = math.sqrt(4 * s**2 * t**2 + half**2)
    apart = (mean - other) ** 2 + s**2 + t**2
    close(out.transport_cost, apart - (root - half), rtol=1e-8)
    value = apart - root + half * (1 - math.log(2 * half) + math.log(root + half))
    close(out.regularized_cost, value, rtol=1e-8)


def test_tol_stops_each_problem_at_its_own_iteration(generator):
    cost, a, b = random_problem(7, 5, batch=(4,), zeros=True, generator=generator)
    cost = cost * torch.tensor([1.0, 3.0, 0.3, 100.0], dtype=F64)[:, None, None]
    tol, options = 1e-6, {"epsilon": 0.1}
    out = sinkhorn(cost, a, b, num_iters=60, tol=tol, **options)
    assert out.num_iters.dtype == torch.int64
    for k, count in enumerate(out.num_iters.tolist()):
        alone = sinkhorn(cost[k], a[k], b[k], num_iters=count, **options)
        for actual, expected in zip(out, alone, strict=True):
            assert torch.equal(actual[k], expected)
        assert alone.marginal_error <= tol or count == 60
        assert count == 1 or sinkhorn(cost[k], a[k], b[k], num_iters=count - 1, **options).marginal_error > tol
    assert len(set(out.num_iters.tolist())) == 4 and out.num_iters[3] == 60 and out.marginal_error[3] > tol


@pytest.mark.parametrize("relaxation", [0.7, 1.0, 1.4, "auto"])
@pytest.mark.parametrize("penalty", [None, 0.4])
def test_relaxation_step_by_step(penalty, relaxation, generator):
    """The definition once more, in scalings' logarithms and Python floats, of one problem."""
    cost, a, b = random_problem(6, 5, generator=generator)
    epsilon, num_iters = 0.05, 34
    power = 1.0 if penalty is None else penalty / (penalty + epsilon)
    f, g, errors, omega = torch.zeros(6, dtype=F64), torch.zeros(5, dtype=F64), [], relaxation
    for k in range(1, num_iters + 1):
        if relaxation == "auto" and k == 1:
            omega = 1.0
        if relaxation == "auto" and k == 11:
            ratio = min(float(errors[-1] / errors[-2]), 0.9999)
            omega = min(round(2048 / (1 + math.sqrt(1 - ratio))) / 1024, 1.95)
        if relaxation == "auto" and k in (21, 31) and errors[-1] > errors[-11]:
            omega = 1.0
        f = (1 - omega) * f + omega * epsilon * (a.log() - power * ((g - cost) / epsilon).logsumexp(-1))
        g = (1 - omega) * g + omega * epsilon * (b.log() - power * ((f[:, None] - cost) / epsilon).logsumexp(0))
        plan = ((f[:, None] + g - cost) / epsilon).exp()
        rest = [1.0, 1.0]
        if penalty is not None:
            rest = [(-(p - epsilon * w.log()) / penalty).exp() for p, w in ((f, a), (g, b))]
        errors.append((plan.sum(1) - a * rest[0]).abs().sum() + (plan.sum(0) - b * rest[1]).abs().sum())
    out = sinkhorn(
        cost, a, b, epsilon=epsilon, num_iters=num_iters, relaxation=relaxation, marginal_penalty=penalty,
        gradient="envelope",
    )  # fmt: skip
    close(out.f, f)
    close(out.g, g)
    close(out.marginal_error, errors[-1], rtol=1e-6, atol=1e-14)


def test_auto_relaxation_needs_fewer_iterations(generator):
    """And ends at the same solution, also where it gives up."""
    cost, a, b = random_problem(12, 9, batch=(5,), generator=generator)
    options = {"epsilon": 0.06, "gradient": "envelope"}
    plain = sinkhorn(cost, a, b, num_iters=1000, tol=1e-8, **options)
    auto = sinkhorn(cost, a, b, num_iters=1000, tol=1e-8, relaxation="auto", **options)
    assert (auto.marginal_error <= 1e-8).all()
    assert auto.num_iters.sum() < 0.7 * plain.num_iters.sum()
    assert (auto.num_iters <= 1.2 * plain.num_iters + 20).all()
    torch.testing.assert_close(auto.regularized_cost, plain.regularized_cost, rtol=1e-6, atol=1e-8)


def test_relaxation_leaves_out_what_is_not_served():
    """A row without mass stays -inf, and the others move as if it were not there."""
    cost = torch.tensor([[0.1, INF], [INF, 0.3], [0.2, 0.5]], dtype=F64)
    a, b = torch.tensor([0.5, 0.5, 0.0], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    start = torch.tensor([0.2, -INF, 0.0], dtype=F64), None
    out = sinkhorn(cost, a, b, epsilon=0.1, num_iters=1, relaxation=1.5, initial_potentials=start)
    close(out.f[0], (1 - 1.5) * 0.2 + 1.5 * (0.1 * math.log(0.5) + 0.1))
    assert out.f[2] == -INF and out.regularized_cost.isfinite()


@pytest.mark.parametrize("penalty", [0.5, (0.1, 2.0), (None, 0.5), (INF, 0.5), (0.3, None)])
def test_penalised_value_is_the_primal_value_at_convergence(penalty, generator):
    """Totals that differ; a side with a constraint meets it."""
    cost, a, b = random_problem(6, 5, zeros=True, generator=generator)
    a, epsilon = 1.7 * a, 0.2
    rho_a, rho_b = (INF if rho is None else rho for rho in (penalty if isinstance(penalty, tuple) else (penalty,) * 2))
    out = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=2000, marginal_penalty=penalty)
    assert out.marginal_error < 1e-13
    plan = plan_of(cost, out, epsilon)
    value = (plan * cost).sum() + epsilon * kl(plan, a[:, None] * b)
    for rho, sums, weights in ((rho_a, plan.sum(1), a), (rho_b, plan.sum(0), b)):
        if rho == INF:
            close(sums, weights)
        else:
            value = value + rho * kl(sums, weights)
    close(out.regularized_cost, value)


def test_penalised_value_is_a_minimum(generator):
    """No plan near the one found is better."""
    cost, a, b = random_problem(4, 5, generator=generator)
    epsilon, rho_a, rho_b = 0.3, 0.4, 0.8
    out = sinkhorn(cost, 2 * a, b, epsilon=epsilon, num_iters=1000, marginal_penalty=(rho_a, rho_b))
    plan = plan_of(cost, out, epsilon).requires_grad_()
    value = (plan * cost).sum() + epsilon * kl(plan, 2 * a[:, None] * b)
    value = value + rho_a * kl(plan.sum(1), 2 * a) + rho_b * kl(plan.sum(0), b)
    (grad,) = torch.autograd.grad(value, plan)
    close(grad, torch.zeros(4, 5), atol=1e-12)


def test_a_large_penalty_is_nearly_a_constraint(generator):
    problem = random_problem(6, 5, generator=generator)
    options = {"epsilon": 0.2, "num_iters": 400}
    loose, tight = sinkhorn(*problem, marginal_penalty=1e6, **options), sinkhorn(*problem, **options)
    close(loose.regularized_cost, tight.regularized_cost, rtol=1e-5)
    close(loose.transport_cost, tight.transport_cost, rtol=1e-5)


@pytest.mark.parametrize("penalty", [1.0, (0.2, 3.0)])
def test_penalties_against_pot(penalty, generator):
    ot = pytest.importorskip("ot")
    cost, a, b = random_problem(7, 5, generator=generator)
    a, epsilon = 1.5 * a, 0.1
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a.numpy(), b.numpy(), cost.numpy(), epsilon, penalty, reg_type="kl", numItermax=20000, stopThr=1e-15
    )
    out = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=3000, marginal_penalty=penalty)
    torch.testing.assert_close(plan_of(cost, out, epsilon), torch.from_numpy(plan), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_penalties_against_geomloss(p, generator):
    """reach^p is the penalty; geomloss writes the term of the masses as epsilon / 2 on each side: equal for mass 1."""
    geomloss = pytest.importorskip("geomloss")
    x, y = torch.rand(8, 2, generator=generator, dtype=F64), torch.rand(9, 2, generator=generator, dtype=F64)
    a, b = (torch.rand(n, generator=generator, dtype=F64) for n in (8, 9))
    a, b, blur, reach = a / a.sum(), b / b.sum(), 0.3, 0.7
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=p, blur=blur, reach=reach, debias=False, scaling=0.999, backend="tensorized"
    )
    expected = loss(a, x, b, y)
    cost = torch.cdist(x, y) if p == 1 else torch.cdist(x, y).square() / 2
    out = sinkhorn(cost, a, b, epsilon=blur**p, num_iters=1000, marginal_penalty=reach**p)
    close(out.regularized_cost, expected, rtol=1e-4)


def test_batch_against_pot(generator):
    batch = pytest.importorskip("ot.batch")
    cost, a, b = random_problem(7, 5, batch=(3,), generator=generator)
    solved = batch.solve_batch(cost, reg=0.1, a=a, b=b, max_iter=5000, tol=1e-12)
    out = sinkhorn(cost, a, b, epsilon=0.1, num_iters=5000, tol=1e-12)
    torch.testing.assert_close(plan_of(cost, out, 0.1), solved.plan, rtol=1e-6, atol=1e-9)


def test_what_a_penalty_does_to_mass_that_cannot_be_served():
    """Its row is given up at the price penalty * mass, which is met: no marginal error. A zero mass costs nothing."""
    cost = torch.tensor([[0.4, INF], [INF, INF], [0.3, 0.2]], dtype=F64)
    a, b = torch.tensor([0.5, 0.25, 0.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    leaves = [tensor.requires_grad_() for tensor in (cost, a, b)]
    rho, epsilon = 0.7, 0.1
    options = {"epsilon": epsilon, "num_iters": 300, "marginal_penalty": rho}
    for gradient in ("envelope", "unroll", "implicit"):
        out = sinkhorn(*leaves, gradient=gradient, **options)
        assert out.f[1] == -INF and out.f[2] == -INF and out.g[1] == -INF
        assert out.marginal_error < 1e-13
        served = sinkhorn(cost[:1, :1].detach(), a[:1].detach(), b[:1].detach(), **options)
        # the mass that is not sent adds its price, and epsilon a_1 sum(b) of KL(P | a b^T)
        close(out.regularized_cost.detach(), served.regularized_cost + 0.25 * rho + epsilon * 0.25)
        close(out.transport_cost.detach(), served.transport_cost)
        grad_cost, grad_a, grad_b = torch.autograd.grad(out.regularized_cost, leaves)
        close(grad_a[1], rho + epsilon * 1.0)
        assert grad_a[2] == 0 and grad_b[1] == 0 and (grad_cost[1:] == 0).all() and (grad_cost[:, 1] == 0).all()


@pytest.mark.parametrize("update_first", ["a", "b"])
def test_a_warm_start_continues(update_first, generator):
    problem = random_problem(6, 5, batch=(2,), zeros=True, infinite=True, generator=generator)
    options = {"epsilon": 0.1, "update_first": update_first, "marginal_penalty": (None, 0.5)}
    first = sinkhorn(*problem, num_iters=3, **options)
    second = sinkhorn(*problem, num_iters=4, initial_potentials=(first.f, first.g), **options)
    whole = sinkhorn(*problem, num_iters=7, **options)
    for actual, expected in zip(second[:5], whole[:5], strict=True):
        assert torch.equal(actual, expected)
    assert second.num_iters.tolist() == [4, 4]
    needed = (None, first.g) if update_first == "a" else (first.f, None)  # the other one is overwritten
    assert torch.equal(sinkhorn(*problem, num_iters=4, initial_potentials=needed, **options).f, second.f)


def test_what_a_warm_start_cannot_say_is_zero():
    """Not finite where there is mass: 0; finite where there is none: -inf."""
    cost = torch.tensor([[0.1, 0.2], [0.4, 0.3], [0.2, 0.2]], dtype=F64)
    a, b = torch.tensor([0.5, 0.0, 0.5], dtype=F64), torch.tensor([0.4, 0.6], dtype=F64)
    strange = torch.tensor([-INF, 0.3, float("nan")], dtype=F64), torch.tensor([INF, 0.2], dtype=F64)
    plain = torch.tensor([0.0, 0.0, 0.0], dtype=F64), torch.tensor([0.0, 0.2], dtype=F64)
    for update_first in ("a", "b"):
        options = {"epsilon": 0.1, "num_iters": 2, "update_first": update_first}
        actual, expected = (sinkhorn(cost, a, b, initial_potentials=start, **options) for start in (strange, plain))
        assert torch.equal(actual.f, expected.f) and torch.equal(actual.g, expected.g)
        assert actual.f[1] == -INF


@pytest.mark.parametrize("given", ["a", "b", "both"])
@pytest.mark.parametrize("gradient", ["unroll", "envelope", "last_step", "implicit"])
def test_shared_cost_is_a_loop(gradient, given, generator):
    cost, a, b = random_problem(5, 4, batch=(3,), zeros=True, generator=generator)
    cost = cost[0].requires_grad_()
    marginals = [a if given != "b" else None, b if given != "a" else None]
    options = {"epsilon": 0.2, "num_iters": 50, "tol": 1e-6, "gradient": gradient}
    out = sinkhorn(cost, *marginals, **options)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    (grad,) = torch.autograd.grad((weights * out.regularized_cost).sum(), cost)
    total = 0
    for k in range(3):
        one = sinkhorn(cost, *(None if w is None else w[k] for w in marginals), **options)
        for actual, expected in zip(out, one, strict=True):
            torch.testing.assert_close(actual[k], expected)
        total = total + weights[k] * one.regularized_cost
    torch.testing.assert_close(grad, torch.autograd.grad(total, cost)[0])
