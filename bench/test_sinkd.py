"""SinKD against its peers: `pytest bench/test_sinkd.py --benchmark-enable`."""

import functools

import pytest

from . import peers, suite
from .cases import SIZES
from .run import sinkd_problem

problem = functools.cache(sinkd_problem)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize("peer", [*peers.SINKD_PEERS, peers.REFERENCE_PEER], ids=lambda p: p.name)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sinkd(benchmark, size, peer, direction):
    inputs, expected = problem(size)
    suite.run(benchmark, peer, inputs, expected, direction, f"sinkd {size}")
