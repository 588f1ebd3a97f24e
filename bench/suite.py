"""What the pytest-benchmark suites share: build a peer, check its answer, then time it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .family import Family, Peer, Problem
from .measure import check, forward_backward

DIRECTIONS = ("forward", "forward-backward")
THREADS = 2


def size_and_peer(family: Family) -> list:
    """(size, peer) for everything that the family measures, as parameters of a test."""
    pairs = [(size, peer) for size in family.sizes for peer in family.peers_of(size)]
    return [pytest.param(size, peer, id=f"{size}-{peer.name}") for size, peer in pairs]


def run(benchmark, problem: Problem, peer: Peer, size: str, direction: str, group: str) -> None:
    """Skips where the peer is not installed, fails where its answer is wrong, else times one direction."""
    torch.set_num_threads(THREADS)
    if peer.forward_only and direction != "forward":
        pytest.skip(f"{peer.name}: has no gradient")
    try:
        function = peer.build(size)
    except ImportError as error:
        pytest.skip(f"{peer.name}: not installed ({error})")
    benchmark.extra_info |= check(peer, function, problem.expected, problem.inputs, peer.oracle and peer.oracle(size))
    benchmark.extra_info |= {"peer": peer.name, "threads": THREADS}
    benchmark.group = f"{group}, {direction}"
    benchmark(timed(function, problem.inputs, direction))


def timed(function: Callable, inputs: tuple, direction: str) -> Callable[[], object]:
    x, y, *grad = inputs
    if direction == "forward-backward":
        return lambda: forward_backward(function, x, y, *grad)
    plain = x.detach()
    return lambda: function(plain, y)
