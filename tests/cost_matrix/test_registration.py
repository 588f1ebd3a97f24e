"""The op among PyTorch's transforms: opcheck, torch.compile, torch.func, vmap, autocast, second derivatives."""

import pytest
import torch
from torch.func import grad, jacrev, vmap

import otkd_fast
from otkd_fast.testing import backends, random_rows

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
COMPILED = backends("cost_matrix", compiled_only=True)
ALL = backends("cost_matrix")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def layouts(generator):
    """(x, y): contiguous, transposed, sliced, and y shared by the batch."""
    x, y = random_rows(2, 4, 5, generator=generator), random_rows(2, 3, 5, generator=generator)
    yield x, y
    yield x.mT.contiguous().mT, y.movedim(0, -1).contiguous().movedim(-1, 0)
    yield random_rows(2, 9, 8, generator=generator)[:, ::2, 1:6], random_rows(4, 3, 7, generator=generator)[::2, :, 2:]
    yield x, y[0]


@pytest.mark.skipif(not COMPILED, reason="no compiled backend")
@pytest.mark.parametrize("metric", METRICS)
def test_opcheck(metric, generator):
    ops = torch.ops.otkd_fast
    for x, y in layouts(generator):
        for dtype in (torch.float64, torch.float32):
            x, y = x.to(dtype), y.to(dtype)
            torch.library.opcheck(ops.cost_matrix_fwd.default, (x, y, metric, 0.0, 2.0), test_utils=CHECKS)
            cost = ops.cost_matrix_fwd(x, y, metric, 0.0, 2.0)
            weights = torch.randn_like(cost.mT).mT
            for needs in ((True, True), (False, True)):
                arguments = (x, y, cost, weights, metric, 0.0, 2.0, *needs)
                torch.library.opcheck(ops.cost_matrix_bwd.default, arguments, test_utils=CHECKS)


def loss(backend, metric="l2", temperature=0.9):
    def function(x, y):
        cost = otkd_fast.cost_matrix(x, y, metric=metric, softmax_temperature=temperature, backend=backend)
        return (cost**2).sum()

    return function


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_compile(backend, metric, generator):
    x, y = (random_rows(2, n, 6, generator=generator).requires_grad_() for n in (5, 4))
    expected = torch.autograd.grad(loss(backend, metric)(x, y), (x, y))
    compiled = torch.compile(loss(backend, metric), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), (x, y)), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, y), loss(backend, metric)(x, y))


@pytest.mark.parametrize("backend", ALL)
def test_compile_with_other_sizes_and_temperatures(backend, generator):
    def function(x, y, temperature):
        return otkd_fast.cost_matrix(x, y, metric="l1", softmax_temperature=temperature, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n, temperature in ((4, 1.0), (5, 1.5), (7, 2.5), (9, 0.3)):
        x, y = (random_rows(n, 6, generator=generator).requires_grad_() for _ in range(2))
        actual, expected = (f(x, y, temperature) for f in (compiled, function))
        torch.testing.assert_close(actual, expected)
        weights = torch.randn_like(expected)
        grads = (torch.autograd.grad(cost, (x, y), weights) for cost in (actual, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ALL)
def test_compile_inductor(backend, generator):
    x, y = (random_rows(2, n, 6, generator=generator).requires_grad_() for n in (5, 4))
    expected = torch.autograd.grad(loss(backend)(x, y), (x, y))
    compiled = torch.compile(loss(backend), fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), (x, y)), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_func_grad_and_jacrev(backend, metric, generator):
    x, y = (random_rows(n, 4, generator=generator) for n in (3, 2))
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    function = loss(backend, metric)
    torch.testing.assert_close(grad(function, (0, 1))(x, y), torch.autograd.grad(function(*leaves), leaves))

    def cost(x):
        return otkd_fast.cost_matrix(x, y, metric=metric, backend=backend)

    expected = torch.autograd.functional.jacobian(cost, x)
    torch.testing.assert_close(jacrev(cost)(x), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(cost, x, vectorize=True), expected)


# for x and for y: the axis that is mapped, and whether the operand keeps a batch axis of its own
@pytest.mark.parametrize("y_dim, y_batch", [(0, True), (2, True), (0, False), (None, True), (None, False)])
@pytest.mark.parametrize("x_dim, x_batch", [(0, True), (1, True), (0, False), (None, True), (None, False)])
@pytest.mark.parametrize("backend", ALL)
def test_vmap(backend, x_dim, x_batch, y_dim, y_batch, generator):
    if x_dim is None and y_dim is None:
        pytest.skip("nothing is mapped")
    mapped, batch = 3, 2

    def operand(rows, dim, own_batch):
        rows = random_rows(*([batch] if own_batch else []), rows, 4, generator=generator)
        if dim is None:
            return rows
        rows = torch.stack([rows * (1 + k) + 0.1 * k for k in range(mapped)])
        return rows.movedim(0, dim)

    dims = x_dim, y_dim
    x, y = operand(5, x_dim, x_batch), operand(4, y_dim, y_batch)

    def cost(x, y):
        return otkd_fast.cost_matrix(x, y, metric="l2", backend=backend)

    def entry(rows, dim, k):
        return (rows if dim is None else rows.select(dim, k)).clone()

    values = vmap(cost, in_dims=dims)(x, y)
    grads = vmap(grad(lambda x, y: (cost(x, y) ** 3).sum(), (0, 1)), in_dims=dims)(x, y)
    for k in range(mapped):
        leaves = entry(x, dims[0], k).requires_grad_(), entry(y, dims[1], k).requires_grad_()
        expected = cost(*leaves)
        torch.testing.assert_close(values[k], expected.detach())
        expected = torch.autograd.grad((expected**3).sum(), leaves)
        torch.testing.assert_close((grads[0][k], grads[1][k]), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_autocast_does_not_lower_the_precision(backend, metric, generator):
    x, y = (random_rows(n, 40, generator=generator).float() for n in (5, 4))
    expected = otkd_fast.cost_matrix(x, y, metric=metric, softmax_temperature=2.0, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = otkd_fast.cost_matrix(x, y, metric=metric, softmax_temperature=2.0, backend=backend)
        half = otkd_fast.cost_matrix(x.bfloat16(), y.bfloat16(), metric=metric, backend=backend)
    assert actual.dtype == torch.float32 and half.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", COMPILED)
def test_second_derivative_of_compiled_backend_raises(backend, generator):
    x, y = (random_rows(n, 4, generator=generator).requires_grad_() for n in (3, 2))
    (first,) = torch.autograd.grad(loss(backend)(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative.*backend='reference'"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="second derivative.*backend='reference'"):
        grad(lambda x: grad(loss(backend))(x, y.detach()).sum())(x.detach())


def test_second_derivative_of_reference(generator):
    x, y = (random_rows(n, 4, generator=generator).requires_grad_() for n in (3, 2))
    assert torch.autograd.gradgradcheck(loss("reference"), (x, y))


@pytest.mark.parametrize("backend", COMPILED)
def test_forward_mode_raises(backend, generator):
    x, y = (random_rows(n, 4, generator=generator) for n in (3, 2))
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: loss(backend)(x, y), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        loss(backend)(torch.autograd.forward_ad.make_dual(x, x), y)


@pytest.mark.parametrize("backend", ALL)
def test_compiles_with_one_tensor_twice(backend, generator):
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)

    def loss(x):
        return (otkd_fast.cost_matrix(x, x, metric="l2", backend=backend) * torch.arange(5.0, dtype=x.dtype)).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(actual, expected)
