"""sinkhorn_points among PyTorch's transforms: opcheck, torch.compile, torch.func, vmap, autocast, forward mode."""

import pytest
import torch
from torch.func import grad, vmap

import otkd_fast
from otkd_fast.functional._sinkhorn_options import COVERED, GRADIENTS, KEEP, OUTPUTS
from otkd_fast.testing import backends

from .cases import METRICS, random_points

COMPILED = backends("sinkhorn_points", compiled_only=True)
ALL = backends("sinkhorn_points")
SLOW_ON_REFERENCE = [*COMPILED, pytest.param("reference", marks=pytest.mark.slow)]  # dynamo unrolls its loops
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = [("unroll", "transport_cost"), ("unroll", "f"), ("envelope", "regularized_cost"), ("detach", "transport_cost"),
         ("last_step", "g"), ("implicit", "transport_cost")]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def layouts(generator):
    """Points contiguous, transposed, shared by a batch, without masses."""
    points = random_points(4, 5, 3, batch=(2,), generator=generator)
    yield points
    yield points._replace(x=points.x.mT.contiguous().mT, y=points.y[0].expand(2, 5, 3), b=None)
    yield points._replace(x=points.x[0], y=points.y[0], a=None, b=points.b[0])


@pytest.mark.skipif(not COMPILED, reason="no compiled backend")
@pytest.mark.parametrize("update_a_first", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_opcheck(gradient, update_a_first, generator):
    ops = torch.ops.otkd_fast
    relaxation, penalties = 1.2 if gradient in ("envelope", "detach", "implicit") else 1.0, (0.5, torch.inf)
    for k, points in enumerate(layouts(generator)):
        points = points.to((torch.float64, torch.float32)[k % 2])
        batch, metric, stored = points.x.shape[:-2], METRICS[k], k % 2 == 0
        start = (None, torch.rand(*batch, 5, generator=generator).to(points.x.dtype) if k % 2 else None)
        for keep in (0, KEEP[gradient]):
            options = (metric, 0.3, 3, 0.05, relaxation, *penalties, update_a_first, keep, stored)
            arguments = (*points, *start, *options)
            torch.library.opcheck(ops.sinkhorn_points_fwd.default, arguments, test_utils=CHECKS)
        outputs = ops.sinkhorn_points_fwd(*arguments)
        grads = [torch.randn_like(output) for output in outputs[:4]]
        if gradient in COVERED:
            grads = [value if name == COVERED[gradient] else None for name, value in zip(OUTPUTS, grads, strict=True)]
        else:
            grads[k] = None  # an output that nobody used
        masses = gradient != "detach"
        needs = (True, k > 0, masses and points.a is not None, masses and points.b is not None)
        options = (metric, 0.3, 3, *penalties, update_a_first, gradient, stored)
        arguments = (*points, *start, outputs[6], *grads, *options, *needs)
        torch.library.opcheck(ops.sinkhorn_points_bwd.default, arguments, test_utils=CHECKS)


@pytest.mark.skipif(not COMPILED, reason="no compiled backend")
@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck_of_the_products(transpose, generator):
    ops = torch.ops.otkd_fast
    for k, (x, y, _, _) in enumerate(layouts(generator)):
        batch = x.shape[:-2]
        f, g = (torch.rand(*batch, size, generator=generator, dtype=x.dtype) for size in (4, 5))
        sizes = (4, 5) if transpose else (5, 4)
        v, out = (torch.rand(*batch, size, 2, generator=generator, dtype=x.dtype) for size in sizes)
        arguments = (x, y, f, g, v, METRICS[k], 0.3, transpose)
        torch.library.opcheck(ops.sinkhorn_points_apply.default, arguments, test_utils=CHECKS)
        arguments = (x, y, f, g, v, out, METRICS[k], 0.3, transpose, True, k > 0)
        torch.library.opcheck(ops.sinkhorn_points_apply_bwd.default, arguments, test_utils=CHECKS)


def loss_of(backend, gradient, output, storage="stored", metric="sqeuclidean"):
    """A function of (x, y, logits of a, logits of b); with 'detach' the logits are not used."""

    def loss(x, y, logits_a, logits_b):
        a, b = (None, None) if gradient == "detach" else (logits_a.softmax(-1), logits_b.softmax(-1))
        result = otkd_fast.sinkhorn_points(
            x, y, a, b, metric=metric, epsilon=0.7, num_iters=4, gradient=gradient, storage=storage, backend=backend
        )
        return (getattr(result, output) ** 2).sum()

    return loss


def inputs_of(generator, batch=(2,)):
    x, y, _, _ = random_points(4, 5, 3, batch=batch, generator=generator)
    logits = (torch.randn(*batch, size, generator=generator, dtype=torch.float64) for size in (4, 5))
    return x, y, *logits


def used(gradient):
    return (0, 1) if gradient == "detach" else (0, 1, 2, 3)


@pytest.mark.parametrize("gradient, output", CASES)
@pytest.mark.parametrize("backend", ALL)
def test_compile(backend, gradient, output, generator):
    storage = "streamed" if output in ("f", "g", "regularized_cost") else "stored"
    loss = loss_of(backend, gradient, output, storage)
    tensors = [tensor.requires_grad_() for tensor in inputs_of(generator)]
    wanted = [tensors[k] for k in used(gradient)]
    expected = loss(*tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = compiled(*tensors)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, wanted), torch.autograd.grad(expected, wanted))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), expected)


