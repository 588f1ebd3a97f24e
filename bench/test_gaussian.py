"""Gaussian distances and moments against their peers: `pytest bench/test_gaussian.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .gaussian import COVARIANCES, DISTANCES, MOMENTS

FAMILIES = {family.op: family for family in (DISTANCES, COVARIANCES, MOMENTS)}
CASES = [
    pytest.param(family, *case.values, id=f"{family.op}-{case.id}")
    for family in FAMILIES.values()
    for case in suite.size_and_peer(family)
]


@functools.cache
def cases(op, size):
    return FAMILIES[op].problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("family", "size", "peer"), CASES)
def test_gaussian(benchmark, family, size, peer, direction):
    suite.run(benchmark, cases(family.op, size), peer, size, direction, f"{family.op} {size}")
