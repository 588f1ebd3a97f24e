"""geomloss.SamplesLoss under its signature, computed by otkd_fast on dense costs.

``from otkd_fast.compat.geomloss import SamplesLoss`` serves loss="sinkhorn", "energy", "gaussian" and "laplacian". The
schedule of epsilon, the averaged updates, values and gradients are geomloss's; options that are not served raise an
error that names them. geomloss is not needed. docs/migration.md lists the differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._autocast import without_autocast
from ..functional._validate import HALF_DTYPES, check_choice, check_tensor, positive_float
from ..functional.cost_matrix import cost_matrix

__all__ = ["SamplesLoss"]

LOSSES = ("sinkhorn", "energy", "gaussian", "laplacian")
BACKENDS = ("auto", "tensorized", "online")
# stands for the logarithm of a mass of 0, so that no infinities are subtracted
LOG_OF_ZERO = -100000.0
# distances are those of squares that are at least this
SMALLEST_SQUARE = 1e-8


class SamplesLoss(nn.Module):
    r"""``geomloss.SamplesLoss``: distances between weighted samples.

    "sinkhorn": with ``C = |x - y|^p / p``, ``eps = blur^p`` and ``rho = reach^p`` (None: constraints), the value
    ``OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2``, or without `debias` ``OT(a, b)``, where OT is the dual value of the
    entropic problem. Potentials start at ``eps = diameter^p``; eps is divided by ``scaling^-p`` at each step; a step
    replaces both potentials by the mean of themselves and of their updates by the others. A last update, with
    gradient, follows. "energy", "gaussian", "laplacian": half the squared norm of ``a - b`` for the kernels
    ``-|x - y|``, ``exp(-|x - y|^2 / (2 blur^2))``, ``exp(-|x - y| / blur)``.

    Call it with ``(x, y)`` or ``(a, x, b, y)``: x (N, D), y (M, D), a (N,), b (M,), or all with a batch axis first.
    Returns (), with a batch axis (B,); with ``potentials=True`` a pair (1, N), (1, M), or (B, N), (B, M).

    Squared distances are sums of squared differences, not the expansion |x|^2 - 2 <x, y> + |y|^2: near points keep
    their digits. Costs are dense, also with ``backend="online"``.

    Raises:
        ValueError: at construction, an option that is not served: loss "hausdorff", backend "multiscale" (which
            clusters points; so do `cluster_scale` and a call with six arguments), `p` other than 1 and 2 without a
            `cost`; a `cost` that is a KeOps formula. In the call, shapes that do not match.

    >>> import torch
    >>> from otkd_fast.compat.geomloss import SamplesLoss
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> print(f"{SamplesLoss('sinkhorn', p=2, blur=0.01)(x, x + torch.tensor([0.0, 2.0])):.4f}")
    2.0000
    """

    def __init__(
        self,
        loss="sinkhorn",
        p=2,
        blur=0.05,
        reach=None,
        diameter=None,
        scaling=0.5,
        truncate=5,
        cost=None,
        kernel=None,
        cluster_scale=None,
        debias=True,
        potentials=False,
        verbose=False,
        backend="auto",
    ):
        super().__init__()
        check_choice("loss", loss, LOSSES)
        check_choice("backend", backend, BACKENDS)
        if cluster_scale is not None:
            raise ValueError(f"cluster_scale: expected None, points are not clustered here, got {cluster_scale!r}")
        if cost is not None and not callable(cost):
            raise ValueError(f"cost: expected None or a function of (B, N, D) and (B, M, D) tensors, got {cost!r}")
        if kernel is not None and not callable(kernel):
            raise ValueError(f"kernel: expected None or a function, got {kernel!r}")
        if loss == "sinkhorn" and cost is None and p not in (1, 2):
            raise ValueError(f"p: expected 1 or 2 without a cost, got {p!r}")
        if loss == "sinkhorn":
            for name, value in (("blur", blur), ("reach", reach), ("diameter", diameter)):
                if value is not None:
                    positive_float(name, value)
            if not 0 < scaling < 1:
                raise ValueError(f"scaling: expected a number in (0, 1), got {scaling!r}")
        self.loss, self.p, self.blur, self.reach, self.diameter = loss, p, blur, reach, diameter
        self.scaling, self.truncate, self.cost, self.kernel = scaling, truncate, cost, kernel
        self.cluster_scale, self.debias, self.potentials = cluster_scale, debias, potentials
        self.verbose, self.backend = verbose, backend

    def forward(self, *args: Tensor):
        """The distance, or the potentials, of samples ``(x, y)`` or ``(a, x, b, y)``."""
        a, x, b, y = _arguments(args)
        single = x.dim() == 2
        if single:
            a, x, b, y = (tensor.unsqueeze(0) for tensor in (a, x, b, y))
        with without_autocast(x.device):
            values = self._sinkhorn(a, x, b, y) if self.loss == "sinkhorn" else self._kernel_norm(a, x, b, y)
        if self.potentials:
            return values
        return values[0] if single else values

    def _sinkhorn(self, a: Tensor, x: Tensor, b: Tensor, y: Tensor):
        cost = _Costs(x, y, self.cost or _COSTS[self.p], bool(self.debias))
        epsilons = _schedule(x, y, self.p, self.blur, self.diameter, self.scaling)
        rho = math.inf if self.reach is None else float(self.reach) ** self.p
        final = epsilons[-1]
        with torch.no_grad():
            log_a, log_b = _log_masses(a), _log_masses(b)
            start = _anneal(cost.constant(), log_a, log_b, epsilons, rho)
        f_ab, g_ab, f_aa, g_bb = _update(cost.differentiable(), log_a, log_b, start, final, rho)
        if self.potentials:
            return (f_ab - f_aa, g_ab - g_bb) if self.debias else (f_ab, g_ab)
        if rho == math.inf:
            f, g = (f_ab - f_aa, g_ab - g_bb) if self.debias else (f_ab, g_ab)
        else:
            weight, free = rho + final / 2, torch.ones_like
            f = weight * ((-f_aa / rho).exp() if self.debias else free(f_ab)) - weight * (-f_ab / rho).exp()
            g = weight * ((-g_bb / rho).exp() if self.debias else free(g_ab)) - weight * (-g_ab / rho).exp()
        return (a * f).sum(1) + (b * g).sum(1)

    def _kernel_norm(self, a: Tensor, x: Tensor, b: Tensor, y: Tensor):
        def kernel(p, q):
            if self.kernel is not None:
                return self.kernel(p, q, blur=self.blur, use_keops=False, ranges=None)
            return _KERNELS[self.loss](p, q, self.blur)

        def applied(p, q, mass):
            return (kernel(p, q) @ mass.unsqueeze(-1)).squeeze(-1)

        on_x = applied(x, x, a) / 2, applied(x, y, b)
        on_y = applied(y, y, b) / 2
        if self.potentials:
            return 2 * on_x[0] - on_x[1], 2 * on_y - applied(y, x, a)
        return (a * (on_x[0] - on_x[1])).sum(1) + (b * on_y).sum(1)


class _Potentials(NamedTuple):
    """f of a and g of b in the problem (a, b), f in (a, a), g in (b, b); the last two None without debiasing."""

    f_ab: Tensor  # (B, N)
    g_ab: Tensor  # (B, M)
    f_aa: Tensor | None
    g_bb: Tensor | None


class _Costs:
    """The costs of the problems (a, b), (a, a), (b, b) between x and y.

    A potential is differentiated by the points that it belongs to, the other side being constant: so the cost for the
    rows and that for the columns are differentiated apart.
    """

    def __init__(self, x: Tensor, y: Tensor, function: Callable, debias: bool) -> None:
        self.x, self.y, self.function, self.debias = x, y, function, debias

    def constant(self) -> tuple[Tensor, ...]:
        """(B, N, M), (B, M, N), and (B, N, N), (B, M, M) with debiasing."""
        x, y = self.x.detach(), self.y.detach()
        own = self.function is not _COSTS.get(1) and self.function is not _COSTS.get(2)
        between = self.function(x, y)
        back = self.function(y, x) if own else between.mT  # a function of the user may be asymmetric
        return (between, back, self.function(x, x), self.function(y, y)) if self.debias else (between, back)

    def differentiable(self) -> tuple[Tensor, ...]:
        """The same costs: rows carry the graph, columns are constants."""
        if not (torch.is_grad_enabled() and (self.x.requires_grad or self.y.requires_grad)):
            return self.constant()
        x, y = self.x.detach(), self.y.detach()
        between = self.function(self.x, y), self.function(self.y, x)
        return (*between, self.function(self.x, x), self.function(self.y, y)) if self.debias else between


def _update(costs, log_a: Tensor, log_b: Tensor, at: _Potentials | None, epsilon: float, rho: float) -> _Potentials:
    """Each potential from that of the other side (None: 0), which is a constant."""
    damping = 1.0 if rho == math.inf else 1.0 / (1.0 + epsilon / rho)
    heights_a, heights_b = log_a, log_b
    own_a, own_b = log_a, log_b
    if at is not None:
        heights_a, heights_b = log_a + at.f_ab.detach() / epsilon, log_b + at.g_ab.detach() / epsilon
        if len(costs) == 4:
            own_a, own_b = log_a + at.f_aa.detach() / epsilon, log_b + at.g_bb.detach() / epsilon
    f_ab, g_ab = _softmin(costs[0], heights_b, epsilon, damping), _softmin(costs[1], heights_a, epsilon, damping)
    if len(costs) == 2:
        return _Potentials(f_ab, g_ab, None, None)
    return _Potentials(
        f_ab, g_ab, _softmin(costs[2], own_a, epsilon, damping), _softmin(costs[3], own_b, epsilon, damping)
    )


def _softmin(cost: Tensor, heights: Tensor, epsilon: float, damping: float) -> Tensor:
    """-damping epsilon log sum_j exp(heights_j - C_ij / epsilon), (B, n)."""
    return (-damping * epsilon) * torch.add(heights.unsqueeze(1), cost, alpha=-1.0 / epsilon).logsumexp(2)


def _anneal(costs, log_a: Tensor, log_b: Tensor, epsilons: list[float], rho: float) -> _Potentials:
    potentials = _update(costs, log_a, log_b, None, epsilons[0], rho)
    for epsilon in epsilons:
        updated = _update(costs, log_a, log_b, potentials, epsilon, rho)
        potentials = _Potentials(
            *(None if old is None else (old + new) / 2 for old, new in zip(potentials, updated, strict=True))
        )
    return potentials


def _schedule(x: Tensor, y: Tensor, p: float, blur: float, diameter: float | None, scaling: float) -> list[float]:
    """diameter^p, then from there by factors of scaling^p as long as it is above blur^p, then blur^p.

    Without a diameter that of the box around all points, for which the host waits.
    """
    if diameter is None:
        points = torch.cat([x.detach().reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])])
        diameter = (points.amax(0) - points.amin(0)).norm().item()
    if diameter == 0:
        return [blur**p]
    steps = np.arange(p * math.log(diameter), p * math.log(blur), p * math.log(scaling))
    return [diameter**p, *(math.exp(step) for step in steps), blur**p]


def _log_masses(mass: Tensor) -> Tensor:
    positive = mass > 0
    return torch.where(positive, torch.where(positive, mass, 1).log(), LOG_OF_ZERO)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    return cost_matrix(x, y, metric="sqeuclidean")


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return _squares(x, y).clamp_min(SMALLEST_SQUARE).sqrt()


def _half_squares(x: Tensor, y: Tensor) -> Tensor:
    return _squares(x, y) / 2


_COSTS = {1: _distances, 2: _half_squares}
_KERNELS = {
    "energy": lambda x, y, blur: -_distances(x, y),
    "gaussian": lambda x, y, blur: (-_half_squares(x / blur, y / blur)).exp(),
    "laplacian": lambda x, y, blur: (-_distances(x / blur, y / blur)).exp(),
}


def _arguments(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """a, x, b, y, checked; masses without their last axis of size 1, uniform where they are not given."""
    if len(args) == 6:
        raise ValueError("labels: expected calls (x, y) or (a, x, b, y), points are not clustered here")
    if len(args) not in (2, 4):
        raise ValueError(f"expected calls (x, y) or (a, x, b, y), got {len(args)} arguments")
    a, x, b, y = args if len(args) == 4 else (None, args[0], None, args[1])
    for name, points in (("x", x), ("y", y)):
        check_tensor(name, points, 2, "(N, D) or (B, N, D)")
        if points.dim() > 3:
            raise ValueError(f"{name}: expected shape (N, D) or (B, N, D), got {tuple(points.shape)}")
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected batch and dimension of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    if x.dtype in HALF_DTYPES:
        a, x, b, y = (None if tensor is None else tensor.float() for tensor in (a, x, b, y))
    masses = []
    for name, mass, points in (("a", a, x), ("b", b, y)):
        if mass is None:
            mass = points.new_full(points.shape[:-1], 1 / points.shape[-2])
        elif mass.shape == (*points.shape[:-1], 1):
            mass = mass.squeeze(-1)
        if mass.shape != points.shape[:-1]:
            raise ValueError(f"{name}: expected shape {tuple(points.shape[:-1])}, got {tuple(mass.shape)}")
        masses.append(mass)
    return masses[0], x, masses[1], y
