"""A training step with and without its loss: `pytest bench/test_training_step.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .training_step import FAMILY


@functools.cache
def problem(size):
    return FAMILY.problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(FAMILY))
def test_training_step(benchmark, size, peer, direction):
    suite.run(benchmark, problem(size), peer, size, direction, f"training step {size}")
