"""csrc/cuda/sinkhorn_points.cu and plan_apply.cu on the emulator, against the reference in float64."""

import math
import sys
from pathlib import Path

import pytest
import torch

import otkd_fast
from otkd_fast import _dispatch, reference
from otkd_fast.testing import assert_close

sys.path.append(str(Path(__file__).parents[1]))  # the package of the other tests between points
from sinkhorn_points.cases import (  # noqa: E402
    METRICS,
    check_gradients,
    check_values,
    compare,
    epsilon_of,
    random_points,
)

F32, F64 = torch.float32, torch.float64
# (n, m, d): one block a problem; launches of tiles, the last of 64 cut into pieces; features beyond one level of sums
IN_ONE, LAUNCHES, DEEP = ((1, 1, 2), (3, 65, 5), (33, 64, 17)), ((70, 130, 3),), ((34, 5, 261),)
RANGES = {"float": 0.1, "double": 0.0008}  # epsilon over the largest cost


def sides(k):
    return {"update_first": "ab"[k % 2], "backend": "cpu"}


KINDS = {"float": (F32, 0.1), "wide": (F32, 0.0008), "double": (F64, 0.1)}
CASES = [(kind, IN_ONE, metric) for kind in KINDS for metric in METRICS]
CASES += [(kind, LAUNCHES, metric) for kind, metric in zip((*KINDS, "float"), METRICS, strict=True)]
CASES += [("float", DEEP, "l1"), ("float", DEEP, "cosine"), ("double", DEEP, "sqeuclidean")]


@pytest.mark.parametrize("kind, shapes, metric", CASES, ids=str)
def test_values_and_gradients(kind, shapes, metric, guarded, generator):
    """Of every output, so that every adjoint takes part; two problems, masses of zero."""
    dtype, ratio = KINDS[kind]
    for k, (n, m, d) in enumerate(shapes):
        points = random_points(n, m, d, batch=(2,), zeros=min(n, m) > 1, generator=generator)
        options = {"epsilon": epsilon_of(points, metric, ratio), "num_iters": 2, **sides(k + METRICS.index(metric))}
        with guarded:
            check_values(points, metric, dtype, **options)
            check_gradients(points, metric, dtype, "unroll", generator, **options)


@pytest.mark.parametrize("gradient", ["envelope", "detach", "last_step"])
@pytest.mark.parametrize("size", [(9, 33, 4), (66, 70, 2)], ids=["in one", "launches"])
def test_modes(size, gradient, guarded, generator):
    for metric, marginals in (("cosine", True), ("l1", False)):
        points = random_points(*size, batch=(2,), zeros=marginals, marginals=marginals, generator=generator)
        options = {"epsilon": epsilon_of(points, metric, 0.2), "num_iters": 3, **sides(marginals)}
        with guarded:
            check_gradients(points, metric, F32, gradient, generator, **options)


