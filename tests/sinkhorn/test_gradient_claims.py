"""Each gradient mode against finite differences of exactly what it claims to differentiate: for dense costs, few and
many small ones, for a cost shared by a batch of marginals, and for points, by every operand at once.
"""

from functools import partial

import pytest
import torch

import otkd_fast
from otkd_fast.functional._sinkhorn_options import COVERED, GRADIENTS, OUTPUTS
from otkd_fast.testing import backends, random_problem, random_rows

N, M, EPSILON, ITERS, CONVERGED = 4, 5, 0.5, 3, 200
KINDS = {"dense": "sinkhorn", "shared": "sinkhorn_shared", "points": "sinkhorn_points"}
CASES = [(kind, backend) for kind, op in KINDS.items() for backend in backends(op)]
CASES += [("many", backend) for backend in backends("sinkhorn") if backend == "cpu"]  # kernels of their own
BATCHES = {"shared": 6, "many": 5}  # shared: more than the few that the dense solver takes over
STEP = 1e-5
QUICK = "cpu" if "cpu" in backends("sinkhorn_points") else "reference"  # its values are tested against the reference's


def problem(kind, generator):
    """Operands: (cost, logits, logits), or (x, y, logits, logits)."""
    batch = BATCHES.get(kind, 2)
    logits = [torch.randn(batch, size, generator=generator, dtype=torch.float64) for size in (N, M)]
    if kind == "points":
        return [random_rows(batch, size, 3, generator=generator) for size in (N, M)] + logits
    return [random_problem(N, M, batch=() if kind == "shared" else (batch,), generator=generator).cost, *logits]


def cost_of(operands):
    return operands[0] if len(operands) == 3 else torch.cdist(*operands[:2]).square()


def solve(operands, gradient="unroll", **options):
    """Masses are softmaxes of the logits: their totals stay 1 in every direction."""
    *first, logits_a, logits_b = operands
    a, b = (logits.softmax(-1) for logits in (logits_a, logits_b))
    if gradient == "detach":
        a, b = a.detach(), b.detach()
    keywords = {"epsilon": EPSILON, "gradient": gradient} | options
    if len(first) == 2:
        return otkd_fast.sinkhorn_points(*first, a, b, metric="sqeuclidean", **keywords)
    return otkd_fast.sinkhorn(*first, a, b, **keywords)


def weights_of(operands, generator):
    """For each output; those of f and g have the same total, so that a constant may move from one to the other."""
    batch = operands[-1].shape[0]
    sizes = (batch,), (batch,), (batch, N), (batch, M)
    value, dual, f, g = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return value, dual, f, g + (f.sum(-1, keepdim=True) - g.sum(-1, keepdim=True)) / M


def loss_of(result, weights, gradient):
    outputs = zip(OUTPUTS, weights, strict=True)
    return sum((getattr(result, k) * w).sum() for k, w in outputs if COVERED.get(gradient, k) == k)


def claim(gradient, operands, weights, options):
    """The function whose derivative at `operands` the mode claims to be."""
    if gradient == "unroll":
        return lambda moved: loss_of(solve(moved, num_iters=ITERS, **options), weights, gradient)
    if gradient in ("envelope", "implicit"):
        return lambda moved: loss_of(solve(moved, num_iters=CONVERGED, **options), weights, gradient)
    if gradient == "detach":
        plan = solve(operands, num_iters=ITERS, **options).plan()
        return lambda moved: (weights[0] * (plan * cost_of(moved)).sum((-2, -1))).sum()
    before = solve(operands, num_iters=ITERS - 1, **options)  # last_step
    start = {"num_iters": 1, "initial_potentials": (before.f, before.g)}
    return lambda moved: loss_of(solve(moved, **start, **options), weights, gradient)


@pytest.mark.parametrize("penalty", [None, (0.7, 1.3)], ids=["constraints", "penalties"])
@pytest.mark.parametrize("update_first", ["a", "b"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind, backend", CASES)
def test_gradient_is_what_it_claims(kind, backend, gradient, update_first, penalty, generator):
    operands = problem(kind, generator)
    weights = weights_of(operands, generator)
    options = {"update_first": update_first, "marginal_penalty": penalty}
    function = claim(gradient, operands, weights, options | {"backend": QUICK})
    leaves = [operand.clone().requires_grad_() for operand in operands]
    iters = CONVERGED if gradient in ("envelope", "implicit") else ITERS
    result = solve(leaves, gradient, num_iters=iters, backend=backend, **options)
    grads = torch.autograd.grad(loss_of(result, weights, gradient), leaves, allow_unused=gradient == "detach")
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    for _ in range(2):
        direction = [random(operand.shape) for operand in operands]
        ends = [[x + sign * STEP * d for x, d in zip(operands, direction, strict=True)] for sign in (1, -1)]
        expected = (function(ends[0]) - function(ends[1])) / (2 * STEP)
        actual = sum((grad * d).sum() for grad, d in zip(grads, direction, strict=True))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert abs(expected) > 1e-3
