"""The CPU op over the ways of solving: every option and gradient on float and double scalings and in the log domain.

Every instruction set and number of threads, also where the threads share a problem, against the float64 reference.
"""

import contextlib

import pytest
import torch

from otkd_fast import reference
from otkd_fast.ops.sinkhorn import KEEP
from otkd_fast.testing import assert_close, backends, instruction_sets, random_problem, use_instruction_set

pytestmark = pytest.mark.skipif("cpu" not in backends("sinkhorn"), reason="no compiled backend")
F32, F64 = torch.float32, torch.float64
OUTPUTS = ("transport_cost", "regularized_cost", "f", "g")
COVERED = {"envelope": ("regularized_cost",), "detach": ("transport_cost",)}
RANGES = (1, 10, 100, 1000, 1e5)  # max C / epsilon: float scalings, double scalings, log domain
METHODS = {1: 0, 10: 0, 100: 1, 1000: 2, 1e5: 2}
DEFAULT = {"num_iters": 6, "tol": 0.0, "relaxation": 1.0, "penalty_a": torch.inf, "penalty_b": torch.inf}
OPTIONS = {
    "plain": {},
    "tol": {"num_iters": 40, "tol": 0.1},
    "penalties": {"penalty_a": 0.3, "penalty_b": 2.0},
    "one penalty": {"penalty_b": 0.1, "tol": 1e-3},
    "relaxation": {"num_iters": 12, "relaxation": 1.4},
    "auto": {"num_iters": 32, "relaxation": 0.0},
    "auto, tol": {"num_iters": 50, "relaxation": 0.0, "tol": 0.02},
    "relaxed penalties": {"num_iters": 25, "relaxation": 0.0, "penalty_a": 0.3},
}


def forward(problem, start, epsilon, options, update_a_first, keep):
    arguments = [options[name] for name in DEFAULT]
    return torch.ops.otkd_fast.sinkhorn_fwd(*problem, *start, epsilon, *arguments, update_a_first, keep)


def backward(problem, start, history, grads, epsilon, options, update_a_first, gradient):
    needs = (True, *(weights is not None and gradient != "detach" for weights in problem[1:]))
    arguments = (options["num_iters"], options["penalty_a"], options["penalty_b"], update_a_first, gradient, *needs)
    return torch.ops.otkd_fast.sinkhorn_bwd(*problem, *start, history, *grads, epsilon, *arguments)


def expected_of(problem, start, epsilon, options, update_a_first, gradient, grads):
    """Outputs of the reference in float64, and the gradients of the sum of <grads, outputs>."""
    leaves = [None if tensor is None else tensor.double().requires_grad_() for tensor in problem]
    outputs = reference.sinkhorn(
        *leaves, epsilon=epsilon, num_iters=options["num_iters"], tol=options["tol"] or None, gradient=gradient,
        update_first="a" if update_a_first else "b", relaxation=options["relaxation"] or "auto",
        initial_potentials=[None if p is None else p.double() for p in start],
        marginal_penalty=(options["penalty_a"], options["penalty_b"]),
    )  # fmt: skip
    total = 0
    for name, grad in zip(OUTPUTS, grads, strict=True):
        value = getattr(outputs, name)
        total = total + (0 if grad is None else (grad.double() * torch.where(value.isfinite(), value, 0)).sum())
    wanted = [leaf for leaf in leaves[: 1 if gradient == "detach" else 3] if leaf is not None]
    return outputs, torch.autograd.grad(total, wanted, materialize_grads=True)