OPTIONS = {
    "tol": {"num_iters": 30, "tol": 1e-2},
    "relaxation": {"num_iters": 12, "relaxation": "auto", "gradient": "envelope"},
    "penalties": {"num_iters": 3, "marginal_penalty": (0.5, None)},
    "schedule": {"num_iters": 2, "epsilon_schedule": [2.0, (1.0, 2)], "update_first": "b"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [(14, 11, 3), (66, 70, 2)], ids=["in one", "launches"])
def test_options(size, options, guarded, generator):
    points = random_points(*size, batch=(2,), zeros=True, generator=generator)
    points.x[1] *= 0.1  # the problems stop at different iterations
    expected = otkd_fast.sinkhorn(points.cost("l2"), points.a, points.b, epsilon=0.5, backend="reference", **options)
    with guarded:
        actual = otkd_fast.sinkhorn_points(*points, metric="l2", epsilon=0.5, backend="cpu", **options)
    compare(actual, expected, float(points.cost("l2").max()), 0.5)
    if "tol" in options:
        assert expected.num_iters[0] != expected.num_iters[1]
        with guarded:
            check_gradients(points, "l2", F64, "unroll", generator, epsilon=0.5, backend="cpu", **options)


@pytest.mark.parametrize("relaxation", [1.0, 1.4])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_potentials_to_start_from(dtype, relaxation, guarded, generator):
    points = random_points(6, 7, 3, batch=(2,), zeros=True, generator=generator)
    f, g = (torch.randn(2, k, generator=generator, dtype=F64).to(dtype) for k in (6, 7))
    g[0, 1] = math.inf
    gradient = {} if relaxation == 1 else {"gradient": "envelope"}
    for k in range(2):
        with guarded:
            check_values(points, "l1", dtype, epsilon=0.5, num_iters=3, relaxation=relaxation,
                         initial_potentials=(f, g), **gradient, **sides(k))  # fmt: skip


def test_ranges_are_found_per_problem(guarded, generator):
    """One problem of the batch in double, the others in float; points far apart, and pairs that nearly coincide."""
    points = random_points(40, 70, 3, batch=(3,), generator=generator)
    points.x[1] *= 40
    points.y[2, :40] = points.x[2] + 1e-4
    with guarded:
        check_values(points, "l2", F32, epsilon=1.0, num_iters=3, backend="cpu")
        check_gradients(points, "l2", F32, "unroll", generator, epsilon=1.0, num_iters=3, backend="cpu")


def test_odd_points(guarded, generator):
    points = random_points(9, 8, 5, generator=generator)
    points.x[2], points.y[1] = 0, points.x[0]  # a row without direction, a pair at distance 0
    options = {"epsilon": 0.5, "num_iters": 3, "backend": "cpu"}
    for metric in METRICS:
        with guarded:
            check_values(points, metric, F32, **options)
            check_gradients(points, metric, F32, "unroll", generator, **options)
    bad = points.x.clone()
    bad[3, 3] = torch.nan
    result = otkd_fast.sinkhorn_points(bad, points.y, metric="l2", **options)
    assert result.transport_cost.isnan() and result.regularized_cost.isnan() and result.marginal_error.isnan()
    none = otkd_fast.sinkhorn_points(points.x[:, :0], points.y[:, :0], metric="l1", **options)
    assert_close(none.plan(), torch.full((9, 8), 1 / 72, dtype=F64), "sinkhorn", "transport_cost")


@pytest.mark.parametrize("size", [(33, 40, 18), (66, 70, 2)], ids=["in one", "launches"])
@pytest.mark.parametrize("ratio", RANGES.values(), ids=RANGES)
def test_the_order_of_threads_does_not_matter(ratio, size, emulated, generator):
    points = random_points(*size, batch=(2,), zeros=True, generator=generator).to(F32)
    v = torch.randn(2, size[1], 3, generator=generator)
    epsilon = epsilon_of(points, "cosine", ratio)

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in points]
        result = otkd_fast.sinkhorn_points(*leaves, metric="cosine", epsilon=epsilon, num_iters=2, backend="cpu")
        applied = result.plan_apply(v)
        grads = torch.autograd.grad(result.transport_cost.sum() + applied.square().sum(), leaves)
        return [result.transport_cost, result.f, result.marginal_error, applied, *grads]

    first = run()
    for order in (1, 2, 3):
        emulated.set_order(order)
        assert all(torch.equal(got, want) for got, want in zip(run(), first, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_products_with_the_plan(dtype, metric, guarded, generator):
    """P v and its gradients by every operand, for plans of one tile and of several; more columns than a block takes."""
    for (n, m, d), columns, transpose in (((5, 3, 2), 1, False), ((33, 70, 17), 3, True), ((40, 66, 3), 70, False)):
        x, y, _, _ = random_points(n, m, d, batch=(2,), generator=generator)
        shapes = (n,), (m,), (n if transpose else m, columns)
        f, g, v = (0.3 * torch.randn(2, *shape, generator=generator, dtype=F64) for shape in shapes)
        f[0, -1] = -math.inf
        epsilon = epsilon_of(random_points(n, m, d, generator=generator), metric, 0.3)
        weights = torch.randn(2, m if transpose else n, columns, generator=generator, dtype=F64)
        found = []
        for backend, kind in (("cpu", dtype), ("reference", F64)):
            leaves = [tensor.to(dtype).to(kind).requires_grad_() for tensor in (x, y, f, g, v)]
            operands = (leaves[0], leaves[1]), epsilon, metric, backend
            empty = torch.empty(2, dtype=kind)
            result = otkd_fast.functional.sinkhorn_points.PointsSinkhornResult(
                empty, empty, leaves[2], leaves[3], empty, empty.long(), *operands
            )
            if backend == "cpu":
                with guarded:
                    value = result.plan_apply(leaves[4], transpose=transpose)
                    grads = torch.autograd.grad((value * weights.to(kind)).sum(), leaves)
            else:
                cost = reference.cost_matrix(leaves[0], leaves[1], metric=metric)
                plan = ((leaves[2].unsqueeze(-1) + leaves[3].unsqueeze(-2) - cost) / epsilon).exp()
                value = (plan.mT if transpose else plan) @ leaves[4]
                grads = torch.autograd.grad((value * weights).sum(), leaves)
            found.append((value, grads))
        (value, grads), (expected, wanted) = found
        unit = float(expected.detach().abs().max())
        assert_close(value, expected, "sinkhorn_points", "plan_apply", scale=unit, context=f"{metric} {(n, m, d)}")
        for grad, want in zip(grads, wanted, strict=True):
            scale = float(want.abs().max())
            assert_close(grad, want, "sinkhorn", "gradient", scale=scale, context=f"{metric} {(n, m, d)}")


def test_small_problems_take_one_launch(emulated, generator):
    points = random_points(20, 30, 4, batch=(3,), generator=generator)
    leaves = [tensor.requires_grad_() for tensor in points]
    before = emulated.launches()
    result = otkd_fast.sinkhorn_points(*leaves, metric="l1", epsilon=0.5, num_iters=3, backend="cpu")
    assert emulated.launches() == before + 1
    result.transport_cost.sum().backward()
    assert emulated.launches() == before + 4  # the adjoint loop, x, y


def test_memory_is_linear_in_the_points(emulated):
    """Of a call between 50 000 points, with a gradient of three unrolled iterations: no n x m."""
    n, d = 50_000, 512
    problems = (0, *(0,) * 7, 1, n, n, 3, 2, 0.1, 0.0, 1.0, math.inf, math.inf, 1)
    for metric, gradient in ((3, -1), (3, 0)):
        assert emulated.sinkhorn_points_workspace((0, 0, d, metric), problems, gradient) < 1.2 * 4 * 2 * n * d


def test_the_implicit_gradient_is_left_to_the_reference(monkeypatch, generator):
    monkeypatch.setitem(_dispatch._CHOICES, ("sinkhorn_points", "cpu", "cpu"), "cuda")
    x, y, _, _ = random_points(4, 3, 2, generator=generator)
    options = {"metric": "l2", "epsilon": 0.5, "num_iters": 60, "gradient": "implicit"}
    result = otkd_fast.sinkhorn_points(x.requires_grad_(), y, backend="cpu", **options)
    assert result._backend == "reference"
    expected = otkd_fast.sinkhorn_points(x, y, backend="reference", **options)
    assert torch.equal(result.transport_cost, expected.transport_cost)
