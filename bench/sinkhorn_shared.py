"""WKD-L's problem: one cost between the classes for a batch of marginals, one excluded class a problem.

From logits to the mean of <P, C>, with the unrolled gradient to the student's logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import otkd_fast

from . import peers
from .family import Family, Function, Peer, Problem
from .measure import forward_backward

EPSILON, NUM_ITERS, TEMPERATURE, BATCH = 0.05, 20, 2.0, 64
SIZES = ("100", "1000")


def class_cost(classes: int) -> Tensor:
    """1 - exp(-d) of distances d like those between classes in the published costs; 0 on the diagonal."""
    generator = torch.Generator().manual_seed(3)
    distance = 0.5 + 0.4 * torch.rand(classes, classes, generator=generator)
    distance = (distance + distance.mT) / 2
    return (1 - torch.exp(-distance)).fill_diagonal_(0.0)


def masses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Softmaxes (B, n) without the teacher's first class: it has mass 0 on both sides."""
    excluded = torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, teacher.argmax(1, keepdim=True), True)
    return tuple(torch.softmax((z / TEMPERATURE).masked_fill(excluded, -torch.inf), dim=1) for z in (student, teacher))


def mean_cost(solver: Callable, cost: Tensor, num_iters: int = NUM_ITERS, **options) -> Function:
    """Loss by a function with the signature of otkd_fast.sinkhorn."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        a, b = masses(student, teacher)
        result = solver(cost.to(a.dtype), a, b, epsilon=EPSILON, num_iters=num_iters, update_first="b", **options)
        return (result.regularized_cost if options.get("gradient") == "envelope" else result.transport_cost).mean()

    return loss


def released(cost: Tensor, num_iters: int = NUM_ITERS) -> Function:
    """The released way: the excluded class is cut out of a copy of the cost for each problem, then dense products."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        batch, classes = teacher.shape
        kept = torch.ones_like(teacher, dtype=torch.bool).scatter_(1, teacher.argmax(1, keepdim=True), False)
        a, b = (torch.softmax(z[kept].view(batch, classes - 1) / TEMPERATURE, dim=1) for z in (student, teacher))
        pairs = kept.unsqueeze(2) & kept.unsqueeze(1)  # (B, n, n)
        own = cost.to(a.dtype).expand(batch, classes, classes)[pairs].view(batch, classes - 1, classes - 1)
        kernel = torch.exp(-own / EPSILON)
        u = torch.ones_like(a)
        for _ in range(num_iters):
            v = b / torch.bmm(kernel.mT, u.unsqueeze(-1)).squeeze(-1)
            u = a / torch.bmm(kernel, v.unsqueeze(-1)).squeeze(-1)
        return (u.unsqueeze(-1) * kernel * v.unsqueeze(-2) * own).sum((1, 2)).mean()

    return loss


def matrix_products(cost: Tensor, num_iters: int = NUM_ITERS) -> Function:
    """Two matrix products an iteration for the whole batch, in plain PyTorch."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        a, b = masses(student, teacher)
        matrix = cost.to(a.dtype)
        kernel = torch.exp(-matrix / EPSILON)
        u = torch.ones_like(a)
        for _ in range(num_iters):
            v = b / (u @ kernel)
            u = a / (v @ kernel.mT)
        return ((u @ (kernel * matrix)) * v).sum(1).mean()

    return loss


def _compiled(function: Function) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _pot(cost: Tensor) -> Function:
    import ot

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        a, b = (weights + 1e-12 for weights in masses(student, teacher))  # it stops at masses of 0
        matrix = cost.to(a.dtype)
        options = {"numItermax": NUM_ITERS, "stopThr": 0.0, "warn": False}
        plans = [ot.sinkhorn(row, column, matrix, EPSILON, **options) for row, column in zip(a, b, strict=True)]
        return torch.stack([(plan * matrix).sum() for plan in plans]).mean()

    return loss


def _ott(cost: Tensor) -> Function:
    import jax

    plan = peers.ott_plan(EPSILON, NUM_ITERS, lse=False)
    matrix = jax.numpy.asarray(cost.numpy())

    def one(a, b):
        return (plan(matrix, a, b) * matrix).sum()

    transport = peers.through_jax(jax.vmap(one))

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        a, b = (weights + 1e-12 for weights in masses(student, teacher))  # its gradient is NaN at masses of 0
        return transport(a, b.detach()).mean()

    return loss


ENVELOPE_NOTE = "The envelope row is the regularised value with the envelope gradient: another vector, not WKD-L's."


def _on_cost(build: Callable[..., Function], **options) -> Callable[[str], Function]:
    """build(cost of that many classes)."""
    return lambda size: build(class_cost(int(size)), **options)


def _ours(cost: Tensor, gradient: str) -> Function:
    return mean_cost(otkd_fast.sinkhorn, cost, gradient=gradient)


PEERS = (
    Peer("otkd_fast", "otkd_fast", _on_cost(_ours, gradient="unroll")),
    Peer("otkd_fast-envelope", "otkd_fast, envelope", _on_cost(_ours, gradient="envelope"), False, note=ENVELOPE_NOTE),
    Peer("released", "released form", _on_cost(released)),
    Peer("released-compiled", "the same, torch.compile", _on_cost(lambda cost: _compiled(released(cost)))),
    Peer("products", "matrix products, PyTorch", _on_cost(matrix_products)),
    Peer("products-compiled", "the same, torch.compile", _on_cost(lambda cost: _compiled(matrix_products(cost)))),
    Peer("pot", "POT ot.sinkhorn, one by one", _on_cost(_pot)),
    Peer("ott", "OTT-JAX, kernel mode, vmap", _on_cost(_ott), note=peers.OTT_NOTE),
)


def problem(size: str) -> Problem:
    classes = int(size)
    generator = torch.Generator().manual_seed(4)
    teacher = 3.0 * torch.randn(BATCH, classes, generator=generator)
    student = 0.7 * teacher + torch.randn(BATCH, classes, generator=generator)
    cost = class_cost(classes)
    # the matrix products in float64: the reference would need B x n x n tensors for every iteration
    expected = forward_backward(matrix_products(cost), student.double().requires_grad_(), teacher.double())
    return Problem((student.requires_grad_(), teacher), expected)


FAMILY = Family(
    op="sinkhorn_shared",
    title=f"WKD-L's problem: {BATCH} pairs of marginals, one shared cost n x n, epsilon {EPSILON:g}, {NUM_ITERS} "
    "iterations, unrolled gradient to the student's logits",
    sizes=SIZES,
    problem=problem,
    peers=PEERS,
    parameters={"batch": BATCH, "epsilon": EPSILON, "num_iters": NUM_ITERS, "temperature": TEMPERATURE},
    required={"100": {"released": 25.0, "products": 3.0}, "1000": {"released": 60.0, "products": 1.5}},
    required_forward={"100": {"released": 25.0, "products": 3.0}, "1000": {"released": 60.0, "products": 1.5}},
    notes=(ENVELOPE_NOTE,),
)
