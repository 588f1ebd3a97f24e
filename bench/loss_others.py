"""WKL, MultiLevelOT, KD2M and WCoRD as whole losses, against their formulas in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from otkd_fast import losses

from .family import Family, Function, Peer, Problem
from .loss_wkd import EPSILON, GUARD, NUM_ITERS, compiled, labels_of, random_pair
from .measure import forward_backward
from .published import sizes_of
from .sinkhorn_shared import class_cost

WKL_TEMPERATURE, WKL_GAMMA, PROGRESS = 8.0, 600.0, 0.5
MULTI_ITERS, MULTI_EPSILON, TOP_K = 10, 0.1, 50

KINK_NOTE = (
    "Where two of millions of probabilities agree to float32 rounding, the sign of their difference is open: the "
    "gradients of both sides differ from float64 by up to 3e-3 there."
)
KINK_ERRORS = (1e-5, 1e-2)


def _logits_size(size: str) -> str:
    return size.split()[0]


def _problem(pair: tuple[Tensor, Tensor], exact: Function) -> Problem:
    student, teacher = pair
    wide = student.detach().double().requires_grad_(), teacher.double()
    return Problem((student, teacher), forward_backward(exact, *wide))


def wkl_plain(size: str) -> Function:
    """L_t + gamma W + (1 - g) (TCKD + 2 NCKD) / 2, W by the released form: B costs without the label's class."""
    batch, classes = map(int, _logits_size(size).split("x"))
    labels, matrix, temperature = labels_of(_logits_size(size)), class_cost(classes), WKL_TEMPERATURE

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        kept = torch.ones_like(teacher, dtype=torch.bool).scatter_(1, labels[:, None], False)
        target = -(torch.softmax(teacher, 1) * torch.log_softmax(student, 1)).gather(1, labels[:, None]).mean()
        others = [z[kept].view(batch, classes - 1) / temperature for z in (student, teacher)]
        a, b = (torch.softmax(z, 1) for z in others)
        pairs = kept.unsqueeze(2) & kept.unsqueeze(1)
        cost = (matrix.to(a.dtype).relu() + 1e-8).repeat(batch, 1, 1)[pairs].view(batch, classes - 1, classes - 1)
        kernel = torch.exp(-cost / EPSILON)
        u = torch.full_like(a, 1 / (classes - 1))
        for _ in range(NUM_ITERS):
            v = b / (torch.bmm(kernel.mT, u.unsqueeze(-1)).squeeze(-1) + GUARD)
            u = a / (torch.bmm(kernel, v.unsqueeze(-1)).squeeze(-1) + GUARD)
        transport = (u.unsqueeze(-1) * kernel * v.unsqueeze(-2) * cost).sum((1, 2)).mean()
        p, q = (torch.softmax(z / temperature, 1).gather(1, labels[:, None]) for z in (student, teacher))
        binary = [torch.cat((x, 1 - x), 1) for x in (p, q)]
        tckd = F.kl_div(binary[0].log(), binary[1], reduction="batchmean") * temperature**2
        nckd = F.kl_div(torch.log_softmax(others[0], 1), b, reduction="batchmean") * temperature**2
        return target + WKL_GAMMA * transport + 0.5 * 0.5 * (tckd + 2 * nckd)

    return loss


def _our_wkl(size: str, mode: str = "dwkd_dkd") -> Function:
    labels, cost = labels_of(_logits_size(size)), class_cost(int(_logits_size(size).split("x")[1]))
    options = {"mode": mode, "temperature": WKL_TEMPERATURE, "gamma": WKL_GAMMA}
    return lambda s, t: losses.wkl(s, t, labels, PROGRESS, cost=cost.to(s.dtype), **options)


