"""Square roots and polar factors against their peers: `pytest bench/test_matrix_roots.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .matrix_roots import NORMS, ROOTS

CASES = [pytest.param(f, *case.values, id=f"{f.op}-{case.id}") for f in (ROOTS, NORMS) for case in suite.size_and_peer(f)]


@functools.cache
def cases(op, size):
    return next(family for family in (ROOTS, NORMS) if family.op == op).problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("family", "size", "peer"), CASES)
def test_matrix_roots(benchmark, family, size, peer, direction):
    suite.run(benchmark, cases(family.op, size), peer, size, direction, f"{family.op} {size}")
