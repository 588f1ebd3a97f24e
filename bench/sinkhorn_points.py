"""Two clouds of n points, squared Euclidean cost, with the gradient to the points of x: envelope and unrolled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import otkd_fast

from .family import Family, Function, Peer, Problem
from .measure import forward_backward

FEATURES, NUM_ITERS, RELATIVE_EPSILON = 64, 50, 0.05
SIZES = ("1024", "4096")
# squared distances of standard normal points and points moved by 0.5: mean 2 d + d / 4
EPSILON = RELATIVE_EPSILON * FEATURES * 2.25


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x|^2 + |y|^2 - 2 <x, y>, one matrix product."""
    return (x * x).sum(-1, keepdim=True) + (y * y).sum(-1) - 2 * x @ y.mT


def ours(output: str, gradient: str) -> Function:
    def solve(x: Tensor, y: Tensor) -> Tensor:
        result = otkd_fast.sinkhorn_points(
            x, y, metric="sqeuclidean", epsilon=EPSILON, num_iters=NUM_ITERS, gradient=gradient
        )
        return getattr(result, output)

    return solve


def log_loop(x: Tensor, y: Tensor) -> Tensor:
    """Log-domain iterations without gradient, then the dual value's terms that have one: <P, C> for the fixed plan."""
    with torch.no_grad():
        cost = squared_distances(x, y) / EPSILON
        log_a, log_b = -torch.tensor(float(len(x))).log().item(), -torch.tensor(float(len(y))).log().item()
        g = torch.zeros(len(y), dtype=x.dtype)
        for _ in range(NUM_ITERS):
            f = log_a - torch.logsumexp(g - cost, dim=1)
            g = log_b - torch.logsumexp(f.unsqueeze(1) - cost, dim=0)
        plan = torch.exp(f.unsqueeze(1) + g - cost)
        potentials = EPSILON * (f.mean() - log_a + g.mean() - log_b)
    moved = (plan * squared_distances(x, y)).sum()
    return potentials + (moved - moved.detach())


def scaling_loop(x: Tensor, y: Tensor) -> Tensor:
    """Iterations on scalings with the kernel in memory, <P, C>, unrolled."""
    cost = squared_distances(x, y)
    kernel = torch.exp(-cost / EPSILON)
    v = x.new_ones(len(y))
    for _ in range(NUM_ITERS):
        u = 1 / len(x) / (kernel @ v)
        v = 1 / len(y) / (kernel.mT @ u)
    return u @ ((kernel * cost) @ v)


def _compiled(function: Function) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _pot(size: str) -> Function:
    import ot

    def solve(x: Tensor, y: Tensor) -> Tensor:
        cost = squared_distances(y, x)  # transposed, for the order of the updates
        a, b = x.new_full((len(y),), 1 / len(y)), x.new_full((len(x),), 1 / len(x))
        plan = ot.sinkhorn(a, b, cost, EPSILON, numItermax=NUM_ITERS, stopThr=0.0, warn=False)
        return (plan * cost).sum()

    return solve


def _geomloss(size: str) -> Function:
    from geomloss import SamplesLoss

    # its cost is |x - y|^2 / 2 and its epsilon blur^2; annealed from the diameter in as many steps
    blur, diameter = (EPSILON / 2) ** 0.5, 40.0
    solver = SamplesLoss(
        "sinkhorn", p=2, blur=blur, diameter=diameter, scaling=(blur / diameter) ** (1 / NUM_ITERS), debias=False,
        backend="tensorized",
    )  # fmt: skip
    return lambda x, y: 2 * solver(x, y)


GEOMLOSS_NOTE = "geomloss anneals epsilon and updates both sides at once: a neighbouring value with the same limit."
ENVELOPE_PEERS = (
    Peer("otkd_fast", "otkd_fast", lambda size: ours("regularized_cost", "envelope")),
    Peer("log", "log-domain loop, PyTorch", lambda size: log_loop, sizes=("1024",)),
    Peer("log-compiled", "the same, torch.compile", lambda size: _compiled(log_loop)),
    Peer("geomloss", "geomloss SamplesLoss", _geomloss, same_answer=False, note=GEOMLOSS_NOTE, sizes=("1024",)),
)
UNROLLED_PEERS = (
    Peer("otkd_fast", "otkd_fast", lambda size: ours("transport_cost", "unroll")),
    Peer("scaling", "scaling loop, PyTorch", lambda size: scaling_loop),
    Peer("scaling-compiled", "the same, torch.compile", lambda size: _compiled(scaling_loop)),
    Peer("pot", "POT ot.sinkhorn, torch", _pot),
)


def clouds(size: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(int(size), FEATURES, generator=generator) for _ in range(2))
    return x, y + 0.5


def make(oracle: Function) -> Callable[[str], Problem]:
    def problem(size: str) -> Problem:
        x, y = clouds(size)
        expected = forward_backward(oracle, x.double().requires_grad_(), y.double())
        return Problem((x.requires_grad_(), y), expected)

    return problem


_PARAMETERS = {"features": FEATURES, "epsilon": EPSILON, "num_iters": NUM_ITERS}
_TITLE = f"clouds of n points in {FEATURES} dimensions, squared distances, epsilon {EPSILON:g}, {NUM_ITERS} iterations"
ENVELOPE = Family(
    op="sinkhorn_points_envelope",
    title=f"Two {_TITLE}: regularised value, envelope gradient to x",
    sizes=SIZES,
    problem=make(log_loop),
    peers=ENVELOPE_PEERS,
    parameters=_PARAMETERS,
    required={"4096": {"log-compiled": 3.0}},
    required_forward={"4096": {"log-compiled": 3.0}},
    notes=(GEOMLOSS_NOTE,),
)
UNROLLED = Family(
    op="sinkhorn_points_unroll",
    title=f"Two {_TITLE}: <P, C>, unrolled gradient to x",
    sizes=SIZES,
    problem=make(scaling_loop),
    peers=UNROLLED_PEERS,
    parameters=_PARAMETERS,
    required={"4096": {"scaling": 3.0, "pot": 3.0}},
    required_forward={"4096": {"scaling": 3.0, "pot": 3.0}},
)