def full_plain(size: str) -> Function:
    """10 <P, C> over all classes, by matrix products for the whole batch."""
    matrix = class_cost(int(size.split("x")[1])).relu() + 1e-8

    def value(student: Tensor, teacher: Tensor) -> Tensor:
        a, b = (torch.softmax(z / WKL_TEMPERATURE, 1) for z in (student, teacher))
        cost = matrix.to(a.dtype)
        kernel = torch.exp(-cost / EPSILON)
        u = torch.full_like(a, 1 / a.shape[1])
        for _ in range(NUM_ITERS):
            v = b / (u @ kernel + GUARD)
            u = a / (v @ kernel.mT + GUARD)
        return 10 * ((u @ (kernel * cost)) * v).sum(1).mean()

    return value


def full_problem(size: str) -> Problem:
    student, teacher = random_pair(size, 3.0)
    return Problem((student, teacher), (full_plain(size)(student.detach().double(), teacher.double()),))


def multi_plain(student: Tensor, teacher: Tensor) -> Tensor:
    """The three terms of MultiLevelOT as released, an answer at a time in the transport."""

    def probabilities(logits: Tensor) -> Tensor:
        p = torch.softmax(logits / (logits.std(-1, keepdim=True) + 1e-4), -1)
        return p[..., p.sum((0, 1)).argsort(descending=True)[:TOP_K]]

    s, t = probabilities(student), probabilities(teacher)
    kl = -(torch.softmax(s, -1) * torch.log_softmax(t, -1)).sum(-1).mean()
    sequence = s.new_zeros(())
    for x, y in zip(torch.softmax(s / 2, -1), torch.softmax(t / 2, -1), strict=True):
        cost = torch.cdist(y, x, p=1)
        plan = torch.exp(-cost / MULTI_EPSILON)
        for _ in range(MULTI_ITERS):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        sequence = sequence + (plan * cost).sum()
    return (s - t).abs().sum(-1).mean() + 0.1 * kl + 0.1 * 0.001 * sequence


def multi_problem(size: str) -> Problem:
    shape = tuple(map(int, size.split("x")))
    generator = torch.Generator().manual_seed(9)
    teacher = 3 * torch.randn(shape, generator=generator)
    student = (0.7 * teacher + torch.randn(shape, generator=generator)).requires_grad_()
    return _problem((student, teacher), multi_plain)


WKL = Family(
    op="wkl",
    title=f"WKL (B x C), mode dwkd_dkd at half of the training: the whole loss, epsilon {EPSILON:g}, "
    f"{NUM_ITERS} iterations",
    sizes=sizes_of("wkl"),
    problem=lambda size: _problem(random_pair(_logits_size(size), 3.0), wkl_plain(size)),
    peers=(
        Peer("otkd_fast", "otkd_fast", _our_wkl),
        Peer("released", "released form", wkl_plain),
        Peer("released-compiled", "the same, torch.compile", compiled(wkl_plain)),
    ),
    parameters={"epsilon": EPSILON, "num_iters": NUM_ITERS},
)
WKL_VALUE = Family(
    op="wkl_value",
    title="WKL's transport over all classes, for the log (B x C): a value without a gradient",
    sizes=sizes_of("wkl_value"),
    problem=full_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", lambda size: _our_wkl(size, "wkd"), forward_only=True),
        Peer("products", "matrix products, PyTorch", full_plain, forward_only=True),
    ),
    parameters={"epsilon": EPSILON, "num_iters": NUM_ITERS},
)
MULTI_LEVEL = Family(
    op="multi_level_ot",
    title=f"MultiLevelOT (answers x tokens x vocabulary): the whole loss, {TOP_K} columns, epsilon {MULTI_EPSILON:g}, "
    f"{MULTI_ITERS} iterations",
    sizes=sizes_of("multi_level_ot"),
    problem=multi_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", lambda size: losses.MultiLevelOT(top_k=TOP_K), max_errors=KINK_ERRORS),
        Peer("released", "released form", lambda size: multi_plain, max_errors=KINK_ERRORS),
    ),
    notes=(KINK_NOTE,),
    parameters={"epsilon": MULTI_EPSILON, "num_iters": MULTI_ITERS, "top_k": TOP_K},
)
FAMILIES = (WKL, WKL_VALUE, MULTI_LEVEL)
