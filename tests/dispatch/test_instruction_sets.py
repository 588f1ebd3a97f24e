"""Every family of CPU kernels on every instruction set that this processor has, values and gradients, against the
reference in float64. `pytest --instruction-set NAME` runs any other test on one."""

import pytest
import torch

import otkd_fast
from otkd_fast.losses import SinKD
from otkd_fast.testing import instruction_sets, use_instruction_set

SINKHORN = {"epsilon": 0.3, "num_iters": 12}


def costs(metric, x, y):
    return otkd_fast.cost_matrix(x, y, metric=metric)


def dense(gradient, cost, a, b, **options):
    result = otkd_fast.sinkhorn(cost, a.softmax(-1), b.softmax(-1), gradient=gradient, **SINKHORN, **options)
    return result.transport_cost


def points(storage, x, y):
    result = otkd_fast.sinkhorn_points(x, y, metric="sqeuclidean", storage=storage, **SINKHORN)
    return result.transport_cost


def ragged(cost):
    offsets = torch.tensor([0, 3, 10, 31]), torch.tensor([0, 8, 12, 29])
    packed = cost.flatten()[: 3 * 8 + 7 * 4 + 21 * 17]
    result = otkd_fast.sinkhorn_ragged(packed, row_offsets=offsets[0], column_offsets=offsets[1], **SINKHORN)
    return result.transport_cost


def moments(grid, x):
    found = otkd_fast.feature_moments(x, dim=(-2, -1), grid=grid, eps=1e-3)
    return torch.cat((found.mean.flatten(), found.std.flatten()))


# name: (function, shapes of its operands)
FAMILIES = {
    "cost_matrix l1": (lambda x, y: costs("l1", x, y), [(2, 13, 37), (2, 21, 37)]),
    "cost_matrix sqeuclidean": (lambda x, y: costs("sqeuclidean", x, y), [(2, 13, 37), (2, 21, 37)]),
    "cost_matrix cosine": (lambda x, y: costs("cosine", x, y), [(2, 13, 37), (2, 21, 37)]),
    "sinkhorn, small": (lambda c, a, b: dense("unroll", c.abs(), a, b), [(40, 5, 7), (40, 5), (40, 7)]),
    "sinkhorn, large": (lambda c, a, b: dense("unroll", c.abs(), a, b), [(2, 70, 90), (2, 70), (2, 90)]),
    "sinkhorn, implicit": (lambda c, a, b: dense("implicit", c.abs(), a, b), [(2, 30, 20), (2, 30), (2, 20)]),
    "sinkhorn, shared": (
        lambda c, a, b: dense("unroll", c.abs().expand(19, 33, 41), a, b), [(33, 41), (19, 33), (19, 41)],
    ),
    "sinkhorn, shared, tol": (
        lambda c, a, b: dense("unroll", c.abs().expand(19, 33, 41), a, b, tol=1e-9), [(33, 41), (19, 33), (19, 41)],
    ),
    "sinkhorn_points, stored": (lambda x, y: points("stored", x, y), [(2, 50, 9), (2, 60, 9)]),
    "sinkhorn_points, streamed": (lambda x, y: points("streamed", x, y), [(2, 50, 9), (2, 60, 9)]),
    "sinkhorn_ragged": (lambda c: ragged(c.abs()), [(20, 30)]),
    "SinKD": (SinKD(reduction="mean"), [(24, 50), (24, 50)]),
    "feature_moments": (lambda x: moments(None, x), [(3, 5, 6, 7)]),
    "feature_moments, grid": (lambda x: moments(4, x), [(3, 5, 7, 9)]),
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
    bound = 2e-4 if dtype == torch.float32 else 1e-9
    for name in instruction_sets():
        generator.set_state(state)
        with use_instruction_set(name), otkd_fast.backend("cpu"):
            actual = solved(function, operands, generator)
        for got, want in zip(actual, expected, strict=True):
            assert (got - want).norm() <= bound * want.norm(), f"{name}: off by {(got - want).norm() / want.norm():.1e}"
