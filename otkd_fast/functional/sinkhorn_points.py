"""sinkhorn_points: entropic optimal transport between points, without their cost matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .. import reference
from .._autocast import without_autocast
from .._dispatch import resolve
from ..reference import PointCosts
from . import _sinkhorn_points_function as compiled
from ._sinkhorn_options import check_initial_potentials, check_options, check_path, check_schedule, follow_schedule
from ._validate import HALF_DTYPES, check_choice
from .cost_matrix import check_rows, cost_matrix
from .sinkhorn import check_marginals
from .sinkhorn_result import SinkhornResult, register_result

STORAGES = ("auto", "stored", "streamed")
# n m up to which storage='auto' keeps a matrix while the iterations run: 1 GiB in float32, 2 GiB in float64
MOST_STORED = 1 << 28


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str,
    epsilon: float,
    num_iters: int,
    tol: float | None = None,
    update_first: str = "a",
    gradient: str = "unroll",
    initial_potentials: tuple[Tensor | None, Tensor | None] | None = None,
    epsilon_schedule: Sequence[float | tuple[float, int]] | None = None,
    relaxation: float | str = 1.0,
    marginal_penalty: float | tuple[float | None, float | None] | None = None,
    storage: str = "auto",
    backend: str | None = None,
) -> SinkhornResult:
    r"""Entropic optimal transport between points: the problem of :func:`otkd_fast.sinkhorn` for the cost
    ``C_ij = metric(x_i, y_j)``, with gradients for the points and the masses in every mode.

    Costs are computed a block of rows at a time, differences first as in :func:`otkd_fast.cost_matrix`, and the
    gradient of a block goes straight to the points, so that nothing of the size n x m outlives the call. While the
    iterations run, the matrix exp(-C / epsilon) is kept (storage 'stored') or computed again in every iteration
    ('streamed': O((n + m) d) memory, with gradient='unroll' and num_iters (n + m) float64 more; for n and m to
    100 000). 'auto' keeps it while n m is at most 2^28, 1 GiB in float32. The storage does not change the result beyond
    rounding. Only the CPU's kernels and the reference keep it; those of a GPU always stream.

    Args:
        x: (..., n, d), float16, bfloat16, float32 or float64.
        y: (..., m, d), same dtype and device; the same batch axes as `x`, or one of the two has none and is shared.
        a: (..., n) masses >= 0, or (n,) shared by the batch; None: 1/n each.
        b: (..., m) masses >= 0, or (m,) shared by the batch; None: 1/m each.
        metric: 'l1', 'l2', 'sqeuclidean' or 'cosine'.
        storage: 'auto', 'stored' or 'streamed'.
        epsilon, num_iters, tol, update_first, gradient, backend: as in :func:`otkd_fast.sinkhorn`.
        initial_potentials, epsilon_schedule, relaxation, marginal_penalty: likewise.

    Returns:
        SinkhornResult in the dtype of `x`; float32 for half-precision inputs, which are computed in float32 (the costs
        too). ``plan_apply`` computes ``P v`` without P; ``plan()`` makes the matrix.

    Raises:
        TypeError: as :func:`otkd_fast.cost_matrix` for the points and :func:`otkd_fast.sinkhorn` for the rest.
        ValueError: likewise; no rows; an unknown `storage`.
        RuntimeError: as :func:`otkd_fast.sinkhorn`.

    >>> import torch, otkd_fast
    >>> x, y = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [5.0]])
    >>> result = otkd_fast.sinkhorn_points(x, y, metric="sqeuclidean", epsilon=0.5, num_iters=10)
    >>> print(f"{result.transport_cost:.4f}")
    1.0000
    >>> 2 * result.plan_apply(y)  # where the mass of each x goes
    tensor([[1.0000],
            [5.0000]])
    """
    options = check_options(epsilon, num_iters, tol, update_first, gradient, relaxation, marginal_penalty)
    check_rows(x, y, metric)
    check_choice("storage", storage, STORAGES)
    n, m = x.shape[-2], y.shape[-2]
    if n == 0 or m == 0:
        name, rows = ("x", x) if n == 0 else ("y", y)
        raise ValueError(f"{name}: expected at least one row, got shape {tuple(rows.shape)}")
    batch = tuple((x if x.dim() >= y.dim() else y).shape[:-2])
    axes = "the rows of x", "the rows of y"
    a, b, batch = check_marginals(a, b, n, m, batch, ("x", x), axes, gradient, options)
    check_path(options, gradient, x, y, a, b)
    if x.dtype in HALF_DTYPES:
        x, y, a, b = (None if tensor is None else tensor.float() for tensor in (x, y, a, b))
    initial = check_initial_potentials(initial_potentials, batch, n, m, x)
    x, y = x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
    stored = n * m <= MOST_STORED if storage == "auto" else storage == "stored"
    backend = resolve("sinkhorn_points", x.device, backend, "gradient='implicit'" if gradient == "implicit" else None)
    solve = _reference if backend == "reference" else partial(compiled.solve, backend)
    if epsilon_schedule is not None:
        constants = [None if tensor is None else tensor.detach() for tensor in (x, y, a, b)]
        initial = follow_schedule(
            check_schedule(epsilon_schedule), options, *constants[2:], *initial,
            lambda stage, f, g: solve(*constants, f, g, metric, stage, "envelope", stored)[2:4],
        )  # fmt: skip
    outputs = solve(x, y, a, b, *initial, metric, options, gradient, stored)
    return PointsSinkhornResult(*outputs, (x, y), options.epsilon, metric, backend)


def _reference(x, y, a, b, f, g, metric, options, gradient, stored):
    keywords = {"gradient": gradient, "initial_potentials": (f, g), **options.for_reference()}
    return reference.sinkhorn_points(x, y, a, b, metric=metric, stored=stored, **keywords)


@register_result
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PointsSinkhornResult(SinkhornResult):
    """Result of :func:`otkd_fast.sinkhorn_points`; its plan is differentiable by the points too."""

    _metric: str
    _backend: str

    def plan(self) -> Tensor:
        """The dense plan ``P_ij = exp((f_i + g_j - C_ij) / epsilon)``, (..., n, m): n m numbers, see ``plan_apply``."""
        x, y = self._operands
        cost = cost_matrix(x, y, metric=self._metric, backend=self._backend)
        return ((self.f.unsqueeze(-1) + self.g.unsqueeze(-2) - cost) / self._epsilon).exp()

    def plan_apply(self, v: Tensor, transpose: bool = False) -> Tensor:
        """The plan applied to `v` without the plan in memory: ``P v``, or ``P^T v``.

        Differentiable by `v`, by the points, and where f and g are; memory O((n + m) (d + k)).

        Args:
            v: (..., m) or (..., m, k) with the batch axes of the result; with `transpose` (..., n) or (..., n, k).
            transpose: apply ``P^T``.

        Returns:
            (..., n) or (..., n, k), with `transpose` (..., m) or (..., m, k), in the dtype of the potentials.

        Raises:
            TypeError: `v` is no floating-point tensor.
            ValueError: its shape does not fit.

        >>> import torch, otkd_fast
        >>> points = torch.tensor([[0.0], [1.0]])
        >>> result = otkd_fast.sinkhorn_points(points, points, metric="l1", epsilon=0.01, num_iters=5)
        >>> result.plan_apply(torch.tensor([2.0, 4.0]))
        tensor([1., 2.])
        """
        v, vector = self._applied(v, transpose)
        x, y = self._operands
        if self._backend != "reference":
            operands = (x, y, self.f, self.g, v)
            applied = compiled.plan_apply(self._backend, *operands, self._metric, self._epsilon, transpose)
        else:
            x, y, f, g = (y, x, self.g, self.f) if transpose else (x, y, self.f, self.g)
            with without_autocast(v.device):
                applied = PointCosts(x, y, self._metric).plan_product(f, g, v, self._epsilon)
        return applied.squeeze(-1) if vector else applied
