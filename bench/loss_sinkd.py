"""SinKD in its published forms and sizes: batch-wise, flattened, sample-wise, over a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from otkd_fast import losses, reference
from otkd_fast.reference import sinkd as oracle

from .family import Family, Function, Peer, Problem
from .loss_wkd import compiled
from .measure import forward_backward
from .published import sizes_of
from .sinkd import EPSILON, TEMPERATURE, logits

SAMPLE_ITERS = TOKEN_ITERS = 20
HALF_NOTE = "bfloat16 logits: gradients are rounded to bfloat16, three digits."
HALF_ERRORS = (1e-5, 1e-2)


def shape_of(size: str) -> tuple[int, int]:
    rows, classes = map(int, size.split()[0].split("x"))
    return rows, classes


def iterations_of(size: str) -> int:
    return int(size.split("T")[1])


def _softmaxed(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return torch.softmax(student / TEMPERATURE, dim=-1), torch.softmax(teacher / TEMPERATURE, dim=-1)


def batch_loop(num_iters: int) -> Function:
    """The released loop, rows and columns of the plan divided by their sums in turn."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        s, t = _softmaxed(student, teacher)
        cost = torch.cdist(t, s, p=1)
        plan = torch.exp(-cost / EPSILON)
        for _ in range(num_iters):
            plan = plan / plan.sum(dim=1, keepdim=True)
            plan = plan / plan.sum(dim=0, keepdim=True)
        return (plan * cost).sum()

    return loss


def _released(size: str) -> Function:
    return batch_loop(iterations_of(size))


def _ours(size: str) -> Function:
    return losses.SinKD(temperature=TEMPERATURE, epsilon=EPSILON, num_iters=iterations_of(size))


def _wide(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].detach().double().requires_grad_(), pair[1].double()


def batch_problem(size: str) -> Problem:
    student, teacher = logits(*shape_of(size))

    def exact(s: Tensor, t: Tensor) -> Tensor:
        return oracle.sinkd(s, t, temperature=TEMPERATURE, epsilon=EPSILON, num_iters=iterations_of(size))

    # the loop on the plan in float64, whose range is wide enough: the log-domain oracle takes long at 512
    exact = batch_loop(iterations_of(size)) if len(student) > 64 else exact
    expected = forward_backward(exact, *_wide((student, teacher)))
    return Problem((student.requires_grad_(), teacher), expected)


def sorted_points(student: Tensor, teacher: Tensor) -> Tensor:
    """Exact transport of the flattened probabilities, by a sort of both sides."""
    s, t = (z.flatten().sort().values for z in _softmaxed(student, teacher))
    return (s - t).abs().sum()


def _pot_line(size: str) -> Function:
    import ot

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (z.flatten() for z in _softmaxed(student, teacher))
        return s.numel() * ot.wasserstein_1d(s, t, p=1)

    return loss


def flattened_problem(size: str) -> Problem:
    student, teacher = logits(*shape_of(size))
    return Problem((student.requires_grad_(), teacher), forward_backward(sorted_points, *_wide((student, teacher))))


def sample_loop(student: Tensor, teacher: Tensor) -> Tensor:
    """A d x d problem a sample, all together in dense products, scalings, rows first."""
    s, t = _softmaxed(student, teacher)
    cost = (s.unsqueeze(-1) - t.unsqueeze(-2)).abs()  # (b, d, d)
    kernel = torch.exp(-cost / EPSILON)
    v = torch.ones_like(t)
    for _ in range(SAMPLE_ITERS):
        u = s / (kernel @ v.unsqueeze(-1)).squeeze(-1)
        v = t / (kernel.mT @ u.unsqueeze(-1)).squeeze(-1)
    return (u.unsqueeze(-1) * kernel * v.unsqueeze(-2) * cost).sum()


def sample_problem(size: str) -> Problem:
    student, teacher = logits(*shape_of(size))

    def exact(s: Tensor, t: Tensor) -> Tensor:
        s, t = _softmaxed(s, t)
        cost = (s.unsqueeze(-1) - t.unsqueeze(-2)).abs()
        return reference.sinkhorn(cost, s, t, epsilon=EPSILON, num_iters=SAMPLE_ITERS).transport_cost.sum()

    expected = forward_backward(exact, *_wide((student, teacher)))
    return Problem((student.requires_grad_(), teacher), expected)


def token_problem(size: str) -> Problem:
    student, teacher = (z.bfloat16() for z in logits(*shape_of(size)))
    expected = forward_backward(batch_loop(TOKEN_ITERS), *_wide((student, teacher)))
    return Problem((student.requires_grad_(), teacher), expected)


def _token_loop(size: str) -> Function:
    loop = batch_loop(TOKEN_ITERS)
    return lambda s, t: loop(s.float(), t.float())


BATCH = Family(
    op="sinkd_published",
    title=f"SinKD at its published sizes (b x d, T iterations): the whole loss, epsilon {EPSILON:g}",
    sizes=sizes_of("sinkd_published"),
    problem=batch_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", _ours),
        Peer("released", "released loop, PyTorch", _released),
        Peer("released-compiled", "the same, torch.compile", compiled(_released)),
    ),
    parameters={"temperature": TEMPERATURE, "epsilon": EPSILON, "num_iters": "20 or 30"},
)
FLATTENED = Family(
    op="sinkd_flattened",
    title="SinKD, flattened form (b x d probabilities on the line): exact, by sorting",
    sizes=sizes_of("sinkd_flattened"),
    problem=flattened_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", lambda size: losses.SinKD(form="flattened", solver="sort")),
        Peer("sorted", "torch.sort on both sides", lambda size: sorted_points),
        Peer("pot", "POT ot.wasserstein_1d", _pot_line),
    ),
    parameters={"temperature": TEMPERATURE},
)
SAMPLE = Family(
    op="sinkd_sample",
    title=f"SinKD, sample-wise form (b problems of d x d), epsilon {EPSILON:g}, {SAMPLE_ITERS} iterations",
    sizes=sizes_of("sinkd_sample"),
    problem=sample_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", lambda size: losses.SinKD(form="sample", num_iters=SAMPLE_ITERS)),
        Peer("scaling", "scaling loop, PyTorch", lambda size: sample_loop),
        Peer("scaling-compiled", "the same, torch.compile", compiled(lambda size: sample_loop)),
    ),
    parameters={"temperature": TEMPERATURE, "epsilon": EPSILON, "num_iters": SAMPLE_ITERS},
)
TOKENS = Family(
    op="sinkd_tokens",
    title=f"SinKD over a vocabulary (tokens x classes), bfloat16 logits, epsilon {EPSILON:g}, {TOKEN_ITERS} iterations",
    sizes=sizes_of("sinkd_tokens"),
    problem=token_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", lambda size: losses.SinKD(num_iters=TOKEN_ITERS), max_errors=HALF_ERRORS),
        Peer("released", "released loop in float32, PyTorch", _token_loop, max_errors=HALF_ERRORS),
    ),
    parameters={"temperature": TEMPERATURE, "epsilon": EPSILON, "num_iters": TOKEN_ITERS},
    notes=(HALF_NOTE,),
)
FAMILIES = (BATCH, FLATTENED, SAMPLE, TOKENS)
