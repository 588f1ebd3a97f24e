"""The fused SinKD op on Triton, interpreted in guarded memory, against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

from otkd_fast.functional.sinkd import sinkd_transport_cost  # noqa: E402
from otkd_fast.reference.sinkd import sinkd_transport_cost as expected_cost  # noqa: E402
from otkd_fast.testing import assert_close, random_rows  # noqa: E402
from otkd_fast.testing.guarded import gradients_guarded, run_guarded  # noqa: E402

OPTIONS = {"temperature_rows": 2.0, "temperature_columns": 1.5, "epsilon": 0.1, "num_iters": 3}


def check(rows, columns, needs=(True, True), weights=(None, None), scale=1.0, **changes):
    options = OPTIONS | changes
    leaves = [t.clone().requires_grad_(need) for t, need in zip((rows, columns), needs, strict=True)]
    value, grads = gradients_guarded(
        lambda x, y: sinkd_transport_cost(x, y, *weights, scale=scale, backend="triton", **options), leaves
    )
    wide = [t.detach().double().requires_grad_(need) for t, need in zip((rows, columns), needs, strict=True)]
    masses = (None if t is None else t.double() for t in weights)
    expected = expected_cost(*wide, *masses, **options) * scale
    wanted = torch.autograd.grad(expected.sum(), [t for t in wide if t.requires_grad])
    assert value.dtype == rows.dtype
    assert_close(value, expected, "sinkhorn", "transport_cost")
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, "sinkhorn", "gradient")


@pytest.mark.parametrize("sizes", [(2, 3, 4), (5, 5, 9), (9, 1, 3)], ids=str)
def test_value_and_gradients(sizes, generator):
    n, m, d = sizes
    rows, columns = (random_rows(2, size, d, generator=generator).float() for size in (n, m))
    check(rows, columns, scale=0.5)
    check(rows[0], columns[0], needs=(True, False))


def test_weights_plain_rows_and_a_small_epsilon(generator):
    rows = random_rows(4, 5, generator=generator).float()
    columns = torch.eye(5)[:3]
    weights = torch.tensor([0.5, 0.0, 0.25, 0.25]), torch.tensor([0.2, 0.3, 0.5])
    check(rows, columns, weights=weights, needs=(True, False), temperature_columns=0.0)
    check(rows, columns, needs=(True, False), temperature_columns=0.0, epsilon=0.02)


def test_no_gradient_and_no_problems(generator):
    rows = random_rows(3, 4, generator=generator)
    value = run_guarded(sinkd_transport_cost, rows, rows, backend="triton", **OPTIONS)
    assert_close(value, expected_cost(rows, rows, **OPTIONS), "sinkhorn", "transport_cost")
    nothing = sinkd_transport_cost(rows.new_empty(0, 3, 4), rows.new_empty(0, 2, 4), backend="triton", **OPTIONS)
    assert nothing.shape == (0,)
