"""The two terms of WKD's logit loss for rows of logits; WKL is made of them too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._values import values_readable
from ..functional._sinkhorn_guarded import sinkhorn_guarded
from ..functional._validate import check_choice, check_tensor, positive_float, positive_int
from ..functional.sinkhorn import sinkhorn
from ._common import check_backend, nan_rows, poison

VARIANTS = ("released", "paper")
GRADIENTS = ("unroll", "last_step", "implicit")
COST_FLOOR = 1e-8  # added to the cost by the released code
GUARD = 1e-8  # added to the denominators of the scalings by the released code


class Transport(NamedTuple):
    """The checked parameters of the transport term."""

    temperature: float
    epsilon: float
    num_iters: int
    variant: str
    gradient: str
    backend: str | None


def check_transport(temperature, epsilon, num_iters, variant, gradient, backend) -> Transport:
    """Raise for parameters that are wrong by themselves or together."""
    temperature, epsilon = positive_float("temperature", temperature), positive_float("epsilon", epsilon)
    num_iters = positive_int("num_iters", num_iters)
    check_choice("variant", variant, VARIANTS)
    check_choice("gradient", gradient, GRADIENTS)
    if variant == "released" and gradient == "implicit":
        raise ValueError(
            "gradient: expected 'unroll' or 'last_step' with variant='released', whose loop has guards in its "
            "denominators and no fixed point of the theorem; got 'implicit' (variant='paper' takes it)"
        )
    return Transport(temperature, epsilon, num_iters, variant, gradient, check_backend(backend))


def check_cost(cost: Tensor, classes: int | None = None, names: str = "") -> None:
    """A square floating-point matrix, (classes, classes) if their number is known; `names`: where it is known from."""
    check_tensor("cost", cost, 2, "(C, C)")
    if cost.dim() != 2 or cost.shape[0] != cost.shape[1] or cost.shape[0] < 2:
        raise ValueError(f"cost: expected shape (C, C) with C >= 2, got {tuple(cost.shape)}")
    if classes is not None and cost.shape[0] != classes:
        raise ValueError(
            f"cost: expected shape {(classes, classes)} for {names} with {classes} classes, got {tuple(cost.shape)}"
        )


def check_cost_values(cost: Tensor, variant: str) -> None:
    """No NaN, and no infinite cost in the released loop (0 times infinity); where values can be read."""
    if not values_readable(cost):
        return
    if cost.isnan().any() or (variant == "released" and cost.isinf().any()):
        kind = "finite numbers with variant='released'" if variant == "released" else "numbers"
        raise ValueError(f"cost: expected {kind}, got NaN or infinite ones")


def finished_cost(cost: Tensor, kappa: float) -> Tensor:
    """relu(c) + 1e-8 with c = 1 - exp(-kappa cost), or c = cost if kappa is 0; at least float32."""
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    return torch.relu(sharpened(cost, kappa)) + COST_FLOOR


def sharpened(distance: Tensor, kappa: float) -> Tensor:
    """1 - exp(-kappa distance), or the distance itself if kappa is 0."""
    return -torch.expm1(-kappa * distance) if kappa else distance


def target_term(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """-p_T(y) log p_S(y) (N,) of logits (N, C) at temperature 1; target bool (N, C), True at the label."""
    log_s = torch.log_softmax(student, -1)
    p_t = torch.softmax(teacher, -1)
    return -torch.where(target, p_t * torch.where(target, log_s, 0), 0).sum(-1)


def probabilities(logits: Tensor, temperature: float, target: Tensor | None) -> Tensor:
    """softmax(logits / temperature) (N, C), over the classes other than the target: that has mass 0."""
    if target is not None:
        logits = torch.where(target, -torch.inf, logits)
    return torch.softmax(logits / temperature, -1)


def transport_term(student: Tensor, teacher: Tensor, target: Tensor | None, cost: Tensor, options: Transport) -> Tensor:
    """<P, cost> (N,) of the plan between the softmaxed rows; the target class takes no part.

    Args:
        student, teacher: logits (N, C), float32 or float64 alike.
        target: bool (N, C), True at the label; None: all classes take part.
        cost: (C, C) in their dtype, as :func:`finished_cost` makes it.
    """
    rows = probabilities(student, options.temperature, target)
    columns = probabilities(teacher, options.temperature, target)
    bad = nan_rows(rows, columns)
    if bad is not None:
        rows, columns = (torch.where(bad.unsqueeze(-1), 1 / x.shape[-1], x) for x in (rows, columns))
    loop = {
        "epsilon": options.epsilon,
        "num_iters": options.num_iters,
        "update_first": "b",
        "gradient": options.gradient,
        "backend": options.backend,
    }
    if options.variant == "released":  # starts at 1 / support: at 1 with other guards
        support = rows.shape[-1] - (target is not None)
        guard = GUARD / support, GUARD * support
        value = sinkhorn_guarded(cost, rows, columns, guard=guard, **loop).transport_cost
    else:
        value = sinkhorn(cost, rows, columns, **loop).transport_cost
    return poison(value, bad)
