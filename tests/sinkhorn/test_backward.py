"""Gradients of every mode: against finite differences, against the float64 reference, and what must raise."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import assert_close, backends, instruction_sets, random_problem, use_instruction_set

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129)
SHAPES = [(n, SIZES[(5 * i + 3) % len(SIZES)]) for i, n in enumerate(SIZES)]
OUTPUTS = ("transport_cost", "regularized_cost", "f", "g")
COVERED = {"unroll": OUTPUTS, "envelope": ("regularized_cost",), "detach": ("transport_cost",)}
COMPILED = backends("sinkhorn", compiled_only=True)
ALL = backends("sinkhorn")


def leaves_of(problem, gradient):
    """Cost and marginals as leaves; with 'detach' only the cost asks for a gradient."""
    cost, *marginals = (None if tensor is None else tensor.clone() for tensor in problem)
    wanted = [cost] + ([] if gradient == "detach" else [weights for weights in marginals if weights is not None])
    for leaf in wanted:
        leaf.requires_grad_()
    return (cost, *marginals), wanted


def gradients(problem, weights, solve, gradient, **options):
    """Gradients of sum_o <weights_o, output_o>, over the outputs that the mode covers."""
    tensors, wanted = leaves_of(problem, gradient)
    outputs = solve(*tensors, gradient=gradient, **options)
    total = 0
    for name in COVERED[gradient]:
        value = getattr(outputs, name)
        value = torch.where(value.isfinite(), value, 0)
        total = total + (weights[name].to(value.dtype) * value).sum()
    return torch.autograd.grad(total, wanted)


def check(problem, dtype, backend, generator, gradient, only=None, **options):
    problem = problem.to(dtype)
    *batch, n, m = problem.cost.shape
    shapes = {"transport_cost": batch, "regularized_cost": batch, "f": [*batch, n], "g": [*batch, m]}
    weights = {
        name: torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * (only in (None, name))
        for name, shape in shapes.items()
    }
    actual = gradients(problem, weights, otkd_fast.sinkhorn, gradient, backend=backend, **options)
    expected = gradients(problem.to(torch.float64), weights, reference.sinkhorn, gradient, **options)
    context = f"{backend} {gradient} {only} {tuple(problem.cost.shape)} {options}"
    # gradients may be 0 but for rounding; their unit is a mass of 1e-3 for the cost, epsilon for the marginals
    for value, want, unit in zip(actual, expected, (1e-3, options["epsilon"], options["epsilon"]), strict=False):
        assert_close(value, want, "sinkhorn", "gradient", scale=max(float(want.abs().max()), unit), context=context)


@pytest.mark.parametrize("update_first", ["a", "b"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("backend", ALL)
def test_unroll_is_the_derivative_of_the_loop(backend, output, update_first, generator):
    """Finite differences of the fixed loop, far from convergence, for cost and marginals."""
    problem = random_problem(4, 3, batch=(2,), generator=generator)
    tensors, _ = leaves_of(problem, "unroll")

    def solve(*tensors):
        result = otkd_fast.sinkhorn(*tensors, epsilon=0.3, num_iters=3, update_first=update_first, backend=backend)
        return getattr(result, output)

    assert torch.autograd.gradcheck(solve, tensors)


@pytest.mark.parametrize("update_first", ["a", "b"])
@pytest.mark.parametrize("backend", ALL)
def test_envelope_is_the_derivative_of_the_converged_value(backend, update_first, generator):
    """Finite differences of the converged regularized cost, along directions that keep the total mass."""
    cost, a, b = problem = random_problem(4, 5, generator=generator)
    options = {"epsilon": 0.3, "num_iters": 400, "update_first": update_first, "backend": backend}
    tensors, wanted = leaves_of(problem, "envelope")
    value = otkd_fast.sinkhorn(*tensors, gradient="envelope", **options).regularized_cost
    grads = torch.autograd.grad(value, wanted)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in problem]
    directions[1] -= directions[1].mean()
    directions[2] -= directions[2].mean()
    step = 1e-5
    for k, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
        values = []
        for sign in (1, -1):
            moved = list(problem)
            moved[k] = moved[k] + sign * step * direction
            values.append(otkd_fast.sinkhorn(*moved, **options).regularized_cost)
        difference = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((grad * direction).sum(), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", ALL)
def test_envelope_formulas(backend, generator):
    """P for the cost; f - epsilon (log a + 1) + epsilon sum(b) for a, and the same for b; at any iteration."""
    epsilon = 0.3
    problem = random_problem(5, 4, batch=(2,), zeros=True, generator=generator)
    tensors, wanted = leaves_of(problem, "envelope")
    result = otkd_fast.sinkhorn(*tensors, epsilon=epsilon, num_iters=2, gradient="envelope", backend=backend)
    grad_cost, grad_a, grad_b = torch.autograd.grad(result.regularized_cost.sum(), wanted)
    torch.testing.assert_close(grad_cost, result.plan().detach())
    for grad, weights, potential in ((grad_a, problem.a, result.f), (grad_b, problem.b, result.g)):
        formula = potential.detach() - epsilon * weights.log()  # the total of the other marginal is 1
        torch.testing.assert_close(grad, torch.where(weights > 0, formula, 0))


@pytest.mark.parametrize("backend", ALL)
def test_modes_are_not_interchangeable(backend, generator):
    """'unroll' agrees with 'envelope', for the value, and with 'implicit', at convergence only."""
    problem = random_problem(30, 40, generator=generator)

    def gradient_of(output, gradient, num_iters):
        cost = problem.cost.clone().requires_grad_()
        options = {"epsilon": 0.05, "num_iters": num_iters, "gradient": gradient, "backend": backend}
        return torch.autograd.grad(getattr(otkd_fast.sinkhorn(cost, *problem[1:], **options), output), cost)[0]

    for num_iters, apart in ((5, 1e-2), (300, None)):
        unroll, detach = (gradient_of("transport_cost", mode, num_iters) for mode in ("unroll", "detach"))
        assert (unroll - detach).norm() > 0.1 * unroll.norm()
        last_step, implicit = (gradient_of("transport_cost", mode, num_iters) for mode in ("last_step", "implicit"))
        assert (unroll - last_step).norm() > 0.05 * unroll.norm()
        if apart is None:
            torch.testing.assert_close(unroll, implicit, rtol=1e-6, atol=1e-10)
        else:
            assert (unroll - implicit).norm() > 1e-3 * unroll.norm()
        unroll, envelope = (gradient_of("regularized_cost", mode, num_iters) for mode in ("unroll", "envelope"))
        if apart is None:
            torch.testing.assert_close(unroll, envelope, rtol=1e-6, atol=1e-12)
        else:
            assert (unroll - envelope).norm() > apart * unroll.norm()


@pytest.mark.parametrize("backend", ALL)
def test_detach_is_the_plan(backend, generator):
    problem = random_problem(5, 4, batch=(2,), zeros=True, infinite=True, generator=generator)
    tensors, wanted = leaves_of(problem, "detach")
    result = otkd_fast.sinkhorn(*tensors, epsilon=0.3, num_iters=2, gradient="detach", backend=backend)
    weights = torch.tensor([2.0, -1.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad((weights * result.transport_cost).sum(), wanted)
    torch.testing.assert_close(grad, weights[:, None, None] * result.plan().detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gradient", COVERED)
@pytest.mark.parametrize("backend", COMPILED)
def test_every_tail(backend, gradient, dtype, generator):
    for n, m in SHAPES:
        problem = random_problem(n, m, zeros=True, generator=generator)
        for update_first in ("a", "b"):
            options = {"epsilon": 0.1, "num_iters": 5, "update_first": update_first}
            check(problem, dtype, backend, generator, gradient, **options)
            check(problem._replace(a=None, b=None), dtype, backend, generator, gradient, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon", [10.0, 0.1, 0.03, 0.01, 0.001])
@pytest.mark.parametrize("gradient", COVERED)
@pytest.mark.parametrize("backend", COMPILED)
def test_every_epsilon(backend, gradient, epsilon, dtype, generator):
    for num_iters in (1, 12):
        for zeros, infinite in ((False, False), (True, True)):
            problem = random_problem(13, 9, batch=(2,), zeros=zeros, infinite=infinite, generator=generator)
            check(problem, dtype, backend, generator, gradient, epsilon=epsilon, num_iters=num_iters)


@pytest.mark.parametrize("only", OUTPUTS)
@pytest.mark.parametrize("backend", COMPILED)
def test_one_output_at_a_time(backend, only, generator):
    problem = random_problem(9, 17, batch=(2,), zeros=True, generator=generator)
    for dtype in (torch.float64, torch.float32):
        for update_first in ("a", "b"):
            options = {"epsilon": 0.2, "num_iters": 4, "update_first": update_first}
            check(problem, dtype, backend, generator, "unroll", only, **options)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("backend", COMPILED)
def test_instruction_sets_and_threads(backend, instruction_set, threads, generator):
    torch.set_num_threads(threads)
    with use_instruction_set(instruction_set):
        for gradient in COVERED:
            for n, m, epsilon in ((3, 5, 0.1), (17, 9, 0.1), (64, 70, 0.05), (17, 9, 0.002)):
                problem = random_problem(n, m, batch=(3,), zeros=True, infinite=True, generator=generator)
                for dtype in (torch.float64, torch.float32):
                    check(problem, dtype, backend, generator, gradient, epsilon=epsilon, num_iters=6)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("gradient", ["unroll", "envelope"])
@pytest.mark.parametrize("backend", COMPILED)
def test_gradients_asked_for_one_by_one(backend, gradient, needs, generator):
    problem = random_problem(6, 9, batch=(2,), generator=generator)
    found = []
    for solve in (lambda *t, **o: otkd_fast.sinkhorn(*t, backend=backend, **o), reference.sinkhorn):
        tensors = [tensor.clone().requires_grad_(bool(need)) for tensor, need in zip(problem, needs, strict=True)]
        value = solve(*tensors, epsilon=0.2, num_iters=5, gradient=gradient).regularized_cost.sum()
        found.append(torch.autograd.grad(value, [tensor for tensor in tensors if tensor.requires_grad]))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, "sinkhorn", "gradient")


@pytest.mark.parametrize("backend", ALL)
def test_shared_marginal_gets_the_sum(backend, generator):
    cost, a, _ = random_problem(5, 7, batch=(3,), generator=generator)
    shared = a[0].clone().requires_grad_()
    options = {"epsilon": 0.2, "num_iters": 5, "backend": backend}
    (actual,) = torch.autograd.grad(otkd_fast.sinkhorn(cost, shared, **options).transport_cost.sum(), shared)
    copies = [a[0].clone().requires_grad_() for _ in range(3)]
    total = sum(otkd_fast.sinkhorn(cost[k], copies[k], **options).transport_cost for k in range(3))
    torch.testing.assert_close(actual, sum(torch.autograd.grad(total, copies)))


@pytest.mark.parametrize("backend", ALL)
def test_expanded_and_transposed_gradients(backend, generator):
    """Gradients of stride 0 and in other memory orders arrive as they would contiguous."""
    problem = random_problem(5, 4, batch=(2,), generator=generator)

    def run(weights_scalar, weights_f, solve):
        tensors, wanted = leaves_of(problem, "unroll")
        out = solve(*tensors, epsilon=0.3, num_iters=3)
        return torch.autograd.grad((out.transport_cost, out.f), wanted, (weights_scalar, weights_f))

    strange = torch.ones(()).double().expand(2), torch.randn(5, 2, generator=generator, dtype=torch.float64).mT
    expected = run(*(weights.contiguous() for weights in strange), reference.sinkhorn)
    actual = run(*strange, lambda *t, **o: otkd_fast.sinkhorn(*t, backend=backend, **o))
    for value, want in zip(actual, expected, strict=True):
        assert_close(value, want, "sinkhorn", "gradient")


@pytest.mark.parametrize("backend", ALL)
def test_plan_is_differentiable(backend, generator):
    problem = random_problem(4, 3, zeros=True, generator=generator)
    weights = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    found = []
    for name in (backend, "reference"):
        tensors, wanted = leaves_of(problem, "unroll")
        plan = otkd_fast.sinkhorn(*tensors, epsilon=0.3, num_iters=4, backend=name).plan()
        found.append(torch.autograd.grad((weights * plan).sum(), wanted))
    for value, want in zip(*found, strict=True):
        assert value.isfinite().all() and want.abs().max() > 1e-3
        assert_close(value, want, "sinkhorn", "gradient")
    cost = problem.cost.clone().requires_grad_()
    marginals = problem.a, problem.b

    def plan_of(cost):
        return otkd_fast.sinkhorn(cost, *marginals, epsilon=0.3, num_iters=4, backend=backend).plan()

    assert torch.autograd.gradcheck(plan_of, (cost,))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("gradient", ["envelope", "detach"])
@pytest.mark.parametrize("backend", ALL)
def test_uncovered_output_raises(backend, gradient, output, generator):
    cost = random_problem(4, 3, generator=generator).cost.requires_grad_()
    result = otkd_fast.sinkhorn(cost, epsilon=0.3, num_iters=3, gradient=gradient, backend=backend)
    value = getattr(result, output).sum()
    assert value.requires_grad
    if output in COVERED[gradient]:
        value.backward()
        assert cost.grad.abs().sum() > 0
        return
    covered = COVERED[gradient][0]
    with pytest.raises(RuntimeError, match=f"gradient='{gradient}' differentiates {covered} only.*{output}"):
        (value + getattr(result, covered)).backward()
    with pytest.raises(RuntimeError, match=f"gradient='{gradient}'"):
        result.plan().sum().backward()


@pytest.mark.parametrize("backend", ALL)
def test_marginal_error_and_num_iters_have_no_gradient(backend, generator):
    cost = random_problem(4, 3, generator=generator).cost.requires_grad_()
    result = otkd_fast.sinkhorn(cost, epsilon=0.3, num_iters=3, backend=backend)
    assert not result.marginal_error.requires_grad and not result.num_iters.requires_grad


@pytest.mark.parametrize("backend", ALL)
def test_detach_refuses_marginals_with_gradient(backend, generator):
    cost, a, b = random_problem(4, 3, generator=generator)
    for name, marginals in (("a", (a.requires_grad_(), b)), ("b", (a.detach(), b.clone().requires_grad_()))):
        with pytest.raises(ValueError, match=f"^{name}: .*gradient='detach'.*requires_grad=True"):
            otkd_fast.sinkhorn(cost, *marginals, epsilon=0.3, num_iters=3, gradient="detach", backend=backend)


@pytest.mark.parametrize("gradient", COVERED)
@pytest.mark.parametrize("backend", ALL)
def test_no_nan_where_nothing_moves(backend, gradient):
    """Zero mass, infinite cost, a row that cannot be served: 0 there, the reference's gradient elsewhere."""
    inf = torch.inf
    cost = torch.tensor([[0.1, inf, 0.3], [inf, inf, 0.9], [0.2, 0.4, 0.5], [0.3, 0.1, inf]])
    a, b = torch.tensor([0.3, 0.3, 0.4, 0.0]), torch.tensor([0.6, 0.4, 0.0])
    for dtype in (torch.float64, torch.float32):
        for epsilon in (0.2, 0.002):
            found = []
            for kind, solve in ((dtype, otkd_fast.sinkhorn), (torch.float64, reference.sinkhorn)):
                tensors = [tensor.to(dtype).to(kind) for tensor in (cost, a, b)]
                wanted = tensors[:1] if gradient == "detach" else tensors
                for leaf in wanted:
                    leaf.requires_grad_()
                options = {"backend": backend} if solve is otkd_fast.sinkhorn else {}
                result = solve(*tensors, epsilon=epsilon, num_iters=4, gradient=gradient, **options)
                total = sum(getattr(result, name)[getattr(result, name).isfinite()].sum() for name in COVERED[gradient])
                found.append(torch.autograd.grad(total, wanted))
            for actual, expected in zip(*found, strict=True):
                assert expected.isfinite().all()
                assert_close(actual, expected, "sinkhorn", "gradient", context=f"{epsilon}")
            assert (found[0][0][[1, 3]] == 0).all() and (found[0][0][cost.isinf()] == 0).all()
            if gradient != "detach":
                assert found[0][1][3] == 0 and found[0][2][2] == 0
