"""Products with the plan between points, without the plan."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import assert_close, backends, instruction_sets, use_instruction_set

from .cases import DTYPES, METRICS, epsilon_of, random_points

ALL = backends("sinkhorn_points")
COMPILED = backends("sinkhorn_points", compiled_only=True)


def operands(shape, transpose, k, generator, batch=()):
    """v of the plan's columns, or with `transpose` of its rows; k None: a vector."""
    size = shape[0] if transpose else shape[1]
    return torch.randn(*batch, size, *(() if k is None else (k,)), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_against_the_plan(backend, dtype, transpose, generator):
    shapes = (17, 33, 5), (1, 4, 2), (40, 3, 9), (33, 64, 20)
    for metric, (n, m, d), k in zip(METRICS, shapes, (None, 1, 3, 5), strict=True):
        points = random_points(n, m, d, batch=(2,), zeros=True, generator=generator).to(dtype)
        options = {"metric": metric, "epsilon": epsilon_of(points, metric, 0.2), "num_iters": 3, "backend": backend}
        result = otkd_fast.sinkhorn_points(*points, **options)
        v = operands((n, m), transpose, k, generator, (2,)).to(dtype)
        exponent = result.f.double().unsqueeze(-1) + result.g.double().unsqueeze(-2) - points.cost(metric)
        plan = (exponent / options["epsilon"]).exp()
        matrix = v.double() if k else v.double().unsqueeze(-1)
        expected = (plan.mT if transpose else plan) @ matrix
        actual = result.plan_apply(v, transpose=transpose)
        assert actual.dtype == dtype
        assert_close(actual, expected if k else expected.squeeze(-1), "sinkhorn_points", "plan_apply", context=metric)


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_instruction_sets_and_threads(instruction_set, generator):
    points = random_points(300, 203, 67, generator=generator)
    v = operands((300, 203), False, 2, generator)
    result = otkd_fast.sinkhorn_points(*points, metric="l2", epsilon=1.0, num_iters=2, backend="cpu")
    expected = result.plan() @ v
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with use_instruction_set(instruction_set):
            torch.testing.assert_close(result.plan_apply(v), expected)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_gradients(backend, metric, transpose, generator):
    """By v, the points and, through f and g, the masses: those of the dense plan."""
    points = random_points(23, 19, 4, batch=(2,), generator=generator)
    v = operands((23, 19), transpose, 3, generator, (2,))
    leaves = [tensor.requires_grad_() for tensor in (*points, v)]
    options = {"metric": metric, "epsilon": epsilon_of(points, metric, 0.2), "num_iters": 3, "backend": backend}

    def gradients(product):
        result = otkd_fast.sinkhorn_points(*leaves[:4], **options)
        return torch.autograd.grad(product(result, leaves[4]).sin().sum(), leaves)

    def dense(result, v):
        plan = result.plan()
        return (plan.mT if transpose else plan) @ v

    expected = gradients(dense)
    torch.testing.assert_close(gradients(lambda result, v: result.plan_apply(v, transpose=transpose)), expected)
    assert min(grad.abs().max() for grad in expected) > 1e-6


@pytest.mark.parametrize("backend", COMPILED)
def test_transforms(backend, generator):
    points = random_points(6, 5, 3, batch=(3,), generator=generator)
    v = operands((6, 5), False, 2, generator, (3,))
    options = {"metric": "l2", "epsilon": 0.5, "num_iters": 3, "backend": backend}

    def loss(x, y, v):
        return otkd_fast.sinkhorn_points(x, y, **options).plan_apply(v).square().sum()

    mapped = torch.vmap(torch.func.grad(loss, (0, 1, 2)), in_dims=(0, None, 0))(points.x, points.y[0], v)
    for k in range(3):
        expected = torch.func.grad(loss, (0, 1, 2))(points.x[k], points.y[0], v[k])
        torch.testing.assert_close(tuple(grad[k] for grad in mapped), expected)
    x = points.x[0].requires_grad_()
    (first,) = torch.autograd.grad(loss(x, points.y[0], v[0]), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("backend", ALL)
def test_wrong_operands(backend, generator):
    points = random_points(4, 3, 2, generator=generator)
    result = otkd_fast.sinkhorn_points(*points, metric="l1", epsilon=0.5, num_iters=2, backend=backend)
    with pytest.raises(ValueError, match=r"v: expected shape \(3,\)"):
        result.plan_apply(torch.ones(4, dtype=torch.float64))
    with pytest.raises(TypeError, match="v: expected"):
        result.plan_apply(torch.ones(3, dtype=torch.int64))
