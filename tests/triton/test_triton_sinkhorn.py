"""The Triton kernels of the Sinkhorn family under the interpreter, against the float64 reference. Tiny problems."""

import math

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.ops import _library  # noqa: E402
from otkd_fast.testing import assert_close, random_problem  # noqa: E402
from otkd_fast.testing.guarded import guarded  # noqa: E402

OUTPUTS = ("transport_cost", "regularized_cost", "f", "g")
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))
COVERED = {"envelope": ("regularized_cost",), "detach": ("transport_cost",)}


@pytest.fixture(params=["on chip", "in tiles"])
def form(request, monkeypatch):
    """Both ways of solving, the second with tiny blocks, so that small problems have several and a tail."""
    from otkd_fast.triton_kernels import _sinkhorn_large, sinkhorn, sinkhorn_shared

    if request.param == "in tiles":
        monkeypatch.setattr(sinkhorn, "is_small", lambda *_: False)
        monkeypatch.setattr(sinkhorn_shared, "is_small", lambda *_: False)
        monkeypatch.setattr(_sinkhorn_large, "block_of", lambda *_: (2, 4))
    return request.param


def solved(problem, weights, solve, gradient, **options):
    """Outputs, and the gradients of their weighted sum over what the mode covers."""
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in problem]
    if gradient == "detach":
        leaves[1:] = [None if leaf is None else leaf.detach() for leaf in leaves[1:]]
    outputs = solve(*leaves, gradient=gradient, **options)
    total = 0
    for name in COVERED.get(gradient, OUTPUTS):
        value = getattr(outputs, name)
        total = total + (weights[name].to(value.dtype) * torch.where(value.isfinite(), value, 0)).sum()
    return outputs, torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None and leaf.requires_grad])


def check(problem, dtype, gradient, generator, **options):
    """Values and gradients of backend 'triton' against the reference in float64 for the same, rounded, problem."""
    problem = problem.to(dtype)
    batch = next(w.shape[:-1] for w in (problem.a, problem.cost[..., 0]) if w is not None)
    n, m = problem.cost.shape[-2:]
    sizes = zip(OUTPUTS, (batch, batch, (*batch, n), (*batch, m)), strict=True)
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in sizes}
    exact = dict(options)
    if "initial_potentials" in options:
        exact["initial_potentials"] = tuple(p if p is None else p.double() for p in options["initial_potentials"])
    expected, wanted = solved(problem.to(torch.float64), weights, reference.sinkhorn, gradient, **exact)
    with guarded():
        actual, found = solved(problem, weights, otkd_fast.sinkhorn, gradient, backend="triton", **options)
    context = f"{tuple(problem.cost.shape)} {dtype} {gradient} {options}"
    unit = max(float(problem.cost[problem.cost.isfinite()].max()), options["epsilon"])
    for name, quantity in QUANTITIES.items():
        scale = unit if quantity == "potential" else None
        pair = getattr(actual, name), getattr(expected, name)
        assert_close(*pair, "sinkhorn", quantity, scale=scale, context=f"{context} {name}")
    errors = actual.marginal_error, expected.marginal_error
    assert_close(*errors, "sinkhorn", "marginal_error", scale=1.0, context=context)
    assert torch.equal(actual.num_iters, expected.num_iters)
    for value, want, least in zip(found, wanted, (1e-3, unit, unit), strict=False):
        assert_close(value, want, "sinkhorn", "gradient", scale=max(float(want.abs().max()), least), context=context)
    return actual


@pytest.mark.parametrize("n, m", [(1, 1), (1, 5), (4, 4), (5, 2)])
def test_sizes(form, n, m, generator):
    """Below, at and beyond powers of two and blocks; without marginals too."""
    problem = random_problem(n, m, zeros=True, generator=generator)
    update_first = "ab"[n % 2]
    check(problem, torch.float32, "unroll", generator, epsilon=0.1, num_iters=2, update_first=update_first)
    if n == 5:
        check(problem._replace(a=None, b=None), torch.float64, "unroll", generator, epsilon=0.1, num_iters=2)


@pytest.mark.parametrize(
    "dtype, epsilon", [(torch.float64, 0.1), (torch.float32, 10.0), (torch.float32, 0.002)], ids=str
)
def test_ranges_of_exponents(form, dtype, epsilon, generator):
    """Scalings and the log domain; zero masses and forbidden pairs."""
    problem = random_problem(4, 5, batch=(2,), zeros=True, infinite=True, generator=generator)
    check(problem, dtype, "unroll", generator, epsilon=epsilon, num_iters=2, update_first="b")


