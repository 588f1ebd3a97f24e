"""What the pytest-benchmark suites share: build a peer, check its answer, then time it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .measure import check, forward_backward
from .peers import Peer

DIRECTIONS = ("forward", "forward-backward")
THREADS = 2


def run(benchmark, peer: Peer, inputs: tuple, expected: tuple[Tensor, Tensor], direction: str, group: str) -> None:
    """Skips where the peer is not installed, fails where its answer is wrong, else times one direction."""
    torch.set_num_threads(THREADS)
    try:
        function = peer.build()
    except ImportError as error:
        pytest.skip(f"{peer.name}: not installed ({error})")
    benchmark.extra_info |= check(peer, function, expected, inputs) | {"peer": peer.name, "threads": THREADS}
    benchmark.group = f"{group}, {direction}"
    benchmark(timed(function, inputs, direction))


def timed(function: Callable, inputs: tuple, direction: str) -> Callable[[], object]:
    x, y, *grad = inputs
    if direction == "forward-backward":
        return lambda: forward_backward(function, x, y, *grad)
    plain = x.detach()
    return lambda: function(plain, y)
