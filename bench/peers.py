"""The same problems through other people's libraries; a builder returns a function or raises ImportError."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import otkd_fast
from otkd_fast.losses import SinKD

from .cases import EPSILON, NUM_ITERS, TEMPERATURE

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """`same_answer` False: solves a neighbouring problem, so it is checked against its own float64 result only."""

    name: str
    label: str
    build: Callable[[], Function]
    same_answer: bool = True
    note: str = ""


def released_loop(student: Tensor, teacher: Tensor) -> Tensor:
    """The published batch-wise loss (without the factor 0.001) in its authors' way: dense normalisations in a loop."""
    s = torch.softmax(student / TEMPERATURE, dim=1)
    t = torch.softmax(teacher / TEMPERATURE, dim=1)
    cost = torch.cdist(t, s, p=1)
    plan = torch.exp(-cost / EPSILON)
    for _ in range(NUM_ITERS):
        plan = plan / plan.sum(dim=1, keepdim=True)
        plan = plan / plan.sum(dim=0, keepdim=True)
    return (plan * cost).sum()


def _released_compiled() -> Function:
    torch._dynamo.reset()
    return torch.compile(released_loop, dynamic=False)


def _pot() -> Function:
    import ot

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        s = torch.softmax(student / TEMPERATURE, dim=1)
        t = torch.softmax(teacher / TEMPERATURE, dim=1)
        # POT updates the scaling of its second marginal first: transposed, that is Algorithm 1's order.
        cost = torch.cdist(s, t, p=1)
        uniform = torch.full((s.shape[0],), 1.0 / s.shape[0], dtype=s.dtype, device=s.device)
        plan = ot.sinkhorn(uniform, uniform, cost, EPSILON, numItermax=NUM_ITERS, stopThr=0.0, warn=False)
        return s.shape[0] * (plan * cost).sum()

    return loss


def _geomloss() -> Function:
    from geomloss import SamplesLoss

    # Costs are at most 2: annealed from 2 down to epsilon in as many steps as the published iterations.
    solver = SamplesLoss(
        "sinkhorn",
        p=1,
        blur=EPSILON,
        diameter=2.0,
        scaling=(EPSILON / 2.0) ** (1.0 / NUM_ITERS),
        cost=lambda x, y: torch.cdist(x, y, p=1),
        debias=False,
        backend="tensorized",
    )

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        s = torch.softmax(student / TEMPERATURE, dim=1)
        t = torch.softmax(teacher / TEMPERATURE, dim=1)
        return s.shape[0] * solver(t, s)

    return loss


def _ours(backend: str | None) -> Callable[[], Function]:
    return lambda: SinKD(temperature=TEMPERATURE, epsilon=EPSILON, num_iters=NUM_ITERS, backend=backend)


def _our_cost(backend: str | None) -> Callable[[], Function]:
    return lambda: lambda x, y: otkd_fast.cost_matrix(x, y, metric="l1", backend=backend)


def transport_cost(solver: Callable) -> Function:
    """(cost (B, n, m), marginals (B, 2, n)) -> <P, C> (B,) by a function with the signature of otkd_fast.sinkhorn."""

    def solve(cost: Tensor, marginals: Tensor) -> Tensor:
        a, b = marginals.unbind(-2)
        return solver(cost, a, b, epsilon=EPSILON, num_iters=NUM_ITERS).transport_cost

    return solve


def scaling_loop(cost: Tensor, marginals: Tensor) -> Tensor:
    """The textbook iteration on scalings in plain PyTorch, rows first."""
    a, b = marginals.unbind(-2)
    kernel = torch.exp(-cost / EPSILON)
    v = torch.ones_like(b)
    for _ in range(NUM_ITERS):
        u = a / (kernel @ v.unsqueeze(-1)).squeeze(-1)
        v = b / (kernel.mT @ u.unsqueeze(-1)).squeeze(-1)
    return (u.unsqueeze(-1) * kernel * v.unsqueeze(-2) * cost).sum((-2, -1))


def _pot_sinkhorn() -> Function:
    import ot

    def solve(cost: Tensor, marginals: Tensor) -> Tensor:
        # Transposed for the order of the updates; one problem after the other, POT's sinkhorn takes no batch of costs.
        options = {"numItermax": NUM_ITERS, "stopThr": 0.0, "warn": False}
        plans = [ot.sinkhorn(b, a, c.mT, EPSILON, **options) for c, (a, b) in zip(cost, marginals, strict=True)]
        return torch.stack([(plan * c.mT).sum() for plan, c in zip(plans, cost, strict=True)])

    return solve


GEOMLOSS_NOTE = (
    "geomloss solves a neighbouring problem: its value is the regularised cost after an annealing schedule (not <P, C> "
    "after 20 fixed iterations), and its gradient is the envelope one (not that of the unrolled iterations)."
)
SINKD_PEERS = (
    Peer("otkd_fast", "otkd_fast", _ours(None)),
    Peer("released", "released loop, PyTorch", lambda: released_loop),
    Peer("released-compiled", "the same, torch.compile", _released_compiled),
    Peer("pot", "POT ot.sinkhorn, torch", _pot),
    Peer("geomloss", "geomloss SamplesLoss", _geomloss, same_answer=False, note=GEOMLOSS_NOTE),
)
REFERENCE_PEER = Peer("reference", "otkd_fast reference", _ours("reference"))
COST_PEERS = (
    Peer("otkd_fast", "otkd_fast", _our_cost(None)),
    Peer("cdist", "torch.cdist(p=1)", lambda: lambda x, y: torch.cdist(x, y, p=1)),
)
SINKHORN_PEERS = (
    Peer("otkd_fast", "otkd_fast", lambda: transport_cost(otkd_fast.sinkhorn)),
    Peer("scaling", "scaling loop, PyTorch", lambda: scaling_loop),
    Peer("pot", "POT ot.sinkhorn, torch", _pot_sinkhorn),
)
