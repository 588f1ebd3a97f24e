"""A family of benchmark cases: one table of the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]


class Unavailable(ImportError):
    """A peer that cannot run here although nothing is broken; the message says what it needs."""


@dataclass(frozen=True)
class Peer:
    """One way of computing a case. `build(size)` returns a function of the two inputs, or raises ImportError.

    same_answer: False if it solves a neighbouring problem (`note` says which). Its result in float32 is then checked
        against its own in float64, or that of `oracle(size)`, another way to compute the same.
    sizes: where it is measured; None is everywhere.
    max_errors: relative errors of value and gradient that are accepted of it, where its method has larger ones (`note`
        says why); None: those of everybody.
    forward_only: it has no gradient.
    equal: what it has in common with otkd_fast, "iterations", "the answer" (another algorithm, or none that iterates)
        or "marginal error"; None: iterations where the family has them, else the answer.

    A function that `build` returns may have an attribute `compared`, a dict that goes into the result: marginal errors
    and steps.
    """

    name: str
    label: str
    build: Callable[[str], Function]
    same_answer: bool = True
    note: str = ""
    sizes: tuple[str, ...] | None = None
    max_errors: tuple[float, float] | None = None
    forward_only: bool = False
    equal: str | None = None
    oracle: Callable[[str], Function] | None = None


@dataclass(frozen=True)
class Problem:
    """Inputs (x with gradient, y[, gradient of the output]), and the float64 value and gradient."""

    inputs: tuple
    expected: tuple[Tensor, ...]


@dataclass(frozen=True)
class Family:
    """`required`: size -> peer -> ratio (peer's time over ours, forward and backward) that the package has to reach."""

    op: str
    title: str
    sizes: tuple[str, ...]
    problem: Callable[[str], Problem]
    peers: tuple[Peer, ...]
    parameters: dict = field(default_factory=dict)
    required: dict[str, dict[str, float]] = field(default_factory=dict)
    required_forward: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def peers_of(self, size: str) -> tuple[Peer, ...]:
        """The peers that are measured at this size."""
        return tuple(peer for peer in self.peers if peer.sizes is None or size in peer.sizes)

    def equal_of(self, peer: Peer) -> str:
        """What this peer and otkd_fast have in common where their times are compared."""
        if peer.equal is not None:
            return peer.equal
        return "iterations" if "num_iters" in self.parameters else "the answer"
