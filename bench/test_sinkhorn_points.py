"""Sinkhorn between points: `pytest bench/test_sinkhorn_points.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .sinkhorn_points import FAMILY


@functools.cache
def cases(size):
    return FAMILY.problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(FAMILY))
def test_points(benchmark, size, peer, direction):
    suite.run(benchmark, cases(size), peer, size, direction, f"sinkhorn between points {size}")
