"""Guards in the denominators of the scalings: the reference against the loop written out, the kernels against it."""

import pytest
import torch

import otkd_fast
from otkd_fast import _dispatch, reference
from otkd_fast.functional._sinkhorn_guarded import sinkhorn_guarded
from otkd_fast.testing import assert_close, backends, instruction_sets, use_instruction_set

COMPILED = [name for name in backends("sinkhorn_shared", compiled_only=True) if name == "cpu"]
F64 = torch.float64
LEAST = 1e-30  # float32 has no smaller results
QUANTITIES = {
    "transport_cost": "transport_cost",
    "regularized_cost": "regularized_cost",
    "f": "potential",
    "g": "potential",
}
MODES = {
    "unroll": ("transport_cost", "regularized_cost", "f", "g"),
    "last_step": ("transport_cost", "regularized_cost", "f", "g"),
    "envelope": ("regularized_cost",),
    "detach": ("transport_cost",),
}


def problem(batch, n, m, generator, *, low=0.0):
    """Costs from `low` to 1; softmaxes with one class of each problem left out."""
    cost = low + (1 - low) * torch.rand(n, m, generator=generator, dtype=F64)
    masses = []
    for size in (n, m):
        logits = 2.0 * torch.randn(batch, size, generator=generator, dtype=F64)
        if min(n, m) > 1:
            logits[torch.arange(batch), torch.arange(batch) % min(n, m)] = -torch.inf
        masses.append(torch.softmax(logits, -1))
    return cost, *masses


def written_out(cost, a, b, guard, epsilon, num_iters, update_first):
    """One problem: the scalings and the plan."""
    kernel = (-cost / epsilon).exp()
    u, v = (a > 0).double(), (b > 0).double()
    for _ in range(num_iters):
        if update_first == "a":
            u = a / (kernel @ v + guard[0])
        v = b / (kernel.mT @ u + guard[1])
        if update_first == "b":
            u = a / (kernel @ v + guard[0])
    return u, v, u[:, None] * kernel * v


@pytest.mark.parametrize("update_first", ["a", "b"])
@pytest.mark.parametrize("low", [0.0, -0.7])
def test_reference_is_the_loop(low, update_first, generator):
    cost, a, b = problem(3, 5, 4, generator, low=low)
    guard, epsilon = (0.02, 0.3), 0.2
    out = reference.sinkhorn_guarded(cost, a, b, guard=guard, epsilon=epsilon, num_iters=4, update_first=update_first)
    for k in range(3):
        u, v, plan = written_out(cost, a[k], b[k], guard, epsilon, 4, update_first)
        torch.testing.assert_close(out.f[k].exp(), u.pow(epsilon), rtol=1e-12, atol=0)
        torch.testing.assert_close(out.g[k].exp(), v.pow(epsilon), rtol=1e-12, atol=0)
        torch.testing.assert_close(out.transport_cost[k], (plan * cost).sum(), rtol=1e-12, atol=0)
        error = (plan.sum(1) - a[k]).abs().sum() + (plan.sum(0) - b[k]).abs().sum()
        torch.testing.assert_close(out.marginal_error[k], error, rtol=1e-12, atol=1e-15)
        f, g = (torch.where(w > 0, p - epsilon * w.log(), 0) for w, p in ((a[k], out.f[k]), (b[k], out.g[k])))
        dual = (a[k] * f).sum() + (b[k] * g).sum() + epsilon * (1 - plan.sum())
        torch.testing.assert_close(out.regularized_cost[k], dual, rtol=1e-12, atol=1e-14)
        assert error > 1e-3


