"""Whole losses against the released forms: `pytest bench/test_losses.py --benchmark-enable`."""

import functools

import pytest

from . import loss_features, loss_others, loss_sinkd, suite
from .loss_wkd import FEATURE_FAMILY, LOGIT_FAMILY

FAMILIES = (LOGIT_FAMILY, FEATURE_FAMILY, *loss_sinkd.FAMILIES, *loss_others.FAMILIES, *loss_features.FAMILIES)
CASES = [
    pytest.param(family, *case.values, id=f"{family.op}-{case.id}")
    for family in FAMILIES
    for case in suite.size_and_peer(family)
]


@functools.cache
def problem(op, size):
    return next(family for family in FAMILIES if family.op == op).problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("family", "size", "peer"), CASES)
def test_loss(benchmark, family, size, peer, direction):
    suite.run(benchmark, problem(family.op, size), peer, size, direction, f"{family.op} {size}")
