"""Properties that hold for any input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import otkd_fast
from otkd_fast.testing import assert_close, backends, random_rows

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
ALL = backends("cost_matrix")
few = settings(max_examples=12, deadline=None, derandomize=True)


@st.composite
def two_sets(draw):
    """x (n, d), y (m, d) and the generator that made them."""
    n, m, d = (draw(st.integers(1, 20)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return random_rows(n, d, generator=generator), random_rows(m, d, generator=generator), generator


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
@given(sets=two_sets())
@few
def test_transpose_and_permutation(backend, metric, sets):
    x, y, generator = sets
    cost = otkd_fast.cost_matrix(x, y, metric=metric, backend=backend)
    assert_close(otkd_fast.cost_matrix(y, x, metric=metric, backend=backend).mT, cost, "cost_matrix", "value")
    order = torch.randperm(len(x), generator=generator)
    permuted = otkd_fast.cost_matrix(x[order], y, metric=metric, backend=backend)
    assert_close(permuted, cost[order], "cost_matrix", "value")
    assert (cost >= 0).all()


@pytest.mark.parametrize("backend", ALL)
@given(sets=two_sets())
@few
def test_translation_scaling_and_triangle(backend, sets):
    x, y, generator = sets

    def cost(x, y, metric):
        return otkd_fast.cost_matrix(x, y, metric=metric, backend=backend)

    shift = torch.randn(x.shape[1], generator=generator, dtype=torch.float64)
    for metric, power in (("l1", 1), ("l2", 1), ("sqeuclidean", 2)):
        assert_close(cost(x + shift, y + shift, metric), cost(x, y, metric), "cost_matrix", "value", scale=100.0)
        assert_close(cost(4 * x, 4 * y, metric), 4**power * cost(x, y, metric), "cost_matrix", "value")
    for metric in ("l1", "l2"):
        through = cost(x, y, metric).unsqueeze(-1) + cost(y, x, metric).unsqueeze(0)  # (n, m, n)
        assert (cost(x, x, metric).unsqueeze(1) <= through * (1 + 1e-12) + 1e-12).all()
    assert_close(cost(3 * x, y, "cosine"), cost(x, y, "cosine"), "cost_matrix", "value")
    assert_close(cost(x, y, "l2") ** 2, cost(x, y, "sqeuclidean"), "cost_matrix", "value")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
@given(sets=two_sets(), batch=st.integers(1, 4))
@few
def test_batch_is_a_loop(backend, metric, sets, batch):
    x, y, _ = sets
    x, y = (torch.stack([rows * (k + 1) for k in range(batch)]) for rows in (x, y))
    cost = otkd_fast.cost_matrix(x, y, metric=metric, backend=backend)
    shared = otkd_fast.cost_matrix(x, y[0], metric=metric, backend=backend)
    for k in range(batch):
        one = otkd_fast.cost_matrix(x[k], y[k], metric=metric, backend=backend)
        assert_close(cost[k], one, "cost_matrix", "value")
        one = otkd_fast.cost_matrix(x[k], y[0], metric=metric, backend=backend)
        assert_close(shared[k], one, "cost_matrix", "value")
