"""csrc/cuda/sinkhorn_ragged.cu and cost_matrix_ragged.cu on the emulator, against the reference in float64."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import otkd_fast
from otkd_fast import _dispatch
from otkd_fast.functional._sinkhorn_options import COVERED, OUTPUTS
from otkd_fast.ops import sinkhorn_ragged
from otkd_fast.testing import assert_close, random_problem

# of each tile, beyond them, without rows or columns or both
SIZES = [(3, 5), (1, 1), (0, 4), (40, 20), (9, 33), (66, 7), (2, 0), (0, 0), (3, 130), (130, 2), (7, 9)]
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))
F32, F64 = torch.float32, torch.float64


def offsets_of(sizes):
    counts = torch.tensor(sizes).T  # (2, K)
    return [torch.cat([torch.zeros(1, dtype=torch.int64), side.cumsum(0)]) for side in counts]


def problems_of(sizes, generator, dtype, **options):
    """Costs and masses of each problem; those of empty ones have masses on the other side only."""
    found = []
    for n, m in sizes:
        if n and m:
            found.append(random_problem(n, m, generator=generator, **options))
        else:
            found.append((torch.zeros(n, m), torch.rand(n, generator=generator), torch.rand(m, generator=generator)))
    return [tuple(t.to(dtype) for t in problem) for problem in found]


def check(sizes, guard, generator, dtype=F32, gradient="unroll", scale=1.0, **options):
    """Outputs and gradients; the emulated ones."""
    problems = problems_of(sizes, generator, dtype, zeros=True)
    packed = [
        scale * torch.cat([p[0].reshape(-1) for p in problems]),
        *(torch.cat([p[k] for p in problems]) for k in (1, 2)),
    ]
    row_offsets, column_offsets = offsets_of(sizes)
    places = {"row_offsets": row_offsets, "column_offsets": column_offsets}
    options = {"epsilon": 0.2, "num_iters": 4, "gradient": gradient} | options
    wanted_of = slice(1) if gradient == "detach" else slice(3)  # that mode has no gradient of the masses
    leaves, wide = [t.clone() for t in packed], [t.double() for t in packed]
    for tensor in (*leaves[wanted_of], *wide[wanted_of]):
        tensor.requires_grad_()
    with guard:
        actual = otkd_fast.sinkhorn_ragged(*leaves, **places, backend="cpu", **options)
    expected = otkd_fast.sinkhorn_ragged(*wide, **places, backend="reference", **options)
    found = [getattr(actual, name) for name in (*OUTPUTS, "marginal_error", "num_iters")]
    for name, quantity in QUANTITIES.items():
        unit = max(1.0, scale) if quantity == "potential" else None
        assert_close(getattr(actual, name), getattr(expected, name), "sinkhorn", quantity, scale=unit, context=name)
    assert_close(actual.marginal_error, expected.marginal_error, "sinkhorn", "marginal_error", scale=1.0)
    assert torch.equal(actual.num_iters, expected.num_iters)
    covered = (COVERED[gradient],) if gradient in COVERED else OUTPUTS
    weights = [torch.randn(getattr(expected, name).shape, generator=generator, dtype=F64) for name in covered]
    losses = []
    for result in (actual, expected):
        values = [getattr(result, name) for name in covered]
        values = [torch.where(value.isfinite(), value, 0) for value in values]
        losses.append(sum((w.to(v.dtype) * v).sum() for w, v in zip(weights, values, strict=True)))
    with guard:
        grads = torch.autograd.grad(losses[0], leaves[wanted_of])
    wanted = torch.autograd.grad(losses[1], wide[wanted_of], materialize_grads=True)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, "sinkhorn", "gradient", scale=max(float(want.abs().max()), 0.1))
    return *found, *grads


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("gradient", ["unroll", "envelope", "last_step", "detach"])
def test_each_gradient(gradient, dtype, guarded, emulated, generator):
    before = emulated.launches()
    check(SIZES, guarded, generator, dtype, gradient)
    tiles = 2 if dtype == F32 else 1
    assert emulated.launches() == before + 2 * (tiles + 1)  # the tiles and the rest, each way


@pytest.mark.parametrize(
    "options",
    [
        {"update_first": "b"},
        {"tol": 0.05, "num_iters": 12},
        {"marginal_penalty": (0.5, 2.0)},
        {"scale": 30.0},  # the log domain, exponentials in float64
        {"relaxation": 1.3, "num_iters": 6, "gradient": "envelope"},
    ],
    ids=str,
)
def test_options(options, guarded, generator):
    check(SIZES, guarded, generator, **options)


def test_many_problems(guarded, generator):
    """More than a block has threads: places are sums over all problems before."""
    check([(2, 3), (1, 2), *[(0, 0)] * 256, (4, 2), (1, 1), (3, 3)], guarded, generator, num_iters=2)


def test_the_order_of_threads_does_not_matter(guarded, emulated, generator):
    state, results = generator.get_state(), []
    for order in range(4):
        emulated.set_order(order)
        generator.set_state(state)
        results.append(check(SIZES[:6] + [(3, 130)], guarded, generator, num_iters=2))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("wrong", [[0, 9, 4, 9], [0, 3, 70, 9], [0, -2, 4, 9]], ids=str)
@pytest.mark.parametrize("update_a_first", [True, False])
def test_offsets_that_do_not_fit(wrong, update_a_first, guarded, generator):
    """Nothing is read or written beside the tensors; the problems with wrong offsets are NaN."""
    sizes = [(3, 2), (1, 4), (5, 3)]
    problems = problems_of(sizes, generator, F32)
    cost, a, b = (torch.cat([p[k].reshape(-1) for p in problems]) for k in range(3))
    columns = offsets_of(sizes)[1]
    with guarded:
        arguments = (cost, a, b, None, None, torch.tensor(wrong), columns)
        outputs = sinkhorn_ragged._fwd_cuda(*arguments, 0.2, 3, 0.0, 1.0, torch.inf, torch.inf, update_a_first, 0)
    bad = [k for k in range(3) if not 0 <= wrong[k] <= wrong[k + 1] <= 9]
    assert outputs[0][bad].isnan().all() and outputs[1][bad].isnan().all()


def test_the_implicit_gradient_is_the_references_on_cuda(emulated, generator):
    with pytest.raises(NotImplementedError, match="sinkhorn_ragged_bwd: no implicit gradient on CUDA"):
        check([(3, 4)], nullcontext(), generator, gradient="implicit")


def test_explain_says_what_is_left_to_the_reference(monkeypatch):
    tensor = SimpleNamespace(device=torch.device("cuda"))
    for op in ("sinkhorn_ragged", "sqrtm", "polar"):
        monkeypatch.setitem(_dispatch._CHOICES, (op, "cuda", "cuda"), "cuda")
    with otkd_fast.backend("cuda"):
        assert "with gradient='implicit': 'reference' runs" in otkd_fast.explain("sinkhorn_ragged", tensor)
        assert "beyond 2048 x 2048" in otkd_fast.explain("sqrtm", tensor)
        assert "in one launch up to 160 x 160" in otkd_fast.explain("polar", tensor)
        asked = _dispatch.resolve("sinkhorn_ragged", tensor.device, None, "gradient='implicit'")
    assert asked == "reference"


def check_costs(sizes, d, metric, dtype, guard, generator):
    row_offsets, column_offsets = offsets_of(sizes)
    places = {"row_offsets": row_offsets, "column_offsets": column_offsets}
    x = torch.randn(int(row_offsets[-1]), d, generator=generator, dtype=F64).to(dtype)
    y = torch.randn(int(column_offsets[-1]), d, generator=generator, dtype=F64).to(dtype)
    x[0] = 0  # of no direction
    leaves, wide = ([t.to(kind).requires_grad_() for t in (x, y)] for kind in (dtype, F64))
    options = {"metric": metric, "epsilon": 5.0, "num_iters": 1, "gradient": "envelope"}
    with guard:
        actual = otkd_fast.sinkhorn_ragged(tuple(leaves), **places, backend="cpu", **options)
        grads = torch.autograd.grad(actual.regularized_cost.sum(), leaves)
    expected = otkd_fast.sinkhorn_ragged(tuple(wide), **places, backend="reference", **options)
    wanted = torch.autograd.grad(expected.regularized_cost.sum(), wide)
    cost = actual._operands[0]
    assert_close(cost, expected._operands[0], "cost_matrix", "value", context=metric)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, "sinkhorn", "gradient", context=metric)
    return cost, *grads


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean", "cosine"])
def test_costs_between_points(metric, dtype, guarded, generator):
    check_costs(SIZES, 5, metric, dtype, guarded, generator)


@pytest.mark.parametrize("metric", ["l1", "cosine"])
def test_costs_of_large_problems_and_long_rows(metric, guarded, emulated, generator):
    """Problems of several tiles, with fewer and more blocks for each than tiles."""
    results = []
    state = generator.get_state()
    for order in (0, 1, 2):
        emulated.set_order(order)
        generator.set_state(state)
        results.append(check_costs([(70, 66), (2, 3), (0, 1)], 70, metric, F32, guarded, generator))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
