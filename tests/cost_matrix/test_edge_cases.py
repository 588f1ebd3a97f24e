"""Empty problems, memory layouts, values at the ends of the range, reproducibility."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import assert_close, backends, random_rows

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
ALL = backends("cost_matrix")
COMPILED = backends("cost_matrix", compiled_only=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("x_shape", "y_shape", "shape"),
    [
        ((0, 3, 4), (0, 2, 4), (0, 3, 2)),
        ((0, 3, 4), (2, 4), (0, 3, 2)),
        ((2, 0, 4), (2, 3, 4), (2, 0, 3)),
        ((3, 4), (0, 4), (3, 0)),
    ],
)
def test_empty(backend, metric, x_shape, y_shape, shape):
    x, y = torch.ones(x_shape, requires_grad=True), torch.ones(y_shape, requires_grad=True)
    cost = otkd_fast.cost_matrix(x, y, metric=metric, backend=backend)
    assert cost.shape == shape
    cost.sum().backward()
    assert torch.equal(x.grad, torch.zeros(x_shape)) and torch.equal(y.grad, torch.zeros(y_shape))


@pytest.mark.parametrize("batch", [(), (2,), (0,)])
@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean"])
@pytest.mark.parametrize("backend", ALL)
def test_no_features(backend, metric, batch):
    x, y = torch.ones(*batch, 3, 0, requires_grad=True), torch.ones(2, 0, requires_grad=True)
    cost = otkd_fast.cost_matrix(x, y, metric=metric, backend=backend)
    assert torch.equal(cost, torch.zeros(*batch, 3, 2))
    cost.sum().backward()
    assert x.grad.shape == x.shape and y.grad.shape == y.shape


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_layouts(backend, metric, generator):
    """Expanded, transposed, sliced and offset operands hold the same numbers as their contiguous copies."""
    whole = random_rows(4, 12, 20, generator=generator)
    x = whole[1:, ::2, 3:16]  # (3, 6, 13)
    y = random_rows(13, 5, generator=generator).mT.expand(3, 5, 13)
    leaves = [(x.clone().requires_grad_(), y.contiguous().requires_grad_()), (x.requires_grad_(), y.requires_grad_())]
    costs = [otkd_fast.cost_matrix(*pair, metric=metric, backend=backend) for pair in leaves]
    assert torch.equal(costs[0], costs[1])
    assert costs[1].is_contiguous()
    weights = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64).mT
    grads = [torch.autograd.grad(cost, pair, weights) for cost, pair in zip(costs, leaves, strict=True)]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)
    expected = torch.autograd.grad(reference.cost_matrix(*leaves[0], metric=metric), leaves[0], weights)
    for actual, want in zip(grads[1], expected, strict=True):
        assert_close(actual, want, "cost_matrix", "gradient")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_inputs_are_not_written(backend, metric, generator):
    x, y = random_rows(5, 7, generator=generator), random_rows(4, 7, generator=generator)
    before = x.clone(), y.clone()
    leaves = x.requires_grad_(), y.requires_grad_()
    cost = otkd_fast.cost_matrix(*leaves, metric=metric, softmax_temperature=2.0, backend=backend)
    kept = cost.detach().clone()
    cost.backward(torch.ones(()).double().expand(5, 4))
    assert torch.equal(x.detach(), before[0]) and torch.equal(y.detach(), before[1]) and torch.equal(cost, kept)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-40, 2.0**40, 2.0**100])
@pytest.mark.parametrize("backend", ALL)
def test_cosine_does_not_depend_on_the_length_of_rows(backend, scale, generator):
    x, y = (random_rows(n, 19, generator=generator).float() for n in (5, 4))
    actual = otkd_fast.cost_matrix(x * scale, y, metric="cosine", backend=backend)
    expected = reference.cost_matrix(x.double(), y.double(), metric="cosine")
    assert_close(actual, expected, "cost_matrix", "value")


@pytest.mark.parametrize("backend", ALL)
def test_nan_is_not_hidden(backend):
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    for metric in METRICS:
        cost = otkd_fast.cost_matrix(x, x, metric=metric, backend=backend)
        assert cost[0].isnan().all() and cost[:, 0].isnan().all() and not cost[1, 1].isnan(), metric


@pytest.mark.parametrize("backend", ALL)
def test_softmax_of_masked_and_of_large_logits(backend):
    """-inf masks a class; exp of the largest logit would overflow without the shift."""
    x = torch.tensor([[0.0, 0.0, -float("inf")], [1e4, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([[-1e4, 0.0, 0.0]])
    cost = otkd_fast.cost_matrix(x, y, metric="l1", softmax_temperature=1.0, backend=backend)
    torch.testing.assert_close(cost, torch.tensor([[1.0], [2.0]]))
    cost.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_same_bits_every_time(backend, metric, generator):
    torch.set_num_threads(2)
    x, y = (random_rows(3, n, 37, generator=generator).float().requires_grad_() for n in (41, 33))
    weights = torch.randn(3, 41, 33, generator=generator)

    def run():
        cost = otkd_fast.cost_matrix(x, y, metric=metric, softmax_temperature=1.5, backend=backend)
        return cost, *torch.autograd.grad(cost, (x, y), weights)

    first = run()
    for _ in range(9):
        assert all(torch.equal(actual, expected) for actual, expected in zip(run(), first, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_no_graph_without_need(backend, generator):
    x, y = (random_rows(n, 7, generator=generator) for n in (5, 4))
    assert otkd_fast.cost_matrix(x, y, metric="l1", backend=backend).grad_fn is None
    x.requires_grad_()
    assert otkd_fast.cost_matrix(x, y, metric="l1", backend=backend).requires_grad
    with torch.no_grad():
        assert not otkd_fast.cost_matrix(x, y, metric="l1", backend=backend).requires_grad
