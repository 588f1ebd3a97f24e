"""Solvers of other packages as functions of torch tensors, each built where it is asked for: OTT-JAX, KeOps, geomloss,
flash-sinkhorn. POT's calls stand in the families, they are one line each."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from .family import Function, Unavailable

os.environ.setdefault("PYKEOPS_VERBOSE", "0")  # read when geomloss or pykeops is imported

STEPS = (3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160)
OTT_NOTE = "OTT-JAX: compiled by jax.jit, tensors handed over as numpy arrays within the time; its own thread pool."
INSTALL = {
    "pot": "POT", "pot-batch": "POT", "pot-batch-log": "POT", "geomloss": "geomloss", "geomloss-ot": "geomloss",
    "ott": "ott-jax", "keops": "pykeops", "scipy": "scipy", "flash-sinkhorn": "flash-sinkhorn",
}  # fmt: skip


def marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> float:
    """L1 distance of the plan's marginals from a (n) and b (m), added; in float64."""
    plan = plan.detach().double()
    return ((plan.sum(-1) - a).abs().sum() + (plan.sum(-2) - b).abs().sum()).item()


def fewest_steps(error: Callable[[int], float], ours: float) -> tuple[int, dict]:
    """The smallest of STEPS whose marginal error is at most ours, else the last; and what goes into the record."""
    for steps in STEPS:
        reached = error(steps)
        if reached <= ours:
            break
    return steps, {"marginal_error": reached, "marginal_error_of_ours": ours, "steps": steps}


class _ThroughJax(torch.autograd.Function):
    """A compiled JAX function of (x, y); its gradient to x is computed with the value where one is wanted."""

    @staticmethod
    def forward(ctx, value, value_and_gradient, x, y):
        arguments = x.detach().numpy(), y.detach().numpy()
        if not ctx.needs_input_grad[2]:
            return torch.from_numpy(_own(value(*arguments)))
        out, gradient = value_and_gradient(*arguments)
        ctx.save_for_backward(torch.from_numpy(_own(gradient)))
        return torch.from_numpy(_own(out))

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * grad.reshape(grad.shape + (1,) * (gradient.dim() - grad.dim())), None


def _own(array):
    import numpy

    return numpy.array(array)  # a copy: JAX's memory is read-only


def through_jax(function: Callable) -> Function:
    """`function(x, y)` of JAX arrays, a scalar or a value a row of x, as one of torch tensors."""
    import jax

    def total(x, y):
        value = function(x, y)
        return value.sum(), value

    def both(x, y):
        (_, value), gradient = jax.value_and_grad(total, has_aux=True)(x, y)
        return value, gradient

    value, value_and_gradient = jax.jit(function), jax.jit(both)
    return lambda x, y: _ThroughJax.apply(value, value_and_gradient, x, y)


def ott_plan(epsilon: float, num_iters: int, lse: bool = True) -> Callable:
    """(cost, a, b) of JAX arrays -> plan after exactly `num_iters` iterations, columns first, differentiable."""
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    solver = sinkhorn.Sinkhorn(
        lse_mode=lse, threshold=0.0, inner_iterations=num_iters, min_iterations=num_iters, max_iterations=num_iters,
        implicit_diff=None, use_danskin=False,
    )  # fmt: skip

    def plan(cost, a, b):
        return solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=epsilon), a, b)).matrix

    return plan


def ott_dense(epsilon: float, num_iters: int) -> Function:
    """(cost (B, n, m), marginals (B, 2, n)) -> <P, C> (B), rows first."""
    import jax

    plan = ott_plan(epsilon, num_iters)

    def one(cost, marginals):  # transposed, for the order of the updates
        return (plan(cost.T, marginals[1], marginals[0]) * cost.T).sum()

    return through_jax(jax.vmap(one))


def keops_log(epsilon: float, num_iters: int) -> Function:
    """Points (n, d), (m, d) -> the regularised value, streamed in the log domain; gradient at fixed potentials."""
    from pykeops.torch import LazyTensor

    def value(x: Tensor, y: Tensor) -> Tensor:
        log_n, log_m = (torch.log(torch.tensor(float(len(z)), dtype=z.dtype)) for z in (x, y))
        fixed_x, fixed_y = LazyTensor(x.detach()[:, None, :]), LazyTensor(y.detach()[None, :, :])
        cost = ((fixed_x - fixed_y) ** 2).sum(-1) / epsilon
        g = torch.zeros_like(y[:, :1])
        for _ in range(num_iters):
            f = -log_n - (LazyTensor(g[None, :, :]) - cost).logsumexp(dim=1)
            g = -log_m - (LazyTensor(f[:, None, :]) - cost).logsumexp(dim=0).view(-1, 1)
        plan = (LazyTensor(f[:, None, :]) + LazyTensor(g[None, :, :]) - cost).exp()
        dual = epsilon * ((f + log_n).mean() + (g + log_m).mean() + 1 - plan.sum(dim=1).sum())
        through_cost = (plan * ((LazyTensor(x[:, None, :]) - fixed_y) ** 2).sum(-1)).sum(dim=1).sum()
        return dual + through_cost - through_cost.detach()

    return value


def flash_sinkhorn(size: str) -> Function:
    """Its kernels are Triton's: on the CPU it is registered and says so."""
    raise Unavailable("flash-sinkhorn runs on a GPU only: python -m bench.gpu measures it where there is one")
