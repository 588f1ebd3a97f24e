"""One cost for a batch of marginals: every way of solving, against as many solves by the float64 reference."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import assert_close, backends, instruction_sets, use_instruction_set

COMPILED = backends("sinkhorn_shared", compiled_only=True)
SIZES = [(1, 1, 1), (1, 5, 3), (2, 8, 8), (3, 16, 17), (7, 33, 16), (16, 31, 40), (17, 64, 65), (33, 100, 100)]
QUANTITIES = {
    "transport_cost": "transport_cost",
    "regularized_cost": "regularized_cost",
    "f": "potential",
    "g": "potential",
}


def problem(batch, n, m, generator, *, spread=3.0, zeros=True):
    """Cost with largest entry 1; softmaxes of normal logits with that deviation; one class of each problem excluded."""
    cost = torch.rand(n, m, generator=generator, dtype=torch.float64)
    masses = []
    for size in (n, m):
        logits = spread * torch.randn(batch, size, generator=generator, dtype=torch.float64)
        if zeros and min(n, m) > 1:
            logits[torch.arange(batch), torch.arange(batch) % min(n, m)] = -torch.inf
        masses.append(torch.softmax(logits, -1))
    return cost / cost.max(), *masses


def check(tensors, dtype, backend, **options):
    cost, a, b = (tensor.to(dtype) for tensor in tensors)
    actual = otkd_fast.sinkhorn(cost, a, b, backend=backend, **options)
    expanded = cost.double().expand(len(a), *cost.shape)
    expected = reference.sinkhorn(expanded, a.double(), b.double(), **options)
    unit = max(float(cost[cost.isfinite()].max()), options["epsilon"])
    for name, quantity in QUANTITIES.items():
        scale = unit if quantity == "potential" else None
        assert_close(getattr(actual, name), getattr(expected, name), "sinkhorn", quantity, scale=scale, context=name)
    assert_close(actual.marginal_error, expected.marginal_error, "sinkhorn", "marginal_error", scale=1.0)
    assert torch.equal(actual.num_iters, expected.num_iters)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("update_first", ["a", "b"])
def test_sizes(backend, isa, dtype, update_first, generator):
    with use_instruction_set(isa):
        for batch, n, m in SIZES:
            tensors = problem(batch, n, m, generator)
            check(tensors, dtype, backend, epsilon=0.05, num_iters=7, update_first=update_first)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest_cost_over_epsilon", [1.0, 10.0, 100.0, 1000.0, 1e5])
def test_ranges(backend, dtype, largest_cost_over_epsilon, generator):
    """Masses down to 1e-30 and exact zeros."""
    tensors = problem(9, 23, 31, generator, spread=12.0)
    assert 0 < tensors[1][tensors[1] > 0].min() < 1e-12
    check(tensors, dtype, backend, epsilon=1 / largest_cost_over_epsilon, num_iters=12)


@pytest.mark.parametrize("backend", COMPILED)
def test_forbidden_pairs(backend, generator):
    cost, a, b = problem(5, 12, 12, generator, zeros=False)
    cost = torch.where(torch.rand(12, 12, generator=generator) < 0.2, torch.inf, cost).fill_diagonal_(0.1)
    check((cost, a, b), torch.float32, backend, epsilon=0.1, num_iters=9)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("options", [{"tol": 1e-3}, {"marginal_penalty": 0.5}, {"tol": 1e-4, "relaxation": 1.2}])
def test_options(backend, options, generator):
    tensors = problem(9, 23, 31, generator)
    gradient = {"gradient": "detach"} if "relaxation" in options else {}
    check(tensors, torch.float64, backend, epsilon=0.1, num_iters=60, **options, **gradient)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("gradient", ["unroll", "envelope", "last_step"])
def test_gradients(backend, isa, gradient, generator):
    output = "regularized_cost" if gradient == "envelope" else "transport_cost"
    for dtype in (torch.float32, torch.float64):
        for batch, n, m in SIZES:
            cost, a, b = (tensor.to(dtype) for tensor in problem(batch, n, m, generator))
            direction = torch.randn(batch, generator=generator, dtype=torch.float64)

            def gradients(solve, tensors, expand, direction=direction):
                leaves = [tensor.clone().requires_grad_() for tensor in tensors]
                matrix = leaves[0].expand(len(leaves[1]), *leaves[0].shape) if expand else leaves[0]
                result = solve(matrix, *leaves[1:], epsilon=0.1, num_iters=6, gradient=gradient)
                return torch.autograd.grad(getattr(result, output) @ direction.to(leaves[0].dtype), leaves)

            with use_instruction_set(isa):
                actual = gradients(otkd_fast.sinkhorn, (cost, a, b), False)
            expected = gradients(reference.sinkhorn, (cost.double(), a.double(), b.double()), True)
            for got, want, name in zip(actual, expected, ("cost", "a", "b"), strict=True):
                assert_close(got, want, "sinkhorn", "gradient", context=f"{dtype} {batch} {n} {m} {name}")


@pytest.mark.parametrize("backend", COMPILED)
def test_threads_and_repeats(backend, generator):
    cost, a, b = (tensor.float() for tensor in problem(37, 70, 90, generator))

    def solve(threads):
        torch.set_num_threads(threads)
        leaf = a.clone().requires_grad_()
        value = otkd_fast.sinkhorn(cost, leaf, b, epsilon=0.05, num_iters=10, backend=backend).transport_cost
        return value.detach(), *torch.autograd.grad(value.sum(), leaf)

    first = solve(2)
    assert all(torch.equal(x, y) for x, y in zip(first, solve(2), strict=True))
    for one, two in zip(solve(1), first, strict=True):
        assert_close(one, two, "sinkhorn", "gradient")


@pytest.mark.parametrize("backend", COMPILED)
def test_layouts_and_empty_batches(backend, generator):
    cost, a, b = problem(4, 9, 11, generator)
    options = {"epsilon": 0.1, "num_iters": 5, "backend": backend}
    plain = otkd_fast.sinkhorn(cost, a, b, **options)
    strided = otkd_fast.sinkhorn(cost.mT.contiguous().mT, a.mT.contiguous().mT, b[:1].expand(4, -1), **options)
    assert torch.equal(plain.transport_cost[0], strided.transport_cost[0])
    empty = otkd_fast.sinkhorn(cost, a[:0], b[:0], **options)
    assert empty.transport_cost.shape == (0,) and empty.f.shape == (0, 9)
