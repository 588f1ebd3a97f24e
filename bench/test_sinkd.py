"""SinKD against its peers: `pytest bench/test_sinkd.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .sinkd import FAMILY


@functools.cache
def cases(size):
    return FAMILY.problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(FAMILY))
def test_sinkd(benchmark, size, peer, direction):
    suite.run(benchmark, cases(size), peer, size, direction, f"sinkd {size}")
