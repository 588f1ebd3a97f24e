"""The op among PyTorch's transforms: opcheck, torch.compile, torch.func, vmap, autocast, second derivatives."""

import pytest
import torch
from torch.func import grad, jacrev, vmap

import otkd_fast
from otkd_fast.functional._sinkhorn_options import COVERED, GRADIENTS, KEEP, OUTPUTS
from otkd_fast.testing import backends, random_problem

CASES = [("unroll", name) for name in OUTPUTS] + [
    ("envelope", "regularized_cost"),
    ("detach", "transport_cost"),
    ("last_step", "transport_cost"),
    ("last_step", "g"),
    ("implicit", "transport_cost"),
]
COMPILED = backends("sinkhorn", compiled_only=True)
ALL = backends("sinkhorn")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def layouts(generator):
    """(cost, a, b): contiguous, transposed, sliced, without marginals, unbatched."""
    cost, a, b = random_problem(4, 5, batch=(2,), generator=generator)
    yield cost, a, b
    yield cost.mT.contiguous().mT, a.mT.contiguous().mT, b.expand(2, 5)
    whole = random_problem(8, 7, batch=(4,), generator=generator).cost
    yield whole[::2, ::2, 1:6], a, None
    yield cost[0], None, b[0]


@pytest.mark.skipif(not COMPILED, reason="no compiled backend")
@pytest.mark.parametrize("update_a_first", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_opcheck(gradient, update_a_first, generator):
    ops = torch.ops.otkd_fast
    tol, relaxation, penalties = 0.05, 1.2 if gradient in ("envelope", "detach", "implicit") else 1.0, (0.5, torch.inf)
    for k, problem in enumerate(layouts(generator)):
        dtype = (torch.float64, torch.float32)[k % 2]
        problem = [None if tensor is None else tensor.to(dtype) for tensor in problem]
        *batch, _, m = problem[0].shape
        start = (None, torch.rand(*batch, m, generator=generator).to(dtype) if k % 2 else None)
        for keep in (0, KEEP[gradient]):
            arguments = (*problem, *start, 0.3, 3, tol, relaxation, *penalties, update_a_first, keep)
            torch.library.opcheck(ops.sinkhorn_fwd.default, arguments, test_utils=CHECKS)
        outputs = ops.sinkhorn_fwd(*arguments)
        grads = [torch.randn_like(output) for output in outputs[:4]]
        if gradient in COVERED:
            grads = [value if name == COVERED[gradient] else None for name, value in zip(OUTPUTS, grads, strict=True)]
        else:
            grads[k] = None  # an output that nobody used
        needs = (True, gradient != "detach" and problem[1] is not None, gradient != "detach" and problem[2] is not None)
        options = (0.3, 3, *penalties, update_a_first, gradient)
        arguments = (*problem, *start, outputs[6], *grads, *options, *needs)
        torch.library.opcheck(ops.sinkhorn_bwd.default, arguments, test_utils=CHECKS)


def loss_of(backend, gradient, output, marginals):
    """A function of (cost, logits of a, logits of b); without marginals or with 'detach' the logits are not used."""

    def loss(cost, logits_a, logits_b):
        a, b = (logits_a.softmax(-1), logits_b.softmax(-1)) if marginals else (None, None)
        result = otkd_fast.sinkhorn(cost, a, b, epsilon=0.3, num_iters=4, gradient=gradient, backend=backend)
        return (getattr(result, output) ** 2).sum()

    return loss


def inputs_of(generator, batch=(2,)):
    cost = random_problem(4, 5, batch=batch, generator=generator).cost
    logits = (torch.randn(*batch, size, generator=generator, dtype=torch.float64) for size in (4, 5))
    return cost, *logits


def used(gradient, marginals):
    return (0, 1, 2) if marginals and gradient != "detach" else (0,)


@pytest.mark.parametrize("marginals", [False, True])
@pytest.mark.parametrize("gradient, output", CASES)
@pytest.mark.parametrize("backend", ALL)
def test_compile(backend, gradient, output, marginals, generator):
    marginals = marginals and gradient != "detach"
    loss = loss_of(backend, gradient, output, marginals)
    tensors = [tensor.requires_grad_() for tensor in inputs_of(generator)]
    wanted = [tensors[k] for k in used(gradient, marginals)]
    expected = loss(*tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = compiled(*tensors)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, wanted), torch.autograd.grad(expected, wanted))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ALL)
