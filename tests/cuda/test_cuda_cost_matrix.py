"""csrc/cuda/cost_matrix.cu on the emulator against the reference in float64."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import assert_close, near_coincident_rows, random_rows

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
# tiles of 64 x 64 and their tails, depth stages of 16, sums of 256, a depth that is split over blocks (1100)
SHAPES = ((1, 1, 2), (3, 70, 17), (66, 67, 35), (5, 4, 1100))


def check(x, y, metric, temperature=None, guard=None):
    """Value and both gradients."""
    x, y = x.requires_grad_(), y.requires_grad_()
    expected_x, expected_y = (t.detach().double().requires_grad_() for t in (x, y))
    expected = reference.cost_matrix(expected_x, expected_y, metric=metric, softmax_temperature=temperature)
    with guard:
        actual = otkd_fast.cost_matrix(x, y, metric=metric, softmax_temperature=temperature, backend="cpu")
        weights = torch.linspace(-1, 2, actual.numel(), dtype=actual.dtype).view(actual.shape).sin()
        grads = torch.autograd.grad(actual, (x, y), weights)
    wanted = torch.autograd.grad(expected, (expected_x, expected_y), weights.double())
    context = f"{metric} {tuple(x.shape)} {tuple(y.shape)} {temperature}"
    assert_close(actual, expected, "cost_matrix", "value", context=context)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, "cost_matrix", "gradient", context=context)
    return actual, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_every_tail(metric, dtype, guarded, generator):
    for n, m, d in SHAPES:
        x, y = random_rows(n, d, generator=generator), random_rows(m, d, generator=generator)
        check(x.to(dtype), y.to(dtype), metric, guard=guarded)
        if n < 66:
            check(x.to(dtype), y.to(dtype), metric, 2.0, guard=guarded)


@pytest.mark.parametrize("metric", METRICS)
def test_batches_and_shared_operands(metric, guarded, generator):
    x, y = random_rows(2, 3, 6, 17, generator=generator), random_rows(2, 3, 5, 17, generator=generator)
    check(x.float(), y.float(), metric, guard=guarded)
    check(x.float()[0, 0], y.float(), metric, guard=guarded)
    check(x.float()[0], y.float()[0, 0], metric, 0.5, guard=guarded)


@pytest.mark.parametrize("metric", METRICS)
def test_near_coincident_rows_keep_their_digits(metric, emulated, generator):
    x, y = near_coincident_rows(12, 300, generator=generator, dtype=torch.float32)
    actual = otkd_fast.cost_matrix(x, y, metric=metric, backend="cpu")
    expected = reference.cost_matrix(x.double(), y.double(), metric=metric)
    assert_close(actual, expected, "cost_matrix", "near_coincident")


@pytest.mark.parametrize("metric", METRICS)
def test_the_order_of_threads_does_not_matter(metric, guarded, emulated, generator):
    x = random_rows(66, 70, generator=generator).float()
    y = random_rows(3, 70, generator=generator, zero_rows=1).float()
    first = check(x, y, metric, 1.5, guard=guarded)
    for order in (1, 2):
        emulated.set_order(order)
        for got, want in zip(check(x, y, metric, 1.5, guard=guarded), first, strict=True):
            assert torch.equal(got, want)


def test_equal_rows_have_gradient_zero(emulated):
    x = torch.ones(3, 5, requires_grad=True)
    for metric in METRICS:
        (grad,) = torch.autograd.grad(otkd_fast.cost_matrix(x, x.detach(), metric=metric, backend="cpu").sum(), x)
        assert (grad.abs() < 1e-6).all()


def test_empty_operands_launch_nothing(emulated):
    before = emulated.launches()
    assert otkd_fast.cost_matrix(torch.ones(0, 3), torch.ones(2, 3), metric="l1", backend="cpu").shape == (0, 2)
    assert otkd_fast.cost_matrix(torch.ones(2, 0), torch.ones(2, 0), metric="l1", backend="cpu").eq(0).all()
    assert emulated.launches() == before


def test_not_a_number_stays_one(emulated):
    x = torch.ones(2, 3)
    x[1, 1] = torch.nan
    for metric in METRICS:
        for temperature in (None, 1.0):
            options = dict(metric=metric, softmax_temperature=temperature, backend="cpu")
            cost = otkd_fast.cost_matrix(x, torch.ones(2, 3) * 2, **options)
            assert cost[1].isnan().all()
            assert cost[0].isfinite().all()
