"""csrc/cuda/sinkhorn.cu on the emulator against the reference in float64: each tile, the log domain, the phases."""

import math

import pytest
import torch
from solves import OPTIONS, solve_both

import otkd_fast
from otkd_fast.ops import sinkhorn_shared
from otkd_fast.testing import random_problem

# (n, m): one warp; narrow; middle; wide (float; phases in float64); beyond every tile
TINY, NARROW, MIDDLE = ((1, 1), (5, 3), (16, 32)), ((17, 9),), ((33, 40), (4, 100))
WIDE, BEYOND = ((20, 150),), ((3, 193),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [TINY, NARROW, MIDDLE, WIDE, BEYOND], ids="tiny narrow middle wide beyond".split())
def test_every_tile(shapes, dtype, guarded, generator):
    for n, m in shapes:
        problem = random_problem(n, m, generator=generator, batch=(2,))
        solve_both(problem, dtype, guarded, epsilon=0.1, num_iters=4)


@pytest.mark.parametrize("gradient", ["unroll", "envelope", "detach", "last_step"])
@pytest.mark.parametrize("size", [(6, 7), (3, 130)], ids=str)
@pytest.mark.parametrize("epsilon", [0.2, 0.002], ids=["scalings", "logarithms"])
def test_gradients(epsilon, size, gradient, guarded, generator):
    outputs = {"envelope": ("regularized_cost",), "detach": ("transport_cost",)}.get(gradient)
    options = {"outputs": outputs} if outputs else {}
    problem = random_problem(*size, generator=generator, batch=(2,))
    if gradient == "detach":
        problem = problem._replace(a=None, b=None)
    for update_first in "ab":
        solve_both(problem, torch.float64, guarded, epsilon=epsilon, num_iters=5, gradient=gradient,
                   update_first=update_first, **options)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(6, 7), (20, 34), (3, 193)], ids=str)
def test_zero_masses_and_forbidden_pairs(size, dtype, guarded, generator):
    problem = random_problem(*size, generator=generator, batch=(3,), zeros=True, infinite=True)
    solve_both(problem, dtype, guarded, epsilon=0.3, num_iters=3)


def test_rows_that_cannot_be_served(guarded, generator):
    """The scalings find a sum of 0, and the block goes on in the log domain."""
    problem = random_problem(6, 7, generator=generator)
    problem.cost[2] = torch.inf
    problem.cost[:, 4] = torch.inf
    solve_both(problem, torch.float32, guarded, epsilon=0.3, num_iters=3)


def test_a_range_beyond_scalings_is_found_per_problem(guarded, generator):
    problem = random_problem(9, 8, generator=generator, batch=(3,))
    problem.cost[1] *= 200
    problem.cost[2] += 1000
    solve_both(problem, torch.float32, guarded, epsilon=0.5, num_iters=4, outputs=("transport_cost",))


@pytest.mark.parametrize("size", [(6, 7), (3, 130)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, size, guarded, generator):
    problem = random_problem(*size, generator=generator, batch=(2,))
    problem.cost[1] *= 4  # the problems stop at different iterations
    outputs = {"outputs": ("regularized_cost",)} if options.get("gradient") == "envelope" else {}
    num_iters = 30 if "tol" in options else 12
    solve_both(problem, torch.float64, guarded, epsilon=0.3, num_iters=num_iters, **outputs, **options)


@pytest.mark.parametrize("size", [(6, 7), (3, 130)], ids=str)
@pytest.mark.parametrize("relaxation", [1.0, 1.4])
def test_potentials_to_start_from(relaxation, size, guarded, generator):
    problem = random_problem(*size, generator=generator, batch=(2,), zeros=True)
    n, m = size
    f = torch.randn(2, n, generator=generator, dtype=torch.float64)
    g = torch.randn(2, m, generator=generator, dtype=torch.float64)
    g[0, 1] = math.inf
    for update_first in "ab":
        more = {"gradient": "unroll"} if relaxation == 1 else {"gradient": "envelope", "outputs": ("regularized_cost",)}
        solve_both(problem, torch.float64, guarded, epsilon=0.3, num_iters=3, initial_potentials=(f, g),
                   update_first=update_first, relaxation=relaxation, **more)  # fmt: skip


@pytest.mark.parametrize("size", [(5, 6), (18, 30), (34, 40), (2, 193)], ids=str)
@pytest.mark.parametrize("epsilon", [0.1, 0.005], ids=["scalings", "logarithms"])
def test_the_order_of_threads_does_not_matter(epsilon, size, emulated, guarded, generator):
    problem = random_problem(*size, generator=generator, batch=(2,), zeros=True)
    first = solve_both(problem, torch.float32, guarded, epsilon=epsilon, num_iters=2, outputs=("transport_cost",))
    for order in (1, 2, 3):
        emulated.set_order(order)
        again = solve_both(problem, torch.float32, guarded, epsilon=epsilon, num_iters=2, outputs=("transport_cost",))
        for got, want in zip(again, first, strict=True):
            assert torch.equal(got, want)


def test_the_cost_gradient_of_a_large_batch_is_made_in_parts(guarded, monkeypatch, generator):
    monkeypatch.setattr(sinkhorn_shared, "CHUNK_ENTRIES", 30)  # 2 of 5 problems at a time
    problem = random_problem(7, 8, generator=generator, batch=(5,))
    problem = problem._replace(cost=problem.cost[0])
    for update_first in "ab":
        solve_both(problem, torch.float64, guarded, epsilon=0.2, num_iters=2, update_first=update_first)


def test_small_problems_take_one_launch_each_way(emulated, generator):
    problem = random_problem(12, 15, generator=generator, batch=(3,)).to(torch.float32)
    cost = problem.cost.clone().requires_grad_()
    before = emulated.launches()
    result = otkd_fast.sinkhorn(cost, problem.a, problem.b, epsilon=0.1, num_iters=3, backend="cpu")
    assert emulated.launches() == before + 1
    result.transport_cost.sum().backward()
    assert emulated.launches() == before + 2


@pytest.mark.parametrize(
    "size, update_first, epsilon", [((6, 7), "a", 0.1), ((6, 7), "b", 0.002), ((3, 130), "b", 0.1)], ids=str
)
def test_one_cost_for_a_batch_of_marginals(epsilon, update_first, size, guarded, generator):
    problem = random_problem(*size, generator=generator, batch=(3,), zeros=True)
    problem = problem._replace(cost=problem.cost[0])
    options = dict(epsilon=epsilon, num_iters=3, update_first=update_first)
    solve_both(problem, torch.float64, guarded, **options)
    solve_both(problem._replace(a=None), torch.float32, guarded, outputs=("transport_cost",), **options)
