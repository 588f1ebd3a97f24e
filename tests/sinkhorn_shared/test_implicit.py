"""The implicit gradient of a shared cost: potentials of the kernels, a solve on products; against the reference."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.ops import _sinkhorn_shared_implicit, sinkhorn_shared
from otkd_fast.testing import assert_close, backends, instruction_sets, use_instruction_set

pytestmark = pytest.mark.skipif("cpu" not in backends("sinkhorn_shared"), reason="no compiled backend")
F32, F64 = torch.float32, torch.float64


def problem(batch, n, m, generator, *, forbidden=0.0):
    cost = torch.rand(n, m, generator=generator, dtype=F64)
    if forbidden:
        cost = torch.where(torch.rand(n, m, generator=generator) < forbidden, torch.inf, cost)
        cost.fill_diagonal_(0.1)
    masses = []
    for size in (n, m):
        logits = torch.randn(batch, size, generator=generator, dtype=F64)
        if min(n, m) > 2:
            logits[torch.arange(batch), torch.arange(batch) % min(n, m)] = -torch.inf
        masses.append(torch.softmax(logits, -1))
    return cost, *masses


def gradients(solve, tensors, directions, expand, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    matrix = leaves[0].expand(len(leaves[1]), *leaves[0].shape) if expand else leaves[0]
    result = solve(matrix, *leaves[1:], gradient="implicit", **options)
    total = 0
    for name, direction in directions.items():
        value = getattr(result, name)
        total = total + (torch.where(value.isfinite(), value, 0) * direction.to(value.dtype)).sum()
    return torch.autograd.grad(total, leaves)


def check(tensors, dtype, generator, outputs=("transport_cost", "regularized_cost", "f", "g"), **options):
    tensors = [tensor.to(dtype) for tensor in tensors]
    _, a, b = tensors
    shapes = {"transport_cost": (len(a),), "regularized_cost": (len(a),), "f": a.shape, "g": b.shape}
    directions = {name: torch.randn(shapes[name], generator=generator, dtype=F64) for name in outputs}
    found = gradients(otkd_fast.sinkhorn, tensors, directions, False, **options)
    wanted = gradients(reference.sinkhorn, [tensor.double() for tensor in tensors], directions, True, **options)
    for got, want, name in zip(found, wanted, ("cost", "a", "b"), strict=True):
        scale = max(float(want.abs().max()), 1e-3)
        assert_close(got, want, "sinkhorn", "gradient", scale=scale, context=f"{name} {dtype} {options}")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("update_first", ["a", "b"])
def test_equals_the_dense_reference(update_first, dtype, generator):
    """Batches that fill their lanes and not; few problems, which the dense solver takes."""
    for batch, n, m in ((5, 6, 9), (16, 8, 8), (35, 12, 10), (2, 7, 5)):
        options = {"epsilon": 0.2, "num_iters": 40, "update_first": update_first}
        check(problem(batch, n, m, generator), dtype, generator, **options)


@pytest.mark.parametrize("output", ["transport_cost", "regularized_cost", "f", "g"])
def test_each_output(output, generator):
    check(problem(7, 6, 8, generator), F64, generator, (output,), epsilon=0.2, num_iters=30, update_first="b")


@pytest.mark.parametrize("isa", instruction_sets())
def test_each_instruction_set_keeps_scalings_in_its_own_layout(isa, generator):
    with use_instruction_set(isa):
        for dtype in (F32, F64):
            check(problem(37, 9, 8, generator), dtype, generator, epsilon=0.2, num_iters=30)


@pytest.mark.parametrize("range_", [1, 10])
def test_penalties(range_, generator):
    for penalty in (0.5, (0.3, None)):
        tensors = problem(6, 7, 9, generator)
        options = {"epsilon": 1 / range_, "num_iters": 60, "marginal_penalty": penalty}
        check(tensors, F32, generator, **options)
        check(tensors, F64, generator, **options)


def test_problems_of_one_batch_that_are_solved_each_its_own_way(generator):
    """float32: in double where the costs range over more than 60 epsilon, and on start potentials as wide as that."""
    tensors = problem(9, 6, 7, generator)
    check(tensors, F32, generator, ("transport_cost", "regularized_cost"), epsilon=1 / 80, num_iters=300)
    cost, a, b = (tensor.float() for tensor in tensors)
    start = torch.zeros(9, 7)
    start[3, 1], start[5, 2] = 30.0, 1000.0
    options = {"epsilon": 0.2, "num_iters": 60, "initial_potentials": (None, start)}
    history = torch.ops.otkd_fast.sinkhorn_shared_fwd(
        cost, a, b, None, start, 0.2, 60, 0.0, 1.0, torch.inf, torch.inf, True, 1
    )[6]
    assert set(history[:9].tolist()) == {0.0, 1.0, 2.0}
    check((cost, a, b), F32, generator, **options)


def test_forbidden_pairs_have_gauges_of_their_own(generator, monkeypatch):
    cost, a, b = problem(8, 6, 6, generator)
    cost[:3, 3:] = cost[3:, :3] = torch.inf
    a, b = (0.5 * torch.cat([part / part.sum(-1, keepdim=True) for part in w.split(3, -1)], -1) for w in (a, b))
    monkeypatch.setattr(_sinkhorn_shared_implicit, "CHUNK_ENTRIES", 80)  # two problems at a time
    check((cost, a, b), F64, generator, epsilon=0.3, num_iters=60)


def test_converged_gradient_is_that_of_the_loop(generator):
    cost, a, b = problem(6, 5, 7, generator)
    leaves = [tensor.requires_grad_() for tensor in (cost, a + 0.1, b + 0.1)]

    def loss(gradient):
        a, b = (w / w.sum(-1, keepdim=True) for w in leaves[1:])
        options = {"epsilon": 0.3, "num_iters": 300, "gradient": gradient}
        return torch.autograd.grad(otkd_fast.sinkhorn(cost, a, b, **options).transport_cost.sum(), leaves)

    for got, want in zip(loss("implicit"), loss("unroll"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_no_tensor_of_all_expanded_costs(generator):
    """B n m would be 40 times the largest tensor that is made."""
    batch, size = 160, 128
    leaves = [tensor.float().requires_grad_() for tensor in problem(batch, size, size, generator)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    result = otkd_fast.sinkhorn(*leaves, epsilon=0.1, num_iters=20, gradient="implicit")
    sides = [tensor.detach() for tensor in leaves]
    x, y = (torch.rand(batch, size, generator=generator, dtype=F64) + 0.5 for _ in range(2))
    with Watch():
        sinkhorn_shared.implicit_gradients(*sides, x, y, torch.ones(batch), None, None, 0.1, torch.inf, torch.inf, True)
    assert 0 < largest <= batch * size * 8 * 2
    result.transport_cost.sum().backward()
    assert leaves[0].grad.abs().sum() > 0
