"""The options through the public function, for every backend: against the reference, and what is composed of calls."""

import math

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.functional._sinkhorn_options import COVERED, GRADIENTS, OUTPUTS
from otkd_fast.testing import assert_close, backends, random_problem

ALL = backends("sinkhorn")
COMPILED = backends("sinkhorn", compiled_only=True)
DTYPES = (torch.float64, torch.float32)
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))
OPTIONS = {
    "tol": {"num_iters": 50, "tol": 1e-2},
    "penalty": {"num_iters": 8, "marginal_penalty": 0.4},
    "one penalty": {"num_iters": 8, "marginal_penalty": (None, 0.2)},
    "all": {"num_iters": 50, "tol": 1e-2, "marginal_penalty": (0.7, 0.2), "update_first": "b"},
}
CONVERGED = {
    "relaxation": {"num_iters": 60, "relaxation": 1.3},
    "auto": {"num_iters": 45, "relaxation": "auto"},
    "auto and tol": {"num_iters": 500, "relaxation": "auto", "tol": 1e-4, "update_first": "b"},
}
CASES = [(gradient, name) for gradient in GRADIENTS for name in OPTIONS] + [
    (gradient, name) for gradient in ("envelope", "detach", "implicit") for name in CONVERGED
]


def values_and_gradients(problem, weights, solve, gradient, **options):
    tensors = [tensor.clone() for tensor in problem]
    wanted = tensors[:1] if gradient == "detach" else tensors
    for leaf in wanted:
        leaf.requires_grad_()
    result = solve(*tensors, gradient=gradient, **options)
    covered = (COVERED[gradient],) if gradient in COVERED else OUTPUTS
    total = 0
    for name in covered:
        value = getattr(result, name)
        total = total + (weights[name].to(value.dtype) * torch.where(value.isfinite(), value, 0)).sum()
    return result, torch.autograd.grad(total, wanted, materialize_grads=True)


def compare(problem, dtype, backend, gradient, generator, **options):
    problem = problem.to(dtype)
    *batch, n, m = problem.cost.shape
    sizes = zip(OUTPUTS, (batch, batch, (*batch, n), (*batch, m)), strict=True)
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in sizes}
    exact = dict(options)
    if "initial_potentials" in options:
        exact["initial_potentials"] = [p if p is None else p.double() for p in options["initial_potentials"]]
    expected, grads = values_and_gradients(problem.to(torch.float64), weights, reference.sinkhorn, gradient, **exact)
    actual, found = values_and_gradients(problem, weights, otkd_fast.sinkhorn, gradient, backend=backend, **options)
    assert torch.equal(actual.num_iters, expected.num_iters)
    unit = max(float(problem.cost[problem.cost.isfinite()].max()), options["epsilon"])
    for name, quantity in QUANTITIES.items():
        scale = unit if quantity == "potential" else None
        assert_close(getattr(actual, name), getattr(expected, name), "sinkhorn", quantity, scale=scale, context=name)
    assert_close(actual.marginal_error, expected.marginal_error, "sinkhorn", "marginal_error", scale=1.0)
    for value, want, least in zip(found, grads, (1e-3, unit, unit), strict=False):
        assert_close(value, want, "sinkhorn", "gradient", scale=max(float(want.abs().max()), least))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient, name", CASES)
