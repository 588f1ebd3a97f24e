"""csrc/cuda/sinkhorn_shared.cu on the emulator: one cost for many problems, by products of matrices."""

import pytest
import torch
from test_cuda_sinkhorn import solve_both

import otkd_fast
from otkd_fast.ops import _library, sinkhorn, sinkhorn_shared
from otkd_fast.testing import assert_close, random_problem

F32, F64 = torch.float32, torch.float64


def shared_problem(n, m, generator, batch=65, **options):
    """One more than two tiles of problems, beyond the sizes that a block holds."""
    problem = random_problem(n, m, generator=generator, batch=(batch,), **options)
    return problem._replace(cost=problem.cost[0])


def wide_reaching(problem):
    """Two of the problems have masses that scalings in float32 cannot hold."""
    a, b = problem.a.clone(), problem.b.clone()
    a[64, 0], b[5, 7] = 1e-33, 1e-31
    return problem._replace(a=a / a.sum(-1, keepdim=True), b=b / b.sum(-1, keepdim=True))


def serves(problem, dtype, core):
    n, m = problem.cost.shape
    code = _library.DTYPE_CODES[dtype]
    told = (code, *(0,) * 7, len(problem.b), n, m, 2, 2, 0.1, 0.0, 1.0, torch.inf, torch.inf, 1)
    return core.sinkhorn_shared_workspace(told, -1) >= 0


CASES = [(F32, 3, 193, "a"), (F32, 200, 2, "b"), (F32, 34, 197, "a"), (F64, 3, 193, "b"), (F64, 130, 3, "a")]


@pytest.mark.parametrize("dtype, n, m, update_first", CASES, ids=str)
def test_values_and_gradients(dtype, n, m, update_first, emulated, guarded, generator):
    problem = shared_problem(n, m, generator, zeros=True, infinite=update_first == "a")
    problem = problem._replace(a=None) if n == 3 else problem
    assert serves(problem, dtype, emulated)
    solve_both(problem, dtype, guarded, epsilon=0.2, num_iters=2, update_first=update_first)


@pytest.mark.parametrize("gradient, num_iters", [("envelope", 2), ("last_step", 1), ("last_step", 3)], ids=str)
def test_modes(gradient, num_iters, guarded, generator):
    problem = shared_problem(4, 194, generator, zeros=True)
    outputs = {"outputs": ("regularized_cost",)} if gradient == "envelope" else {}
    solve_both(problem, F32, guarded, epsilon=0.2, num_iters=num_iters, gradient=gradient, **outputs)


def test_a_plan_that_is_a_constant(guarded, generator):
    problem = shared_problem(4, 194, generator).to(F32)
    weights, grads = torch.linspace(0.5, 1.5, 65), []
    for backend, dtype in (("cpu", F32), ("reference", F64)):
        cost, a, b = problem.to(dtype)
        cost = cost.clone().requires_grad_()
        with guarded:
            value = otkd_fast.sinkhorn(cost, a, b, epsilon=0.2, num_iters=2, gradient="detach", backend=backend)
            grads += torch.autograd.grad((value.transport_cost * weights.to(dtype)).sum(), cost)
    assert_close(*grads, "sinkhorn", "gradient")


@pytest.mark.parametrize("epsilon", [0.2, 0.004], ids=["some", "all"])
def test_ranges_beyond_scalings(epsilon, guarded, generator):
    """Found on the device, problem by problem: those go to the log domain, and add their part of the gradient."""
    problem = wide_reaching(shared_problem(3, 193, generator))
    gradient = "unroll" if epsilon == 0.2 else "last_step"
    solve_both(problem, F32, guarded, epsilon=epsilon, num_iters=2, gradient=gradient)


def test_who_is_solved_in_the_log_domain(emulated, generator):
    """By the header of the history: only those whose exponents reach too far."""
    cost, a, b = wide_reaching(shared_problem(3, 193, generator)).to(F32)
    options = 0.2, 2, 0.0, 1.0, torch.inf, torch.inf, True, sinkhorn.KEEP_ALL
    *_, history = sinkhorn_shared._fwd_cuda(cost, a, b, None, None, *options)
    methods = sinkhorn_shared._History(history, cost, 65, 2, sinkhorn.KEEP_ALL).scalings_apart()[:, 0]
    assert methods.nonzero().flatten().tolist() == [5, 64] and methods[5] == 2


def test_rows_that_cannot_be_served(guarded, generator):
    """Two of the problems have mass in a row without a finite cost: a sum of 0 sends them to the log domain."""
    problem = shared_problem(3, 193, generator)
    cost, a = problem.cost.clone(), problem.a.clone()
    cost[1] = torch.inf
    a[2:, 1] = 0
    problem = problem._replace(cost=cost, a=a / a.sum(-1, keepdim=True))
    solve_both(problem, F32, guarded, epsilon=0.3, num_iters=2)


@pytest.mark.slow
def test_costs_that_are_all_infinite(guarded, generator):
    problem = shared_problem(3, 193, generator)
    problem = problem._replace(cost=torch.full_like(problem.cost, torch.inf))
    solve_both(problem, F32, guarded, epsilon=0.3, num_iters=2, outputs=("transport_cost",))


def test_potentials_to_start_from(guarded, generator):
    problem = shared_problem(3, 193, generator, zeros=True)
    f, g = (torch.randn(65, size, generator=generator, dtype=F64) for size in (3, 193))
    for update_first in "ab":
        options = {"initial_potentials": (f, g), "update_first": update_first}
        solve_both(problem, F64, guarded, epsilon=0.3, num_iters=2, **options)


def test_the_order_of_threads_does_not_matter(emulated, guarded, generator):
    problem = wide_reaching(shared_problem(3, 193, generator))
    first = None
    for order in (0, 1, 2, 3):
        emulated.set_order(order)
        found = solve_both(problem, F32, guarded, epsilon=0.2, num_iters=2)
        first = first or found
        assert all(torch.equal(got, want) for got, want in zip(found, first, strict=True))


def test_no_tensor_has_the_size_of_all_costs(emulated, generator):
    """256 problems of 1000 x 1000, 10 iterations: 4 matrices, and the vectors."""
    told = (0, *(0,) * 7, 256, 1000, 1000, 10, sinkhorn.KEEP_ALL, 0.1, 0.0, 1.0, torch.inf, torch.inf, 1)
    assert emulated.sinkhorn_shared_workspace(told, 0) < 100e6
    few = (*told[:8], 8, *told[9:])
    assert emulated.sinkhorn_shared_workspace(few, 0) < 0
    small = (*told[:9], 100, 100, *told[11:])
    assert emulated.sinkhorn_shared_workspace(small, 0) < 0


def test_an_iteration_is_two_products(emulated, generator):
    problem = shared_problem(3, 193, generator).to(F32)
    counts = []
    for num_iters in (2, 3):
        before = emulated.launches()
        otkd_fast.sinkhorn(*problem, epsilon=0.2, num_iters=num_iters, backend="cpu")
        counts.append(emulated.launches() - before)
    assert counts == [4 + 4 * 2 + 6, 4 + 4 * 3 + 6]
