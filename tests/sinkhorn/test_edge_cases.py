"""Zero masses, forbidden pairs, one row, no problems, memory layouts, extreme ranges, reproducibility."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import (
    assert_close,
    assert_potentials_equivalent,
    backends,
    block_diagonal_problem,
    random_problem,
)

INF = torch.inf
COMPILED = backends("sinkhorn", compiled_only=True)
ALL = backends("sinkhorn")
DTYPES = (torch.float64, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("backend", ALL)
def test_atom_without_mass_is_an_atom_that_is_not_there(backend, epsilon, dtype, generator):
    """Values, potentials and gradients; whatever the costs of that atom are."""
    if backend == "reference" and dtype == torch.float32 and epsilon < 0.1:
        pytest.skip("the reference in float32 rounds exponents of 1 / epsilon")
    cost, a, b = random_problem(9, 7, generator=generator)
    a[[1, 4, 8]] = b[[0, 6]] = 0
    a, b = a / a.sum(), b / b.sum()
    rows, columns = a > 0, b > 0
    small = (cost[rows][:, columns], a[rows], b[columns])
    cost[~rows] = torch.tensor([0.0, 1.0, INF, 1e30, 5.0, 1e-30, 2.0], dtype=torch.float64)
    found = []
    for problem in ((cost, a, b), small):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in problem]
        result = otkd_fast.sinkhorn(*leaves, epsilon=epsilon, num_iters=10, backend=backend)
        value = result.transport_cost + result.regularized_cost
        found.append((result, torch.autograd.grad(value, leaves)))
    (whole, grads), (part, small_grads) = found
    assert_close(whole.transport_cost, part.transport_cost, "sinkhorn", "transport_cost")
    assert_close(whole.regularized_cost, part.regularized_cost, "sinkhorn", "regularized_cost")
    assert (whole.f[~rows] == -INF).all() and (whole.g[~columns] == -INF).all()
    assert_close(whole.f[rows], part.f, "sinkhorn", "potential")
    assert_close(whole.g[columns], part.g, "sinkhorn", "potential")
    assert_close(grads[0][rows][:, columns], small_grads[0], "sinkhorn", "gradient")
    assert_close(grads[1][rows], small_grads[1], "sinkhorn", "gradient")
    assert_close(grads[2][columns], small_grads[2], "sinkhorn", "gradient")
    assert grads[0][~rows].abs().sum() == grads[0][:, ~columns].abs().sum() == 0
    assert grads[1][~rows].abs().sum() == grads[2][~columns].abs().sum() == 0
    assert (whole.plan()[~rows] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [1.0, 0.05])
@pytest.mark.parametrize("backend", ALL)
def test_blocks_are_separate_problems(backend, epsilon, dtype, generator):
    """+inf off the blocks: one solve is the solve of each class on its own."""
    whole, blocks = block_diagonal_problem([(3, 4), (1, 2), (5, 3)], generator=generator)
    leaf = whole.cost.to(dtype).requires_grad_()
    options = {"epsilon": epsilon, "num_iters": 12, "backend": backend}
    result = otkd_fast.sinkhorn(leaf, whole.a.to(dtype), whole.b.to(dtype), **options)
    (grad,) = torch.autograd.grad(result.transport_cost, leaf)
    total, row, column = 0, 0, 0
    for cost, a, b in blocks:
        n, m = cost.shape
        one = cost.requires_grad_()
        expected = reference.sinkhorn(one, a, b, epsilon=epsilon, num_iters=12)
        (expected_grad,) = torch.autograd.grad(expected.transport_cost, one)
        total = total + expected.transport_cost
        block = (slice(row, row + n), slice(column, column + m))
        assert_potentials_equivalent(result.f[block[0]], result.g[block[1]], expected.f, expected.g)
        assert_close(grad[block], expected_grad, "sinkhorn", "gradient", scale=float(grad.abs().max()))
        row, column = row + n, column + m
    assert_close(result.transport_cost, total, "sinkhorn", "transport_cost")
    assert (result.plan()[whole.cost.isinf()] == 0).all() and (grad[whole.cost.isinf()] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
@pytest.mark.parametrize("backend", ALL)
def test_one_row_or_one_column(backend, shape, dtype, generator):
    """The plan is the product of the marginals, whatever the cost."""
    problem = random_problem(*shape, batch=(2,), generator=generator).to(dtype)
    for update_first in ("a", "b"):
        options = {"epsilon": 0.1, "num_iters": 2, "update_first": update_first, "backend": backend}
        result = otkd_fast.sinkhorn(*problem, **options)
        product = problem.a[..., None].double() * problem.b[:, None].double()
        expected = (product * problem.cost).sum((-2, -1))
        assert_close(result.transport_cost, expected, "sinkhorn", "transport_cost")
        assert_close(result.regularized_cost, expected, "sinkhorn", "regularized_cost")


@pytest.mark.parametrize("gradient", ["unroll", "envelope", "detach"])
@pytest.mark.parametrize("backend", ALL)
def test_no_problems(backend, gradient):
    for batch in ((0,), (3, 0)):
        cost = torch.ones(*batch, 4, 5, requires_grad=True)
        a = torch.full((*batch, 4), 0.25, requires_grad=gradient != "detach")
        result = otkd_fast.sinkhorn(cost, a, epsilon=0.1, num_iters=3, gradient=gradient, backend=backend)
        assert result.transport_cost.shape == result.num_iters.shape == batch
        assert result.f.shape == (*batch, 4) and result.plan().shape == (*batch, 4, 5)
        value = result.regularized_cost if gradient == "envelope" else result.transport_cost
        value.sum().backward()
        assert cost.grad.shape == cost.shape and (gradient == "detach" or a.grad.shape == a.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_unserved_rows_and_columns_are_shown(backend, dtype):
    """Row 1 may only go to a column without mass; column 2 may only come from row 1."""
    cost = torch.tensor([[0.3, 0.1, INF, INF], [INF, INF, INF, 0.2], [0.2, 0.5, INF, 0.1]], dtype=dtype)
    a, b = torch.tensor([0.5, 0.2, 0.3], dtype=dtype), torch.tensor([0.4, 0.4, 0.2, 0.0], dtype=dtype)
    for epsilon in (1.0, 0.1, 0.001):
        for update_first in ("a", "b"):
            options = {"epsilon": epsilon, "num_iters": 300, "update_first": update_first, "backend": backend}
            result = otkd_fast.sinkhorn(cost, a, b, **options)
            assert result.f[1] == -INF and result.g[2] == -INF and result.g[3] == -INF
            assert result.f[[0, 2]].isfinite().all() and result.g[:2].isfinite().all()
            error = float(result.marginal_error)  # row 1 sends nothing of 0.2, column 2 receives nothing of 0.2
            assert error > 0.3999 and (epsilon < 0.1 or error < 0.4001)
            assert result.transport_cost.isfinite() and result.regularized_cost.isfinite()


@pytest.mark.parametrize("backend", ALL)
def test_batch_mixes_ordinary_and_awkward_problems(backend, generator):
    """One problem's zeros, forbidden pairs and unserved rows change nothing in its neighbours."""
    problems = [
        random_problem(6, 5, generator=generator),
        random_problem(6, 5, zeros=True, infinite=True, generator=generator),
        random_problem(6, 5, zeros=True, scale=1e3, generator=generator),
        random_problem(6, 5, infinite=True, scale=1e-3, generator=generator),
    ]
    problems[3].cost[2] = INF
    batch = [torch.stack(tensors) for tensors in zip(*problems, strict=True)]
    for dtype in DTYPES:
        result = otkd_fast.sinkhorn(*(tensor.to(dtype) for tensor in batch), epsilon=0.1, num_iters=9, backend=backend)
        for k, problem in enumerate(problems):
            one = otkd_fast.sinkhorn(*problem.to(dtype), epsilon=0.1, num_iters=9, backend=backend)
            assert_close(result.transport_cost[k], one.transport_cost.double(), "sinkhorn", "transport_cost")
            assert_close(result.f[k], one.f.double(), "sinkhorn", "potential")
            assert_close(result.plan()[k], one.plan().double(), "sinkhorn", "transport_cost")


