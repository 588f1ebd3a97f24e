"""The reference's gradient modes against finite differences of exactly what each claims to differentiate."""

import pytest
import torch

from otkd_fast.reference import sinkhorn
from otkd_fast.testing import block_diagonal_problem, random_problem

F64, INF = torch.float64, torch.inf
OUTPUTS = ("transport_cost", "regularized_cost", "f", "g")
PENALTIES = [None, 0.4, (0.3, None)]


def leaves_of(problem):
    return [tensor.clone().requires_grad_() for tensor in problem]


def plan_of(cost, out, epsilon):
    return ((out.f.unsqueeze(-1) + out.g.unsqueeze(-2) - cost) / epsilon).exp()


def unbalanced(problem, penalty):
    """Totals that differ, where the penalties let them."""
    return problem if penalty is None else problem._replace(a=1.5 * problem.a)


def free_of_gauge(problem, penalty, generator):
    """Directions for cost, a and b; without penalties those of the marginals keep the total."""
    directions = [torch.randn(t.shape, generator=generator, dtype=F64) * (t != 0) for t in problem]
    if penalty is None:
        for k in (1, 2):
            mass = (problem[k] > 0).double()
            directions[k] -= mass * directions[k].sum(-1, keepdim=True) / mass.sum(-1, keepdim=True)
    return directions


def difference(function, problem, k, direction, step=1e-5):
    """Central difference of `function` along `direction` of its argument k."""
    moved = [[t + sign * step * direction if i == k else t for i, t in enumerate(problem)] for sign in (1, -1)]
    return (function(*moved[0]) - function(*moved[1])) / (2 * step)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("tol", [None, 0.05])
def test_unroll(tol, penalty, output, generator):
    """The loop that ran; the iterations that `tol` counts are a constant. Warm starts are constants too."""
    problem = unbalanced(random_problem(4, 3, batch=(2,), generator=generator), penalty)
    start = torch.randn(2, 4, generator=generator, dtype=F64), torch.randn(2, 3, generator=generator, dtype=F64)
    options = {"epsilon": 0.3, "num_iters": 8, "tol": tol, "marginal_penalty": penalty, "initial_potentials": start}

    def solve(*tensors):
        return getattr(sinkhorn(*tensors, **options), output)

    assert torch.autograd.gradcheck(solve, leaves_of(problem))
    assert tol is None or sinkhorn(*problem, **options).num_iters.max() < 8


def test_unroll_has_second_derivatives(generator):
    problem = random_problem(3, 3, generator=generator)
    options = {"epsilon": 0.3, "num_iters": 6, "tol": 0.05, "marginal_penalty": (0.5, None)}
    assert torch.autograd.gradgradcheck(lambda *t: sinkhorn(*t, **options).transport_cost, leaves_of(problem))


