"""Problems between points, and the comparison with the reference on their cost matrix in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

import otkd_fast
from otkd_fast import reference
from otkd_fast.functional._sinkhorn_options import COVERED, OUTPUTS
from otkd_fast.testing import assert_close, random_problem, random_rows

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
DTYPES = (torch.float64, torch.float32)
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))


class Points(NamedTuple):
    x: Tensor  # (..., n, d)
    y: Tensor  # (..., m, d)
    a: Tensor | None  # (..., n)
    b: Tensor | None  # (..., m)

    def to(self, dtype):
        return Points(*(None if tensor is None else tensor.to(dtype) for tensor in self))

    def cost(self, metric):
        return reference.cost_matrix(self.x.double(), self.y.double(), metric=metric)


def random_points(n, m, d, *, generator, batch=(), zeros=False, marginals=True):
    x = random_rows(*batch, n, d, generator=generator)
    y = 0.7 * random_rows(*batch, m, d, generator=generator) + 0.3
    a, b = random_problem(n, m, batch=batch, zeros=zeros, generator=generator)[1:] if marginals else (None, None)
    return Points(x, y, a, b)


def epsilon_of(points, metric, ratio):
    """`ratio` times the largest cost."""
    return ratio * float(points.cost(metric).detach().max())


def check_values(points, metric, dtype, **options):
    """sinkhorn_points on the rounded points against the reference in float64; returns the result."""
    points = points.to(dtype)
    exact = {key: value for key, value in options.items() if key not in ("storage", "backend", "epsilon_schedule")}
    wide = [None if tensor is None else tensor.double() for tensor in points]
    actual = otkd_fast.sinkhorn_points(*points, metric=metric, **options)
    expected = reference.sinkhorn_points(*wide, metric=metric, stored=True, **exact)
    compare(actual, expected, float(points.cost(metric).max()), options["epsilon"], f"{metric} {options}")
    return actual


def compare(actual, expected, largest, epsilon, context=""):
    unit = max(largest, epsilon)
    for name, quantity in QUANTITIES.items():
        scale = unit if quantity == "potential" else None
        value = getattr(actual, name)
        assert_close(value, getattr(expected, name), "sinkhorn", quantity, scale=scale, context=f"{context} {name}")
    errors = actual.marginal_error, expected.marginal_error
    assert_close(*errors, "sinkhorn", "marginal_error", scale=1.0, context=context)
    assert torch.equal(actual.num_iters, expected.num_iters)


def gradients(solve, points, weights, gradient, **options):
    """Of a weighted sum of the covered outputs, by x, y and (not with 'detach') a and b."""
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in points]
    if gradient == "detach":
        leaves[2:] = [None if leaf is None else leaf.detach() for leaf in leaves[2:]]
    result = solve(*leaves, gradient=gradient, **options)
    covered = (COVERED[gradient],) if gradient in COVERED else OUTPUTS
    total = 0
    for name in covered:
        value = getattr(result, name)
        total = total + (weights[name].to(value.dtype) * torch.where(value.isfinite(), value, 0)).sum()
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return torch.autograd.grad(total, wanted, materialize_grads=True)


def check_gradients(points, metric, dtype, gradient, generator, **options):
    points = points.to(dtype)
    batch, n, m = points.x.shape[:-2], points.x.shape[-2], points.y.shape[-2]
    sizes = zip(OUTPUTS, (batch, batch, (*batch, n), (*batch, m)), strict=True)
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in sizes}
    exact = {key: value for key, value in options.items() if key not in ("storage", "backend")} | {"metric": metric}
    wide = [None if tensor is None else tensor.double() for tensor in points]
    expected = gradients(reference.sinkhorn_points, wide, weights, gradient, stored=True, **exact)
    actual = gradients(otkd_fast.sinkhorn_points, points, weights, gradient, metric=metric, **options)
    unit = float(points.cost(metric).max())
    for value, want, least in zip(actual, expected, (1e-3, 1e-3, unit, unit), strict=False):
        scale = max(float(want.abs().max()), least)
        assert_close(value, want, "sinkhorn", "gradient", scale=scale, context=f"{metric} {gradient} {options}")
