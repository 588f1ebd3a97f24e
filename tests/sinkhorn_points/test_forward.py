"""Values between points against the float64 reference: metrics, ranges of exponents, storages, shapes, odd entries."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import assert_close, backends, instruction_sets, use_instruction_set

from .cases import DTYPES, METRICS, check_values, epsilon_of, random_points

ALL = backends("sinkhorn_points")
COMPILED = backends("sinkhorn_points", compiled_only=True)
STORAGES = ("stored", "streamed")
SHAPES = ((1, 1, 1), (1, 5, 2), (7, 1, 3), (3, 2, 9), (15, 17, 16), (17, 33, 31), (33, 64, 5), (70, 100, 3))
RANGES = {"float scalings": 0.1, "double scalings": 0.005, "log domain": 0.0005}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", ALL)
def test_every_tail(backend, storage, dtype, generator):
    for k, (n, m, d) in enumerate(SHAPES):
        points, metric = random_points(n, m, d, zeros=True, generator=generator), METRICS[k % 4]
        options = {"epsilon": epsilon_of(points, metric, 0.1), "num_iters": 5, "update_first": "ab"[k % 2]}
        check_values(points, metric, dtype, backend=backend, storage=storage, **options)
        check_values(points._replace(a=None, b=None), metric, dtype, backend=backend, storage=storage, **options)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("storage", STORAGES)
def test_metrics_ranges_instruction_sets(storage, instruction_set, threads, generator):
    """Every way of solving, with more features than a tile sums at a time and several blocks of rows."""
    torch.set_num_threads(threads)
    with use_instruction_set(instruction_set):
        for metric in METRICS:
            for ratio in RANGES.values():
                for dtype in DTYPES:
                    points = random_points(21, 35, 260, batch=(2,), zeros=True, generator=generator)
                    options = {"epsilon": epsilon_of(points, metric, ratio), "num_iters": 4, "storage": storage}
                    check_values(points, metric, dtype, backend="cpu", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", COMPILED)
def test_threads_share_one_problem(backend, storage, ratio, dtype, generator):
    points = random_points(530, 517, 3, generator=generator)
    options = {"epsilon": epsilon_of(points, "sqeuclidean", ratio), "num_iters": 4, "backend": backend}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        result = check_values(points, "sqeuclidean", dtype, storage=storage, **options)
        again = otkd_fast.sinkhorn_points(*points.to(dtype), metric="sqeuclidean", storage=storage, **options)
        assert torch.equal(result.f, again.f) and torch.equal(result.g, again.g)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", COMPILED)
def test_storages_agree(backend, metric, generator):
    """The same costs and the same sums: bit for bit, but for <P, C>, whose costs come from other places."""
    points = random_points(140, 131, 7, generator=generator).to(torch.float32)
    options = {"metric": metric, "epsilon": epsilon_of(points, metric, 0.05), "num_iters": 6, "backend": backend}
    stored, streamed = (otkd_fast.sinkhorn_points(*points, storage=storage, **options) for storage in STORAGES)
    assert torch.equal(stored.f, streamed.f) and torch.equal(stored.g, streamed.g)
    torch.testing.assert_close(stored.transport_cost, streamed.transport_cost)


OPTIONS = {
    "tol": {"num_iters": 40, "tol": 1e-2},
    "relaxation": {"num_iters": 25, "relaxation": "auto", "gradient": "envelope"},
    "penalties": {"num_iters": 5, "marginal_penalty": (0.5, None)},
    "schedule": {"num_iters": 2, "epsilon_schedule": [2.0, (1.0, 2)], "update_first": "b"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", ALL)
def test_options(backend, storage, name, generator):
    points = random_points(14, 11, 3, batch=(2,), zeros=True, generator=generator)
    cost = points.cost("l2")
    options = {"epsilon": 0.3, "backend": backend} | OPTIONS[name]
    expected = otkd_fast.sinkhorn(cost, points.a, points.b, **options)
    actual = otkd_fast.sinkhorn_points(*points, metric="l2", storage=storage, **options)
    for name in ("transport_cost", "regularized_cost", "f", "g", "marginal_error"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name))
    assert torch.equal(actual.num_iters, expected.num_iters)
    start = (expected.f, expected.g)
    first, second = (
        call(initial_potentials=start, epsilon=0.3, num_iters=1, backend=backend).f
        for call in (
            lambda **rest: otkd_fast.sinkhorn(cost, points.a, points.b, **rest),
            lambda **rest: otkd_fast.sinkhorn_points(*points, metric="l2", storage=storage, **rest),
        )
    )
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_half_precision_is_solved_in_float32(backend, dtype, generator):
    """The costs too: they are not rounded to half precision on the way."""
    points = random_points(12, 9, 6, generator=generator).to(dtype)
    options = {"epsilon": epsilon_of(points, "sqeuclidean", 0.05), "num_iters": 6}
    result = check_values(points, "sqeuclidean", dtype, backend=backend, **options)
    assert result.f.dtype == result.plan().dtype == torch.float32


@pytest.mark.parametrize("backend", ALL)
def test_batches_and_shared_operands(backend, generator):
    points = random_points(6, 5, 4, batch=(2, 3), generator=generator)
    options = {"metric": "l1", "epsilon": 0.5, "num_iters": 5, "backend": backend}
    whole = otkd_fast.sinkhorn_points(*points, **options)
    assert whole.transport_cost.shape == (2, 3) and whole.f.shape == (2, 3, 6) and whole.plan().shape == (2, 3, 6, 5)
    x, y, a, b = points
    for k, arguments in enumerate([(x[0, 0], y, a, b), (x, y[0, 0], a[0, 0], b), (x[0, 0], y[0, 0], a, b)]):
        shapes = (6, 4), (5, 4), (6,), (5,)
        full = [tensor.expand(2, 3, *shape) for tensor, shape in zip(arguments, shapes, strict=True)]
        expected = otkd_fast.sinkhorn_points(*full, **options)
        actual = otkd_fast.sinkhorn_points(*arguments, **options)
        assert torch.equal(actual.g, expected.g), k
    empty = otkd_fast.sinkhorn_points(x[:0], y[:0], **options)
    assert empty.transport_cost.shape == (0, 3) and empty.f.shape == (0, 3, 6)
    strided = otkd_fast.sinkhorn_points(x.mT.contiguous().mT, y.flip(-1).flip(-1), a, b, **options)
    assert torch.equal(strided.f, whole.f)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", ALL)
def test_odd_points(backend, storage, generator):
    options = {"num_iters": 3, "storage": storage, "backend": backend}
    points = random_points(9, 8, 5, generator=generator)
    points.x[2], points.y[1] = 0, points.x[0]  # a row without direction, a pair at distance 0
    for metric in METRICS:
        check_values(points, metric, torch.float32, epsilon=0.5, **options)
    none = otkd_fast.sinkhorn_points(points.x[:, :0], points.y[:, :0], metric="l1", epsilon=0.1, **options)
    assert_close(none.plan(), torch.full((9, 8), 1 / 72, dtype=torch.float64), "sinkhorn", "transport_cost")
    bad = points.x.clone()
    bad[3, 3] = torch.nan
    result = otkd_fast.sinkhorn_points(bad, points.y, metric="l2", epsilon=0.5, **options)
    assert result.transport_cost.isnan() and result.regularized_cost.isnan() and result.marginal_error.isnan()
