"""The packed ops: many tiny problems, large ones that threads share, registration, offsets that do not fit."""

import pytest
import torch

import otkd_fast
from otkd_fast.functional._sinkhorn_options import COVERED, GRADIENTS, KEEP, OUTPUTS
from otkd_fast.testing import assert_close, backends, instruction_sets, use_instruction_set

from .packed import loop, pack, random_packed, total

pytestmark = pytest.mark.skipif("cpu" not in backends("sinkhorn_ragged"), reason="no compiled backend")
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
F32, F64 = torch.float32, torch.float64


def random_sizes(count, most, generator):
    return torch.randint(1, most + 1, (count, 2), generator=generator).tolist()


def compare(packed, problems, gradient, generator, dtype=F32, **options):
    """The op on the packed problems in `dtype` against a loop of the reference in float64."""
    one = [tuple(t.to(dtype).double().requires_grad_() for t in problem) for problem in problems]
    flat = [list(tensors) for tensors in zip(*one, strict=True)]
    expected = loop(one, backend="reference", gradient=gradient, **options)
    leaves = [t.to(dtype).requires_grad_() for t in packed[:3]]
    result = otkd_fast.sinkhorn_ragged(*leaves, **packed.offsets, gradient=gradient, backend="cpu", **options)
    for name, quantity in QUANTITIES.items():
        scale = max(1.0, float(packed.cost[packed.cost.isfinite()].max())) if quantity == "potential" else None
        assert_close(getattr(result, name), expected[name], "sinkhorn", quantity, scale=scale, context=name)
    assert torch.equal(result.num_iters, expected["num_iters"])
    covered = (COVERED[gradient],) if gradient in COVERED else OUTPUTS
    weights = {name: torch.randn(expected[name].shape, generator=generator, dtype=F64) for name in OUTPUTS}
    grads = torch.autograd.grad(total(result, weights, covered), leaves)
    wanted = torch.autograd.grad(total(expected, weights, covered), sum(flat, []), materialize_grads=True)
    for k, grad in enumerate(grads):
        parts = torch.cat([part.reshape(-1) for part in wanted[k * len(one) : (k + 1) * len(one)]])
        assert_close(grad, parts, "sinkhorn", "gradient", scale=max(float(parts.abs().max()), 0.1))
    return result


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_many_tiny_problems(instruction_set, generator):
    """Of sizes that differ: groups are filled up; those that exceed the float scalings leave their group."""
    sizes = random_sizes(60, 9, generator) + random_sizes(12, 32, generator) + [[33, 2], [2, 40]]
    problems, _ = random_packed(generator, sizes, zeros=True)
    scales = torch.tensor([1.0, 5.0, 30.0, 300.0])
    problems = [(cost * scales[k % 4], a, b) for k, (cost, a, b) in enumerate(problems)]
    packed = pack(problems)
    with use_instruction_set(instruction_set):
        compare(packed, problems, "unroll", generator, epsilon=0.1, num_iters=5)
        compare(packed, problems, "last_step", generator, epsilon=0.1, num_iters=12, tol=0.1, update_first="b")


def test_remainder_of_one_size(generator):
    """Those of a mixed group that need float64 are all of one size, which is not that of the group."""
    problems, _ = random_packed(generator, [(9, 8), (9, 7), (9, 5), (9, 5)])
    problems = [(cost * scale, a, b) for (cost, a, b), scale in zip(problems, (1, 1, 25, 25), strict=True)]
    compare(pack(problems), problems, "unroll", generator, epsilon=0.1, num_iters=5)


def test_max_cost_over_epsilon(generator):
    """1 to 1e5, with masses down to 1e-30 and zeros, in one call."""
    problems, _ = random_packed(generator, [[7, 5], [12, 30], [3, 3], [40, 35], [6, 6], [8, 8]] * 3, zeros=True)
    sharp = []
    for k, (cost, a, b) in enumerate(problems):
        a, b = ((w * (20 * torch.randn(w.shape, generator=generator)).double().exp()) for w in (a, b))
        a, b = ((w / w.max()).clamp(min=1e-30) * (w > 0) for w in (a, b))
        sharp.append((cost * (0.1, 1, 10, 100, 1e4)[k % 5], a / a.sum(), b / b.sum()))
    packed = pack(sharp)
    result = otkd_fast.sinkhorn_ragged(*packed.to(F32)[:3], **packed.offsets, epsilon=0.1, num_iters=6)
    expected = loop(
        [tuple(t.float().double() for t in p) for p in sharp], backend="reference", epsilon=0.1, num_iters=6
    )
    for k in range(len(sharp)):
        assert_close(result.transport_cost[k], expected["transport_cost"][k], "sinkhorn", "transport_cost")
        assert_close(result.regularized_cost[k], expected["regularized_cost"][k], "sinkhorn", "regularized_cost")