@pytest.mark.parametrize("gradient", ["unroll", "envelope", "detach"])
@pytest.mark.parametrize("ratio", [30, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("backend", ALL)
def test_no_nan_at_any_range(backend, ratio, gradient, generator):
    """max(C) / epsilon up to 1e5 in float32: finite everywhere, and the last marginal updated holds."""
    cost, a, b = random_problem(23, 17, batch=(2,), zeros=True, generator=generator).to(torch.float32)
    cost = (cost / cost.amax((-2, -1), keepdim=True)).requires_grad_()
    result = otkd_fast.sinkhorn(cost, a, b, epsilon=1 / ratio, num_iters=15, gradient=gradient, backend=backend)
    value = result.regularized_cost if gradient == "envelope" else result.transport_cost
    (grad,) = torch.autograd.grad(value.sum(), cost)
    for tensor in (result.transport_cost, result.regularized_cost, result.marginal_error, grad, result.plan()):
        assert tensor.isfinite().all()
    assert torch.equal(result.f == -INF, a == 0) and torch.equal(result.g == -INF, b == 0)
    assert not result.f.isnan().any() and not result.g.isnan().any()
    # exponents carry a rounding of ratio * 2^-24
    columns = (result.plan().sum(-2) - b).abs().sum(-1)
    assert (columns < 1e-5 + 1e-6 * ratio).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", COMPILED)
def test_extreme_range_is_still_accurate(backend, dtype, generator):
    """Compiled backends keep the accuracy of the table up to max(C) / epsilon = 1e4: what they round is the output."""
    problem = random_problem(23, 17, zeros=True, generator=generator).to(dtype)
    for epsilon in (1e-3, 1e-4):
        expected = reference.sinkhorn(*problem.to(torch.float64), epsilon=epsilon, num_iters=15)
        result = otkd_fast.sinkhorn(*problem, epsilon=epsilon, num_iters=15, backend=backend)
        assert_close(result.transport_cost, expected.transport_cost, "sinkhorn", "transport_cost")
        assert_close(result.regularized_cost, expected.regularized_cost, "sinkhorn", "regularized_cost")
        assert_close(result.f, expected.f, "sinkhorn", "potential", scale=1.0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("backend", ALL)
def test_units_do_not_matter(backend, scale, generator):
    """Costs and epsilon in other units; float32 with costs of 1e-30 and of 1e30."""
    problem = random_problem(9, 7, generator=generator).to(torch.float32)
    expected = reference.sinkhorn(*problem.to(torch.float64), epsilon=0.1, num_iters=10)
    result = otkd_fast.sinkhorn(problem.cost * scale, *problem[1:], epsilon=0.1 * scale, num_iters=10, backend=backend)
    assert_close(result.transport_cost / scale, expected.transport_cost, "sinkhorn", "transport_cost")
    assert_close(result.f / scale, expected.f, "sinkhorn", "potential", scale=10.0)


@pytest.mark.parametrize("backend", ALL)
def test_total_mass_need_not_be_one(backend, generator):
    """Masses of 12: the plan, the transport cost and its gradient are 12 times those of masses of 1."""
    problem = random_problem(6, 5, generator=generator)
    options = {"epsilon": 0.2, "num_iters": 200, "backend": backend}
    large = otkd_fast.sinkhorn(problem.cost, 12 * problem.a, 12 * problem.b, **options)
    small = otkd_fast.sinkhorn(*problem, **options)
    torch.testing.assert_close(large.plan(), 12 * small.plan())
    torch.testing.assert_close(large.transport_cost, 12 * small.transport_cost)
    plan = large.plan()
    product = 144 * problem.a[:, None] * problem.b
    kl = (plan * (plan / product).log()).sum() - plan.sum() + product.sum()
    torch.testing.assert_close(large.regularized_cost, large.transport_cost + 0.2 * kl)


@pytest.mark.parametrize("gradient", ["unroll", "envelope"])
@pytest.mark.parametrize("backend", ALL)
def test_layouts(backend, gradient, generator):
    """Expanded, transposed and sliced operands hold the same numbers as their contiguous copies."""
    whole = random_problem(14, 24, batch=(6,), generator=generator).cost
    cost = whole.mT[::2, 1:11, 2:14:2]  # (3, 10, 6)
    a = random_problem(10, 6, generator=generator).a.expand(3, 10)
    b = random_problem(10, 3, batch=(6,), generator=generator).b.mT
    b = b / b.sum(-1, keepdim=True).mT.mT
    found = []
    for problem in ((cost, a, b), tuple(tensor.contiguous() for tensor in (cost, a, b))):
        leaves = [tensor.detach().requires_grad_() for tensor in problem]
        result = otkd_fast.sinkhorn(*leaves, epsilon=0.1, num_iters=5, gradient=gradient, backend=backend)
        found.append((result, torch.autograd.grad(result.regularized_cost.sum(), leaves)))
    (strange, grads), (plain, plain_grads) = found
    for name in ("transport_cost", "regularized_cost", "f", "g"):
        torch.testing.assert_close(getattr(strange, name), getattr(plain, name), rtol=1e-13, atol=1e-14)
        assert backend == "reference" or getattr(strange, name).is_contiguous()
    for actual, expected in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("update_first", ["a", "b"])
@pytest.mark.parametrize("backend", ALL)
def test_inputs_are_not_written(backend, update_first, generator):
    problem = random_problem(6, 5, batch=(2,), zeros=True, infinite=True, generator=generator)
    before = [tensor.clone() for tensor in problem]
    leaves = [tensor.requires_grad_() for tensor in problem]
    options = {"epsilon": 0.1, "num_iters": 5, "update_first": update_first, "backend": backend}
    result = otkd_fast.sinkhorn(*leaves, **options)
    kept = [tensor.clone() for tensor in (result.f, result.g)]
    result.transport_cost.sum().backward()
    for tensor, expected in zip(leaves, before, strict=True):
        assert torch.equal(tensor.detach(), expected)
    assert torch.equal(result.f, kept[0]) and torch.equal(result.g, kept[1])


@pytest.mark.parametrize("backend", ALL)
def test_backward_twice_gives_the_same(backend, generator):
    """The saved history is read, not consumed."""
    problem = [t.requires_grad_() for t in random_problem(17, 9, batch=(2,), generator=generator).to(torch.float32)]
    for epsilon in (0.1, 0.001):
        value = otkd_fast.sinkhorn(*problem, epsilon=epsilon, num_iters=6, backend=backend).transport_cost.sum()
        first = torch.autograd.grad(value, problem, retain_graph=True)
        second = torch.autograd.grad(value, problem)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("epsilon", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("backend", ALL)
def test_same_bits_every_time(backend, epsilon, generator):
    torch.set_num_threads(2)
    problem = random_problem(65, 47, batch=(3,), zeros=True, generator=generator).to(torch.float32)
    leaves = [tensor.requires_grad_() for tensor in problem]

    def run():
        result = otkd_fast.sinkhorn(*leaves, epsilon=epsilon, num_iters=8, backend=backend)
        grads = torch.autograd.grad((result.transport_cost + result.regularized_cost).sum(), leaves)
        return result.transport_cost, result.regularized_cost, result.f, result.g, result.marginal_error, *grads

    first = run()
    for _ in range(9):
        assert all(torch.equal(actual, expected) for actual, expected in zip(run(), first, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_nan_is_not_hidden(backend, generator):
    """A NaN in one problem's cost reaches that problem's results and no other's."""
    problem = random_problem(6, 5, batch=(3,), generator=generator).to(torch.float32)
    problem.cost[1, 2, 3] = float("nan")
    for epsilon in (0.1, 0.001):
        result = otkd_fast.sinkhorn(*problem, epsilon=epsilon, num_iters=4, backend=backend)
        for value in (result.transport_cost, result.regularized_cost, result.marginal_error):
            assert value.isnan().tolist() == [False, True, False], epsilon


@pytest.mark.parametrize("backend", ALL)
def test_no_graph_without_need(backend, generator):
    problem = random_problem(6, 5, generator=generator)
    options = {"epsilon": 0.1, "num_iters": 4, "backend": backend}
    assert otkd_fast.sinkhorn(*problem, **options).transport_cost.grad_fn is None
    problem.cost.requires_grad_()
    assert otkd_fast.sinkhorn(*problem, **options).transport_cost.requires_grad
    with torch.no_grad():
        assert not otkd_fast.sinkhorn(*problem, **options).f.requires_grad
        frozen = otkd_fast.sinkhorn(problem.cost, problem.a.requires_grad_(), gradient="detach", **options)
        assert not frozen.transport_cost.requires_grad


def test_result_is_frozen_and_says_what_it_is(generator):
    result = otkd_fast.sinkhorn(*random_problem(6, 5, batch=(2,), generator=generator), epsilon=0.1, num_iters=4)
    with pytest.raises(AttributeError):
        result.f = None
    assert "batch=(2,), n=6, m=5" in repr(result)