@pytest.mark.parametrize("backend", COMPILED)
def test_against_the_reference(backend, gradient, name, dtype, generator):
    options = {"epsilon": 0.1} | (OPTIONS | CONVERGED)[name]
    problem = random_problem(13, 9, batch=(3,), zeros=True, generator=generator)
    if name in ("penalty", "all"):
        problem = problem._replace(a=1.5 * problem.a)
    compare(problem, dtype, backend, gradient, generator, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("backend", COMPILED)
def test_warm_start_against_the_reference(backend, gradient, dtype, generator):
    problem = random_problem(9, 7, batch=(2,), zeros=True, infinite=True, generator=generator)
    f, g = (torch.randn(2, n, generator=generator).to(dtype) for n in (9, 7))
    f[0, 3], g[1, 2] = -torch.inf, torch.nan
    for start, update_first in (
        ((f, g), "a"),
        ((None, g), "a"),
        ((f, None), "b"),
        ((f, None), "a"),
        ((None, None), "b"),
    ):
        options = {"epsilon": 0.2, "num_iters": 4, "update_first": update_first, "initial_potentials": start}
        compare(problem, dtype, backend, gradient, generator, **options)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_a_warm_start_continues(backend, dtype, generator):
    problem = random_problem(6, 5, batch=(2,), generator=generator).to(dtype)
    options = {"epsilon": 0.3, "backend": backend}
    first = otkd_fast.sinkhorn(*problem, num_iters=3, **options)
    second = otkd_fast.sinkhorn(*problem, num_iters=4, initial_potentials=(first.f, first.g), **options)
    whole = otkd_fast.sinkhorn(*problem, num_iters=7, **options)
    torch.testing.assert_close(second.plan(), whole.plan())
    assert second.num_iters.tolist() == [4, 4]
    one = otkd_fast.sinkhorn(*problem, num_iters=4, initial_potentials=(first.f[0], None), update_first="b", **options)
    assert one.f.shape == (2, 6)  # shared by the batch


@pytest.mark.parametrize("backend", ALL)
def test_each_problem_stops_by_itself(backend, generator):
    cost, a, b = random_problem(7, 5, batch=(2, 3), generator=generator)
    cost = cost * torch.tensor([0.1, 1.0, 50.0], dtype=torch.float64)[:, None, None]
    options = {"epsilon": 0.1, "num_iters": 40, "backend": backend}
    result = otkd_fast.sinkhorn(cost, a, b, tol=1e-4, **options)
    assert result.num_iters.dtype == torch.int64 and result.num_iters.shape == (2, 3)
    assert (result.marginal_error <= 1e-4).eq(result.num_iters < 40).all() and (result.num_iters[:, 2] == 40).all()
    for k in range(2):
        for j in range(3):
            alone = otkd_fast.sinkhorn(
                cost[k, j], a[k, j], b[k, j], **options | {"num_iters": int(result.num_iters[k, j])}
            )
            torch.testing.assert_close(result.f[k, j], alone.f, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["unroll", "last_step", "implicit"])
@pytest.mark.parametrize("backend", ALL)
def test_schedule_is_a_warm_start(backend, gradient, generator):
    """Stages hand on f - epsilon log a; the start is a constant for the gradient."""
    cost, a, b = random_problem(6, 5, batch=(2,), zeros=True, generator=generator)
    f = g = None
    last = 0.05
    for (epsilon, num_iters), following in (((1.0, 2), 0.3), ((0.3, 1), last)):
        start = (f, g)
        stage = otkd_fast.sinkhorn(
            cost, a, b, epsilon=epsilon, num_iters=num_iters, initial_potentials=start, backend=backend
        )
        f, g = (p + (following - epsilon) * torch.where(w > 0, w, 1).log() for p, w in ((stage.f, a), (stage.g, b)))
    options = {"epsilon": last, "num_iters": 3, "gradient": gradient, "backend": backend}
    found = []
    for start in ({"epsilon_schedule": [(1.0, 2), 0.3]}, {"initial_potentials": (f, g)}):
        leaves = [tensor.clone().requires_grad_() for tensor in (cost, a, b)]
        result = otkd_fast.sinkhorn(*leaves, **start, **options)
        found.append((result.plan(), *torch.autograd.grad(result.transport_cost.sum(), leaves)))
        assert result.num_iters.tolist() == [3, 3]
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ALL)
def test_schedule_saves_iterations(backend, generator):
    """Points on a line, a small epsilon, masses that differ much."""
    x, y = torch.rand(40, 1, generator=generator), torch.rand(40, 1, generator=generator)
    cost = otkd_fast.cost_matrix(x, y, metric="sqeuclidean").double()
    a, b = ((4 * torch.randn(40, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(2))
    options = {"epsilon": 2e-3, "num_iters": 4000, "tol": 1e-3, "gradient": "envelope", "backend": backend}
    cold = otkd_fast.sinkhorn(cost, a, b, **options)
    warm = otkd_fast.sinkhorn(cost, a, b, epsilon_schedule=[0.5**k for k in range(9)], **options)
    assert warm.marginal_error <= 1e-3 and warm.num_iters < 0.8 * cold.num_iters
    one = otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=2, epsilon_schedule=[(0.4, 1), (0.2, 1)], backend=backend)
    two = otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=2, epsilon_schedule=(0.4, 0.2), backend=backend)
    assert torch.equal(one.f, two.f)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("given", ["a", "b", "both", "a and one b", "two axes"])