@pytest.mark.parametrize("gradient", ["envelope", "detach", "last_step"])
def test_modes(form, gradient, generator):
    problem = random_problem(3, 5, batch=(2,), zeros=True, generator=generator)
    check(problem, torch.float32, gradient, generator, epsilon=0.1, num_iters=2)
    check(problem, torch.float64, gradient, generator, epsilon=0.002, num_iters=1, update_first="b")


OPTIONS = {
    "tol": ("unroll", {"num_iters": 5, "tol": 5e-2}),
    "penalties": ("unroll", {"num_iters": 2, "marginal_penalty": (0.5, None), "update_first": "b"}),
    "relaxation": ("envelope", {"num_iters": 2, "relaxation": 1.3}),
    "auto": ("envelope", {"num_iters": 12, "relaxation": "auto"}),
    "penalised, implicit": ("implicit", {"num_iters": 3, "marginal_penalty": 0.5}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(form, name, generator):
    gradient, options = OPTIONS[name]
    problem = random_problem(3, 4, batch=(2,) if "tol" in options else (), generator=generator)
    check(problem, torch.float64, gradient, generator, epsilon=0.2, **options)


def test_initial_potentials(form, generator):
    problem = random_problem(3, 4, generator=generator)
    start = torch.randn(4, generator=generator, dtype=torch.float64)
    start[1] = math.nan
    options = {"epsilon": 0.2, "num_iters": 2, "initial_potentials": (None, start)}
    check(problem, torch.float64, "unroll", generator, **options)


@pytest.mark.parametrize("update_first", ["a", "b"])
def test_a_row_that_cannot_be_served(form, update_first, generator):
    cost, a, b = random_problem(3, 4, generator=generator)
    cost[1] = torch.inf
    result = otkd_fast.sinkhorn(cost, a, b, epsilon=0.2, num_iters=2, update_first=update_first, backend="triton")
    expected = reference.sinkhorn(cost, a, b, epsilon=0.2, num_iters=2, update_first=update_first)
    assert result.f[1] == -torch.inf
    torch.testing.assert_close(result.marginal_error, expected.marginal_error)
    torch.testing.assert_close(result.f, expected.f)


@pytest.mark.parametrize("gradient", ["unroll", "detach"])
def test_shared_cost(form, gradient, generator):
    problem = random_problem(3, 5, batch=(3,), zeros=True, generator=generator)
    problem = problem._replace(cost=problem.cost[0])
    check(problem, torch.float32, gradient, generator, epsilon=0.1, num_iters=2)
    check(problem._replace(a=None), torch.float64, gradient, generator, epsilon=0.01, num_iters=2, update_first="b")


def test_no_problems():
    cost = torch.zeros(0, 3, 4, requires_grad=True)
    result = otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=2, backend="triton")
    assert result.f.shape == (0, 3)
    (grad,) = torch.autograd.grad(result.transport_cost.sum(), cost)
    assert grad.shape == (0, 3, 4)


def test_layouts_and_repeatability(form, generator):
    """Transposed and expanded costs, a gradient of stride 0; the same bits twice."""
    cost = torch.rand(4, 3, generator=generator).mT.expand(2, 3, 4)
    results = []
    for given in (cost, cost.contiguous(), cost):
        leaf = given.detach().requires_grad_()
        result = otkd_fast.sinkhorn(leaf, epsilon=0.1, num_iters=2, backend="triton")
        results.append((result.f, result.g, *torch.autograd.grad(result.transport_cost.sum(), leaf)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("op", ["sinkhorn", "sinkhorn_shared"])
def test_registration(op, generator):
    problem = random_problem(3, 4, batch=(2,), generator=generator).to(torch.float32)
    cost = problem.cost if op == "sinkhorn" else problem.cost[0]
    forward = _library.operators(f"{op}_fwd")["triton"]
    backward = _library.operators(f"{op}_bwd")["triton"]
    options = (0.1, 2, 0.0, 1.0, math.inf, math.inf, True)
    tensors = (cost, problem.a, problem.b, None, None)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, (*tensors, *options, 2), test_utils=utilities)
    history = forward(*tensors, *options, 2)[6]
    incoming = (torch.ones(2), None, None, None)
    last = (0.1, 2, math.inf, math.inf, True, "unroll", True, True, False)
    torch.library.opcheck(backward, (*tensors, history, *incoming, *last), test_utils=utilities)


def test_compiled(generator):
    """One graph, the same numbers."""
    cost = torch.rand(3, 4, generator=generator).requires_grad_()

    def loss(cost):
        return otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=2, backend="triton").transport_cost

    (expected,) = torch.autograd.grad(loss(cost), cost)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(cost), cost)[0], expected, rtol=0, atol=0)
