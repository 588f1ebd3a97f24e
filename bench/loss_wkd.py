"""WKD-L and WKD-F as whole losses: logits or feature maps to a scalar, against the released forms written afresh."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from otkd_fast import losses

from .family import Family, Function, Peer, Problem
from .measure import forward_backward
from .sinkhorn_shared import class_cost

EPSILON, NUM_ITERS, GUARD = 0.05, 10, 1e-8
LOGIT_SIZES = {"64x100": (8.0, 600.0), "256x1000": (2.0, 30.0)}  # B x C: temperature, gamma, as published
MAP_SIZES = {"64x256x8x8, grid 1": (1, 4.0), "256x512x7x7, grid 4": (4, 2.0)}  # (N, C, H, W): grid, ratio


def shape_of(size: str) -> tuple[int, ...]:
    return tuple(map(int, size.split(",")[0].split("x")))


def labels_of(size: str) -> Tensor:
    batch, classes = shape_of(size)
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(1))


def released_logit(size: str) -> Function:
    """B copies of the cost without the target's row and column, dense products, scalings with a guard."""
    batch, classes = shape_of(size)
    temperature, gamma = LOGIT_SIZES[size]
    labels, matrix = labels_of(size), class_cost(classes)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        kept = torch.ones_like(teacher, dtype=torch.bool).scatter_(1, labels[:, None], False)
        target = -(torch.softmax(teacher, 1) * torch.log_softmax(student, 1)).gather(1, labels[:, None]).mean()
        a, b = (torch.softmax(z[kept].view(batch, classes - 1) / temperature, 1) for z in (student, teacher))
        pairs = kept.unsqueeze(2) & kept.unsqueeze(1)  # (B, C, C)
        cost = (matrix.to(a.dtype).relu() + 1e-8).repeat(batch, 1, 1)[pairs].view(batch, classes - 1, classes - 1)
        kernel = torch.exp(-cost / EPSILON)
        u = torch.full_like(a, 1 / (classes - 1))
        for _ in range(NUM_ITERS):
            v = b / (torch.bmm(kernel.mT, u.unsqueeze(-1)).squeeze(-1) + GUARD)
            u = a / (torch.bmm(kernel, v.unsqueeze(-1)).squeeze(-1) + GUARD)
        plan = u.unsqueeze(-1) * kernel * v.unsqueeze(-2)
        return target + gamma * (plan * cost).sum((1, 2)).mean()

    return loss


def our_logit(size: str, variant: str) -> Function:
    temperature, gamma = LOGIT_SIZES[size]
    labels = labels_of(size)
    cost = class_cost(shape_of(size)[1])
    options = {"temperature": temperature, "gamma": gamma, "variant": variant}
    return lambda student, teacher: losses.wkd_logit(student, teacher, labels, cost=cost.to(student.dtype), **options)


def released_feature(size: str) -> Function:
    """Mean and standard deviation of each window, one after the other."""
    grid, ratio = MAP_SIZES[size]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        height, width = student.shape[-2:]
        total = student.new_zeros(())
        for i in range(grid):
            for j in range(grid):
                rows = slice(i * height // grid, -(-(i + 1) * height // grid))
                columns = slice(j * width // grid, -(-(j + 1) * width // grid))
                moments = []
                for maps in (student, teacher):
                    window = maps[..., rows, columns].flatten(2)
                    moments.append((window.mean(-1), (window.var(-1) + 1e-5).sqrt()))
                (mean_s, std_s), (mean_t, std_t) = moments
                total = total + ratio * (mean_s - mean_t).square().sum(1).mean()
                total = total + (std_s - std_t).square().sum(1).mean()
        return total / grid**2

    return loss


def our_feature(size: str) -> Function:
    grid, ratio = MAP_SIZES[size]
    return lambda student, teacher: losses.wkd_feature(student, teacher, grid=grid, ratio=ratio)


def compiled(build: Callable[[str], Function]) -> Callable[[str], Function]:
    def build_compiled(size: str) -> Function:
        torch._dynamo.reset()
        return torch.compile(build(size), dynamic=False)

    return build_compiled


def random_pair(size: str, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    teacher = scale * torch.randn(shape_of(size), generator=generator)
    return (0.7 * teacher + torch.randn(shape_of(size), generator=generator)).requires_grad_(), teacher


def logit_problem(size: str) -> Problem:
    student, teacher = random_pair(size, 3.0)
    ours = our_logit(size, "released")  # tests/losses proves it equal to the published formula
    wide = student.double().detach().requires_grad_(), teacher.double()
    return Problem((student, teacher), forward_backward(ours, *wide))


def feature_problem(size: str) -> Problem:
    student, teacher = random_pair(size, 1.0)
    wide = student.double().detach().requires_grad_(), teacher.double()
    return Problem((student, teacher), forward_backward(released_feature(size), *wide))


PAPER_NOTE = "variant='paper' leaves out the released code's guards of 1e-8."

LOGIT_FAMILY = Family(
    op="wkd_logit",
    title=f"WKD-L (B x C): the whole loss, epsilon {EPSILON:g}, {NUM_ITERS} iterations",
    sizes=tuple(LOGIT_SIZES),
    problem=logit_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", lambda size: our_logit(size, "released")),
        Peer("otkd_fast-paper", "otkd_fast, variant='paper'", lambda size: our_logit(size, "paper"), False, PAPER_NOTE),
        Peer("released", "released form", released_logit),
        Peer("released-compiled", "the same, torch.compile", compiled(released_logit)),
    ),
    parameters={"epsilon": EPSILON, "num_iters": NUM_ITERS},
    notes=(PAPER_NOTE,),
)
FEATURE_FAMILY = Family(
    op="wkd_feature",
    title="WKD-F, diagonal (N x C x H x W): the whole loss",
    sizes=tuple(MAP_SIZES),
    problem=feature_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", our_feature),
        Peer("released", "released form", released_feature),
        Peer("released-compiled", "the same, torch.compile", compiled(released_feature)),
    ),
)
