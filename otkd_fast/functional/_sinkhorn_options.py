"""The options that every Sinkhorn function takes: their checks, and the epsilon schedule."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._autograd import needs_function
from ._validate import check_choice, check_tensor, positive_float, positive_int

GRADIENTS = ("unroll", "envelope", "detach", "last_step", "implicit")
OUTPUTS = ("transport_cost", "regularized_cost", "f", "g")
COVERED = {"envelope": "regularized_cost", "detach": "transport_cost"}  # the other modes differentiate every output

# what the ops keep for their backward: nothing (0), the last scalings, those of every iteration, or the last iteration
KEEP = {"unroll": 2, "envelope": 1, "detach": 1, "last_step": 3, "implicit": 1}


class Options(NamedTuple):
    """The checked options as the ops take them, in their order."""

    epsilon: float
    num_iters: int
    tol: float = 0.0  # 0: none
    relaxation: float = 1.0  # 0: 'auto'
    penalty_a: float = math.inf  # inf: a constraint
    penalty_b: float = math.inf
    update_a_first: bool = True

    def for_reference(self) -> dict[str, Any]:
        """As the reference takes them."""
        return {
            "epsilon": self.epsilon,
            "num_iters": self.num_iters,
            "tol": self.tol or None,
            "update_first": "a" if self.update_a_first else "b",
            "relaxation": self.relaxation or "auto",
            "marginal_penalty": (self.penalty_a, self.penalty_b),
        }


def check_options(epsilon, num_iters, tol, update_first, gradient, relaxation, marginal_penalty) -> Options:
    """Raise for options that are wrong by themselves or together."""
    epsilon = positive_float("epsilon", epsilon)
    num_iters = positive_int("num_iters", num_iters)
    if update_first not in ("a", "b"):
        check_choice("update_first", update_first, ("a", "b"))
    if gradient not in GRADIENTS:
        check_choice("gradient", gradient, GRADIENTS)
    tol = 0.0 if tol is None else positive_float("tol", tol)
    if type(relaxation) is not float or relaxation != 1.0:
        relaxation = _relaxation(relaxation)
    penalty_a = penalty_b = math.inf
    if marginal_penalty is not None:
        penalty_a, penalty_b = _penalties(marginal_penalty)
    return Options(epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_first == "a")


def check_path(options: Options, gradient: str, *tensors: Tensor | None) -> None:
    """Raise for relaxed iterations that are to be differentiated: a gradient of the path is one of plain iterations.

    Where no tensor asks for a gradient, 'unroll' and 'last_step' mean nothing. Under a transform (torch.func,
    forward-mode AD) whether one is asked for is not known, and it counts as asked for.
    """
    if options.relaxation != 1.0 and gradient in ("unroll", "last_step") and needs_function(*tensors):
        raise ValueError(
            f"relaxation: expected 1.0 with gradient='{gradient}', which differentiates plain iterations, where a "
            f"gradient is asked for; got {options.relaxation or 'auto'!r} (gradient='implicit', 'envelope' or 'detach' "
            "do not depend on the path)"
        )


def _relaxation(value: float | str) -> float:
    expected = "expected a number between 0 and 2, or 'auto'"
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"relaxation: {expected}, got {value!r}")
        return 0.0
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"relaxation: {expected}, got {type(value).__name__}")
    if not 0.0 < value < 2.0:
        raise ValueError(f"relaxation: {expected}, got {value}")
    return float(value)


def _penalties(value) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)):
        penalty = _penalty("marginal_penalty", value)
        return penalty, penalty
    if len(value) != 2:
        raise ValueError(f"marginal_penalty: expected a number or a pair of numbers (or None), got {value!r}")
    penalty_a, penalty_b = (_penalty(f"marginal_penalty[{k}]", penalty) for k, penalty in enumerate(value))
    return penalty_a, penalty_b


def _penalty(name: str, value: float | None) -> float:
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number or None, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0 (None or inf: the marginal is a constraint), got {value}")
    return float(value)


def check_constant(name: str, weights: Tensor) -> None:
    """With gradient='detach', masses ask for no gradient."""
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected marginals without a gradient, because gradient='detach' takes the plan as a constant; "
            f"got requires_grad=True (use {name}.detach(), or gradient='unroll' or 'envelope')"
        )


def check_initial_potentials(
    initial_potentials, batch: Sequence[int], n: int, m: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(f (*batch, n), g (*batch, m)) without graph, each may be None; dtype and device are those of `like`."""
    if initial_potentials is None:
        return None, None
    if not isinstance(initial_potentials, (tuple, list)) or len(initial_potentials) != 2:
        got = type(initial_potentials).__name__
        raise TypeError(f"initial_potentials: expected a pair (f, g), each a tensor or None, got {got}")
    checked = []
    for k, (value, letter, size) in enumerate(zip(initial_potentials, "nm", (n, m), strict=True)):
        if value is not None:
            name, shape = f"initial_potentials[{k}]", (*batch, size)
            check_tensor(name, value, 1, f"(..., {letter})")
            if value.dtype != like.dtype:
                raise ValueError(f"{name}: expected {like.dtype}, the dtype of the result, got {value.dtype}")
            if value.device != like.device:
                raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {value.device}")
            if value.shape not in (shape, (size,)):
                either = f"{shape} or {(size,)}" if batch else f"{shape}"
                raise ValueError(f"{name}: expected shape {either}, got {tuple(value.shape)}")
            value = value.detach().expand(shape)
        checked.append(value)
    return checked[0], checked[1]


