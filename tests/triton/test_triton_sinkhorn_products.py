"""One cost for a batch of marginals by products of matrices, under the interpreter, against the float64 reference."""

import math

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.ops import _library  # noqa: E402
from otkd_fast.testing import assert_close, random_problem  # noqa: E402
from otkd_fast.testing.guarded import guarded  # noqa: E402

F32, F64 = torch.float32, torch.float64
OUTPUTS = ("transport_cost", "regularized_cost", "f", "g")
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))
COVERED = {"envelope": ("regularized_cost",), "detach": ("transport_cost",)}
KERNELS = {"update", "sums_of_plans", "exponentiate"}
TILES = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch):
    """Small problems in several tiles, with tails."""
    from otkd_fast.triton_kernels import _sinkhorn_products, sinkhorn, sinkhorn_shared

    monkeypatch.setattr(sinkhorn, "is_small", lambda *_: False)
    monkeypatch.setattr(sinkhorn_shared, "is_small", lambda *_: False)
    monkeypatch.setattr(_sinkhorn_products, "tiles_of", lambda *_: {"BP": 2, "BN": 4, "DEPTH": 8} | TILES)
    monkeypatch.setattr(
        _sinkhorn_products, "gradient_tiles", lambda *_: {"BN": 4, "BM": 4, "DEPTH": 8, "CHUNK": 4} | TILES
    )


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran."""
    from triton.runtime.interpreter import GridExecutor

    names, call = set(), GridExecutor.__call__

    def recorded(self, *arguments, **options):
        names.add(self.fn.__name__)
        return call(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", recorded)
    return names


def shared_problem(n, m, batch, generator, **options):
    """The smallest cost is not 0."""
    problem = random_problem(n, m, batch=(batch,), generator=generator, **options)
    return problem._replace(cost=problem.cost[0] + 0.3)


def solved(problem, weights, solve, gradient, need, **options):
    leaves = [None if x is None else x.clone().requires_grad_(k in need) for k, x in enumerate(problem)]
    outputs = solve(*leaves, gradient=gradient, **options)
    total = 0
    for name in COVERED.get(gradient, OUTPUTS):
        value = getattr(outputs, name)
        total = total + (weights[name].to(value.dtype) * torch.where(value.isfinite(), value, 0)).sum()
    return outputs, torch.autograd.grad(total, [x for x in leaves if x is not None and x.requires_grad])


def check(problem, dtype, gradient, generator, *, need=(0, 1, 2), initial=None, **options):
    """Values and gradients against the reference in float64 for the same, rounded, problem."""
    problem, need = problem.to(dtype), (0,) if gradient == "detach" else need
    batch = len(problem.b if problem.a is None else problem.a)
    n, m = problem.cost.shape
    sizes = zip(OUTPUTS, ((batch,), (batch,), (batch, n), (batch, m)), strict=True)
    weights = {name: torch.randn(shape, generator=generator, dtype=F64) for name, shape in sizes}
    starts = {} if initial is None else {"initial_potentials": (None, initial)}
    given, exact = ({name: (None, g.to(kind)) for name, (_, g) in starts.items()} for kind in (dtype, F64))
    expected, wanted = solved(problem.to(F64), weights, reference.sinkhorn, gradient, need, **options, **exact)
    with guarded():
        actual, found = solved(
            problem, weights, otkd_fast.sinkhorn, gradient, need, backend="triton", **options, **given
        )
    context = f"{(n, m, batch)} {dtype} {gradient} {options}"
    unit = max(float(problem.cost[problem.cost.isfinite()].max()), options["epsilon"])
    for name, quantity in QUANTITIES.items():
        scale = unit if quantity == "potential" else None
        pair = getattr(actual, name), getattr(expected, name)
        assert_close(*pair, "sinkhorn", quantity, scale=scale, context=f"{context} {name}")
    errors = actual.marginal_error, expected.marginal_error
    assert_close(*errors, "sinkhorn", "marginal_error", scale=1.0, context=context)
    assert torch.equal(actual.num_iters, expected.num_iters)
    for value, want in zip(found, wanted, strict=True):
        assert value.dtype == dtype
        assert_close(value, want, "sinkhorn", "gradient", scale=max(float(want.abs().max()), unit), context=context)


GRADIENTS = [("unroll", 0.1), ("unroll", 0.005), ("last_step", 0.005), ("envelope", 0.1), ("detach", 0.005)]
SLOW_GRADIENTS = [("last_step", 0.1), ("envelope", 0.005), ("detach", 0.1)]


@pytest.mark.parametrize(
    "gradient, epsilon", GRADIENTS + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_GRADIENTS]
)
def test_gradients(gradient, epsilon, generator, launched):
    """Both ways, either side first; masses of 0."""
    problem = shared_problem(5, 7, 3, generator, zeros=True)
    check(problem, F32, gradient, generator, epsilon=epsilon, num_iters=3)
    check(problem, F64, gradient, generator, epsilon=epsilon / 8, num_iters=2, update_first="b")
    assert KERNELS < launched and not launched & {"solve_small", "half_iteration", "plan_sums"}


def test_both_ways_are_taken(generator, monkeypatch):
    """The history tells which."""
    forward = _library.operators("sinkhorn_shared_fwd")["triton"]
    problem = shared_problem(5, 7, 3, generator)
    for dtype, epsilon, scalings in ((F32, 0.1, 1.0), (F32, 0.005, 0.0), (F64, 0.01, 1.0), (F64, 0.001, 0.0)):
        cost, a, b = problem.to(dtype)
        history = forward(cost, a, b, None, None, epsilon, 2, 0.0, 1.0, math.inf, math.inf, True, 1)[6]
        assert history.shape == (3, 4 + 12) and (history[:, 0] == scalings).all()
    cost[1, 2] = torch.inf
    history = forward(cost, a, b, None, None, 0.1, 2, 0.0, 1.0, math.inf, math.inf, True, 1)[6]
    assert (history[:, 0] == 0).all()


def test_the_kernel_has_full_precision_at_the_end_of_the_range(generator):
    """Rounding an exponent of 59 to float32 would cost 2e-6."""
    from otkd_fast.triton_kernels import _sinkhorn_large, _sinkhorn_products

    cost = 0.3 + torch.rand(7, 1100, generator=generator)
    epsilon = math.log2(math.e) / 59
    sides = _sinkhorn_large.Sides(None, None, 1.0, 1.0, 0.0, 0.0, epsilon)
    with guarded():
        shared = _sinkhorn_products.prepare(cost, sides, torch.zeros(2, 1100, dtype=F64))
    wide = cost.double()
    exact = ((wide.amin(1, keepdim=True) - wide) * (math.log2(math.e) / epsilon)).exp2()
    assert shared.flag.all() and ((shared.kernel - exact).abs() <= 3e-7 * exact).all()


@pytest.mark.parametrize("num_iters", [1, 2, 3])
def test_last_step_of_few(num_iters, generator):
    check(shared_problem(3, 5, 2, generator), F64, "last_step", generator, epsilon=0.1, num_iters=num_iters)


@pytest.mark.parametrize("n, m, batch", [(1, 1, 1), (1, 6, 5), (9, 2, 1)])
def test_sizes(n, m, batch, generator):
    problem = shared_problem(n, m, batch, generator)
    check(problem, F32, "unroll", generator, epsilon=0.2, num_iters=2)
    check(problem._replace(a=None), F32, "unroll", generator, epsilon=0.2, num_iters=1, update_first="b")
    check(problem._replace(b=None), F64, "unroll", generator, epsilon=0.2, num_iters=1)


@pytest.mark.parametrize("need", [(0,), (1,), (2,)])
def test_one_gradient_alone(need, generator):
    check(shared_problem(4, 5, 3, generator), F32, "unroll", generator, epsilon=0.1, num_iters=2, need=need)


def test_forbidden_pairs(generator):
    problem = shared_problem(5, 6, 3, generator, zeros=True, infinite=True)
    check(problem, F64, "unroll", generator, epsilon=0.1, num_iters=2)


@pytest.mark.parametrize("size", [1.0, 40.0], ids=["scalings", "log domain"])
def test_initial_potentials(size, generator):
    """Large ones leave the range of scalings by themselves."""
    start = size * torch.randn(3, 6, generator=generator, dtype=F64)
    start[1, 2] = torch.nan
    check(shared_problem(5, 6, 3, generator), F64, "unroll", generator, epsilon=0.1, num_iters=2, initial=start)


def test_tiny_masses(generator):
    """They do not widen the exponents: scalings leave the masses out."""
    problem = shared_problem(5, 6, 3, generator)
    a = problem.a * 10.0 ** torch.tensor([0, -12, -25, 0, -3], dtype=F64)
    problem = problem._replace(a=a / a.sum(-1, keepdim=True))
    check(problem, F32, "unroll", generator, epsilon=0.04, num_iters=3)


IMPLICIT = {
    "scalings": (F32, 12, {}),
    "columns first": (F64, 12, {"update_first": "b"}),
    "forbidden": (F64, 12, {}),
    "penalties": (F64, 6, {"marginal_penalty": (0.5, None)}),
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_implicit(name, generator, monkeypatch):
    """No cost is expanded: the dense op does not run."""
    from otkd_fast.triton_kernels import sinkhorn_shared

    dtype, num_iters, options = IMPLICIT[name]
    problem = shared_problem(4, 5, 3, generator, zeros=name != "forbidden", infinite=name == "forbidden")
    if "marginal_penalty" not in options:
        monkeypatch.setattr(sinkhorn_shared, "differentiate", None)
    monkeypatch.setattr(sinkhorn_shared, "_implicitly_apart", None)
    check(problem, dtype, "implicit", generator, epsilon=1.0, num_iters=num_iters, **options)


def test_implicit_beyond_the_range_of_float64(generator, monkeypatch):
    from otkd_fast.triton_kernels import _sinkhorn_products, sinkhorn_shared

    monkeypatch.setattr(_sinkhorn_products, "RANGE", {F64: 0.0})
    monkeypatch.setattr(sinkhorn_shared, "CHUNK_ENTRIES", 50)  # two problems at a time
    problem = shared_problem(4, 5, 3, generator)
    check(problem, F64, "implicit", generator, epsilon=1.0, num_iters=12, update_first="b")


def test_other_loops_keep_their_kernels(generator, launched):
    """With a tolerance, penalties or over-relaxation."""
    problem = shared_problem(3, 4, 2, generator)
    for options in ({"tol": 5e-2}, {"marginal_penalty": 0.5}, {"relaxation": 1.3}):
        gradient = "envelope" if "relaxation" in options else "unroll"
        check(problem, F64, gradient, generator, epsilon=0.3, num_iters=3, **options)
    assert not launched & KERNELS


def test_the_same_bits_twice_and_transposed(generator):
    cost, a, b = shared_problem(4, 5, 3, generator).to(F32)
    results = []
    for given in (cost, cost.mT.contiguous().mT, cost):
        leaf = given.clone(memory_format=torch.preserve_format).requires_grad_()
        result = otkd_fast.sinkhorn(leaf, a, b, epsilon=0.1, num_iters=2, backend="triton")
        results.append((result.f, result.g, *torch.autograd.grad(result.transport_cost.sum(), leaf)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("keep, gradient", [(2, "unroll"), (1, "implicit")])
def test_registration(keep, gradient, generator):
    cost, a, b = shared_problem(3, 4, 2, generator).to(F32)
    forward, backward = (_library.operators(f"sinkhorn_shared_{way}")["triton"] for way in ("fwd", "bwd"))
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (cost, a, b, None, None, 0.1, 2, 0.0, 1.0, math.inf, math.inf, True, keep)
    torch.library.opcheck(forward, arguments, test_utils=utilities)
    history = forward(*arguments)[6]
    last = (0.1, 2, math.inf, math.inf, True, gradient, True, True, False)
    torch.library.opcheck(
        backward, (cost, a, b, None, None, history, torch.ones(2), None, None, None, *last),
        test_utils=utilities[:1] if gradient == "implicit" else utilities,
    )  # fmt: skip


def test_no_problems():
    cost, a = torch.rand(3, 4, requires_grad=True), torch.rand(0, 3)
    result = otkd_fast.sinkhorn(cost, a, epsilon=0.1, num_iters=2, backend="triton")
    assert result.f.shape == (0, 3)
    assert torch.equal(torch.autograd.grad(result.transport_cost.sum(), cost)[0], torch.zeros(3, 4))
