"""Gradients of the marginals without that of the cost, which take a shorter way, and the check of many short rows."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import backends

compiled = pytest.mark.parametrize("backend", backends("sinkhorn_shared", compiled_only=True))


@compiled
@pytest.mark.parametrize("update_first", ["a", "b"])
def test_gradients_are_those_beside_the_cost(backend, update_first):
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(23, 37, generator=generator)
    a, b = (torch.softmax(2 * torch.randn(40, n, generator=generator), 1) for n in cost.shape)

    def gradients(which, dtype=torch.float32, backend=backend):
        leaves = [x.to(dtype, copy=True).requires_grad_(k in which) for k, x in enumerate((cost, a, b))]
        options = {"epsilon": 0.05, "num_iters": 7, "update_first": update_first, "backend": backend}
        loss = otkd_fast.sinkhorn(*leaves, **options).transport_cost.square().sum()
        return torch.autograd.grad(loss, [leaves[k] for k in which])

    expected = gradients((1, 2), torch.float64, "reference")
    for which, columns in (((1,), (0,)), ((2,), (1,)), ((1, 2), (0, 1))):
        for own, k in zip(gradients(which), columns, strict=True):
            assert (own - expected[k]).norm() <= 2e-5 * expected[k].norm()


@pytest.mark.parametrize("n", [4, 7, 32, 33, 100])
@pytest.mark.parametrize("row", [0, 17, 36])
def test_one_wrong_row_of_many_is_found(n, row):
    a, cost = torch.full((37, n), 1 / n), torch.rand(n, n)
    for wrong in (1.1, -1.0, torch.inf, torch.nan):
        b = a.clone()
        b[row, -1] *= wrong
        with pytest.raises(ValueError, match="^b: "):
            otkd_fast.sinkhorn(cost, a, b, epsilon=1.0, num_iters=1)
    otkd_fast.sinkhorn(cost, a, a, epsilon=1.0, num_iters=1)