@pytest.mark.parametrize("backend", SLOW_ON_REFERENCE)
def test_compile_a_result_its_product_and_the_divergence(backend, generator):
    x, y, _, _ = inputs_of(generator)
    x.requires_grad_()

    def everything(x, y):
        options = {"metric": "l2", "epsilon": 0.7, "num_iters": 4, "backend": backend}
        result = otkd_fast.sinkhorn_points(x, y, **options)
        divergence = otkd_fast.sinkhorn_divergence(x, y, **options)
        return result, result.plan_apply(y).square().sum() + result.plan().square().sum() + divergence.sum()

    expected, value = everything(x, y)
    found, actual = torch.compile(everything, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close((actual, found.f, found.num_iters), (value, expected.f, expected.num_iters))
    torch.testing.assert_close(torch.autograd.grad(actual, x), torch.autograd.grad(value, x))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ALL)
def test_compile_inductor(backend, generator):
    loss, tensors = loss_of(backend, "unroll", "transport_cost"), [t.requires_grad_() for t in inputs_of(generator)]
    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors), expected)


@pytest.mark.parametrize("backend", SLOW_ON_REFERENCE)
def test_compile_with_other_sizes_and_options(backend, generator):
    """Dynamic shapes, floats and ints do not change the answer and do not break the graph."""

    def solve(x, y, epsilon, num_iters):
        options = {"epsilon": epsilon, "num_iters": num_iters, "backend": backend}
        return otkd_fast.sinkhorn_points(x, y, metric="l1", **options).transport_cost

    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    for n, epsilon, num_iters in ((4, 0.3, 3), (5, 0.2, 4), (7, 0.5, 5)):
        x, y, _, _ = random_points(n, 6, 3, batch=(n - 1,), generator=generator)
        x.requires_grad_()
        actual, expected = compiled(x, y, epsilon, num_iters), solve(x, y, epsilon, num_iters)
        torch.testing.assert_close(actual, expected)
        found, wanted = (torch.autograd.grad(value.sum(), x) for value in (actual, expected))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("gradient, output", CASES)
@pytest.mark.parametrize("backend", ALL)
def test_func_grad_and_vmap(backend, gradient, output, generator):
    loss, tensors, argnums = loss_of(backend, gradient, output), inputs_of(generator), used(gradient)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(loss(*leaves), [leaves[k] for k in argnums])
    torch.testing.assert_close(grad(loss, argnums)(*tensors), expected)
    torch.testing.assert_close(vmap(grad(loss, argnums))(*tensors), expected)  # each problem has its own loss
    moved = [tensor.movedim(0, -1) for tensor in tensors]
    torch.testing.assert_close(vmap(grad(loss, argnums), in_dims=-1)(*moved), expected)
    torch.testing.assert_close(grad(lambda *t: vmap(loss)(*t).sum(), argnums)(*tensors), expected)


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (None, 0, None, None), (None, None, 0, 0)])
@pytest.mark.parametrize("backend", ALL)
def test_vmap_over_some(backend, in_dims, generator):
    """What vmap does not map is shared, and gets one gradient for each mapped entry."""
    loss, tensors = loss_of(backend, "unroll", "transport_cost"), inputs_of(generator)
    mapped = [t if dim is None else torch.stack([t, 2 * t, t + 1]) for t, dim in zip(tensors, in_dims, strict=True)]
    grads = vmap(grad(loss, (0, 1, 2, 3)), in_dims=in_dims)(*mapped)
    for k in range(3):
        leaves = [(t if dim is None else t[k]).clone().requires_grad_() for t, dim in zip(mapped, in_dims, strict=True)]
        torch.testing.assert_close(tuple(g[k] for g in grads), torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize("backend", ALL)
def test_autocast_does_not_lower_the_precision(backend, generator):
    points = random_points(9, 8, 6, generator=generator).to(torch.float32)
    options = {"metric": "cosine", "epsilon": 0.05, "num_iters": 10, "backend": backend}
    expected = otkd_fast.sinkhorn_points(*points, **options)
    product = expected.plan_apply(points.y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = otkd_fast.sinkhorn_points(*points, **options)
        assert torch.equal(actual.f, expected.f) and torch.equal(actual.transport_cost, expected.transport_cost)
        assert torch.equal(actual.plan_apply(points.y), product)


@pytest.mark.parametrize("backend", COMPILED)
def test_forward_mode_raises(backend, generator):
    x, y, _, _ = inputs_of(generator)

    def solve(x):
        options = {"metric": "l2", "epsilon": 0.3, "num_iters": 3, "backend": backend}
        return otkd_fast.sinkhorn_points(x, y, **options).transport_cost

    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(solve, (x,), (x,))