@pytest.mark.parametrize("update_first", ["a", "b"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_last_step_is_one_iteration_from_the_potentials_before_it(tol, penalty, update_first, generator):
    """Differentiated exactly as that one unrolled iteration, whose gradient is checked above."""
    problem = unbalanced(random_problem(5, 4, batch=(3,), zeros=True, infinite=True, generator=generator), penalty)
    problem = problem._replace(cost=problem.cost * torch.tensor([1.0, 2.0, 4.0], dtype=F64)[:, None, None])
    options = {"epsilon": 0.2, "update_first": update_first, "marginal_penalty": penalty}
    leaves, others = leaves_of(problem), leaves_of(problem)
    out = sinkhorn(*leaves, num_iters=30, tol=tol, gradient="last_step", **options)
    assert (out.num_iters > 1).all() and (tol is None or (out.num_iters < 30).any())
    before = [
        sinkhorn(*(t[k] for t in problem), num_iters=count - 1, **options)
        for k, count in enumerate(out.num_iters.tolist())
    ]
    start = torch.stack([one.f for one in before]), torch.stack([one.g for one in before])
    one = sinkhorn(*others, num_iters=1, initial_potentials=start, **options)
    weights = [torch.randn(value.shape, generator=generator, dtype=F64) for value in out[:4]]
    for name, weight in zip(OUTPUTS, weights, strict=True):
        actual, expected = (getattr(outputs, name) for outputs in (out, one))
        assert torch.equal(actual, expected)
        served = actual.isfinite()
        grads = (
            torch.autograd.grad(
                (weight * torch.where(served, value, 0)).sum(), tensors, retain_graph=True, materialize_grads=True
            )
            for value, tensors in ((actual, leaves), (expected, others))
        )
        for grad, want in zip(*grads, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("update_first", ["a", "b"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_envelope_is_the_derivative_of_the_converged_value(penalty, update_first, generator):
    problem = unbalanced(random_problem(4, 5, zeros=True, generator=generator), penalty)
    options = {"epsilon": 0.3, "num_iters": 300, "update_first": update_first, "marginal_penalty": penalty}
    leaves = leaves_of(problem)
    grads = torch.autograd.grad(sinkhorn(*leaves, gradient="envelope", **options).regularized_cost, leaves)
    for k, direction in enumerate(free_of_gauge(problem, penalty, generator)):
        expected = difference(lambda *t: sinkhorn(*t, **options).regularized_cost, problem, k, direction)
        torch.testing.assert_close((grads[k] * direction).sum(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("penalty", [0.4, (0.3, 2.0), (None, 0.5)])
def test_envelope_under_penalties(penalty, generator):
    """P for the cost; rho (1 - e) - epsilon e + epsilon sum(b), e = exp(-f' / rho), for a; at any iteration."""
    epsilon = 0.3
    problem = unbalanced(random_problem(5, 4, zeros=True, generator=generator), penalty)
    leaves = leaves_of(problem)
    out = sinkhorn(*leaves, epsilon=epsilon, num_iters=2, gradient="envelope", marginal_penalty=penalty)
    grads = torch.autograd.grad(out.regularized_cost, leaves)
    torch.testing.assert_close(grads[0], plan_of(problem.cost, out, epsilon).detach())
    rhos = penalty if isinstance(penalty, tuple) else (penalty, penalty)
    sides = zip(grads[1:], rhos, problem[1:], (out.f, out.g), (problem.b, problem.a), strict=True)
    for grad, rho, weights, potential, other in sides:
        shift = potential.detach() - epsilon * weights.log()
        e = 1.0 if rho is None else (-shift / rho).exp()
        price = shift if rho is None else rho * (1 - e)
        torch.testing.assert_close(grad, torch.where(weights > 0, price - epsilon * e + epsilon * other.sum(), 0))


@pytest.mark.parametrize("update_first", ["a", "b"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_implicit_is_the_derivative_of_the_converged_solution(penalty, update_first, generator):
    """Every output and the plan; potentials without penalties up to the constant that moves from f to g."""
    problem = unbalanced(random_problem(5, 4, zeros=True, generator=generator), penalty)
    epsilon = 0.3
    options = {"epsilon": epsilon, "num_iters": 3000, "update_first": update_first, "marginal_penalty": penalty}
    rows, columns = problem.a > 0, problem.b > 0

    def outputs(gradient, *tensors):
        out = sinkhorn(*tensors, gradient=gradient, tol=1e-15, **options)
        f, g = out.f[rows], out.g[columns]
        if penalty is None:
            shift = (f.sum() - g.sum()) / (len(f) + len(g))
            f, g = f - shift, g + shift
        return out.transport_cost, out.regularized_cost, f, g, plan_of(tensors[0], out, epsilon)

    directions = free_of_gauge(problem, penalty, generator)
    for index in range(5):
        leaves = leaves_of(problem)
        value = outputs("implicit", *leaves)[index]
        weight = torch.randn(value.shape, generator=generator, dtype=F64)
        grads = torch.autograd.grad((weight * value).sum(), leaves)

        def solved(*tensors, index=index, weight=weight):
            return (weight * outputs("detach", *tensors)[index]).sum()

        for k, direction in enumerate(directions):
            expected = difference(solved, problem, k, direction)
            torch.testing.assert_close((grads[k] * direction).sum(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("penalty", [None, (0.4, 3.0)])
def test_implicit_solves_its_linear_system(penalty, generator):
    """The documented system and its pseudo-inverse, formed densely, at potentials that have not converged."""
    n, m, epsilon = 6, 5, 0.1
    problem = unbalanced(random_problem(n, m, zeros=True, infinite=True, generator=generator), penalty)
    leaves = leaves_of(problem)
    out = sinkhorn(*leaves, epsilon=epsilon, num_iters=4, gradient="implicit", marginal_penalty=penalty)
    u, v = (torch.randn(size, generator=generator, dtype=F64) for size in (n, m))
    loss = (u * torch.where(out.f.isfinite(), out.f, 0)).sum() + (v * torch.where(out.g.isfinite(), out.g, 0)).sum()
    grads = torch.autograd.grad(loss, leaves)
    plan = plan_of(problem.cost, out, epsilon).detach()
    damping = [1.0, 1.0] if penalty is None else [rho / (rho + epsilon) for rho in penalty]
    diagonals = plan.sum(1) / damping[0], plan.sum(0) / damping[1]
    system = torch.cat([torch.cat([diagonals[0].diag(), plan], 1), torch.cat([plan.T, diagonals[1].diag()], 1)])
    right = torch.cat([u * (diagonals[0] > 0), v * (diagonals[1] > 0)])
    w, x = (torch.linalg.pinv(system, hermitian=True, rtol=1e-11) @ right).split([n, m])
    expected = (
        plan * (w[:, None] + x),
        *(
            torch.where(weights > 0, epsilon * diagonal / weights * part, 0)
            for weights, diagonal, part in ((problem.a, diagonals[0], w), (problem.b, diagonals[1], x))
        ),
    )
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-9 * float(want.abs().max()))


def test_implicit_has_one_gauge_for_each_block(generator):
    """Potentials of separate problems in one cost: as if each were solved alone."""
    whole, blocks = block_diagonal_problem([(3, 4), (1, 1), (4, 3)], generator=generator)
    options = {"epsilon": 0.2, "num_iters": 500, "gradient": "implicit"}
    leaf = whole.cost.clone().requires_grad_()
    out = sinkhorn(leaf, whole.a, whole.b, **options)
    u, v = torch.randn(8, generator=generator, dtype=F64), torch.randn(8, generator=generator, dtype=F64)
    (grad,) = torch.autograd.grad((u * out.f).sum() + (v * out.g).sum(), leaf)
    row = column = 0
    for cost, a, b in blocks:
        n, m = cost.shape
        one = cost.clone().requires_grad_()
        part = sinkhorn(one, a, b, **options)
        loss = (u[row : row + n] * part.f).sum() + (v[column : column + m] * part.g).sum()
        block = grad[row : row + n, column : column + m]
        torch.testing.assert_close(block, torch.autograd.grad(loss, one)[0], rtol=1e-8, atol=1e-11)
        row, column = row + n, column + m
    assert (grad[whole.cost.isinf()] == 0).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon", [1.0, 0.05, 1e-3, 1e-4])
def test_implicit_is_finite_at_any_range(epsilon, dtype, generator):
    """Also where the plan is numerically a permutation, and its support falls apart."""
    problem = random_problem(9, 9, batch=(2,), zeros=True, generator=generator)
    for cost, a, b in ((problem.cost, None, None), problem):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (cost, a, b) if tensor is not None]
        out = sinkhorn(*leaves, epsilon=epsilon, num_iters=30, gradient="implicit")
        grads = torch.autograd.grad((out.transport_cost + 0.3 * out.regularized_cost).sum(), leaves)
        assert all(grad.isfinite().all() and grad.dtype == dtype for grad in grads)
        assert grads[0].abs().max() <= 1 + 1 / epsilon


@pytest.mark.parametrize("gradient", ["envelope", "detach", "last_step", "implicit"])
def test_no_second_derivative(gradient, generator):
    cost = random_problem(4, 3, generator=generator).cost.requires_grad_()
    out = sinkhorn(cost, epsilon=0.3, num_iters=20, gradient=gradient)
    value = out.regularized_cost if gradient == "envelope" else out.transport_cost
    (first,) = torch.autograd.grad(value, cost, create_graph=True)
    with pytest.raises(RuntimeError, match=f"gradient='{gradient}' has no second derivative"):
        (first**2).sum().backward()
