"""Gaussian distances and moments against their peers: `pytest bench/test_gaussian.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .gaussian import MOMENTS, DISTANCES

CASES = [pytest.param(f, *case.values, id=f"{f.op}-{case.id}") for f in (DISTANCES, MOMENTS) for case in suite.size_and_peer(f)]


@functools.cache
def cases(op, size):
    return next(family for family in (DISTANCES, MOMENTS) if family.op == op).problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("family", "size", "peer"), CASES)
def test_gaussian(benchmark, family, size, peer, direction):
    suite.run(benchmark, cases(family.op, size), peer, size, direction, f"{family.op} {size}")
