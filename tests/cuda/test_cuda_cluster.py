"""csrc/cuda/sinkhorn_cluster.cu on the emulator against the reference in float64, in clusters of several sizes."""

import math

import pytest
import torch
from solves import OPTIONS, solve_both

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import assert_close, random_problem

FLOAT, DOUBLE = torch.float32, torch.float64


def memory_of(n, m, dtype, size, held=1.0):
    """Bytes of shared memory with which a block of `size` holds this part of its rows (Cluster::rows_held)."""
    rows = -(-n // size)
    kept = rows if held == 1 else int(held * rows) // 4 * 4
    threads = max(128, -(-m // 32) * 32)
    item = torch.finfo(dtype).bits // 8
    return max(8 * (2 * threads + rows + m) + item * (2 * m + rows + kept * m) + 4 * 18, 4096)


@pytest.fixture
def cut(emulated):
    """cut(n, m, dtype, size): problems of this kind are solved by clusters of `size` blocks."""

    def of(n, m, dtype, size, held=1.0):
        emulated.set_clusters(size, 0)
        emulated.set_shared_limit(memory_of(n, m, dtype, size, held))

    return of


SHAPES = [
    (9, 130, DOUBLE, 4),  # the last block has no rows
    (8, 129, DOUBLE, 2),  # 4 rows a block, one of their tiles
    (21, 140, DOUBLE, 16),  # 16 blocks, the last five without rows
    (133, 3, DOUBLE, 4),  # few columns: only the first three blocks own one
    (19, 193, FLOAT, 2),
    (37, 200, FLOAT, 8),
    (200, 21, FLOAT, 4),
]


@pytest.mark.parametrize("n, m, dtype, size", SHAPES, ids=str)
def test_every_tail(n, m, dtype, size, cut, guarded, emulated, generator):
    cut(n, m, dtype, size)
    problem = random_problem(n, m, generator=generator, batch=(2,))
    solve_both(problem, dtype, guarded, epsilon=0.1, num_iters=4)


def test_one_launch(cut, emulated, generator):
    cut(12, 140, DOUBLE, 4)
    problem = random_problem(12, 140, generator=generator, batch=(2,))
    before = emulated.launches()
    otkd_fast.sinkhorn(*problem, epsilon=0.1, num_iters=3, tol=1e-9, backend="cpu")
    assert emulated.launches() == before + 1
    cost = problem.cost.clone().requires_grad_()
    for gradient in ("unroll", "last_step"):
        result = otkd_fast.sinkhorn(cost, *problem[1:], epsilon=0.1, num_iters=3, gradient=gradient, backend="cpu")
        before = emulated.launches()
        result.transport_cost.sum().backward()
        assert emulated.launches() == before + 1
    emulated.set_clusters(0, 0)
    otkd_fast.sinkhorn(*problem, epsilon=0.1, num_iters=3, backend="cpu")
    assert emulated.launches() > before + 6


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("epsilon", [0.3, 0.05, 0.02, 0.001], ids=str)
def test_every_range_of_exponents(epsilon, dtype, cut, guarded, generator):
    """Scalings that drift, sums that leave the safe range, and kernels of which most is 0."""
    cut(10, 194, dtype, 2)
    problem = random_problem(10, 194, generator=generator, batch=(3,))
    problem.cost[1] *= 3
    problem.cost[2] += 2
    solve_both(problem, dtype, guarded, epsilon=epsilon, num_iters=6, outputs=("transport_cost",))


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("n, m", [(201, 6), (6, 201)], ids=str)
@pytest.mark.parametrize("update_first", "ab")
def test_sums_that_are_not_safe(update_first, n, m, dtype, cut, guarded, generator):
    """Of 201 rows those that are nearest to none of 6 columns have sums below 1e-200, and so have columns of 6 rows."""
    cut(*((n, m) if update_first == "a" else (m, n)), dtype, 2)
    problem = random_problem(n, m, generator=generator, batch=(2,)).to(dtype)
    forward(problem, guarded, epsilon=2e-4, num_iters=4, update_first=update_first)


def test_masses_beyond_the_safe_range(cut, guarded, generator):
    """The first row is near to columns of hardly any mass only: its sum is, too, and then its scaling is not safe."""
    cut(7, 130, DOUBLE, 2)
    problem = random_problem(7, 130, generator=generator)
    problem.cost[0, 60:] += 2
    problem.cost[1:, :60] += 2
    problem.b[:60] = 1e-315
    problem.b[60:] /= problem.b.sum()
    forward(problem, guarded, epsilon=0.002, num_iters=2)


def forward(problem, guarded, **options):
    with guarded:
        got = otkd_fast.sinkhorn(*problem, backend="cpu", **options)
    want = reference.sinkhorn(*(tensor.double() for tensor in problem), **options)
    for name in ("transport_cost", "regularized_cost", "f", "g", "marginal_error"):
        quantity = "potential" if name in "fg" else name
        scale = {"f": 1.0, "g": 1.0, "marginal_error": 1.0}.get(name)
        assert_close(getattr(got, name), getattr(want, name), "sinkhorn", quantity, scale=scale, context=name)


def test_gradients_through_steps_that_are_far_from_the_last(cut, guarded, generator):
    """The columns move from 0 by more than 330 epsilon: the backward forms its kernel anew for each half of a step."""
    cut(6, 201, FLOAT, 2)
    problem = random_problem(6, 201, generator=generator, batch=(2,))
    problem = problem._replace(cost=(64 * problem.cost).round() / 64)  # exact in float32, and so are its exponents
    options = dict(epsilon=2.0**-13, num_iters=3, outputs=("transport_cost",))
    g = solve_both(problem, FLOAT, guarded, **options)[3]
    assert float(g.detach().abs().amax()) > 330 * options["epsilon"]


@pytest.mark.parametrize("gradient", ["unroll", "envelope", "detach", "last_step"])
@pytest.mark.parametrize("epsilon, dtype", [(0.2, DOUBLE), (0.002, DOUBLE), (0.2, FLOAT)], ids=str)
def test_gradients(epsilon, dtype, gradient, cut, guarded, generator):
    cut(7, 193, dtype, 2)
    outputs = {"envelope": ("regularized_cost",), "detach": ("transport_cost",)}.get(gradient)
    options = {"outputs": outputs} if outputs else {}
    problem = random_problem(7, 193, generator=generator, batch=(2,))
    if gradient == "detach":
        problem = problem._replace(a=None, b=None)
    solve_both(problem, dtype, guarded, epsilon=epsilon, num_iters=5, gradient=gradient, **options)


def test_costs_far_from_zero(cut, guarded, generator):
    """Nothing of their size cancels in float32."""
    cut(11, 193, FLOAT, 4)
    problem = random_problem(11, 193, generator=generator)
    problem = problem._replace(cost=problem.cost + 100)
    solve_both(problem, FLOAT, guarded, epsilon=0.5, num_iters=4, outputs=("transport_cost",))


@pytest.mark.parametrize("epsilon", [0.3, 0.004], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_zero_masses_and_forbidden_pairs(dtype, epsilon, cut, guarded, generator):
    cut(14, 193, dtype, 4)
    problem = random_problem(14, 193, generator=generator, batch=(3,), zeros=True, infinite=True)
    solve_both(problem, dtype, guarded, epsilon=epsilon, num_iters=4)


def test_rows_and_columns_that_cannot_be_served(cut, guarded, generator):
    cut(9, 193, FLOAT, 2)
    problem = random_problem(9, 193, generator=generator)
    problem.cost[2] = torch.inf
    problem.cost[:, 4] = torch.inf
    for epsilon in (0.3, 0.003):
        solve_both(problem, FLOAT, guarded, epsilon=epsilon, num_iters=3)


def test_not_a_number_stays_in_its_problem(cut, emulated, generator):
    cut(9, 130, DOUBLE, 2)
    problem = random_problem(9, 130, generator=generator, batch=(2,))
    problem.cost[0, 3, 5] = math.nan
    result = otkd_fast.sinkhorn(*problem, epsilon=0.1, num_iters=3, backend="cpu")
    assert result.transport_cost[0].isnan() and result.transport_cost[1].isfinite()


@pytest.mark.parametrize("options", [*OPTIONS, {"update_first": "b"}], ids=str)
def test_options(options, cut, guarded, generator):
    n, m = (130, 7) if options.get("update_first") == "b" else (7, 130)
    cut(7, 130, DOUBLE, 2)
    problem = random_problem(n, m, generator=generator, batch=(2,))
    problem.cost[1] *= 4  # the problems stop at different iterations
    outputs = {"outputs": ("regularized_cost",)} if options.get("gradient") == "envelope" else {}
    num_iters = 20 if "tol" in options else 11
    solve_both(problem, DOUBLE, guarded, epsilon=0.3, num_iters=num_iters, **outputs, **options)


@pytest.mark.parametrize("relaxation", [1.0, 1.4])
def test_potentials_to_start_from(relaxation, cut, guarded, generator):
    cut(8, 130, DOUBLE, 4)
    problem = random_problem(8, 130, generator=generator, batch=(2,), zeros=True)
    f = torch.randn(2, 8, generator=generator, dtype=DOUBLE)
    g = 3 * torch.randn(2, 130, generator=generator, dtype=DOUBLE)
    g[0, 1] = math.inf
    more = {"gradient": "unroll"} if relaxation == 1 else {"gradient": "envelope", "outputs": ("regularized_cost",)}
    solve_both(problem, DOUBLE, guarded, epsilon=0.03, num_iters=3, initial_potentials=(f, g),
               relaxation=relaxation, **more)  # fmt: skip


def test_one_cost_for_a_batch_of_marginals(cut, guarded, generator):
    cut(9, 130, DOUBLE, 2)
    problem = random_problem(9, 130, generator=generator, batch=(3,), zeros=True)
    problem = problem._replace(cost=problem.cost[0])
    solve_both(problem, DOUBLE, guarded, epsilon=0.1, num_iters=3)
    solve_both(problem._replace(a=None), DOUBLE, guarded, epsilon=0.1, num_iters=3, outputs=("transport_cost",))


@pytest.mark.parametrize("epsilon, dtype", [(0.1, FLOAT), (0.003, FLOAT), (0.003, DOUBLE)], ids=str)
def test_the_order_of_threads_does_not_matter(epsilon, dtype, cut, emulated, guarded, generator):
    cut(9, 193, dtype, 4)
    problem = random_problem(9, 193, generator=generator, batch=(2,), zeros=True)
    options = dict(epsilon=epsilon, num_iters=3, tol=1e-12, outputs=("transport_cost",))
    first = solve_both(problem, dtype, guarded, **options)
    for order in (1, 2, 3):
        emulated.set_order(order)
        again = solve_both(problem, dtype, guarded, **options)
        assert all(torch.equal(got, want) for got, want in zip(again, first, strict=True))


def test_what_one_block_decides_waits_for_the_others(cut, emulated, guarded, generator):
    """When to stop, the relaxation, and the width of the sums, which only the last row asks for."""
    cut(5, 193, FLOAT, 2)
    problem = random_problem(5, 193, generator=generator, batch=(2,))
    problem.cost[:, -1] *= 20
    options = dict(epsilon=0.2, num_iters=13, tol=3e-3, relaxation="auto", gradient="envelope")
    found = []
    for order in range(3):
        emulated.set_order(order)
        found.append(solve_both(problem, FLOAT, guarded, outputs=("regularized_cost",), **options))
    for again in found[1:]:
        assert all(torch.equal(got, want) for got, want in zip(again, found[0], strict=True))


@pytest.mark.parametrize("epsilon", [0.1, 0.003], ids=str)
def test_rows_that_are_not_held_are_formed_again(epsilon, cut, emulated, guarded, generator):
    """The same bits, with less shared memory."""
    problem = random_problem(38, 193, generator=generator, zeros=True)
    options = dict(epsilon=epsilon, num_iters=4, outputs=("transport_cost",))
    cut(38, 193, FLOAT, 2)
    whole = solve_both(problem, FLOAT, guarded, **options)
    cut(38, 193, FLOAT, 2, held=0.85)  # 16 of 19
    before = emulated.launches()
    part = solve_both(problem, FLOAT, guarded, **options)
    assert emulated.launches() == before + 2
    assert all(torch.equal(got, want) for got, want in zip(part, whole, strict=True))


def test_other_problems_are_left_to_the_launches(emulated, generator):
    emulated.set_clusters(8, 0)
    for n, m, memory in ((3, 1025, 99 * 1024), (60, 193, 9000), (1, 193, 99 * 1024)):
        emulated.set_shared_limit(memory)
        problem = random_problem(n, m, generator=generator)
        before = emulated.launches()
        otkd_fast.sinkhorn(*(tensor.float() for tensor in problem), epsilon=0.1, num_iters=2, backend="cpu")
        assert emulated.launches() > before + 4


def test_clusters_grow_as_long_as_the_device_is_not_full(emulated, monkeypatch, generator):
    """80 rows: 2 blocks hold them; 4 have 20 rows each, 8 only 10."""
    emulated.set_shared_limit(99 * 1024)
    problem = random_problem(80, 193, generator=generator, batch=(2,)).to(FLOAT)
    solve = lambda: otkd_fast.sinkhorn(*problem, epsilon=0.1, num_iters=2, backend="cpu").transport_cost  # noqa: E731
    sizes = []
    for processors in (0, 7, 8, 132):
        emulated.set_clusters(16, processors)
        solve()
        sizes.append(emulated.last_cluster())
    assert sizes == [2, 2, 4, 4]
