"""The same bits from run to run, and the same answer from one thread and from two, for values and every gradient."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import assert_close, backends

from .cases import METRICS, epsilon_of, random_points

COMPILED = backends("sinkhorn_points", compiled_only=True)
STORAGES = ("stored", "streamed")
LEVELS = {"float scalings": 0.1, "double scalings": 0.01, "log domain": 0.0005}
SHARED = (530, 517, 5)  # large enough for the threads to share a problem


def solve(points, threads, **options):
    """Values, gradients of all four operands by every output, and a product with the plan with its gradient."""
    torch.set_num_threads(threads)
    leaves = [tensor.clone().requires_grad_() for tensor in points]
    result = otkd_fast.sinkhorn_points(*leaves, num_iters=4, **options)
    loss = result.transport_cost.sum() + 0.5 * result.regularized_cost.sum() + result.f[..., ::7].sum()
    loss = loss + result.g[..., 1::5].sum() + result.plan_apply(leaves[1]).square().sum()
    values = result.transport_cost, result.regularized_cost, result.f, result.g, result.plan_apply(leaves[1])
    return [tensor.detach() for tensor in (*values, *torch.autograd.grad(loss, leaves))]


def problem(metric, shared, level, generator):
    size, batch = (SHARED, ()) if shared else ((60, 50, 5), (40,))
    points = random_points(*size, batch=batch, generator=generator).to(torch.float32)
    return points, epsilon_of(points, metric, LEVELS[level])


@pytest.mark.parametrize("shared", [False, True], ids=["a problem a thread", "a problem shared"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", COMPILED)
def test_threads_and_runs(backend, storage, level, shared, generator):
    metric = METRICS[(len(storage) + len(level) + shared) % 4]
    points, epsilon = problem(metric, shared, level, generator)
    options = {"metric": metric, "epsilon": epsilon, "storage": storage, "backend": backend}
    together = solve(points, 2, **options)
    for _ in range(3):
        assert all(map(torch.equal, solve(points, 2, **options), together))
    alone = solve(points, 1, **options)
    assert all(map(torch.equal, solve(points, 1, **options), alone))
    if not shared:
        assert all(map(torch.equal, alone[:5], together[:5]))  # the values: nobody else's sums
    for one, two in zip(alone, together, strict=True):
        assert_close(two, one.double(), "sinkhorn", "gradient", context=f"{metric} {storage} {level}")
