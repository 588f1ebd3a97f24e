"""Packed problems against a loop over them and against one block-diagonal problem; points, plans, transforms."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.functional._sinkhorn_options import COVERED, GRADIENTS, OUTPUTS
from otkd_fast.testing import assert_close, backends, block_diagonal_problem, random_problem

from .packed import SIZES, Packed, loop, pack, random_packed, total

ALL = backends("sinkhorn_ragged")
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))
OPTIONS = [
    {"num_iters": 6},
    {"num_iters": 6, "update_first": "b"},
    {"num_iters": 60, "tol": 1e-2, "marginal_penalty": (0.5, None)},
    {"num_iters": 5, "epsilon_schedule": [1.0, (0.3, 2)]},
]
F64 = torch.float64


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("case", range(len(OPTIONS)))
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("backend", ALL)
def test_is_a_loop_over_the_problems(backend, gradient, case, dtype, generator):
    """Values, potentials, plan and gradients; the loop is the reference in float64."""
    # forbidden pairs may leave no plan with these marginals, and then there is no fixed point to differentiate
    problems, packed = random_packed(generator, zeros=True, infinite=gradient != "implicit")
    options = {"epsilon": 0.1, "gradient": gradient} | OPTIONS[case]
    given = packed.to(dtype)
    if gradient == "implicit":
        options["num_iters"] = 60
    covered = (COVERED[gradient],) if gradient in COVERED else OUTPUTS
    one = [tuple(t.to(dtype).double() for t in problem) for problem in problems]
    flat = [[t.requires_grad_() for t in tensors] for tensors in zip(*one, strict=True)]
    if gradient == "detach":
        flat[1:] = [[t.requires_grad_(False) for t in tensors] for tensors in flat[1:]]
    expected = loop(one, backend="reference", **options)
    leaves = [t.clone().requires_grad_(gradient != "detach" or k == 0) for k, t in enumerate(given[:3])]
    result = otkd_fast.sinkhorn_ragged(*leaves, **packed.offsets, backend=backend, **options)
    for name, quantity in QUANTITIES.items():
        scale = 1.0 if quantity == "potential" else None
        assert_close(getattr(result, name), expected[name], "sinkhorn", quantity, scale=scale, context=name)
    assert torch.equal(result.num_iters, expected["num_iters"])
    assert_close(result.marginal_error, expected["marginal_error"], "sinkhorn", "marginal_error", scale=1.0)
    assert_close(result.plan(), expected["plan"], "sinkhorn", "gradient")
    weights = {name: torch.randn(expected[name].shape, generator=generator, dtype=F64) for name in OUTPUTS}
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(total(result, weights, covered), wanted, materialize_grads=True)
    want = torch.autograd.grad(total(expected, weights, covered), sum(flat[: len(wanted)], []), materialize_grads=True)
    for k, grad in enumerate(grads):
        parts = torch.cat([part.reshape(-1) for part in want[k * len(SIZES) : (k + 1) * len(SIZES)]])
        assert_close(grad, parts, "sinkhorn", "gradient", scale=max(float(parts.abs().max()), 0.1))


@pytest.mark.parametrize("backend", ALL)
def test_is_a_block_diagonal_problem(backend, generator):
    whole, blocks = block_diagonal_problem([(3, 4), (5, 2), (1, 1)], generator=generator)
    packed = pack(blocks)
    leaf, packed_leaf = whole.cost.clone().requires_grad_(), packed.cost.clone().requires_grad_()
    options = {"epsilon": 0.1, "num_iters": 9, "backend": backend}
    one = otkd_fast.sinkhorn(leaf, *whole[1:], **options)
    ragged = otkd_fast.sinkhorn_ragged(packed_leaf, *packed[1:3], **packed.offsets, **options)
    torch.testing.assert_close(ragged.transport_cost.sum(), one.transport_cost)
    torch.testing.assert_close(ragged.f, one.f)
    torch.testing.assert_close(ragged.g, one.g)
    grads = (
        torch.autograd.grad(one.transport_cost, leaf)[0],
        torch.autograd.grad(ragged.transport_cost.sum(), packed_leaf)[0],
    )
    torch.testing.assert_close(grads[1], grads[0][whole.cost.isfinite()])
    torch.testing.assert_close(ragged.plan(), one.plan()[whole.cost.isfinite()])


@pytest.mark.parametrize("relaxation", [1.4, "auto"])
@pytest.mark.parametrize("backend", ALL)
def test_relaxation_is_decided_for_each_problem(backend, relaxation, generator):
    problems, packed = random_packed(generator)
    options = {"epsilon": 0.05, "num_iters": 300, "tol": 1e-6, "relaxation": relaxation, "gradient": "envelope"}
    expected = loop(problems, backend="reference", **options)
    result = otkd_fast.sinkhorn_ragged(*packed[:3], **packed.offsets, backend=backend, **options)
    assert torch.equal(result.num_iters, expected["num_iters"]) and result.num_iters.unique().numel() > 2
    torch.testing.assert_close(result.plan(), expected["plan"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("backend", ALL)
def test_warm_start(backend, generator):
    problems, packed = random_packed(generator, zeros=True)
    options = {"epsilon": 0.1, "backend": backend}
    solve = {**packed.offsets, **options}
    first = otkd_fast.sinkhorn_ragged(*packed[:3], num_iters=3, **solve)
    second = otkd_fast.sinkhorn_ragged(*packed[:3], num_iters=4, initial_potentials=(None, first.g), **solve)
    whole = otkd_fast.sinkhorn_ragged(*packed[:3], num_iters=7, **solve)
    torch.testing.assert_close(second.plan(), whole.plan())


@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_points(backend, dtype, metric, generator):
    """(x, y) and a metric: the costs of cost_matrix, problem by problem, with gradients to the points."""
    problems, packed = random_packed(generator)
    x, y = (torch.rand(size, 6, generator=generator).to(dtype) for size in (len(packed.a), len(packed.b)))
    leaves, exact = ([t.clone().to(kind).requires_grad_() for t in (x, y)] for kind in (dtype, F64))
    options = {"epsilon": 0.2, "num_iters": 5}
    result = otkd_fast.sinkhorn_ragged(tuple(leaves), **packed.offsets, metric=metric, backend=backend, **options)
    grads = torch.autograd.grad(result.transport_cost.sum(), leaves)
    values = []
    for (i, j), (k, m) in zip(*(torch.stack([o[:-1], o[1:]], 1).tolist() for o in packed[3:]), strict=True):
        cost = otkd_fast.cost_matrix(exact[0][i:j], exact[1][k:m], metric=metric, backend="reference")
        values.append(reference.sinkhorn(cost, **options).transport_cost)
    values = torch.stack(values)
    assert_close(result.transport_cost, values, "sinkhorn", "transport_cost")
    for actual, expected in zip(grads, torch.autograd.grad(values.sum(), exact), strict=True):
        assert actual.dtype == dtype
        if dtype != torch.bfloat16:
            assert_close(actual, expected, "sinkhorn", "gradient")
        torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ALL)
def test_uniform_masses(backend, generator):
    problems, packed = random_packed(generator)
    options = {"epsilon": 0.1, "num_iters": 4}
    expected = loop([(cost, None, None) for cost, _, _ in problems], backend="reference", **options)
    result = otkd_fast.sinkhorn_ragged(packed.cost, **packed.offsets, backend=backend, **options)
    torch.testing.assert_close(result.f, expected["f"])
    half = otkd_fast.sinkhorn_ragged(packed.cost.half(), **packed.offsets, backend=backend, **options)
    assert half.f.dtype == torch.float32 and half.marginal_error.max() < 1
    torch.testing.assert_close(half.f.double(), expected["f"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("penalty", [None, 0.7])
@pytest.mark.parametrize("backend", ALL)
def test_problems_without_rows_or_columns(backend, penalty, gradient, generator):
    """Transport cost 0, no iteration; their mass cannot be served. Their neighbours do not notice."""
    sizes = [(0, 3), (4, 2), (0, 0), (3, 0), (2, 5)]
    problems = [random_problem(n, m, generator=generator) for n, m in ((4, 2), (2, 5))]
    empty = torch.empty(0, dtype=F64)
    masses = torch.rand(3, generator=generator, dtype=F64)
    packed = Packed(
        torch.cat([p.cost.reshape(-1) for p in problems]),
        torch.cat([problems[0].a, masses, problems[1].a]),
        torch.cat([masses, problems[0].b, problems[1].b]),
        torch.tensor([n for n, _ in [(0, 0), *sizes]]).cumsum(0),
        torch.tensor([m for _, m in [(0, 0), *sizes]]).cumsum(0).int(),
    )
    leaves = [t.clone().requires_grad_(gradient != "detach" or k == 0) for k, t in enumerate(packed[:3])]
    options = {"epsilon": 0.1, "num_iters": 5, "marginal_penalty": penalty, "gradient": gradient}
    result = otkd_fast.sinkhorn_ragged(*leaves, **packed.offsets, backend=backend, **options)
    assert result.num_iters.tolist() == [0, 5, 0, 0, 5]
    price = 0.0 if penalty is None else penalty * masses.sum()
    alone = loop(problems, backend="reference", **options)
    for k, name in enumerate(("transport_cost", "regularized_cost")):
        lost = torch.as_tensor(k * price, dtype=F64)
        expected = torch.stack([lost, alone[name][0], 0 * lost, lost, alone[name][1]])
        torch.testing.assert_close(getattr(result, name).detach(), expected.detach())
    missing = masses.sum() if penalty is None else 0 * masses.sum()
    torch.testing.assert_close(result.marginal_error[[0, 2, 3]], torch.stack([missing, empty.sum(), missing]))
    assert (result.f[4:7] == -torch.inf).all() and (result.g[:3] == -torch.inf).all()
    torch.testing.assert_close(result.f[:4].detach(), alone["f"][:4].detach())
    torch.testing.assert_close(result.plan().detach(), alone["plan"].detach())
    value = getattr(result, COVERED.get(gradient, "regularized_cost")).sum()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(value, wanted)
    assert all(grad.isfinite().all() for grad in grads)
    if gradient != "detach":
        expected = torch.full((3,), penalty or 0.0, dtype=F64)
        torch.testing.assert_close(grads[1][4:7], expected)
        torch.testing.assert_close(grads[2][:3], expected)


@pytest.mark.parametrize("backend", ALL)
def test_no_problems(backend):
    offsets = {"row_offsets": torch.tensor([0]), "column_offsets": torch.tensor([0])}
    cost, a = torch.empty(0, requires_grad=True), torch.empty(0, requires_grad=True)
    result = otkd_fast.sinkhorn_ragged(cost, a, torch.empty(0), **offsets, epsilon=0.1, num_iters=3, backend=backend)
    assert result.transport_cost.shape == result.num_iters.shape == result.f.shape == result.plan().shape == (0,)
    result.transport_cost.sum().backward()
    assert cost.grad.shape == a.grad.shape == (0,)
    points = torch.empty(0, 3, requires_grad=True), torch.empty(0, 3)
    value = otkd_fast.sinkhorn_ragged(points, **offsets, metric="l1", epsilon=0.1, num_iters=3, backend=backend)
    value.transport_cost.sum().backward()
    assert points[0].grad.shape == (0, 3)


@pytest.mark.parametrize("backend", ALL)
def test_plan_apply(backend, generator):
    problems, packed = random_packed(generator, [(3, 5), (4, 4), (1, 3)], zeros=True)
    cost = packed.cost.clone().requires_grad_()
    result = otkd_fast.sinkhorn_ragged(cost, *packed[1:3], **packed.offsets, epsilon=0.1, num_iters=4, backend=backend)
    parts = result.plan().split([problem.cost.numel() for problem in problems])
    blocks = torch.block_diag(*(part.reshape(p.cost.shape) for part, p in zip(parts, problems, strict=True)))
    for transpose, matrix in ((False, blocks), (True, blocks.T)):
        for k in ((), (2,)):
            v = torch.randn(matrix.shape[1], *k, generator=generator, dtype=F64, requires_grad=True)
            actual, expected = result.plan_apply(v, transpose), matrix @ v
            torch.testing.assert_close(actual, expected)
            wanted = torch.autograd.grad(expected.sum(), (v, cost), retain_graph=True)
            torch.testing.assert_close(torch.autograd.grad(actual.sum(), (v, cost), retain_graph=True), wanted)
    with pytest.raises(ValueError, match=r"^v: expected shape \(12,\)"):
        result.plan_apply(torch.ones(8, dtype=F64))


@pytest.mark.parametrize("backend", [name for name in ALL if name != "reference"])
def test_compiles(backend, generator):
    """Packed costs with marginals: nothing waits, so nothing breaks the graph. (The reference reads the offsets.)"""
    torch._dynamo.reset()
    _, packed = random_packed(generator)

    def solve(cost, logits, rows, columns):
        return otkd_fast.sinkhorn_ragged(
            cost,
            logits.exp(),
            packed.b,
            row_offsets=rows,
            column_offsets=columns,
            epsilon=0.1,
            num_iters=4,
            backend=backend,
        )

    leaves = packed.cost.clone().requires_grad_(), packed.a.log().requires_grad_()
    expected, actual = (
        f(*leaves, *packed[3:]) for f in (solve, torch.compile(solve, fullgraph=True, backend="aot_eager"))
    )
    torch.testing.assert_close(actual.plan(), expected.plan())
    grads = [torch.autograd.grad(result.transport_cost.sum(), leaves) for result in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ALL)
def test_func(backend, generator):
    if backend == "reference":
        pytest.skip("its loop needs the offsets on the host, and vmap does not give them")
    _, packed = random_packed(generator)
    rows, columns = packed[3:]

    def loss(cost, a):
        result = otkd_fast.sinkhorn_ragged(
            cost, a, packed.b, row_offsets=rows, column_offsets=columns, epsilon=0.1, num_iters=4, backend=backend
        )
        return (result.transport_cost**2).sum()

    leaves = [t.clone().requires_grad_() for t in packed[:2]]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(*packed[:2]), expected)
    costs = torch.stack([packed.cost, 2 * packed.cost])
    grads = torch.func.vmap(torch.func.grad(loss), (0, None))(costs, packed.a)
    torch.testing.assert_close(grads[0], expected[0])
    torch.testing.assert_close(grads[1], torch.func.grad(loss)(costs[1], packed.a))


@pytest.mark.parametrize("backend", ALL)
def test_uncovered_output_raises(backend, generator):
    _, packed = random_packed(generator)
    cost = packed.cost.clone().requires_grad_()
    options = {"epsilon": 0.1, "num_iters": 3, "backend": backend}
    result = otkd_fast.sinkhorn_ragged(cost, *packed[1:3], **packed.offsets, gradient="envelope", **options)
    with pytest.raises(RuntimeError, match="gradient='envelope' differentiates regularized_cost only"):
        result.transport_cost.sum().backward()
    with pytest.raises(ValueError, match="^a: .*gradient='detach'"):
        a = packed.a.clone().requires_grad_()
        otkd_fast.sinkhorn_ragged(cost, a, packed.b, **packed.offsets, gradient="detach", **options)
