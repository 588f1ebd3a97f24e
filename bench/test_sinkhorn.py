"""Sinkhorn alone, on a given cost: `pytest bench/test_sinkhorn.py --benchmark-enable`."""

import functools

import pytest
import torch

from . import peers, suite
from .run import sinkhorn_problem

BATCHES = (1, 16)
POINTS = (100, 500)
problem = functools.cache(sinkhorn_problem)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize("peer", peers.SINKHORN_PEERS, ids=lambda p: p.name)
@pytest.mark.parametrize("n", POINTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_sinkhorn(benchmark, batch, n, peer, direction):
    inputs, expected = problem(batch, n)
    suite.run(benchmark, peer, inputs, expected, direction, f"sinkhorn {batch} x {n} x {n}")


def test_problem_has_unequal_marginals():
    (cost, marginals, _), _ = problem(1, 100)
    assert cost.shape == (1, 100, 100)
    assert marginals.std() > 1e-3 and torch.allclose(marginals.sum(-1), torch.ones(1, 2))
