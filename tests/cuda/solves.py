"""Sinkhorn on the emulator and by the reference in float64, compared."""

import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import assert_close

OPTIONS = [
    {"tol": 1e-3},
    {"tol": 1e-3, "gradient": "last_step"},
    {"relaxation": 1.3, "gradient": "envelope"},
    {"relaxation": "auto", "gradient": "envelope", "tol": 1e-4},
    {"marginal_penalty": 0.7},
    {"marginal_penalty": (None, 0.5), "gradient": "last_step"},
    {"marginal_penalty": (0.4, None), "tol": 1e-3, "gradient": "envelope"},
]
QUANTITIES = ("transport_cost", "regularized_cost", "f", "g", "marginal_error")


def solve_both(problem, dtype, guard, *, outputs=("transport_cost", "regularized_cost", "f", "g"), **options):
    """Values of all outputs and gradients of a weighted sum of `outputs`, compared; the emulated ones."""
    given = problem.to(dtype)
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    with guard:
        actual = otkd_fast.sinkhorn(leaves[0], *leaves[1:], backend="cpu", **options)
        grads = differentiate(actual, leaves, outputs)
    expected = reference.sinkhorn(wide[0], *wide[1:], **options)
    wanted = differentiate(expected, wide, outputs)
    finite = problem.cost[problem.cost.isfinite()]
    scale = max(float(finite.abs().max()) if len(finite) else 0.0, options["epsilon"])
    context = f"{tuple(problem.cost.shape)} {options}"
    for name in QUANTITIES:
        got, want = getattr(actual, name), getattr(expected, name)
        quantity = "potential" if name in "fg" else name
        unit = {"potential": scale, "marginal_error": 1.0}.get(quantity)
        assert_close(got, want, "sinkhorn", quantity, scale=unit, context=f"{context} {name}")
    assert torch.equal(actual.num_iters, expected.num_iters)
    for grad, want, name in zip(grads, wanted, "Cab", strict=True):
        if grad is not None:
            assert_close(grad, want, "sinkhorn", "gradient", context=f"{context} d{name}")
    return [*(getattr(actual, name) for name in QUANTITIES), *(g for g in grads if g is not None)]


def differentiate(result, leaves, outputs):
    loss = 0
    for k, name in enumerate(outputs):
        value = getattr(result, name)
        value = torch.where(value.isfinite(), value, 0)
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape) + 0.3 * k
        loss = loss + (value * weights).sum()
    given = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True))
    return [None if leaf is None else next(found) for leaf in leaves]