@pytest.mark.parametrize("backend", ALL)
def test_shared_cost(backend, given, gradient, generator):
    """A cost (n, m) with batches of marginals is the cost expanded; its gradient is the sum."""
    batch = (2, 3) if given == "two axes" else (3,)
    cost, a, b = random_problem(6, 5, batch=batch, zeros=True, generator=generator)
    cost = cost[(0,) * len(batch)]
    a, b = None if given == "b" else a, None if given == "a" else b[0] if given == "a and one b" else b
    start = (None, torch.randn(*batch, 5, generator=generator, dtype=torch.float64))
    options = {
        "epsilon": 0.2,
        "num_iters": 30,
        "tol": 1e-3,
        "initial_potentials": start,
        "marginal_penalty": (1.0, None),
    }
    options |= {"gradient": gradient, "backend": backend}
    weights = torch.randn(batch, generator=generator, dtype=torch.float64)
    found = []
    for expanded in (cost, cost.expand(*batch, 6, 5)):
        marginals = [None if w is None else w.clone().requires_grad_(gradient != "detach") for w in (a, b)]
        leaf = expanded.clone().requires_grad_()
        result = otkd_fast.sinkhorn(leaf, *marginals, **options)
        assert result.f.shape == (*batch, 6) and result.plan().shape == (*batch, 6, 5)
        value = getattr(result, COVERED.get(gradient, "transport_cost"))
        wanted = [leaf] + [w for w in marginals if w is not None and w.requires_grad]
        grads = torch.autograd.grad((weights * value).sum(), wanted, materialize_grads=True)
        grad = grads[0] if expanded is cost else grads[0].sum(tuple(range(len(batch))))
        found.append([*(getattr(result, name) for name in (*OUTPUTS, "marginal_error", "num_iters")), grad, *grads[1:]])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ALL)
def test_shared_cost_among_transforms(backend, generator):
    cost, a, b = random_problem(4, 5, batch=(3,), generator=generator)
    cost, logits = cost[0], a.log()

    def loss(cost, logits):
        result = otkd_fast.sinkhorn(cost, logits.softmax(-1), b, epsilon=0.3, num_iters=3, backend=backend)
        return (result.transport_cost**2).sum()

    leaves = [tensor.clone().requires_grad_() for tensor in (cost, logits)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(cost, logits), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)
    costs, many = torch.stack([cost, 2 * cost]), torch.stack([logits, -logits])
    values, grads = torch.func.vmap(torch.func.grad_and_value(loss, (0, 1)))(costs, many)[::-1]
    for k in range(2):
        leaves = [tensor[k].clone().requires_grad_() for tensor in (costs, many)]
        value = loss(*leaves)
        torch.testing.assert_close(values[k], value.detach())
        torch.testing.assert_close([g[k] for g in grads], list(torch.autograd.grad(value, leaves)))
    leaves = [tensor.clone().requires_grad_() for tensor in (cost, logits)]
    value = otkd_fast.sinkhorn(
        leaves[0], leaves[1].softmax(-1), epsilon=0.3, num_iters=3, backend=backend
    ).transport_cost
    rows = [torch.autograd.grad(v, leaves, retain_graph=True) for v in value]
    together = torch.autograd.grad(value, leaves, torch.eye(3, dtype=torch.float64), is_grads_batched=True)
    for k in range(3):
        torch.testing.assert_close([t[k] for t in together], list(rows[k]))


