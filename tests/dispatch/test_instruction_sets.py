"""Every family of CPU kernels on every instruction set that this processor has, values and gradients, against the
reference in float64. `pytest --instruction-set NAME` runs any other test on one."""

from functools import partial

import pytest
import torch

import otkd_fast
from otkd_fast.losses import SinKD
from otkd_fast.testing import instruction_sets, use_instruction_set

SINKHORN = {"epsilon": 0.3, "num_iters": 12}


def dense(gradient, cost, a, b, **options):
    """A cost without batch is shared by all of it."""
    cost = cost.abs().expand(len(a), *cost.shape[-2:])
    result = otkd_fast.sinkhorn(cost, a.softmax(-1), b.softmax(-1), gradient=gradient, **SINKHORN, **options)
    return result.transport_cost


def points(storage, x, y):
    result = otkd_fast.sinkhorn_points(x, y, metric="sqeuclidean", storage=storage, **SINKHORN)
    return result.transport_cost


def ragged(cost):
    offsets = torch.tensor([0, 3, 10, 31]), torch.tensor([0, 8, 12, 29])
    packed = cost.abs().flatten()[: 3 * 8 + 7 * 4 + 21 * 17]
    result = otkd_fast.sinkhorn_ragged(packed, row_offsets=offsets[0], column_offsets=offsets[1], **SINKHORN)
    return result.transport_cost


def moments(grid, x):
    found = otkd_fast.feature_moments(x, dim=(-2, -1), grid=grid, eps=1e-3)
    return torch.cat((found.mean.flatten(), found.std.flatten()))


# name: (function, shapes of its operands)
FAMILIES = {
    "cost_matrix l1": (partial(otkd_fast.cost_matrix, metric="l1"), [(2, 13, 37), (2, 21, 37)]),
    "cost_matrix sqeuclidean": (partial(otkd_fast.cost_matrix, metric="sqeuclidean"), [(2, 13, 37), (2, 21, 37)]),
    "cost_matrix cosine": (partial(otkd_fast.cost_matrix, metric="cosine"), [(2, 13, 37), (2, 21, 37)]),
    "sinkhorn, small": (partial(dense, "unroll"), [(40, 5, 7), (40, 5), (40, 7)]),
    "sinkhorn, large": (partial(dense, "unroll"), [(2, 70, 90), (2, 70), (2, 90)]),
    "sinkhorn, implicit": (partial(dense, "implicit"), [(2, 30, 20), (2, 30), (2, 20)]),
    "sinkhorn, shared": (partial(dense, "unroll"), [(33, 41), (19, 33), (19, 41)]),
    "sinkhorn, shared, tol": (partial(dense, "unroll", tol=1e-9), [(33, 41), (19, 33), (19, 41)]),
    "sinkhorn_points, stored": (partial(points, "stored"), [(2, 50, 9), (2, 60, 9)]),
    "sinkhorn_points, streamed": (partial(points, "streamed"), [(2, 50, 9), (2, 60, 9)]),
    "sinkhorn_ragged": (ragged, [(20, 30)]),
    "SinKD": (SinKD(reduction="mean"), [(24, 50), (24, 50)]),
    "feature_moments": (partial(moments, None), [(3, 5, 6, 7)]),
    "feature_moments, grid": (partial(moments, 4), [(3, 5, 7, 9)]),
    "gaussian_wasserstein, few rows": (otkd_fast.gaussian_wasserstein_from_samples, [(2, 12, 20), (2, 12, 20)]),
    "gaussian_wasserstein, more rows": (otkd_fast.gaussian_wasserstein_from_samples, [(2, 40, 70), (2, 40, 70)]),
    "gaussian_wasserstein, most rows": (otkd_fast.gaussian_wasserstein_from_samples, [(2, 70, 40), (2, 70, 40)]),
    "polar": (lambda K: otkd_fast.polar(K)[1], [(3, 40, 30)]),
    "bures_distance": (lambda x, y: otkd_fast.bures_distance(x @ x.mT, y @ y.mT), [(3, 30, 40), (3, 30, 40)]),
}  # fmt: skip


def solved(function, operands, generator):
    """The value and the gradients of a random sum of its entries."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    value = function(*leaves)
    weight = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    return value.detach(), *torch.autograd.grad((value * weight).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_instruction_set(family, dtype, generator):
    function, shapes = FAMILIES[family]
    operands = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    state = generator.get_state()
    with otkd_fast.backend("reference"):
        expected = solved(function, [operand.double() for operand in operands], generator)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    for name in instruction_sets():
        generator.set_state(state)
        with use_instruction_set(name), otkd_fast.backend("cpu"):
            actual = solved(function, operands, generator)
        for got, want in zip(actual, expected, strict=True):
            assert want.norm() > 0
            assert (got - want).norm() <= bound * want.norm(), f"{name}: off by {(got - want).norm() / want.norm():.1e}"