def test_compile_inductor(backend, generator):
    loss = loss_of(backend, "unroll", "transport_cost", True)
    tensors = [tensor.requires_grad_() for tensor in inputs_of(generator)]
    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors), expected)


@pytest.mark.parametrize("backend", ALL)
def test_compile_with_other_sizes_and_options(backend, generator):
    """Dynamic shapes, floats and ints do not change the answer and do not break the graph."""

    def solve(cost, epsilon, num_iters):
        return otkd_fast.sinkhorn(cost, epsilon=epsilon, num_iters=num_iters, backend=backend).transport_cost

    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    for n, epsilon, num_iters in ((4, 0.3, 3), (5, 0.2, 4), (7, 0.5, 5), (9, 1.0, 2)):
        cost = random_problem(n, 6, batch=(n - 1,), generator=generator).cost.requires_grad_()
        actual, expected = compiled(cost, epsilon, num_iters), solve(cost, epsilon, num_iters)
        torch.testing.assert_close(actual, expected)
        found, wanted = (torch.autograd.grad(value.sum(), cost) for value in (actual, expected))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("backend", ALL)
def test_compiled_function_may_return_the_result(backend, gradient, generator):
    cost = inputs_of(generator)[0].requires_grad_()

    def solve(cost):
        return otkd_fast.sinkhorn(cost, epsilon=0.3, num_iters=4, gradient=gradient, backend=backend)

    expected, actual = solve(cost), torch.compile(solve, fullgraph=True, backend="aot_eager")(cost)
    assert isinstance(actual, otkd_fast.SinkhornResult)
    torch.testing.assert_close(actual.plan().detach(), expected.plan().detach())
    torch.testing.assert_close(actual.num_iters, expected.num_iters)
    covered = "regularized_cost" if gradient == "envelope" else "transport_cost"
    grads = [torch.autograd.grad(getattr(result, covered).sum(), cost)[0] for result in (actual, expected)]
    torch.testing.assert_close(*grads)
    if gradient in COVERED:
        result = torch.compile(solve, fullgraph=True, backend="aot_eager")(cost)
        with pytest.raises(RuntimeError, match=f"gradient='{gradient}' differentiates {covered} only"):
            (result.f**2).sum().backward()


@pytest.mark.parametrize("gradient, output", CASES)
@pytest.mark.parametrize("backend", ALL)
def test_func_grad_and_vmap(backend, gradient, output, generator):
    marginals = gradient != "detach"
    loss, tensors = loss_of(backend, gradient, output, marginals), inputs_of(generator)
    argnums = used(gradient, marginals)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(loss(*leaves), [leaves[k] for k in argnums])
    torch.testing.assert_close(grad(loss, argnums)(*tensors), expected)
    torch.testing.assert_close(vmap(grad(loss, argnums))(*tensors), expected)  # each problem has its own loss
    moved = [tensor.movedim(0, -1) for tensor in tensors]
    torch.testing.assert_close(vmap(grad(loss, argnums), in_dims=-1)(*moved), expected)
    summed = grad(lambda *t: vmap(loss)(*t).sum(), argnums)(*tensors)
    torch.testing.assert_close(summed, expected)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, None, 0)])
