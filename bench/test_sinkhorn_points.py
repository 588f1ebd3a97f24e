"""Sinkhorn between clouds of points: `pytest bench/test_sinkhorn_points.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .sinkhorn_points import ENVELOPE, UNROLLED


@functools.cache
def cases(family, size):
    return next(f for f in (ENVELOPE, UNROLLED) if f.op == family).problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(ENVELOPE))
def test_envelope(benchmark, size, peer, direction):
    suite.run(benchmark, cases(ENVELOPE.op, size), peer, size, direction, f"points, envelope {size}")


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(UNROLLED))
def test_unrolled(benchmark, size, peer, direction):
    suite.run(benchmark, cases(UNROLLED.op, size), peer, size, direction, f"points, unrolled {size}")
