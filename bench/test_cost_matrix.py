"""The L1 cost matrix against torch.cdist: `pytest bench/test_cost_matrix.py --benchmark-enable`."""

import functools

import pytest

from . import peers, suite
from .cases import SIZES
from .run import cost_problem

problem = functools.cache(cost_problem)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize("peer", peers.COST_PEERS, ids=lambda p: p.name)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_l1_cost(benchmark, size, peer, direction):
    inputs, expected = problem(size)
    suite.run(benchmark, peer, inputs, expected, direction, f"l1 cost {size}")