def test_reference_without_guards_is_sinkhorn(generator):
    cost, a, b = problem(3, 5, 6, generator)
    options = {"epsilon": 0.1, "num_iters": 5, "update_first": "b"}
    for actual, expected in zip(
        reference.sinkhorn_guarded(cost, a, b, guard=(0.0, 0.0), **options), reference.sinkhorn(cost, a, b, **options),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def outputs_of(solve, tensors, gradient, directions):
    """The outputs, and the gradients of their products with the directions that the mode covers."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    if gradient == "detach":
        leaves[1:] = [leaf.detach() for leaf in leaves[1:]]
    result = solve(*leaves)
    total = 0
    for name in MODES[gradient]:
        value = getattr(result, name)
        value = torch.where(value.isfinite(), value, 0)
        total = total + (value * directions[name].to(value.dtype)).sum()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return result, torch.autograd.grad(total, wanted)


def check(tensors, dtype, guard, gradient, generator, **options):
    """The compiled op against the reference in float64, on the same rounded inputs."""
    cost, a, b = tensors = tuple(tensor.to(dtype) for tensor in tensors)
    batch = len(a)
    directions = {
        name: torch.randn(shape, generator=generator, dtype=F64)
        for name, shape in zip(QUANTITIES, ((batch,), (batch,), a.shape, b.shape), strict=True)
    }
    found = outputs_of(
        lambda *leaves: sinkhorn_guarded(*leaves, guard=guard, gradient=gradient, backend="cpu", **options),
        tensors, gradient, directions,
    )  # fmt: skip
    wanted = outputs_of(
        lambda *leaves: reference.sinkhorn_guarded(*leaves, guard=guard, gradient=gradient, **options),
        [tensor.double() for tensor in tensors], gradient, directions,
    )  # fmt: skip
    unit = max(float(cost[cost.isfinite()].abs().max()), options["epsilon"])
    for name, quantity in QUANTITIES.items():
        actual, expected = getattr(found[0], name).detach(), getattr(wanted[0], name).detach()
        scale = unit if quantity == "potential" else max(float(expected.abs().max()), LEAST)
        assert_close(actual, expected, "sinkhorn", quantity, scale=scale, context=name)
    assert_close(found[0].marginal_error, wanted[0].marginal_error, "sinkhorn", "marginal_error", scale=1.0)
    assert torch.equal(found[0].num_iters, wanted[0].num_iters)
    for got, want in zip(found[1], wanted[1], strict=True):
        scale = max(float(want.abs().max()), LEAST)
        assert_close(got, want, "sinkhorn", "gradient", scale=scale, context=f"{gradient} {dtype} {tuple(got.shape)}")


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("update_first", ["a", "b"])
def test_kernel(backend, update_first, gradient, generator):
    """Guards as large as the sums, alike and not, and none on one side; batches that do not fill their lanes."""
    for dtype in (torch.float32, F64):
        for (batch, n, m), guard in (
            ((1, 1, 1), (0.5, 0.1)), ((2, 8, 5), (0.0, 0.2)), ((7, 33, 16), (0.3, 0.0)), ((33, 40, 41), (1e-8, 1e-4)),
        ):  # fmt: skip
            options = {"epsilon": 0.1, "num_iters": 6, "update_first": update_first}
            check(problem(batch, n, m, generator), dtype, guard, gradient, generator, **options)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("isa", instruction_sets())
def test_each_instruction_set(backend, isa, generator):
    with use_instruction_set(isa):
        for dtype in (torch.float32, F64):
            tensors = problem(19, 23, 35, generator)
            check(tensors, dtype, (1e-3, 2e-2), "unroll", generator, epsilon=0.05, num_iters=5, update_first="b")


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("range_", [1, 10, 59, 100, 1000, 1e5])
@pytest.mark.parametrize("low", [0.0, 0.5, -0.3])
def test_every_range(backend, low, range_, generator):
    """Beyond 600 entries of K are 0 in double, too: what is left is mass / guard."""
    for dtype in (torch.float32, F64):
        if low < 0 and range_ > 100:
            continue  # K is then far above the guards, and its range has no floor: not what guards are for
        tensors = problem(6, 9, 11, generator, low=low)
        options = {"epsilon": 1 / range_, "num_iters": 8}
        check(tensors, dtype, (1e-8, 3e-7), "unroll", generator, **options)


@pytest.mark.parametrize("backend", COMPILED)
def test_forbidden_pairs_and_a_row_with_none(backend, generator):
    cost, a, b = problem(6, 9, 9, generator)
    cost = torch.where(torch.rand(9, 9, generator=generator) < 0.3, torch.inf, cost)
    cost[2] = torch.inf
    check((cost, a, b), F64, (1e-3, 1e-2), "envelope", generator, epsilon=0.1, num_iters=4)
    out = sinkhorn_guarded(cost, a, b, guard=(1e-3, 1e-2), epsilon=0.1, num_iters=4)
    torch.testing.assert_close(out.f[3:, 2].div(0.1).exp(), a[3:, 2] / 1e-3, rtol=1e-11, atol=0)


@pytest.mark.parametrize("backend", COMPILED)
def test_threads_share_a_block(backend, generator):
    torch.set_num_threads(2)
    tensors = problem(40, 300, 310, generator)
    check(tensors, torch.float32, (1e-6, 1e-5), "unroll", generator, epsilon=0.05, num_iters=50)


@pytest.mark.parametrize("backend", COMPILED)
def test_gradient_of_finite_differences(backend, generator):
    cost, a, b = (tensor.requires_grad_() for tensor in problem(2, 4, 3, generator))
    weights = torch.rand(3, 4, generator=generator, dtype=F64)

    def loss(cost, a, b):
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
        out = sinkhorn_guarded(cost, a, b, guard=(0.1, 0.3), epsilon=0.3, num_iters=3, update_first="b")
        f = torch.where(out.f.isfinite(), out.f, 0)
        return out.transport_cost, out.regularized_cost, (f * weights[:1, :4]).sum()

    masses = [(w.detach() + 0.1).requires_grad_() for w in (a, b)]
    assert torch.autograd.gradcheck(loss, (cost, *masses))


def test_where_it_runs():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    expected = "cpu" if COMPILED else "reference"
    assert _dispatch.resolve("sinkhorn_shared", cpu, None, "guards") == expected
    assert _dispatch.resolve("sinkhorn_shared", cuda, None, "guards") == "reference"
    for backend in ("cuda", "triton"):
        if _dispatch.availability()["sinkhorn_shared"][backend] is None:
            assert _dispatch.resolve("sinkhorn_shared", cuda, backend, "guards") == "reference"


def test_explain_names_what_kernels_do_not_have(monkeypatch):
    monkeypatch.setitem(_dispatch._CHOICES, ("sinkhorn_shared", "cpu", "auto"), "cuda")
    text = otkd_fast.explain("sinkhorn_shared", torch.zeros(1))
    assert "with guards: 'reference' runs, because the cuda kernels do not have it" in text
    assert "with gradient='implicit': 'reference' runs" in text


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("options", [{"tol": 0.1}, {"relaxation": 1.5}, {"penalty_a": 1.0}, {"guard": (-1.0, 0.0)}])
def test_op_refuses_guards_of_other_iterations(backend, options, generator):
    cost, a, b = problem(6, 3, 4, generator)
    values = {"tol": 0.0, "relaxation": 1.0, "penalty_a": torch.inf, "penalty_b": torch.inf} | options
    guard = values.pop("guard", (1.0, 0.0))
    with pytest.raises(ValueError, match="guard_a"):
        torch.ops.otkd_fast.sinkhorn_shared_fwd(cost, a, b, None, None, 0.1, 3, *values.values(), True, 0, *guard)