@pytest.mark.parametrize("backend", ALL)
def test_options_among_transforms(backend, generator):
    """vmap and compile with a stop, penalties, a warm start and a schedule."""
    cost, a, b = random_problem(4, 5, batch=(3,), generator=generator)
    start = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def loss(cost, a, g):
        result = otkd_fast.sinkhorn(
            cost, a, b[0], epsilon=0.3, num_iters=4, tol=1e-2, marginal_penalty=(0.5, None),
            initial_potentials=(None, g), epsilon_schedule=[1.0], backend=backend,
        )  # fmt: skip
        return result.transport_cost.sum(), result.num_iters

    expected, count = loss(cost, a, start)
    values, counts = torch.func.vmap(loss)(cost, a, start)
    torch.testing.assert_close(values.sum(), expected)
    assert torch.equal(count, counts)
    leaves = cost.clone().requires_grad_(), a.clone().requires_grad_()
    (wanted, _), torch_compiled = loss(*leaves, start), torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    actual, _ = torch_compiled(*leaves, start)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(wanted, leaves))
    grads = torch.func.vmap(torch.func.grad(lambda *t: loss(*t)[0], (0, 1)))(cost, a, start)
    torch.testing.assert_close(grads, torch.autograd.grad(loss(*leaves, start)[0], leaves))


@pytest.mark.parametrize("backend", ALL)
def test_totals_may_differ_under_a_penalty(backend, generator):
    cost, a, b = random_problem(5, 4, generator=generator)
    options = {"epsilon": 0.1, "num_iters": 300, "backend": backend}
    result = otkd_fast.sinkhorn(cost, 3 * a, b, marginal_penalty=(0.5, None), **options)
    torch.testing.assert_close(result.plan().sum(0), b)
    assert result.marginal_error < 1e-10
    with pytest.raises(ValueError, match="^b: expected total mass 3"):
        otkd_fast.sinkhorn(cost, 3 * a, b, marginal_penalty=(None, math.inf), **options)


@pytest.mark.parametrize("backend", ALL)
def test_plan_apply(backend, generator):
    problem = random_problem(5, 4, batch=(2,), zeros=True, infinite=True, generator=generator)
    cost = problem.cost.clone().requires_grad_()
    result = otkd_fast.sinkhorn(cost, *problem[1:], epsilon=0.2, num_iters=5, backend=backend)
    plan = result.plan()
    for transpose, size in ((False, 4), (True, 5)):
        matrix = plan.mT if transpose else plan
        for k in ((), (3,), (0,)):
            v = torch.randn(2, size, *k, generator=generator, dtype=torch.float64, requires_grad=True)
            actual = result.plan_apply(v, transpose)
            expected = matrix @ v if k else (matrix @ v.unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(actual, expected)
            wanted = torch.autograd.grad(expected.sum(), (v, cost), retain_graph=True)
            torch.testing.assert_close(torch.autograd.grad(actual.sum(), (v, cost), retain_graph=True), wanted)
    for shape in ((4,), (2, 5), (3, 4), (2, 4, 1, 1)):
        with pytest.raises(ValueError, match=r"^v: expected shape \(2, 4\)"):
            result.plan_apply(torch.ones(shape, dtype=torch.float64))
    with pytest.raises(TypeError, match="^v: expected a tensor"):
        result.plan_apply([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("backend", ALL)
def test_plan_apply_keeps_its_precision(backend, generator):
    problem = random_problem(5, 4, generator=generator).to(torch.bfloat16)
    result = otkd_fast.sinkhorn(*problem, epsilon=0.2, num_iters=5, backend=backend)
    v = torch.randn(4, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = result.plan_apply(v)
    torch.testing.assert_close(actual, result.plan() @ v, rtol=1e-6, atol=1e-7)
    assert result.plan_apply(v.half()).dtype == torch.float32