@pytest.mark.parametrize("gradient", ["unroll", "envelope"])
def test_a_large_problem_among_small_ones(gradient, generator):
    """It is shared by the threads; with one thread the results are the same to rounding, and every run has its bits."""
    problems, packed = random_packed(generator, [(3, 5), (520, 530), (40, 40), (6, 6)])
    torch.set_num_threads(2)
    two = compare(packed, problems, gradient, generator, epsilon=0.2, num_iters=3)
    again = otkd_fast.sinkhorn_ragged(*packed.to(F32)[:3], **packed.offsets, epsilon=0.2, num_iters=3)
    assert torch.equal(two.f, again.f) and torch.equal(two.transport_cost, again.transport_cost)
    torch.set_num_threads(1)
    one = otkd_fast.sinkhorn_ragged(*packed.to(F32)[:3], **packed.offsets, epsilon=0.2, num_iters=3)
    assert_close(one.transport_cost, two.transport_cost.detach().double(), "sinkhorn", "transport_cost")


@pytest.mark.parametrize("update_a_first", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_opcheck(gradient, update_a_first, generator):
    ops = torch.ops.otkd_fast
    _, packed = random_packed(generator, [(3, 5), (1, 1), (7, 2), (4, 4), (5, 5), (33, 34)])
    if update_a_first:
        packed = packed.to(F32)
    tensors = (*packed[:3], None, torch.rand_like(packed.b), *packed[3:])
    for keep in (0, KEEP[gradient]):
        arguments = (*tensors, 0.3, 3, 0.05, 1.0, 0.5, torch.inf, update_a_first, keep)
        torch.library.opcheck(ops.sinkhorn_ragged_fwd.default, arguments, test_utils=CHECKS)
    outputs = ops.sinkhorn_ragged_fwd(*arguments)
    grads = [torch.randn_like(output) for output in outputs[:4]]
    if gradient in COVERED:
        grads = [value if name == COVERED[gradient] else None for name, value in zip(OUTPUTS, grads, strict=True)]
    options = (0.3, 3, 0.5, torch.inf, update_a_first, gradient, True, gradient != "detach", gradient != "detach")
    torch.library.opcheck(ops.sinkhorn_ragged_bwd.default, (*tensors, outputs[6], *grads, *options), test_utils=CHECKS)


@pytest.mark.parametrize("metric", ["l1", "cosine"])
def test_opcheck_of_costs(metric, generator):
    ops = torch.ops.otkd_fast
    _, packed = random_packed(generator, [(3, 5), (1, 1), (7, 2)])
    x, y = (torch.rand(size, 6, generator=generator) for size in (len(packed.a), len(packed.b)))
    arguments = (x, y, *packed[3:], len(packed.cost), metric)
    torch.library.opcheck(ops.cost_matrix_ragged_fwd.default, arguments, test_utils=CHECKS)
    cost = ops.cost_matrix_ragged_fwd(*arguments)
    backward = (x, y, *packed[3:], cost, torch.rand_like(cost), metric, True, True)
    torch.library.opcheck(ops.cost_matrix_ragged_bwd.default, backward, test_utils=CHECKS)


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ([0, 2, 4], [0, 1, 4], "row_offsets: .*3 last"),
        ([0, 4, 3], [0, 1, 4], "row_offsets: .*no entry smaller"),
        ([1, 2, 3], [0, 1, 4], "row_offsets: .*0 first"),
        ([0, 2, 3], [0, 1, 5], "column_offsets: .*4 last"),
        ([0, 1, 3], [0, 1, 4], "cost: expected the 7 entries .* got 5"),
    ],
)
def test_op_refuses_offsets_that_do_not_fit(rows, columns, words):
    """Also where the public function could not look: no read or write beyond the tensors."""
    offsets = torch.tensor(rows), torch.tensor(columns)
    options = (0.1, 3, 0.0, 1.0, torch.inf, torch.inf, True, 0)
    with pytest.raises(ValueError, match=words):
        torch.ops.otkd_fast.sinkhorn_ragged_fwd(
            torch.ones(5), torch.ones(3) / 3, torch.ones(4) / 4, None, None, *offsets, *options
        )


def test_points_under_vmap_and_grad(generator):
    _, packed = random_packed(generator, [(3, 5), (4, 4), (7, 2)])
    x, y = (torch.rand(size, 3, generator=generator, dtype=F64) for size in (len(packed.a), len(packed.b)))

    def loss(x, y):
        result = otkd_fast.sinkhorn_ragged(
            (x, y), packed.a, packed.b, **packed.offsets, metric="l2", epsilon=0.2, num_iters=4, backend="cpu"
        )
        return (result.transport_cost**2).sum()

    leaves = [t.clone().requires_grad_() for t in (x, y)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, y), expected)
    both = torch.func.vmap(torch.func.grad(loss), (0, None))(torch.stack([x, 2 * x]), y)
    torch.testing.assert_close(both[0], expected[0])
    torch.testing.assert_close(both[1], torch.func.grad(loss)(2 * x, y))