def check_schedule(epsilon_schedule) -> list[tuple[float, int]]:
    """Pairs (epsilon, iterations)."""
    if epsilon_schedule is None:
        return []
    if isinstance(epsilon_schedule, (str, Tensor)) or not isinstance(epsilon_schedule, Sequence):
        raise TypeError(
            "epsilon_schedule: expected a sequence of numbers or of pairs (epsilon, iterations), got "
            f"{type(epsilon_schedule).__name__}"
        )
    stages = []
    for k, entry in enumerate(epsilon_schedule):
        name = f"epsilon_schedule[{k}]"
        if isinstance(entry, (tuple, list)):
            if len(entry) != 2:
                raise ValueError(f"{name}: expected a number or a pair (epsilon, iterations), got {entry!r}")
            stages.append((positive_float(f"{name}[0]", entry[0]), positive_int(f"{name}[1]", entry[1])))
        else:
            stages.append((positive_float(name, entry), 1))
    return stages


def follow_schedule(
    stages: Sequence[tuple[float, int]],
    options: Options,
    a: Tensor | None,
    b: Tensor | None,
    initial_f: Tensor | None,
    initial_g: Tensor | None,
    solve: Callable[[Options, Tensor | None, Tensor | None], tuple[Tensor, Tensor]],
) -> tuple[Tensor | None, Tensor | None]:
    """The potentials after the stages, to start from at ``options.epsilon``.

    From one epsilon to the next the potentials relative to the marginals, f - epsilon log a, are kept: it is they that
    converge as epsilon goes to 0.

    Args:
        a: (..., n) or None for uniform; b: (..., m) or None.
        solve: runs a stage with plain iterations and without gradient: (options, f, g) -> (f, g).
    """
    f, g = initial_f, initial_g
    following = [epsilon for epsilon, _ in stages[1:]] + [options.epsilon]
    for (epsilon, num_iters), next_epsilon in zip(stages, following, strict=True):
        stage = options._replace(epsilon=epsilon, num_iters=num_iters, tol=0.0, relaxation=1.0)
        f, g = (potential.detach() for potential in solve(stage, f, g))
        f, g = _rescaled(f, a, next_epsilon - epsilon), _rescaled(g, b, next_epsilon - epsilon)
    return f, g


def _rescaled(potential: Tensor, weights: Tensor | None, change: float) -> Tensor:
    if weights is None:
        return potential - change * math.log(max(potential.shape[-1], 1))
    weights = weights.detach()
    return torch.where(weights > 0, potential + change * weights.log(), -torch.inf)