@pytest.mark.parametrize("backend", ALL)
def test_vmap_over_some(backend, in_dims, generator):
    """What vmap does not map is shared, also inside a batch, and gets one gradient for each mapped entry."""
    loss = loss_of(backend, "unroll", "transport_cost", True)
    tensors = inputs_of(generator, batch=(2,))
    mapped = [t if dim is None else torch.stack([t, 2 * t, t + 1]) for t, dim in zip(tensors, in_dims, strict=True)]
    values = vmap(loss, in_dims=in_dims)(*mapped)
    grads = vmap(grad(loss, (0, 1, 2)), in_dims=in_dims)(*mapped)
    for k in range(3):
        leaves = [(t if dim is None else t[k]).clone().requires_grad_() for t, dim in zip(mapped, in_dims, strict=True)]
        value = loss(*leaves)
        torch.testing.assert_close(values[k], value.detach())
        torch.testing.assert_close(tuple(g[k] for g in grads), torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("backend", ALL)
def test_vmap_returns_the_result(backend, generator):
    cost = inputs_of(generator)[0]

    def solve(cost):
        return otkd_fast.sinkhorn(cost, epsilon=0.3, num_iters=4, backend=backend)

    mapped, batched = vmap(solve)(cost), solve(cost)
    torch.testing.assert_close(mapped.plan(), batched.plan())
    torch.testing.assert_close(mapped.marginal_error, batched.marginal_error)
    assert torch.equal(mapped.num_iters, torch.tensor([4, 4]))


@pytest.mark.parametrize("gradient, output", CASES)
@pytest.mark.parametrize("backend", ALL)
def test_jacobians(backend, gradient, output, generator):
    cost = inputs_of(generator)[0]

    def solve(cost):
        return getattr(otkd_fast.sinkhorn(cost, epsilon=0.3, num_iters=3, gradient=gradient, backend=backend), output)

    expected = torch.autograd.functional.jacobian(solve, cost)
    torch.testing.assert_close(jacrev(solve)(cost), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(solve, cost, vectorize=True), expected)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("backend", ALL)
def test_autocast_does_not_lower_the_precision(backend, generator):
    problem = random_problem(9, 8, batch=(2,), generator=generator).to(torch.float32)
    options = {"epsilon": 0.05, "num_iters": 20, "backend": backend}
    expected = otkd_fast.sinkhorn(*problem, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = otkd_fast.sinkhorn(*problem, **options)
        half = otkd_fast.sinkhorn(*problem.to(torch.bfloat16), **options)
        assert actual.plan().dtype == half.plan().dtype == half.transport_cost.dtype == torch.float32
        torch.testing.assert_close(actual.plan(), expected.plan(), rtol=0, atol=0)
    torch.testing.assert_close(actual.transport_cost, expected.transport_cost, rtol=0, atol=0)


@pytest.mark.parametrize("gradient, output", CASES)
@pytest.mark.parametrize("backend", ALL)
def test_second_derivative(backend, gradient, output, generator):
    """There for the reference's unrolled loop, an error everywhere else, never a silent zero."""
    tensors = [tensor.requires_grad_() for tensor in inputs_of(generator)]
    loss = loss_of(backend, gradient, output, gradient != "detach")
    if backend == "reference" and gradient == "unroll":
        assert torch.autograd.gradgradcheck(loss, tensors)
        return
    (first,) = torch.autograd.grad(loss(*tensors), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative.*backend='reference'"):
        torch.autograd.grad((first**2).sum(), tensors[0])
    with pytest.raises(RuntimeError, match="second derivative.*backend='reference'"):
        constants = [tensor.detach() for tensor in tensors]
        grad(lambda cost: (grad(loss)(cost, *constants[1:]) ** 2).sum())(constants[0])


@pytest.mark.parametrize("gradient", ["envelope", "detach"])
@pytest.mark.parametrize("backend", ALL)
def test_second_derivative_of_a_linear_use_raises_too(backend, gradient, generator):
    """Without anything else in the graph the first gradient is a constant: still an error, not a zero."""
    cost = inputs_of(generator)[0].requires_grad_()
    result = otkd_fast.sinkhorn(cost, epsilon=0.3, num_iters=3, gradient=gradient, backend=backend)
    value = result.regularized_cost if gradient == "envelope" else result.transport_cost
    (first,) = torch.autograd.grad(value.sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative.*backend='reference'"):
        (first.sum() + (cost**2).sum()).backward()


@pytest.mark.parametrize("backend", COMPILED)
def test_forward_mode_raises(backend, generator):
    cost = inputs_of(generator)[0]

    def solve(cost):
        return otkd_fast.sinkhorn(cost, epsilon=0.3, num_iters=3, backend=backend).transport_cost

    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(solve, (cost,), (cost,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        solve(torch.autograd.forward_ad.make_dual(cost, cost))


@pytest.mark.parametrize("backend", ALL)
def test_compiles_with_one_marginal_on_both_sides(backend, generator):
    cost = torch.rand(5, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    masses = torch.rand(5, dtype=torch.float64, generator=generator).softmax(-1).requires_grad_()

    def loss(cost, masses):
        return otkd_fast.sinkhorn(cost, masses, masses, epsilon=0.3, num_iters=4, backend=backend).transport_cost

    expected = torch.autograd.grad(loss(cost, masses), (cost, masses))
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(cost, masses), (cost, masses))
    torch.testing.assert_close(actual, expected)
