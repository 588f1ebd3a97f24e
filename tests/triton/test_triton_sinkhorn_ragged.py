"""Packed problems by Triton, under the interpreter in guarded memory, against the float64 reference."""

import math

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.functional._sinkhorn_options import COVERED  # noqa: E402
from otkd_fast.ops import _library  # noqa: E402
from otkd_fast.testing import assert_close, random_problem  # noqa: E402
from otkd_fast.testing.guarded import gradients_guarded, guarded  # noqa: E402

F32, F64 = torch.float32, torch.float64
OUTPUTS = ("transport_cost", "regularized_cost", "f", "g")
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))
# of each tile of the fixture: inside, at its border, in rows or columns beyond; beyond all; without rows or columns
SIZES = [(1, 1), (2, 2), (3, 4), (0, 2), (4, 3), (5, 3), (2, 0), (3, 6), (7, 9), (0, 0)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a few tiny problems meet each kernel, and several blocks with a tail."""
    from otkd_fast.triton_kernels import sinkhorn_ragged

    monkeypatch.setattr(sinkhorn_ragged, "CLASSES", {F32: (2, 4), F64: (2, 4)})
    monkeypatch.setattr(sinkhorn_ragged, "ROWS", 4)
    monkeypatch.setattr(sinkhorn_ragged, "COLUMNS", 4)


def packed(generator, sizes=SIZES, scales=(1.0,), dtype=F32, **options):
    """(cost, a, b), offsets; the problems without rows or columns have mass on the other side."""
    problems = []
    for k, (n, m) in enumerate(sizes):
        problem = random_problem(max(n, 1), max(m, 1), generator=generator, **options)
        cost = problem.cost[:n, :m] * scales[k % len(scales)]
        problems.append((cost.reshape(-1), problem.a[:n], problem.b[:m]))
    tensors = [torch.cat(parts).to(dtype) for parts in zip(*problems, strict=True)]
    rows, columns = (torch.tensor([0, *(size[k] for size in sizes)]).cumsum(0) for k in (0, 1))
    return tensors, {"row_offsets": rows, "column_offsets": columns}


def finite(result):
    return tuple(torch.where(value.isfinite(), value, 0) for value in (getattr(result, name) for name in OUTPUTS))


def check(tensors, offsets, gradient, generator, **options):
    """Values, and the gradients of a weighted sum of what the mode covers."""
    names = (COVERED[gradient],) if gradient in COVERED else OUTPUTS
    dtype, chosen = tensors[0].dtype, [OUTPUTS.index(name) for name in names]
    exact = [t.double().requires_grad_(gradient != "detach" or k == 0) for k, t in enumerate(tensors)]
    expected = reference.sinkhorn_ragged(*exact, **offsets, gradient=gradient, **options)
    weights = [torch.randn(out.shape, generator=generator, dtype=F64) for out in finite(expected)]
    total = sum((finite(expected)[k] * weights[k]).sum() for k in chosen)
    wanted = torch.autograd.grad(total, [t for t in exact if t.requires_grad])
    results = []

    def solve(cost, a, b):
        result = otkd_fast.sinkhorn_ragged(
            cost, a, b, **offsets, gradient=gradient, backend="triton", **options
        )  # fmt: skip
        results.append(result)
        return tuple(finite(result)[k] for k in chosen)

    leaves = tuple(t.clone().requires_grad_(t_.requires_grad) for t, t_ in zip(tensors, exact, strict=True))
    _, found = gradients_guarded(solve, leaves, lambda k: weights[chosen[k]].to(dtype))
    actual, context = results[0], f"{dtype} {gradient} {options}"
    unit = max(float(tensors[0].detach()[tensors[0].isfinite()].max()), options["epsilon"])
    for name, quantity in QUANTITIES.items():
        scale = unit if quantity == "potential" else None
        pair = getattr(actual, name), getattr(expected, name)
        assert_close(*pair, "sinkhorn", quantity, scale=scale, context=f"{context} {name}")
    errors = actual.marginal_error, expected.marginal_error
    assert_close(*errors, "sinkhorn", "marginal_error", scale=1.0, context=context)
    assert torch.equal(actual.num_iters, expected.num_iters), context
    for value, want, least in zip(found, wanted, (1e-3, unit, unit), strict=False):
        assert_close(value, want, "sinkhorn", "gradient", scale=max(float(want.abs().max()), least), context=context)


MODES = [("unroll", "a"), ("unroll", "b"), ("envelope", "a"), ("detach", "b"), ("last_step", "a")]
REST = [("envelope", "b"), ("detach", "a"), ("last_step", "b")]


@pytest.mark.parametrize(
    "gradient, update_first", MODES + [pytest.param(*mode, marks=pytest.mark.slow) for mode in REST]
)
def test_modes(gradient, update_first, generator):
    """float32 beyond its scalings in some of the problems, zero masses, forbidden pairs."""
    tensors, offsets = packed(generator, zeros=True, infinite=True, scales=(1.0, 1.0, 40.0))
    check(tensors, offsets, gradient, generator, epsilon=0.1, num_iters=2, update_first=update_first)


OPTIONS = {
    "tol": ("unroll", {"num_iters": 4, "tol": 5e-2}),
    "penalties": ("unroll", {"num_iters": 2, "marginal_penalty": (0.5, None), "update_first": "b"}),
    "relaxation": ("envelope", {"num_iters": 2, "relaxation": 1.3}),
    "auto": ("envelope", {"num_iters": 11, "relaxation": "auto"}),
    "implicit": ("implicit", {"num_iters": 6, "update_first": "b"}),
    "penalised, implicit": ("implicit", {"num_iters": 3, "marginal_penalty": 0.5}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, generator):
    """In float64; mass that cannot be served would keep a problem from stopping."""
    gradient, options = OPTIONS[name]
    sizes = [(2, 2), (4, 1), (5, 3)] if "marginal_penalty" not in options else [(2, 2), (0, 2), (5, 3), (2, 0)]
    tensors, offsets = packed(generator, sizes, dtype=F64)
    check(tensors, offsets, gradient, generator, epsilon=0.4, **options)


def test_initial_potentials(generator):
    tensors, offsets = packed(generator, dtype=F64)
    start = torch.randn(len(tensors[2]), generator=generator, dtype=F64)
    start[1] = math.nan
    options = {"epsilon": 0.2, "num_iters": 1, "initial_potentials": (None, start)}
    check(tensors, offsets, "unroll", generator, **options)


def test_the_tiles_that_are_launched(monkeypatch, generator):
    """One of the dense sizes, and none beyond what the packed rows and columns can need."""
    from otkd_fast.triton_kernels import sinkhorn_ragged

    monkeypatch.setattr(sinkhorn_ragged, "CLASSES", {F32: (16, 32, 64)})
    sides = [
        [(launch["LN"], launch["BN"]) for launch in sinkhorn_ragged._launches(*sizes, F32, False) if launch["CHIP"]]
        for sizes in ((3, 16), (17, 1), (100, 200))
    ]
    assert sides == [[(0, 16)], [(0, 16), (16, 32)], [(0, 16), (16, 32), (32, 64)]]
    tensors, offsets = packed(generator, [(3, 5), (17, 2)])
    check(tensors, offsets, "unroll", generator, epsilon=0.2, num_iters=1)


@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean", "cosine"])
def test_points(metric, generator):
    sizes = [(1, 2), (0, 3), (5, 4), (2, 0)]
    _, offsets = packed(generator, sizes)
    for dtype, d in ((F32, 5), (F64, 33)):
        x, y = (torch.rand(count, d, generator=generator, dtype=F64).to(dtype) for count in (8, 9))
        y[4] = x[2] * (1 + 1e-4)  # nearly coincident
        if metric == "cosine":
            y[5], x[1] = 0, x[1] * 1e-20
        exact = [t.double().requires_grad_() for t in (x, y)]
        expected = reference.cost_matrix_ragged(*exact, **offsets, metric=metric)
        weights = torch.randn(expected.shape, generator=generator, dtype=F64)
        wanted = torch.autograd.grad((expected * weights).sum(), exact)
        ops = {name: _library.operators(f"cost_matrix_ragged_{name}")["triton"] for name in ("fwd", "bwd")}
        with guarded() as guards:
            placed = [guards.input(t) for t in (x, y, *offsets.values())]
            cost = ops["fwd"](*placed, len(expected), metric)
            grads = ops["bwd"](*placed, cost, guards.input(weights.to(dtype)), metric, True, True)
        assert guards.launches >= 3
        assert_close(cost, expected, "cost_matrix", "near_coincident" if metric != "cosine" else "value")
        for grad, want in zip(grads, wanted, strict=True):
            rows = want.abs().amax(-1, keepdim=True).clamp(min=1)  # a row of 1e-20 has a gradient of 1e20
            assert_close(grad / rows.to(dtype), want / rows, "cost_matrix", "gradient")


def test_public_function_on_points(generator):
    _, offsets = packed(generator, [(3, 2), (1, 4)])
    x, y = (torch.rand(count, 3, generator=generator, dtype=F64) for count in (4, 6))
    options = {"metric": "sqeuclidean", "epsilon": 0.2, "num_iters": 2}
    grads = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        result = otkd_fast.sinkhorn_ragged(tuple(leaves), **offsets, **options, backend=backend)
        grads.append((result.transport_cost, *torch.autograd.grad(result.transport_cost.sum(), leaves)))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "rows, columns", [([0, 2, 5], [0, 2, 3]), ([0, 3, 2], [0, 1, 3]), ([-1, 2, 3], [0, 1, 3]), ([0, 1, 3], [0, 1, 4])]
)
def test_offsets_that_do_not_fit_reach_nothing_outside(rows, columns):
    """The op does not read them on the host; the problem that does not fit is NaN."""
    offsets = torch.tensor(rows), torch.tensor(columns)
    forward, backward = (_library.operators(f"sinkhorn_ragged_{name}")["triton"] for name in ("fwd", "bwd"))
    with guarded() as guards:
        tensors = [guards.input(t) for t in (torch.ones(5), torch.ones(3) / 3, torch.ones(3) / 3)]
        outputs = forward(*tensors, None, None, *offsets, 0.1, 2, 0.0, 1.0, math.inf, math.inf, True, 2)
        assert outputs[0].isnan().any() and outputs[2].shape == (3,)
        last = (0.1, 2, math.inf, math.inf, True, "unroll", True, True, True)
        backward(*tensors, None, None, *offsets, outputs[6], guards.input(torch.ones(2)), None, None, None, *last)
        points = guards.input(torch.ones(3, 2)), guards.input(torch.ones(3, 2))
        ops = {name: _library.operators(f"cost_matrix_ragged_{name}")["triton"] for name in ("fwd", "bwd")}
        cost = ops["fwd"](*points, *offsets, 5, "l1")
        ops["bwd"](*points, *offsets, cost, guards.input(torch.ones(5)), "l1", True, True)


def test_no_problems_and_repeatability(generator):
    none = {"row_offsets": torch.zeros(1, dtype=torch.int64), "column_offsets": torch.zeros(1, dtype=torch.int64)}
    empty = otkd_fast.sinkhorn_ragged(
        torch.zeros(0), torch.zeros(0), torch.zeros(0), **none, epsilon=0.1, num_iters=1, backend="triton"
    )
    assert empty.transport_cost.shape == (0,)
    tensors, offsets = packed(generator, [(3, 2), (7, 5)])
    results = []
    for _ in range(2):
        leaf = tensors[0].clone().requires_grad_()
        result = otkd_fast.sinkhorn_ragged(leaf, *tensors[1:], **offsets, epsilon=0.1, num_iters=2, backend="triton")
        results.append((result.f, result.g, *torch.autograd.grad(result.transport_cost.sum(), leaf)))
    assert all(map(torch.equal, *results))


def test_registration(generator):
    tensors, offsets = packed(generator, [(3, 2), (1, 4)])
    forward, backward = (_library.operators(f"sinkhorn_ragged_{name}")["triton"] for name in ("fwd", "bwd"))
    given = (*tensors, None, None, *offsets.values())
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (*given, 0.1, 2, 0.0, 1.0, math.inf, math.inf, True, 2)
    torch.library.opcheck(forward, arguments, test_utils=utilities)
    history = forward(*arguments)[6]
    last = (0.1, 2, math.inf, math.inf, True, "unroll", True, True, False)
    torch.library.opcheck(backward, (*given, history, torch.ones(2), None, None, None, *last), test_utils=utilities)
    x, y = torch.rand(4, 3, generator=generator), torch.rand(6, 3, generator=generator)
    forward, backward = (_library.operators(f"cost_matrix_ragged_{name}")["triton"] for name in ("fwd", "bwd"))
    torch.library.opcheck(forward, (x, y, *offsets.values(), 10, "l2"), test_utils=utilities)
    cost = forward(x, y, *offsets.values(), 10, "l2")
    arguments = (x, y, *offsets.values(), cost, torch.ones(10), "l2", True, False)
    torch.library.opcheck(backward, arguments, test_utils=utilities)


def test_compiled(generator):
    """One graph, the same numbers."""
    tensors, offsets = packed(generator, [(3, 2), (1, 4)])

    def loss(cost, a, b):
        return otkd_fast.sinkhorn_ragged(
            cost, a, b, **offsets, epsilon=0.1, num_iters=2, backend="triton"
        ).transport_cost.sum()

    leaves = [t.requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(map(torch.equal, found, expected))
