"""WKD-L's problem: one cost, a batch of marginals: `pytest bench/test_sinkhorn_shared.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .sinkhorn_shared import FAMILY


@functools.cache
def cases(size):
    return FAMILY.problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(FAMILY))
def test_shared_cost(benchmark, size, peer, direction):
    suite.run(benchmark, cases(size), peer, size, direction, f"sinkhorn, shared cost {size}")
