"""SinKD, softmax to loss, with the gradient to the student's logits."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import otkd_fast
from otkd_fast.losses import SinKD
from otkd_fast.reference import sinkd as oracle

from . import peers
from .family import Family, Function, Peer, Problem
from .measure import forward_backward

TEMPERATURE, EPSILON, NUM_ITERS = 2.0, 0.1, 20
SIZES = ("64x100", "256x100", "1024x1000")


def logits(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits, float32: the student is a noisy version of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3.0 * torch.randn(rows, classes, generator=generator)
    student = 0.7 * teacher + torch.randn(rows, classes, generator=generator)
    return student, teacher


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


def _released_compiled(size: str) -> Function:
    torch._dynamo.reset()
    return torch.compile(released_loop, dynamic=False)


def _pot(size: str) -> Function:
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


def _transport(size: str) -> tuple[Tensor, float]:
    """Cost in Algorithm 1's order, and the marginal error of its plan of mass 1 after the published iterations."""
    student, teacher = logits(*map(int, size.split("x")))
    s, t = (torch.softmax(z.double() / TEMPERATURE, dim=1) for z in (student, teacher))
    cost = torch.cdist(t, s, p=1)
    return cost, otkd_fast.sinkhorn(cost, epsilon=EPSILON, num_iters=NUM_ITERS).marginal_error.item()


def _geomloss(size: str) -> Function:
    from geomloss import SamplesLoss

    def solver(steps: int, potentials: bool = False):
        # Costs are at most 2: annealed from 2 down to epsilon in that many steps.
        return SamplesLoss(
            "sinkhorn", p=1, blur=EPSILON, diameter=2.0, scaling=(EPSILON / 2.0) ** (1.0 / steps), debias=False,
            cost=lambda x, y: torch.cdist(x, y, p=1), backend="tensorized", potentials=potentials,
        )  # fmt: skip

    student, teacher = (torch.softmax(z / TEMPERATURE, dim=1) for z in logits(*map(int, size.split("x"))))
    cost, ours = _transport(size)
    uniform = torch.full((len(cost),), 1 / len(cost), dtype=cost.dtype)

    def error(steps: int) -> float:
        f, g = (z.double() for z in solver(steps, potentials=True)(teacher, student))
        plan = torch.exp((f.reshape(-1, 1) + g.reshape(1, -1) - cost) / EPSILON) / len(cost) ** 2
        return peers.marginal_error(plan, uniform, uniform)

    steps, compared = peers.fewest_steps(error, ours)
    solve = solver(steps)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        s = torch.softmax(student / TEMPERATURE, dim=1)
        t = torch.softmax(teacher / TEMPERATURE, dim=1)
        return s.shape[0] * solve(t, s)

    loss.compared = compared
    return loss


def _geomloss_ot(size: str) -> Function:
    import geomloss.ot

    cost, ours = _transport(size)
    uniform = torch.full((len(cost),), 1 / len(cost), dtype=cost.dtype)
    steps, compared = peers.fewest_steps(
        lambda steps: peers.marginal_error(geomloss.ot.solve(cost, reg=EPSILON, max_iter=steps).plan, uniform, uniform),
        ours,
    )

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        s = torch.softmax(student / TEMPERATURE, dim=1)
        t = torch.softmax(teacher / TEMPERATURE, dim=1)
        cost = torch.cdist(t, s, p=1)
        return s.shape[0] * geomloss.ot.solve(cost, reg=EPSILON, max_iter=steps).value

    loss.compared = compared
    return loss


def _pot_solve_sample(size: str) -> Function:
    import ot

    options = {"reg": EPSILON, "max_iter": NUM_ITERS, "tol": 0.0, "metric": "cityblock", "grad": "autodiff"}

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        s = torch.softmax(student / TEMPERATURE, dim=1)
        t = torch.softmax(teacher / TEMPERATURE, dim=1)
        with warnings.catch_warnings():  # of iterations that have not converged, as published
            warnings.simplefilter("ignore")
            return s.shape[0] * ot.solve_sample(s, t, **options).value_linear

    return loss


def _ott(size: str) -> Function:
    import jax
    import jax.numpy as jnp

    plan = peers.ott_plan(EPSILON, NUM_ITERS)

    def loss(student, teacher):
        s, t = (jax.nn.softmax(z / TEMPERATURE, axis=1) for z in (student, teacher))
        cost = jnp.abs(s[:, None] - t[None]).sum(-1)
        uniform = jnp.full(len(s), 1 / len(s), s.dtype)
        return len(s) * (plan(cost, uniform, uniform) * cost).sum()

    return peers.through_jax(loss)


def _ours(backend: str | None) -> Callable[[str], Function]:
    return lambda size: SinKD(temperature=TEMPERATURE, epsilon=EPSILON, num_iters=NUM_ITERS, backend=backend)


GEOMLOSS_NOTE = (
    "geomloss solves a neighbouring problem: its value is the regularised cost after an annealing schedule (not <P, C> "
    "after 20 fixed iterations), and its gradient is the envelope one (not that of the unrolled iterations)."
)
BOTH = "marginal error"
PEERS = (
    Peer("otkd_fast", "otkd_fast", _ours(None)),
    Peer("released", "released loop, PyTorch", lambda size: released_loop),
    Peer("released-compiled", "the same, torch.compile", _released_compiled),
    Peer("pot", "POT ot.sinkhorn, torch", _pot),
    Peer("pot-sample", "POT ot.solve_sample", _pot_solve_sample, sizes=SIZES[:2]),
    Peer("ott", "OTT-JAX", _ott, note=peers.OTT_NOTE, sizes=SIZES[:2]),
    Peer("geomloss", "geomloss SamplesLoss", _geomloss, same_answer=False, note=GEOMLOSS_NOTE, equal=BOTH),
    Peer("geomloss-ot", "geomloss.ot.solve", _geomloss_ot, same_answer=False, note="As SamplesLoss.", equal=BOTH),
)
REFERENCE = Peer("reference", "otkd_fast reference", _ours("reference"))


def problem(size: str) -> Problem:
    rows, classes = map(int, size.split("x"))
    student, teacher = logits(rows, classes)
    published = functools.partial(oracle.sinkd, temperature=TEMPERATURE, epsilon=EPSILON, num_iters=NUM_ITERS)
    # the loop on the plan in float64, whose range is wide enough: the log-domain oracle takes long at 1024
    published = released_loop if rows > 256 else published
    expected = forward_backward(published, student.double().requires_grad_(), teacher.double())
    return Problem((student.requires_grad_(), teacher), expected)


FAMILY = Family(
    op="sinkd",
    title=f"SinKD (b x d), L1 cost on softmax(z / {TEMPERATURE:g}), epsilon {EPSILON:g}, {NUM_ITERS} iterations, "
    "unrolled gradient",
    sizes=SIZES,
    problem=problem,
    peers=PEERS,
    parameters={"temperature": TEMPERATURE, "epsilon": EPSILON, "num_iters": NUM_ITERS},
    required={
        "64x100": {"released": 10.0, "released-compiled": 4.0, "pot": 12.0, "geomloss": 12.0},
        "256x100": {"released": 6.0, "released-compiled": 3.0, "pot": 6.0, "geomloss": 6.0},
        "1024x1000": {"released": 8.0, "released-compiled": 8.0, "pot": 8.0, "geomloss": 8.0},
    },
)