def check(
    problem, options, *, dtypes=(F32, F64), range_, gradient, generator, update_a_first=True, start=(None, None),
    method=None, sets=(None,),
):  # fmt: skip
    """`problem` has costs up to 1. Each dtype and instruction set against one run of the reference.

    The inputs are rounded to the narrowest dtype for all of them.
    """
    options, epsilon = DEFAULT | options, 1 / range_
    if options["relaxation"] == 0 and len(dtypes) > 1:  # omega sees that rounded masses no longer have one total
        for dtype in dtypes:
            check(
                problem, options, dtypes=(dtype,), range_=range_, gradient=gradient, generator=generator,
                update_a_first=update_a_first, start=start, method=method, sets=sets,
            )  # fmt: skip
        return
    narrow = F32 if F32 in dtypes else F64
    problem = [None if tensor is None else tensor.to(narrow) for tensor in problem]
    start = [None if potential is None else potential.to(narrow) for potential in start]
    batch, n, m = problem[0].shape[:-2], *problem[0].shape[-2:]
    shapes = (batch, batch, (*batch, n), (*batch, m))
    covered = COVERED.get(gradient, OUTPUTS)
    grads = [
        torch.randn(shape, generator=generator).to(narrow) if name in covered else None
        for name, shape in zip(OUTPUTS, shapes, strict=True)
    ]
    expected = expected_of(problem, start, epsilon, options, update_a_first, gradient, grads)
    for dtype in dtypes:
        tensors = [[None if x is None else x.to(dtype) for x in group] for group in (problem, start, grads)]
        for instruction_set in sets:
            with use_instruction_set(instruction_set) if instruction_set else contextlib.nullcontext():
                compare(*tensors, options, epsilon, update_a_first, gradient, method, expected)


def compare(problem, start, grads, options, epsilon, update_a_first, gradient, method, references):
    expected, wanted = references
    outputs = forward(problem, start, epsilon, options, update_a_first, KEEP[gradient])
    assert method is None or (outputs[6][..., 0] == method).all()
    found = backward(problem, start, outputs[6], grads, epsilon, options, update_a_first, gradient)
    found = [grad for grad in found if grad.numel()]
    assert torch.equal(outputs[5], expected.num_iters)
    assert len(found) == len(wanted)
    for k, name in enumerate(OUTPUTS):
        quantity = name if k < 2 else "potential"
        assert_close(
            outputs[k], expected[k], "sinkhorn", quantity, scale=max(1, epsilon) if k > 1 else None, context=name
        )
    assert_close(outputs[4], expected.marginal_error, "sinkhorn", "marginal_error", scale=1.0)
    for grad, want, unit in zip(found, wanted, (1e-3, 1, 1), strict=False):
        assert_close(grad, want, "sinkhorn", "gradient", scale=max(float(want.abs().max()), unit), context=gradient)


def dtypes_of(range_):
    """At 1e5 the rounding of C / epsilon is all that float64 results could be compared for."""
    return (F32, F64) if range_ < 1e5 else (F32,)


def gradients_of(name, range_, infinite=False):
    """The modes to check: without a relaxation those of the path too; the implicit one where its system is well
    conditioned."""
    relaxed, penalised = OPTIONS[name].get("relaxation", 1) != 1, {"penalty_a", "penalty_b"} & set(OPTIONS[name])
    modes = ["envelope", "detach"] if relaxed else ["envelope", "detach", "unroll", "last_step"]
    if penalised and range_ <= 1000 or range_ <= 10 and not infinite:
        modes.append("implicit")
    return modes


ORDERS = [(name, (k + j) % 2 == 0, j) for j in range(2) for k, name in enumerate(OPTIONS)]


@pytest.mark.parametrize(  # each option in one order by default, in the other one too among the slow tests
    ("name", "update_a_first"),
    [pytest.param(name, order, marks=[pytest.mark.slow] * again) for name, order, again in ORDERS],
)
def test_options(name, update_a_first, generator):
    for k, range_ in enumerate(RANGES):
        if range_ >= 1000 and name == "relaxed penalties":
            continue  # omega follows from a ratio of errors, which rounding reaches here
        n, m = ((13, 9), (5, 34), (33, 17), (8, 8), (24, 3))[k]
        problem = random_problem(n, m, batch=(2,), zeros=True, infinite=k % 2 == 0, generator=generator)
        for gradient in gradients_of(name, range_, k % 2 == 0):
            options = {"gradient": gradient, "generator": generator, "update_a_first": update_a_first}
            check(problem, OPTIONS[name], dtypes=dtypes_of(range_), range_=range_, **options)


