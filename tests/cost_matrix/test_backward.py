"""Gradients of the cost: against finite differences and against the float64 reference."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import (
    assert_close,
    backends,
    instruction_sets,
    near_coincident_rows,
    random_rows,
    use_instruction_set,
)

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129)
SHAPES = [(n, SIZES[-1 - i], SIZES[(5 * i + 3) % len(SIZES)]) for i, n in enumerate(SIZES)]
COMPILED = backends("cost_matrix", compiled_only=True)
ALL = backends("cost_matrix")


def gradients(x, y, weights, backend, needs=(True, True), **options):
    """Gradients of <weights, C> for the operands that need one."""
    x, y = x.clone().requires_grad_(needs[0]), y.clone().requires_grad_(needs[1])
    cost = otkd_fast.cost_matrix(x, y, backend=backend, **options)
    wanted = [rows for rows, need in zip((x, y), needs, strict=True) if need]
    return torch.autograd.grad(cost, wanted, weights.to(cost.dtype).expand(cost.shape))


def check(x, y, dtype, backend, generator, needs=(True, True), **options):
    x, y = x.to(dtype), y.to(dtype)
    batch = max(x.shape[:-2], y.shape[:-2], key=len)
    weights = torch.randn(*batch, x.shape[-2], y.shape[-2], generator=generator, dtype=torch.float64).to(dtype)
    if options["metric"] == "l1" and options.get("softmax_temperature"):
        weights = weights * _signs_are_sure(x.double(), y.double(), options["softmax_temperature"])
    actual = gradients(x, y, weights, backend, needs, **options)
    expected = gradients(x.double(), y.double(), weights.double(), "reference", needs, **options)
    for value, want in zip(actual, expected, strict=True):
        assert value.dtype == dtype
        scale = float(want.abs().max())
        if options["metric"] == "cosine" and x.shape[-1] == 1:  # constant: the gradient is 0 up to rounding of w / |x|
            scale = float(weights.double().abs().sum() / torch.cat([x.flatten(), y.flatten()]).abs().min())
        context = f"{options} {tuple(x.shape)} {tuple(y.shape)}"
        assert_close(value, want, "cost_matrix", "gradient", scale=scale, context=context)


def _signs_are_sure(x, y, temperature):
    """(..., n, m): pairs for which the rounding of a softmax in float32 cannot change the sign of a difference."""
    p, q = ((rows / temperature).softmax(-1) for rows in (x, y))
    p, q = p.unsqueeze(-2), q.unsqueeze(-3)
    return ((p - q).abs() > 1e-5 * (p + q)).all(-1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend, metric, generator):
    x, y = (random_rows(2, n, 4, generator=generator).requires_grad_() for n in (3, 2))
    for temperature in (None, 0.8):
        options = {"metric": metric, "softmax_temperature": temperature, "backend": backend}
        assert torch.autograd.gradcheck(lambda x, y: otkd_fast.cost_matrix(x, y, **options), (x, y))  # noqa: B023
        shared = y.detach()[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda x, y: otkd_fast.cost_matrix(x, y, **options), (x, shared))  # noqa: B023
        assert torch.autograd.gradcheck(lambda x, y: otkd_fast.cost_matrix(y, x, **options), (x, shared))  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", COMPILED)
def test_every_tail(backend, metric, dtype, generator):
    for n, m, d in SHAPES:
        x, y = random_rows(n, d, generator=generator), random_rows(m, d, generator=generator)
        check(x, y, dtype, backend, generator, metric=metric)
        if d > 1:  # one class: the softmax is constant and its gradient is rounding
            check(x, y, dtype, backend, generator, metric=metric, softmax_temperature=2.0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", COMPILED)
def test_one_operand_at_a_time_and_shared_operands(backend, metric, generator):
    x, y = random_rows(3, 6, 19, generator=generator), random_rows(3, 5, 19, generator=generator)
    for needs in ((True, False), (False, True), (True, True)):
        check(x, y, torch.float32, backend, generator, needs, metric=metric)
        check(x[0], y, torch.float32, backend, generator, needs, metric=metric, softmax_temperature=1.5)
        check(x, y[0], torch.float32, backend, generator, needs, metric=metric)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("backend", COMPILED)
def test_instruction_sets_and_threads(backend, instruction_set, threads, generator):
    torch.set_num_threads(threads)
    with use_instruction_set(instruction_set):
        for metric in METRICS:
            for n, m, d in ((3, 5, 2), (17, 9, 33), (64, 70, 100)):
                x, y = random_rows(2, n, d, generator=generator), random_rows(2, m, d, generator=generator)
                for dtype in (torch.float64, torch.float32):
                    check(x, y, dtype, backend, generator, metric=metric)
                    check(x, y, dtype, backend, generator, metric=metric, softmax_temperature=1.5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_expanded_and_transposed_gradients(backend, metric, generator):
    """`.sum()` hands over a gradient of stride 0, a transpose one in the other memory order."""
    x, y = random_rows(2, 6, 9, generator=generator), random_rows(2, 5, 9, generator=generator)
    weights = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).mT
    expected = gradients(x, y, torch.ones(2, 6, 5).double(), "reference", metric=metric)
    for value, want in zip(gradients(x, y, torch.ones(()), backend, metric=metric), expected, strict=True):
        assert_close(value, want, "cost_matrix", "gradient")
    expected = gradients(x, y, weights.contiguous(), "reference", metric=metric)
    for value, want in zip(gradients(x, y, weights, backend, metric=metric), expected, strict=True):
        assert_close(value, want, "cost_matrix", "gradient")


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("backend", ALL)
def test_near_coincident_rows(backend, metric, generator):
    """Only the pairs (i, i) get a gradient, so nothing large hides an error in the small distances."""
    x, y = near_coincident_rows(40, 512, generator=generator, dtype=torch.float32)
    weights = torch.eye(40)
    actual = gradients(x, y, weights, backend, metric=metric)
    expected = gradients(x.double(), y.double(), weights.double(), "reference", metric=metric)
    for value, want in zip(actual, expected, strict=True):
        assert_close(value, want, "cost_matrix", "gradient")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_half_precision_goes_through_float32(backend, metric, generator):
    x, y = random_rows(6, 9, generator=generator), random_rows(5, 9, generator=generator)
    for dtype in (torch.float16, torch.bfloat16):
        check(x, y, dtype, backend, generator, metric=metric)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_gradient_is_zero_where_the_derivative_does_not_exist(backend, dtype):
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=dtype)
    y = torch.tensor([[1.0, 2.0]], dtype=dtype)
    for metric in ("l1", "l2"):  # x_0 = y_0
        grad_x, grad_y = gradients(x[:1], y, torch.ones(()), backend, metric=metric)
        assert torch.equal(grad_x, torch.zeros_like(grad_x)) and torch.equal(grad_y, torch.zeros_like(grad_y))
    grad_x, grad_y = gradients(x[1:], y, torch.ones(()), backend, metric="cosine")
    assert torch.equal(grad_x, torch.zeros_like(grad_x)) and torch.equal(grad_y, torch.zeros_like(grad_y))
    assert otkd_fast.cost_matrix(x, y, metric="cosine", backend=backend)[1].item() == 1.0
