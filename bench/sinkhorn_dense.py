"""Sinkhorn on given costs, many small problems and a few large ones, with the unrolled gradient to the cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import otkd_fast
from otkd_fast import reference

from . import peers
from .family import Family, Function, Peer, Problem
from .measure import forward_backward

EPSILON, NUM_ITERS = 0.1, 20
SIZES = ("10000x4x4", "4096x8x8", "1024x16x16", "1024x32x32", "16x100x100", "1x500x500")


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


def _scaling_compiled(size: str) -> Function:
    torch._dynamo.reset()
    return torch.compile(scaling_loop, dynamic=False)


def _pot(size: str) -> Function:
    import ot

    def solve(cost: Tensor, marginals: Tensor) -> Tensor:
        # Transposed for the order of the updates; one problem after the other, POT's sinkhorn takes no batch of costs.
        options = {"numItermax": NUM_ITERS, "stopThr": 0.0, "warn": False}
        plans = [ot.sinkhorn(b, a, c.mT, EPSILON, **options) for c, (a, b) in zip(cost, marginals, strict=True)]
        return torch.stack([(plan * c.mT).sum() for plan, c in zip(plans, cost, strict=True)])

    return solve


def _pot_batch(method: str) -> Callable[[str], Function]:
    def build(size: str) -> Function:
        import ot.batch

        def solve(cost: Tensor, marginals: Tensor) -> Tensor:
            a, b = marginals.unbind(-2)
            options = {"max_iter": NUM_ITERS, "tol": 0.0, "method": method, "grad": "autodiff"}
            return ot.batch.solve_batch(cost, EPSILON, a, b, **options).value_linear

        return solve

    return build


POT_BATCH_NOTE = (
    "ot.batch starts from other scalings and counts its iterations otherwise, so its plans differ a little."
)
PEERS = (
    Peer("otkd_fast", "otkd_fast", lambda size: transport_cost(otkd_fast.sinkhorn)),
    Peer("scaling", "scaling loop, PyTorch", lambda size: scaling_loop),
    Peer("scaling-compiled", "the same, torch.compile", _scaling_compiled),
    Peer("pot", "POT ot.sinkhorn, one by one", _pot, sizes=("16x100x100", "1x500x500")),
    Peer("pot-batch", "POT ot.batch, scalings", _pot_batch("sinkhorn"), same_answer=False, note=POT_BATCH_NOTE),
    Peer("pot-batch-log", "POT ot.batch, log domain", _pot_batch("log_sinkhorn"), same_answer=False),
    Peer("ott", "OTT-JAX, vmap", lambda size: peers.ott_dense(EPSILON, NUM_ITERS), note=peers.OTT_NOTE),
)


def problem(size: str) -> Problem:
    batch, n, _ = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(2)
    cost = torch.rand(batch, n, n, generator=generator)
    marginals = torch.softmax(torch.randn(batch, 2, n, generator=generator), dim=-1)
    grad = torch.ones(batch)
    solve = transport_cost(reference.sinkhorn)
    expected = forward_backward(solve, cost.double().requires_grad_(), marginals.double(), grad.double())
    return Problem((cost.requires_grad_(), marginals, grad), expected)


FAMILY = Family(
    op="sinkhorn",
    title=f"Sinkhorn (problems x n x m), epsilon {EPSILON:g} of the largest cost, {NUM_ITERS} iterations, unrolled "
    "gradient of <P, C> to the cost",
    sizes=SIZES,
    problem=problem,
    peers=PEERS,
    parameters={"epsilon": EPSILON, "num_iters": NUM_ITERS},
    required={size: {peer.name: 10.0 for peer in PEERS[1:]} for size in ("10000x4x4", "1024x16x16")},
    required_forward={size: {peer.name: 10.0 for peer in PEERS[1:]} for size in ("10000x4x4", "1024x16x16")},
)