@pytest.mark.parametrize("range_", METHODS)
def test_each_method_with_each_instruction_set(range_, generator):
    problem = random_problem(19, 35, batch=(2,), generator=generator)
    for name in ("tol", "penalties", "auto"):
        for gradient in gradients_of(name, range_):
            options = {"gradient": gradient, "generator": generator, "method": METHODS[range_]}
            check(problem, OPTIONS[name], dtypes=(F32,), sets=instruction_sets(), range_=range_, **options)


@pytest.mark.parametrize("range_", [10, 100, 1000])
def test_threads_share_a_problem(range_, generator):
    torch.set_num_threads(2)
    problem = random_problem(517, 523, zeros=True, generator=generator)
    for name, gradient in (("plain", "unroll"), ("tol", "last_step"), ("penalties", "implicit"), ("auto", "envelope")):
        options = OPTIONS[name] | {"num_iters": 12 if name == "auto" else 4}
        check(problem, options, range_=range_, gradient=gradient, generator=generator)


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("gradient", ["unroll", "last_step", "envelope"])
def test_start(gradient, range_, generator):
    """Potentials to start from, wide and narrow, with entries that are not finite."""
    for name, scale in (("plain", 0.1), ("plain", 30.0), ("penalties", 0.1)):
        problem = random_problem(11, 14, batch=(2,), zeros=True, generator=generator)
        f, g = (scale * torch.randn(2, size, generator=generator, dtype=torch.float64) for size in (11, 14))
        f[0, 2], g[1, 3], g[0, 1] = -torch.inf, torch.nan, torch.inf
        for start, update_a_first in (((f, g), True), ((None, g), True), ((f, None), False)):
            options = {"gradient": gradient, "generator": generator, "update_a_first": update_a_first}
            check(problem, OPTIONS[name], dtypes=dtypes_of(range_), range_=range_, start=start, **options)


@pytest.mark.parametrize("name", ["plain", "tol", "penalties", "relaxation", "auto"])
def test_tiny_masses(name, generator):
    """Masses of a sharp softmax, down to 1e-30, between them exact zeros, beside forbidden pairs."""
    for range_ in (10, 100):
        cost, a, b = random_problem(12, 10, batch=(2,), zeros=True, infinite=True, generator=generator)
        a, b = (
            torch.where(w > 0, (7 * torch.randn(w.shape, generator=generator)).double().exp() * w, w) for w in (a, b)
        )
        a[:, 0], b[:, 0] = 1e-30, 1e-29
        problem = (cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))
        relaxed = name in ("relaxation", "auto")
        for gradient in ("envelope", "detach") if relaxed else ("envelope", "detach", "last_step"):
            check(problem, OPTIONS[name], range_=range_, gradient=gradient, generator=generator)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("range_", RANGES)
def test_stopped_loop_is_the_loop_of_that_length(range_, dtype, generator):
    """In every bit, with its history and its gradient."""
    for n, m in ((9, 13), (130, 120)):
        problem = random_problem(n, m, generator=generator).to(dtype)
        start = (None, None)
        fixed = forward(problem, start, 1 / range_, DEFAULT | {"num_iters": 7}, True, KEEP["unroll"])
        stopping = DEFAULT | {"num_iters": 40, "tol": 1.0001 * float(fixed[4])}
        stopped = forward(problem, start, 1 / range_, stopping, True, KEEP["unroll"])
        ran = int(stopped[5])
        assert 1 <= ran <= 7 and stopped[4] <= stopping["tol"]
        fixed = forward(problem, start, 1 / range_, DEFAULT | {"num_iters": ran}, True, KEEP["unroll"])
        grads = [torch.ones_like(output) for output in stopped[:4]]
        for k in (0, 1, 2, 3):
            assert torch.equal(stopped[k], fixed[k])
        left = backward(problem, start, stopped[6], grads, 1 / range_, stopping, True, "unroll")
        right = backward(problem, start, fixed[6], grads, 1 / range_, DEFAULT | {"num_iters": ran}, True, "unroll")
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one, other)
