"""Problems of one batch that stop after different numbers of iterations, and masses that are NaN."""

import math

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.ops._library import operators
from otkd_fast.testing import assert_close, backends

COMPILED = backends("sinkhorn_shared", compiled_only=True)
EPSILON = 0.2


def problem(batch, n, m, generator):
    """One cost, and masses from almost those that one iteration serves to sharp ones."""
    cost = torch.rand(n, m, generator=generator, dtype=torch.float64)
    kernel = torch.exp(-cost / EPSILON)
    masses = []
    for served in (kernel.sum(1), kernel.sum(0)):
        logits = torch.randn(batch, len(served), generator=generator, dtype=torch.float64)
        masses.append(torch.softmax(served.log() + logits * torch.linspace(0, 4, batch).unsqueeze(1), -1))
    return cost, *masses


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("gradient", ["unroll", "last_step"])
@pytest.mark.parametrize("options", [{"num_iters": 1}, {"num_iters": 50, "tol": 1e-3}, {"num_iters": 3, "tol": 1e-4}])
def test_gradients(backend, gradient, options, generator):
    tensors = problem(21, 9, 12, generator)
    weights = torch.randn(21, 9, generator=generator, dtype=torch.float64)

    def solved(solve, leaves, matrix):
        result = solve(matrix, *leaves[1:], epsilon=EPSILON, gradient=gradient, **options)
        loss = result.transport_cost.sum() + (weights.to(result.f.dtype) * result.f).sum()
        return result.num_iters, torch.autograd.grad(loss, leaves)

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    iterations, expected = solved(reference.sinkhorn, leaves, leaves[0].expand(21, 9, 12))
    counts = set(iterations.tolist())
    assert 1 in counts and (options["num_iters"] == 1 or len(counts) > 1)
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        with otkd_fast.backend(backend):
            ran, grads = solved(otkd_fast.sinkhorn, leaves, leaves[0])
        assert torch.equal(ran, iterations)
        for got, want, name in zip(grads, expected, ("cost", "a", "b"), strict=True):
            assert_close(got, want, "sinkhorn", "gradient", context=f"{dtype} {name}")


@pytest.mark.parametrize("tol", [0.0, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_masses_show_in_their_problem(side, tol, generator):
    """The op by itself: the public function looks at masses where it may. Others do not mind that the loop goes on."""
    cost, *masses = (tensor.float() for tensor in problem(19, 9, 12, generator))
    options = (None, None, EPSILON, 100, tol, 1.0, math.inf, math.inf, True, 0)
    solve = operators("sinkhorn_shared_fwd")["cpu"]
    expected = solve(cost, *masses, *options)
    masses[side][7, 3] = torch.nan
    actual = solve(cost, *masses, *options)
    others = torch.arange(19) != 7
    for k in (0, 1, 4):  # transport_cost, regularized_cost, marginal_error
        assert actual[k][7].isnan() and torch.equal(actual[k][others], expected[k][others])


@pytest.mark.parametrize("gradient", ["unroll", "envelope", "last_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cost_gradient_where_one_problem_leaves_the_range(dtype, gradient, generator):
    """Row 0 may go to column 0 alone, which has no mass in problem 5: its scalings are no numbers, the others' are."""
    cost, a, b = problem(19, 9, 12, generator)
    cost[0, 1:] = torch.inf
    b[5, 0] = 0
    b[5] /= b[5].sum()
    output = "regularized_cost" if gradient == "envelope" else "transport_cost"

    def solved(solve, *tensors, expand):
        leaf = tensors[0].clone().requires_grad_()
        matrix = leaf.expand(19, 9, 12) if expand else leaf
        result = solve(matrix, *tensors[1:], epsilon=EPSILON, num_iters=6, gradient=gradient)
        return torch.autograd.grad(getattr(result, output).sum(), leaf)[0]

    tensors = [tensor.to(dtype) for tensor in (cost, a, b)]
    grad = solved(otkd_fast.sinkhorn, *tensors, expand=False)
    expected = solved(reference.sinkhorn, *(tensor.double() for tensor in tensors), expand=True)
    assert_close(grad, expected, "sinkhorn", "gradient", context=str(dtype))
