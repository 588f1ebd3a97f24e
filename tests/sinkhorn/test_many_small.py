"""Batches of many small problems, which share vectors (csrc/cpu/sinkhorn_lanes.h), against the reference in float64."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.functional._sinkhorn_options import COVERED, GRADIENTS, OUTPUTS
from otkd_fast.ops.sinkhorn import KEEP_ALL, history_size
from otkd_fast.testing import assert_close, backends, instruction_sets, random_problem, use_instruction_set

pytestmark = pytest.mark.skipif("cpu" not in backends("sinkhorn"), reason="no compiled backend")
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))
F32, F64 = torch.float32, torch.float64
EPSILON = 0.1
RANGES = (1.0, 10.0, 100.0, 1000.0, 1e5)  # max C / epsilon
SIZES = [(4, 4, 70), (16, 16, 21), (2, 3, 4), (1, 1, 40), (32, 32, 9), (5, 31, 18), (8, 8, 33), (32, 7, 11), (1, 6, 35)]


def problems(n, m, batch, generator, ranges=(10.0,), dtype=F32, tiny=False, **options):
    """Problem k has costs up to epsilon ranges[k % len(ranges)]; `tiny`: masses of a sharp softmax down to 1e-30."""
    cost, a, b = random_problem(n, m, batch=(batch,), generator=generator, **options)
    scale = EPSILON * torch.tensor(ranges, dtype=F64)[torch.arange(batch) % len(ranges)]
    if tiny:
        a, b = (
            torch.where(w > 0, w * (20 * torch.randn(w.shape, generator=generator)).double().exp(), 0) for w in (a, b)
        )
        a, b = ((w / w.amax(-1, keepdim=True)).clamp(min=1e-30) * (w > 0) for w in (a, b))
        a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    return tuple(t.to(dtype) for t in (cost * scale[:, None, None], a, b))


def solved(problem, weights, gradient, backend, **options):
    """The result, and the gradients of the sum of <weights, outputs> over the outputs that the mode covers."""
    leaves = [t.clone().requires_grad_(gradient != "detach" or k == 0) for k, t in enumerate(problem)]
    result = otkd_fast.sinkhorn(*leaves, epsilon=EPSILON, gradient=gradient, backend=backend, **options)
    total = 0
    for name in (COVERED[gradient],) if gradient in COVERED else OUTPUTS:
        value = getattr(result, name)
        total = total + (weights[name].to(value.dtype) * torch.where(value.isfinite(), value, 0)).sum()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return result, torch.autograd.grad(total, wanted, materialize_grads=True)


def check(problem, gradient, generator, **options):
    """Against the reference, problem by problem: each on its own scale."""
    batch, n, m = problem[0].shape
    shapes = ((batch,), (batch,), (batch, n), (batch, m))
    weights = {
        name: torch.randn(shape, generator=generator, dtype=F64) for name, shape in zip(OUTPUTS, shapes, strict=True)
    }
    actual, grads = solved(problem, weights, gradient, "cpu", **options)
    expected, wanted = solved([t.double() for t in problem], weights, gradient, "reference", **options)
    assert torch.equal(actual.num_iters, expected.num_iters)
    assert_close(actual.marginal_error, expected.marginal_error, "sinkhorn", "marginal_error", scale=1.0)
    costs = torch.where(problem[0].isfinite(), problem[0], 0).amax((-2, -1))
    for k in range(batch):
        for name, quantity in QUANTITIES.items():
            scale = max(float(costs[k]), EPSILON) if quantity == "potential" else None
            assert_close(
                getattr(actual, name)[k], getattr(expected, name)[k], "sinkhorn", quantity, scale=scale, context=name
            )
        for grad, want, unit in zip(grads, wanted, (1e-3, 1, 1), strict=False):
            scale = max(float(want[k].abs().max()), unit)
            assert_close(grad[k], want[k], "sinkhorn", "gradient", scale=scale, context=f"{gradient}, problem {k}")


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_sizes(gradient, dtype, generator):
    iterations = 60 if gradient == "implicit" else 6
    for k, (n, m, batch) in enumerate(SIZES):
        # forbidden pairs may leave no plan with these marginals: see the next test
        infinite = k % 3 == 0 and gradient != "implicit"
        problem = problems(n, m, batch, generator, (4.0,), dtype, zeros=k % 2 == 0, infinite=infinite)
        check(problem, gradient, generator, num_iters=iterations, update_first="ab"[k % 2])


@pytest.mark.parametrize("batch", [2, 6])
@pytest.mark.parametrize("num_iters", [60, 300])
def test_implicit_gradient_where_no_plan_has_these_marginals(num_iters, batch, generator):
    """The pairs that still get mass fall apart into components. The cost's gradient is determined, that of the masses
    up to a constant in each component: by every change that leaves a component's rows as much as its columns.
    """
    cost = 0.4 * torch.rand(batch, 3, 3, generator=generator, dtype=F64)
    cost[:, :2, 1:] = torch.inf  # rows 0 and 1, mass 0.8, have column 0 alone, mass 0.3
    masses = (torch.tensor(w, dtype=F64).expand(batch, 3) for w in ((0.5, 0.3, 0.2), (0.3, 0.4, 0.3)))
    problem = (cost, *masses)
    weights = {
        name: torch.ones((), dtype=F64) if k < 2 else torch.zeros((), dtype=F64) for k, name in enumerate(OUTPUTS)
    }
    result, actual = solved(problem, weights, "implicit", "cpu", num_iters=num_iters)
    _, expected = solved(problem, weights, "implicit", "reference", num_iters=num_iters)
    assert (result.marginal_error > 0.5).all()
    assert all(grad.isfinite().all() for grad in actual)
    assert_close(actual[0], expected[0], "sinkhorn", "gradient", scale=1.0)
    for direction_a, direction_b in (
        ((1, -1, 0), (0, 0, 0)), ((0, 0, 0), (0, 1, -1)), ((1, 0, 0), (1, 0, 0)), ((0, 0, 1), (0, 1, 0)),
    ):  # fmt: skip
        along = [
            sum(
                (grad * torch.tensor(d, dtype=F64)).sum(-1)
                for grad, d in zip(grads[1:], (direction_a, direction_b), strict=True)
            )
            for grads in (actual, expected)
        ]
        assert_close(*along, "sinkhorn", "gradient", scale=1.0)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("gradient", ["unroll", "envelope", "detach", "last_step"])
def test_every_range_in_one_batch(gradient, dtype, generator):
    """Each problem of a group takes its own way: lanes of float or double, or the log domain by itself."""
    for ranges in (RANGES if dtype == F32 else RANGES[:-1], (100.0, 500.0)):
        for n, m in ((4, 4), (17, 9)):
            problem = problems(n, m, 39, generator, ranges, dtype, zeros=True, infinite=n == 4)
            check(problem, gradient, generator, num_iters=7)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("gradient", ["unroll", "envelope", "detach", "last_step"])
def test_tiny_masses(gradient, dtype, generator):
    """Down to 1e-30, beside exact zeros."""
    for range_ in (1.0, 10.0, 100.0):
        problem = problems(6, 10, 20, generator, (range_,), dtype, tiny=True, zeros=True)
        assert problem[1][problem[1] > 0].min() < 1e-25
        check(problem, gradient, generator, num_iters=5)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_each_problem_stops_by_itself(gradient, dtype, generator):
    ranges = (1.0, 8.0) if gradient == "implicit" else (1.0, 20.0, 90.0)
    problem = problems(7, 5, 50, generator, ranges, dtype, zeros=True)
    options = {"num_iters": 40, "tol": 1e-3 if gradient == "implicit" else 0.03}
    result = otkd_fast.sinkhorn(*problem, epsilon=EPSILON, **options)
    assert result.num_iters.unique().numel() > 3
    check(problem, gradient, generator, **options)


@pytest.mark.parametrize("gradient", ["unroll", "last_step", "envelope"])
def test_start(gradient, generator):
    """Potentials to start from, also wide ones and entries that are not finite; the schedule runs on them."""
    problem = problems(5, 9, 37, generator, (1.0, 20.0), zeros=True)
    for scale in (0.1, 3.0):
        f, g = (scale * torch.randn(37, size, generator=generator) for size in (5, 9))
        f[0, 2], g[1, 3], g[0, 1] = -torch.inf, torch.nan, torch.inf
        leaves = [t.clone().requires_grad_() for t in problem]
        exact = [t.double().requires_grad_() for t in problem]
        options = {"epsilon": EPSILON, "num_iters": 4, "gradient": gradient}
        result = otkd_fast.sinkhorn(*leaves, initial_potentials=(f, g), backend="cpu", **options)
        start = (f.double(), g.double())
        expected = otkd_fast.sinkhorn(*exact, initial_potentials=start, backend="reference", **options)
        assert_close(result.regularized_cost, expected.regularized_cost, "sinkhorn", "regularized_cost")
        grads = torch.autograd.grad(result.regularized_cost.sum(), leaves)
        for grad, want in zip(grads, torch.autograd.grad(expected.regularized_cost.sum(), exact), strict=True):
            assert_close(grad, want, "sinkhorn", "gradient")
    check(problem, gradient, generator, num_iters=4, epsilon_schedule=[1.0, (0.5, 2)])


def test_uniform_masses(generator):
    cost = problems(6, 3, 20, generator)[0]
    for gradient in ("unroll", "envelope"):
        leaf, exact = cost.clone().requires_grad_(), cost.double().requires_grad_()
        options = {"epsilon": EPSILON, "num_iters": 5, "gradient": gradient}
        results = [otkd_fast.sinkhorn(x, backend=name, **options) for x, name in ((leaf, "cpu"), (exact, "reference"))]
        assert_close(results[0].f, results[1].f, "sinkhorn", "potential")
        grads = [
            torch.autograd.grad(r.regularized_cost.sum(), x)[0] for r, x in zip(results, (leaf, exact), strict=True)
        ]
        assert_close(*grads, "sinkhorn", "gradient")


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_instruction_sets(instruction_set, generator):
    with use_instruction_set(instruction_set):
        for dtype in (F32, F64):
            for n, m, batch in ((4, 4, 41), (13, 18, 23)):
                problem = problems(n, m, batch, generator, (1.0, 30.0, 300.0), dtype, zeros=True)
                check(problem, "unroll", generator, num_iters=6)
                check(problem, "last_step", generator, num_iters=20, tol=0.03)


def test_same_bits_and_threads(generator):
    """The same bits again, and with another number of threads; on float scalings also in another place of the batch."""
    problem = problems(8, 8, 1100, generator, RANGES, zeros=True)
    weights = {name: torch.ones((), dtype=F64) for name in OUTPUTS}
    results = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        result, grads = solved(problem, weights, "unroll", "cpu", num_iters=20)
        results.append([*(getattr(result, name) for name in OUTPUTS), *grads])
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))
    problem = problems(8, 8, 128, generator, (1.0, 10.0), zeros=True)
    order = torch.randperm(128, generator=generator)
    here = otkd_fast.sinkhorn(*problem, epsilon=EPSILON, num_iters=20)
    there = otkd_fast.sinkhorn(*(t[order] for t in problem), epsilon=EPSILON, num_iters=20)
    assert torch.equal(there.f, here.f[order]) and torch.equal(there.transport_cost, here.transport_cost[order])


def test_nan_stays_in_its_problem(generator):
    cost, a, b = problems(5, 6, 40, generator)
    clean = otkd_fast.sinkhorn(cost, a, b, epsilon=EPSILON, num_iters=5)
    cost[7, 2, 3] = torch.nan
    result = otkd_fast.sinkhorn(cost, a, b, epsilon=EPSILON, num_iters=5)
    others = torch.arange(40) != 7
    assert result.transport_cost[7].isnan() and result.regularized_cost[7].isnan()
    assert torch.equal(result.f[others], clean.f[others])
    assert torch.equal(result.transport_cost[others], clean.transport_cost[others])


def test_history_holds_the_last_scalings_only(generator):
    """The unrolled gradient of small problems runs the loop again: memory from call to call does not grow with T."""
    cost, a, b = problems(4, 4, 10, generator)
    options = (EPSILON, 500, 0.0, 1.0, torch.inf, torch.inf, True, KEEP_ALL)
    history = torch.ops.otkd_fast.sinkhorn_fwd(cost, a, b, None, None, *options)[6]
    assert history.shape == (10, history_size(4, 4, 500, KEEP_ALL, together=True))
    few = torch.ops.otkd_fast.sinkhorn_fwd(cost[:3], a[:3], b[:3], None, None, *options)[6]
    assert few.shape == (3, history_size(4, 4, 500, KEEP_ALL))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("total", [0.5, 2.0])
def test_totals_that_differ_drift_out_of_range(total, isa, generator):
    """Where nobody may look at the masses, scalings double or halve at each iteration: float32 does not hold them."""
    cost, a, b = problems(6, 5, 19, generator)
    b = torch.where(torch.arange(19).unsqueeze(1) % 3 == 0, total * b, b)
    options = (EPSILON, 200, 0.0, 1.0, torch.inf, torch.inf, True, 0)
    with use_instruction_set(isa):
        results = torch.ops.otkd_fast.sinkhorn_fwd(cost, a, b, None, None, *options)
    expected = reference.sinkhorn(cost.double(), a.double(), b.double(), epsilon=EPSILON, num_iters=200)
    for actual, name in zip(results, OUTPUTS, strict=False):
        scale = float(getattr(expected, name)[getattr(expected, name).isfinite()].abs().max())
        assert_close(actual, getattr(expected, name), "sinkhorn", QUANTITIES[name], scale=scale, context=name)


def test_reported_error_is_the_one_that_stopped_the_loop(generator):
    """In every bit: none of 20000 problems says that it stopped above tol."""
    cost, a, b = problems(4, 3, 20000, generator)
    result = otkd_fast.sinkhorn(cost, a, b, epsilon=EPSILON, num_iters=200, tol=1e-5)
    stopped = result.num_iters < 200
    assert stopped.sum() > 10000 and result.marginal_error[stopped].max() <= 1e-5
