"""The L1 cost matrix against torch.cdist: `pytest bench/test_cost_matrix.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .cost_l1 import FAMILY


@functools.cache
def cases(size):
    return FAMILY.problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(FAMILY))
def test_l1_cost(benchmark, size, peer, direction):
    suite.run(benchmark, cases(size), peer, size, direction, f"l1 cost {size}")
