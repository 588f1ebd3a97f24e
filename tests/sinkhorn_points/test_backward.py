"""Gradients by points and masses, every mode, against autograd through the reference on the cost matrix."""

import pytest
import torch

import otkd_fast
from otkd_fast.functional._sinkhorn_options import GRADIENTS
from otkd_fast.testing import backends, instruction_sets, use_instruction_set

from .cases import DTYPES, METRICS, check_gradients, epsilon_of, random_points

ALL = backends("sinkhorn_points")
COMPILED = backends("sinkhorn_points", compiled_only=True)
STORAGES = ("stored", "streamed")
RANGES = {"float scalings": 0.1, "double scalings": 0.008, "log domain": 0.0008}
CONVERGED = {"implicit": 60}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", ALL)
def test_every_metric(backend, storage, gradient, dtype, generator):
    for k, metric in enumerate(METRICS):
        points = random_points(9, 7, 5, batch=(2,), zeros=True, generator=generator)
        options = {"epsilon": epsilon_of(points, metric, 0.2), "num_iters": CONVERGED.get(gradient, 4)}
        options |= {"update_first": "ab"[k % 2], "storage": storage, "backend": backend}
        check_gradients(points, metric, dtype, gradient, generator, **options)


@pytest.mark.parametrize("ratio", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("storage", STORAGES)
def test_ranges_and_instruction_sets(storage, instruction_set, ratio, generator):
    """Every way of solving; several blocks of rows, more features than the backward takes at a time."""
    torch.set_num_threads(2)
    with use_instruction_set(instruction_set):
        for k, gradient in enumerate(GRADIENTS[:4]):
            metric = METRICS[(k + len(storage)) % 4]
            points = random_points(70, 35, 140, generator=generator)
            options = {"epsilon": epsilon_of(points, metric, ratio), "num_iters": 3, "storage": storage}
            for dtype in DTYPES:
                check_gradients(points, metric, dtype, gradient, generator, backend="cpu", **options)


@pytest.mark.parametrize("gradient", ["unroll", "envelope"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", COMPILED)
def test_threads_share_one_problem(backend, storage, gradient, generator):
    points = random_points(530, 517, 3, generator=generator)
    for metric in ("sqeuclidean", "cosine"):
        options = {"epsilon": epsilon_of(points, metric, 0.1), "num_iters": 2, "storage": storage, "backend": backend}
        for threads in (1, 3):
            torch.set_num_threads(threads)
            check_gradients(points, metric, torch.float32, gradient, generator, **options)


@pytest.mark.parametrize("options", [{"tol": 1e-2}, {"marginal_penalty": (0.5, 0.8)}], ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("backend", COMPILED)
def test_options(backend, gradient, options, generator):
    points = random_points(9, 7, 3, generator=generator)
    if "marginal_penalty" in options:
        points = points._replace(a=1.5 * points.a)
    num_iters = CONVERGED.get(gradient, 8)
    options = options | {"epsilon": epsilon_of(points, "l2", 0.1), "num_iters": num_iters, "backend": backend}
    check_gradients(points, "l2", torch.float64, gradient, generator, **options)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend, metric, storage, generator):
    x, y, a, b = random_points(4, 3, 2, generator=generator)
    inputs = [tensor.requires_grad_() for tensor in (x, y, a.log(), b.log())]

    def outputs(x, y, log_a, log_b):
        result = otkd_fast.sinkhorn_points(
            x, y, log_a.softmax(-1), log_b.softmax(-1), metric=metric, epsilon=0.7, num_iters=3, storage=storage,
            backend=backend,
        )  # fmt: skip
        return result.transport_cost, result.regularized_cost, result.f, result.g

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("backend", ALL)
def test_some_gradients_only(backend, generator):
    """Each operand alone gets what it gets among the others, also where both sides are the same points."""
    points = random_points(6, 6, 3, generator=generator)
    options = {"metric": "l2", "epsilon": 0.5, "num_iters": 4, "backend": backend}

    def loss(tensors):
        return otkd_fast.sinkhorn_points(*tensors, **options).transport_cost

    leaves = [tensor.clone().requires_grad_() for tensor in points]
    expected = torch.autograd.grad(loss(leaves), leaves)
    for k in range(4):
        alone = [leaf if i == k else leaf.detach() for i, leaf in enumerate(leaves)]
        torch.testing.assert_close(torch.autograd.grad(loss(alone), leaves[k])[0], expected[k])
    x = points.x.clone().requires_grad_()
    copies = [points.x.clone().requires_grad_() for _ in range(2)]
    (both,) = torch.autograd.grad(loss((x, x, points.a, points.b)), x)
    parts = torch.autograd.grad(loss((*copies, points.a, points.b)), copies)
    torch.testing.assert_close(both, sum(parts))


@pytest.mark.parametrize("backend", ALL)
def test_shared_points_get_the_sum(backend, generator):
    x, y, a, b = random_points(5, 4, 3, batch=(3,), generator=generator)
    shared = y[0].clone().requires_grad_()
    options = {"metric": "sqeuclidean", "epsilon": 0.5, "num_iters": 4, "backend": backend}
    value = otkd_fast.sinkhorn_points(x, shared, a, b, **options).transport_cost
    (actual,) = torch.autograd.grad(value.sum(), shared)
    expanded = shared.detach().expand(3, 4, 3).clone().requires_grad_()
    value = otkd_fast.sinkhorn_points(x, expanded, a, b, **options).transport_cost
    (expected,) = torch.autograd.grad(value.sum(), expanded)
    torch.testing.assert_close(actual, expected.sum(0))


@pytest.mark.parametrize("gradient, output", [("envelope", "transport_cost"), ("detach", "f")])
@pytest.mark.parametrize("backend", ALL)
def test_uncovered_outputs_raise(backend, gradient, output, generator):
    x, y, _, _ = random_points(4, 3, 2, generator=generator)
    options = {"metric": "l1", "epsilon": 0.5, "num_iters": 2, "gradient": gradient, "backend": backend}
    result = otkd_fast.sinkhorn_points(x.requires_grad_(), y, **options)
    with pytest.raises(RuntimeError, match=f"gradient='{gradient}' differentiates"):
        getattr(result, output).sum().backward()


@pytest.mark.parametrize("backend", COMPILED)
def test_second_derivative_raises(backend, generator):
    x, y, _, _ = random_points(4, 3, 2, generator=generator)
    result = otkd_fast.sinkhorn_points(x.requires_grad_(), y, metric="l1", epsilon=0.5, num_iters=2, backend=backend)
    (first,) = torch.autograd.grad(result.transport_cost, x, create_graph=True)
    with pytest.raises(RuntimeError, match="sinkhorn_points.*second derivative"):
        torch.autograd.grad(first.square().sum(), x)
