"""csrc/cuda/sinkd.cu on the emulator: one launch where the problem fits a block, the kernels one by one where not."""

import pytest
import torch

from otkd_fast.functional.sinkd import sinkd_transport_cost
from otkd_fast.reference.sinkd import sinkd_transport_cost as reference_cost
from otkd_fast.testing import assert_close

OPTIONS = dict(temperature_rows=2.0, temperature_columns=2.0, epsilon=0.1, num_iters=5)


def check(rows, columns, guard, weights_rows=None, weights_columns=None, scale=1.0, **changes):
    """Value and both gradients; the emulated ones."""
    options = OPTIONS | changes
    leaves = [t.clone().requires_grad_() for t in (rows, columns)]
    wide = [t.double().requires_grad_() for t in (rows, columns)]
    weights = (weights_rows, weights_columns)
    with guard:
        actual = sinkd_transport_cost(*leaves, *weights, scale=scale, backend="cpu", **options)
        grads = torch.autograd.grad(actual.sum(), leaves)
    expected = scale * reference_cost(*wide, *(None if w is None else w.double() for w in weights), **options)
    wanted = torch.autograd.grad(expected.sum(), wide)
    context = f"{tuple(rows.shape)} {tuple(columns.shape)} {changes}"
    assert_close(actual, expected, "sinkhorn", "transport_cost", context=context)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, "sinkhorn", "gradient", context=context)
    return actual, *grads


def logits(*shape, generator, dtype=torch.float32):
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 2), (5, 3, 17), (18, 35, 40), (33, 10, 7)], ids=str)
def test_one_launch(size, dtype, guarded, emulated, generator):
    n, m, d = size
    before = emulated.launches()
    check(logits(n, d, generator=generator, dtype=dtype), logits(m, d, generator=generator, dtype=dtype), guarded)
    used = emulated.launches() - before
    assert used == 1 if dtype == torch.float32 else used > 1


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 7.0},
        {"temperature_columns": 0.0},
        {"epsilon": 0.02},  # float32 is solved in float64
        {"epsilon": 0.003},  # beyond scalings: in the log domain
        {"num_iters": 1},
    ],
    ids=str,
)
def test_options(changes, guarded, emulated, generator):
    rows, columns = logits(2, 6, 9, generator=generator), logits(2, 7, 9, generator=generator)
    if "temperature_columns" in changes:
        columns = columns.softmax(-1)
    before = emulated.launches()
    check(rows, columns, guarded, **changes)
    used = emulated.launches() - before
    assert used > 1 if changes.get("epsilon", 0.1) < 1 / 30 else used == 1


def test_weights_with_zeros(guarded, generator):
    rows, columns = logits(2, 6, 9, generator=generator), logits(2, 7, 9, generator=generator)
    a, b = torch.rand(2, 6, generator=generator), torch.rand(2, 7, generator=generator)
    a[0, 2:4] = 0
    b[1, 0] = 0
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    check(rows, columns, guarded, a, b)
    check(rows, columns, guarded, a, None)


@pytest.mark.parametrize("size", [(3, 130, 9), (4, 5, 1030)], ids=str)
def test_what_does_not_fit_a_block(size, guarded, emulated, generator):
    n, m, d = size
    before = emulated.launches()
    check(logits(n, d, generator=generator), logits(m, d, generator=generator), guarded, scale=2.0, num_iters=2)
    assert emulated.launches() > before + 1


def test_a_device_with_little_shared_memory(guarded, emulated, generator):
    rows, columns = logits(40, 9, generator=generator), logits(40, 9, generator=generator)
    whole = check(rows, columns, guarded)
    emulated.set_shared_limit(16 * 1024)
    before = emulated.launches()
    pieces = check(rows, columns, guarded)
    assert emulated.launches() > before + 1
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_order_of_threads_does_not_matter(guarded, emulated, generator):
    rows, columns = logits(2, 19, 20, generator=generator), logits(2, 34, 20, generator=generator)
    first = check(rows, columns, guarded)
    for order in (1, 2, 3):
        emulated.set_order(order)
        for got, want in zip(check(rows, columns, guarded), first, strict=True):
            assert torch.equal(got, want)


def test_only_the_gradient_that_is_wanted(guarded, generator):
    rows, columns = logits(6, 9, generator=generator), logits(7, 9, generator=generator)
    both = check(rows, columns, guarded)
    rows.requires_grad_()
    with guarded:
        (grad,) = torch.autograd.grad(sinkd_transport_cost(rows, columns, backend="cpu", **OPTIONS), rows)
        value = sinkd_transport_cost(rows.detach(), columns, backend="cpu", **OPTIONS)
    assert torch.equal(grad, both[1])
    assert torch.equal(value, both[0])
