"""The reference against closed forms, SciPy and finite differences."""

import pytest
import torch

from otkd_fast.reference import cost_matrix
from otkd_fast.reference import cost_matrix as reference_function
from otkd_fast.testing import assert_close, near_coincident_rows, random_rows

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
SCIPY_NAMES = {"l1": "cityblock", "l2": "euclidean", "sqeuclidean": "sqeuclidean", "cosine": "cosine"}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("l1", [[3.0, 4.0], [4.0, 11.0]]),
        ("l2", [[3.0, 4.0], [4.0, 73.0**0.5]]),
        ("sqeuclidean", [[9.0, 16.0], [16.0, 73.0]]),
        ("cosine", [[1.0, 1.0], [0.4, 1.8]]),
    ],
)
def test_by_hand(metric, expected):
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    y = torch.tensor([[3.0, 0.0], [0.0, -4.0]], dtype=torch.float64)
    assert_close(cost_matrix(x, y, metric=metric), torch.tensor(expected, dtype=torch.float64), "cost_matrix", "value")


@pytest.mark.parametrize("metric", METRICS)
def test_against_scipy(metric, generator):
    distance = pytest.importorskip("scipy.spatial.distance")
    x, y = random_rows(9, 5, generator=generator), random_rows(7, 5, generator=generator)
    expected = torch.from_numpy(distance.cdist(x.numpy(), y.numpy(), SCIPY_NAMES[metric]))
    assert_close(cost_matrix(x, y, metric=metric), expected, "cost_matrix", "value")


def test_softmax_temperature(generator):
    x, y = random_rows(4, 6, generator=generator), random_rows(3, 6, generator=generator)
    p, q = (rows.div(2.5).exp() / rows.div(2.5).exp().sum(-1, keepdim=True) for rows in (x, y))
    expected = (p[:, None] - q[None]).abs().sum(-1)
    assert_close(cost_matrix(x, y, metric="l1", softmax_temperature=2.5), expected, "cost_matrix", "value")


@pytest.mark.parametrize("metric", METRICS)
def test_near_coincident_in_double(metric, generator):
    """1e-7 apart: the float64 oracle itself keeps seven digits more than the matrix-product form does."""
    x, y = near_coincident_rows(6, 33, noise=1e-7, generator=generator)
    expected = [[_exact(metric, row, column) for column in y.tolist()] for row in x.tolist()]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(cost_matrix(x, y, metric=metric), expected, "cost_matrix", "near_coincident")


def _exact(metric: str, x: list[float], y: list[float]) -> float:
    """In 60-digit decimal arithmetic."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 60
        x, y = [Decimal(v) for v in x], [Decimal(v) for v in y]
        if metric == "l1":
            return float(sum(abs(a - b) for a, b in zip(x, y, strict=True)))
        if metric == "cosine":
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            return float(1 - dot / (sum(a * a for a in x) * sum(b * b for b in y)).sqrt())
        square = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
        return float(square.sqrt() if metric == "l2" else square)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_extreme_scales_in_float32(metric, scale, generator):
    x, y = random_rows(5, 9, generator=generator), random_rows(4, 9, generator=generator)
    expected = cost_matrix((x * scale).float().double(), (y * scale).float().double(), metric=metric)
    actual = cost_matrix((x * scale).float(), (y * scale).float(), metric=metric)
    assert_close(actual, expected, "cost_matrix", "value")


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_against_finite_differences(metric, generator):
    x, y = (random_rows(2, n, 3, generator=generator).requires_grad_() for n in (4, 5))
    assert torch.autograd.gradcheck(lambda x, y: cost_matrix(x, y, metric=metric), (x, y))
    assert torch.autograd.gradcheck(lambda x, y: cost_matrix(x, y, metric=metric, softmax_temperature=0.7), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: cost_matrix(x, y, metric=metric), (x, y))


@pytest.mark.parametrize("metric", METRICS)
def test_chunks_change_nothing_and_bound_the_memory(metric, monkeypatch, generator):
    import sys

    module = sys.modules[reference_function.__module__]
    x, y = (random_rows(2, n, 3, generator=generator).requires_grad_() for n in (7, 5))

    def value_and_gradients():
        cost = cost_matrix(x, y, metric=metric)
        first = torch.autograd.grad((cost**2).sum(), (x, y), create_graph=True)
        return cost, *first, *torch.autograd.grad(sum((grad**2).sum() for grad in first), (x, y))

    expected = value_and_gradients()
    sizes = []
    whole = module._METRICS[metric]
    monkeypatch.setitem(module._METRICS, metric, lambda x, y: sizes.append(x.shape[-2]) or whole(x, y))
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 2 * 2 * 5 * 3)
    for actual, want in zip(value_and_gradients(), expected, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-12, atol=1e-12)
    assert max(sizes) == 2
