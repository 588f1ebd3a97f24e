"""Square roots and polar factors against their peers: `pytest bench/test_matrix_roots.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .matrix_roots import NORMS, ROOTS

FAMILIES = {family.op: family for family in (ROOTS, NORMS)}
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
def test_matrix_roots(benchmark, family, size, peer, direction):
    suite.run(benchmark, cases(family.op, size), peer, size, direction, f"{family.op} {size}")
