"""Whole losses against the released forms: `pytest bench/test_losses.py --benchmark-enable`."""

import functools

import pytest

from . import suite
from .loss_wkd import FEATURE_FAMILY, LOGIT_FAMILY


@functools.cache
def problem(family, size):
    return {f.op: f for f in (LOGIT_FAMILY, FEATURE_FAMILY)}[family].problem(size)


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(LOGIT_FAMILY))
def test_wkd_logit(benchmark, size, peer, direction):
    suite.run(benchmark, problem("wkd_logit", size), peer, size, direction, f"wkd_logit {size}")


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("size", "peer"), suite.size_and_peer(FEATURE_FAMILY))
def test_wkd_feature(benchmark, size, peer, direction):
    suite.run(benchmark, problem("wkd_feature", size), peer, size, direction, f"wkd_feature {size}")
