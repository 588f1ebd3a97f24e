"""The L1 cost matrix of probability rows, b x b, with the gradient to the rows of x."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import otkd_fast
from otkd_fast import reference

from .family import Family, Peer, Problem
from .measure import forward_backward
from .sinkd import SIZES, TEMPERATURE, logits

PEERS = (
    Peer("otkd_fast", "otkd_fast", lambda size: lambda x, y: otkd_fast.cost_matrix(x, y, metric="l1")),
    Peer("cdist", "torch.cdist(p=1)", lambda size: lambda x, y: torch.cdist(x, y, p=1)),
)


def probabilities(size: str) -> tuple[Tensor, Tensor]:
    """The softmax rows (b, d) of SinKD's logits."""
    student, teacher = logits(*map(int, size.split("x")))
    return torch.softmax(student / TEMPERATURE, dim=-1), torch.softmax(teacher / TEMPERATURE, dim=-1)


def problem(size: str) -> Problem:
    x, y = probabilities(size)
    grad = torch.randn(len(x), len(y), generator=torch.Generator().manual_seed(1))
    # differences and their absolute values in float64; the reference, the same number, takes twenty seconds at 1024
    l1 = functools.partial(torch.cdist, p=1) if len(x) > 256 else functools.partial(reference.cost_matrix, metric="l1")
    expected = forward_backward(l1, x.double().requires_grad_(), y.double(), grad.double())
    return Problem((x.requires_grad_(), y, grad), expected)


_REQUIRED = {size: {"cdist": 10.0} for size in SIZES}
FAMILY = Family(
    op="cost_matrix_l1",
    title="L1 cost matrix (b x d rows on both sides, b x b costs)",
    sizes=SIZES,
    problem=problem,
    peers=PEERS,
    required=_REQUIRED,
    required_forward=_REQUIRED,
)
