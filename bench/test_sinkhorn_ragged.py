"""Sinkhorn on packed problems: `pytest bench/test_sinkhorn_ragged.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .sinkhorn_ragged import FAMILY


@functools.cache
def cases(size):
    return FAMILY.problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(FAMILY))
def test_sinkhorn_ragged(benchmark, size, peer, direction):
    suite.run(benchmark, cases(size), peer, size, direction, f"sinkhorn_ragged {size}")
