"""A training step of a student: forward, cross-entropy with a distillation loss, backward to all parameters.

The same step with the loss of otkd_fast, with the released form, with that form compiled, and without distillation. The
teacher's outputs are given; the optimiser's update, equal for all, is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otkd_fast import losses

from .family import Family, Function, Peer, Problem
from .loss_sinkd import batch_loop
from .loss_wkd import EPSILON, GUARD, MAP_SIZES, NUM_ITERS, released_feature
from .measure import forward_backward
from .sinkhorn_shared import class_cost

# student, batch, classes, loss
SIZES = (
    "linear 64x100, SinKD", "linear 64x100, WKD-L", "linear 64x1000, WKD-L",
    "convolutions 64x100, SinKD", "convolutions 64x100, WKD-L", "convolutions 64x100, WKD-F",
)  # fmt: skip
FEATURES, IMAGE, WIDTHS = 512, 16, (16, 32, 64)
TEMPERATURE, GAMMA, BETA = 4.0, 100.0, 0.8

Outputs = tuple[Tensor, Tensor]
Loss = Callable[[Outputs, Outputs], Tensor]


def parts(size: str) -> tuple[str, int, int, str]:
    student, shape, method = size.replace(",", "").split()
    batch, classes = map(int, shape.split("x"))
    return student, batch, classes, method


class Linear(nn.Module):
    """The last layer alone, on given features: what a loss costs where nothing else does."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Outputs:
        return self.head(x), x


class Convolutions(nn.Module):
    """Six convolutions, three of stride 2 after the first: a small CIFAR student (logits, last maps)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers, width = [], 3
        for k, wider in enumerate(WIDTHS):
            layers += [nn.Conv2d(width, wider, 3, 2 if k else 1, 1), nn.ReLU(), nn.Conv2d(wider, wider, 3, 1, 1)]
            layers += [nn.GroupNorm(4, wider), nn.ReLU()]
            width = wider
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Outputs:
        maps = self.body(x)
        return self.head(maps.mean((2, 3))), maps


def networks(size: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Student, teacher (the same architecture), images or features, labels."""
    student, batch, classes, _ = parts(size)
    torch.manual_seed(20)
    build = Linear if student == "linear" else Convolutions
    shape = (batch, FEATURES) if student == "linear" else (batch, 3, 2 * IMAGE, 2 * IMAGE)
    return build(classes), build(classes), torch.randn(shape), torch.randint(classes, (batch,))


def released_wkd(labels: Tensor, classes: int) -> Loss:
    """WKD-L with the label's class cut out of a copy of the cost for each row, as released."""
    matrix = class_cost(classes)

    def loss(student: Outputs, teacher: Outputs) -> Tensor:
        s, t = student[0], teacher[0]
        batch = len(s)
        kept = torch.ones_like(t, dtype=torch.bool).scatter_(1, labels[:, None], False)
        target = -(torch.softmax(t, 1) * torch.log_softmax(s, 1)).gather(1, labels[:, None]).mean()
        a, b = (torch.softmax(z[kept].view(batch, classes - 1) / TEMPERATURE, 1) for z in (s, t))
        pairs = kept.unsqueeze(2) & kept.unsqueeze(1)
        cost = (matrix.to(a.dtype).relu() + 1e-8).repeat(batch, 1, 1)[pairs].view(batch, classes - 1, classes - 1)
        kernel = torch.exp(-cost / EPSILON)
        u = torch.full_like(a, 1 / (classes - 1))
        for _ in range(NUM_ITERS):
            v = b / (torch.bmm(kernel.mT, u.unsqueeze(-1)).squeeze(-1) + GUARD)
            u = a / (torch.bmm(kernel, v.unsqueeze(-1)).squeeze(-1) + GUARD)
        return target + GAMMA * (u.unsqueeze(-1) * kernel * v.unsqueeze(-2) * cost).sum((1, 2)).mean()

    return loss


def released_loss(size: str) -> Loss:
    _, _, classes, method = parts(size)
    if method == "SinKD":
        loop = batch_loop(20)
        return lambda s, t: BETA / len(s[0]) * loop(s[0], t[0])
    if method == "WKD-F":
        feature = released_feature(next(size for size, (grid, ratio) in MAP_SIZES.items() if (grid, ratio) == (1, 4.0)))
        return lambda s, t: feature(s[1], t[1])
    return released_wkd(networks(size)[3], classes)


def our_loss(size: str) -> Loss:
    _, _, classes, method = parts(size)
    if method == "SinKD":
        sinkd = losses.SinKD(reduction="mean")
        return lambda s, t: BETA * sinkd(s[0], t[0])
    if method == "WKD-F":
        feature = losses.WKDFeature(grid=1, ratio=4.0)
        return lambda s, t: feature(s[1], t[1])
    labels, cost = networks(size)[3], class_cost(classes)
    options = {"temperature": TEMPERATURE, "gamma": GAMMA}
    return lambda s, t: losses.wkd_logit(s[0], t[0], labels, cost=cost.to(s[0].dtype), **options)


def step(size: str, build: Callable[[str], Loss] | None) -> Function:
    """(all parameters as one vector, the teacher's logits and maps as one vector) -> the loss of the step."""
    student, teacher, data, labels = networks(size)
    with torch.no_grad():
        logits, maps = teacher(data)
    shapes = {name: p.shape for name, p in student.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    distil = None if build is None else build(size)

    def loss(vector: Tensor, given: Tensor) -> Tensor:
        values = {n: p.view(s) for p, (n, s) in zip(vector.split(sizes), shapes.items(), strict=True)}
        out = torch.func.functional_call(student, values, (data.to(vector.dtype),))
        total = F.cross_entropy(out[0], labels)
        if distil is None:
            return total
        targets = given.split([logits.numel(), maps.numel()])
        return total + distil(out, tuple(g.view(z.shape) for g, z in zip(targets, (logits, maps), strict=True)))

    return loss


def problem(size: str) -> Problem:
    student, teacher, data, _ = networks(size)
    vector = torch.cat([p.detach().flatten() for p in student.parameters()]).requires_grad_()
    with torch.no_grad():
        given = torch.cat([z.flatten() for z in teacher(data)])
    wide = vector.detach().double().requires_grad_(), given.double()
    return Problem((vector, given), forward_backward(step(size, released_loss), *wide))


def _compiled(size: str) -> Function:
    torch._dynamo.reset()
    distil = torch.compile(released_loss(size), dynamic=False)
    return step(size, lambda _: distil)


NOTE = "No distillation: the step with cross-entropy alone, what is left when the loss costs nothing."
FAMILY = Family(
    op="training_step",
    title="A training step (student, batch x classes, loss), with the gradients of all parameters",
    sizes=SIZES,
    problem=problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", lambda size: step(size, our_loss)),
        Peer("released", "released form", lambda size: step(size, released_loss)),
        Peer("released-compiled", "the same, loss by torch.compile", _compiled, sizes=SIZES[:2] + SIZES[3:]),
        Peer("none", "no distillation", lambda size: step(size, None), False, note=NOTE, equal="nothing"),
    ),
    parameters={"temperature": TEMPERATURE, "epsilon": "0.1 (SinKD), 0.05 (WKD-L)", "num_iters": "20, 10"},
    notes=(NOTE,),
)
FAMILIES = (FAMILY,)
