"""cost_matrix on Triton, interpreted in guarded memory, against the float64 reference.

``pytest tests/cost_matrix --triton`` runs the tests of the other backends on it too (minutes).
"""

import pytest
import torch

pytest.importorskip("triton")

from otkd_fast.triton_kernels import cost_matrix as host  # noqa: E402

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.testing import assert_close, near_coincident_rows, random_rows  # noqa: E402
from otkd_fast.testing.guarded import gradients_guarded, run_guarded  # noqa: E402

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
# what does not depend on the metric: by default for the simplest and for the one with a pass of its own
FEW = [pytest.param(name, marks=() if name in ("l1", "cosine") else pytest.mark.slow) for name in METRICS]
# tiles of 8 pairs, 32 lanes; sizes around them
SHAPES = [(1, 1, 1), (2, 9, 33), (7, 8, 32), (8, 7, 31), (9, 1, 2)]


def check(x, y, metric, temperature=None, needs=(True, True), generator=None):
    """Value and gradients of <weights, C>."""
    batch = max(x.shape[:-2], y.shape[:-2], key=len)
    weights = torch.randn(*batch, x.shape[-2], y.shape[-2], generator=generator, dtype=torch.float64).to(x.dtype)
    if metric == "l1" and temperature:
        weights = weights * _signs_are_sure(x.double(), y.double(), temperature)
    leaves = [rows.clone().requires_grad_(need) for rows, need in zip((x, y), needs, strict=True)]
    options = {"metric": metric, "softmax_temperature": temperature}
    cost, grads = gradients_guarded(
        lambda x, y: otkd_fast.cost_matrix(x, y, backend="triton", **options), leaves, lambda _: weights
    )
    exact = [rows.detach().double().requires_grad_(need) for rows, need in zip((x, y), needs, strict=True)]
    expected = reference.cost_matrix(*exact, **options)
    wanted = [rows for rows, need in zip(exact, needs, strict=True) if need]
    context = f"{metric} {temperature} {tuple(x.shape)} {tuple(y.shape)} {x.dtype}"
    assert_close(cost, expected, "cost_matrix", "value", scale=1.0 if metric == "cosine" else None, context=context)
    for grad, want in zip(grads, torch.autograd.grad((expected * weights.double()).sum(), wanted), strict=True):
        assert grad.dtype == x.dtype
        scale = float(want.abs().max())
        if metric == "cosine" and x.shape[-1] == 1:  # constant: the gradient is 0 up to rounding
            scale = float(weights.double().abs().sum() / torch.cat([x.flatten(), y.flatten()]).abs().min())
        if temperature and x.shape[-1] == 1:
            scale = float(weights.double().abs().sum())
        assert_close(grad, want, "cost_matrix", "gradient", scale=scale, context=context)


def _signs_are_sure(x, y, temperature):
    """(..., n, m): pairs for which the rounding of a softmax in float32 cannot change the sign of a difference."""
    p, q = ((rows / temperature).softmax(-1) for rows in (x, y))
    p, q = p.unsqueeze(-2), q.unsqueeze(-3)
    return ((p - q).abs() > 1e-5 * (p + q)).all(-1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tail(shape, metric, generator):
    n, m, d = shape
    x, y = random_rows(n, d, generator=generator).float(), random_rows(m, d, generator=generator).float()
    check(x, y, metric, generator=generator)
    if d > 1:
        check(x, y, metric, 0.8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes(metric, dtype, generator):
    x, y = random_rows(5, 35, generator=generator).to(dtype), random_rows(9, 35, generator=generator).to(dtype)
    check(x, y, metric, 0.8, generator=generator)
    check(x, y, metric, generator=generator)


@pytest.mark.parametrize("metric", FEW)
def test_batches_and_shared_operands(metric, generator):
    x, y = (random_rows(2, 2, n, 9, generator=generator).float() for n in (3, 5))
    check(x, y, metric, generator=generator)
    check(x[0, 0], y, metric, 0.8, generator=generator)
    check(x, y[0, 0], metric, 0.8, needs=(False, True), generator=generator)
    check(x[0], y[0, 0].bfloat16().float(), metric, needs=(True, False), generator=generator)
    check(x[0].bfloat16(), y[0, 0].bfloat16(), metric, 0.8, generator=generator)


@pytest.mark.parametrize("metric", FEW)
def test_long_rows(metric, generator, monkeypatch):
    """Rows split between programs, softmax from a kernel of its own, gradients in pieces of a small workspace."""
    monkeypatch.setattr(host, "_SPLIT_FEATURES", 64)
    monkeypatch.setattr(host, "_INLINE_FEATURES", 64)
    monkeypatch.setattr(host, "_FUSED_FEATURES", 64)
    monkeypatch.setattr(host, "_ROW_BLOCK", 128)
    monkeypatch.setattr(host, "_WORKSPACE_BYTES", 3 * 4 * 150)
    x, y = random_rows(2, 4, 150, generator=generator), random_rows(2, 3, 150, generator=generator)
    check(x.bfloat16(), y.bfloat16(), metric, 0.8, generator=generator)
    check(x.float(), y[0].float(), metric, generator=generator)
    if metric == "l1":
        check(x[0].float(), y.float(), metric, 0.8, generator=generator)


@pytest.mark.parametrize("metric", FEW)
def test_large_tiles(metric, generator, monkeypatch):
    monkeypatch.setattr(host, "_forward_tiles", lambda double, pairs: {"BI": 16, "BJ": 32, "num_warps": 8})
    for n, m in ((1, 33), (17, 31)):
        x, y = random_rows(n, 40, generator=generator).float(), random_rows(m, 40, generator=generator).float()
        check(x, y, metric, 0.8, generator=generator)


@pytest.mark.parametrize("metric", METRICS)
def test_near_coincident_rows_keep_their_digits(metric, generator):
    x, y = near_coincident_rows(9, 257, generator=generator, dtype=torch.float32)
    actual = run_guarded(otkd_fast.cost_matrix, x, y, metric=metric, backend="triton")
    expected = reference.cost_matrix(x.double(), y.double(), metric=metric)
    assert_close(actual, expected, "cost_matrix", "near_coincident")


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_cosine_does_not_depend_on_the_length_of_rows(scale, generator):
    x, y = (random_rows(n, 19, generator=generator).float() for n in (5, 4))
    x[0] = 0
    check(x * scale, y, "cosine", needs=(False, True), generator=generator)


@pytest.mark.parametrize("metric", FEW)
def test_same_bits_every_time(metric, generator):
    x, y = (random_rows(n, 37, generator=generator).float().requires_grad_() for n in (9, 5))

    def run():
        cost = otkd_fast.cost_matrix(x, y, metric=metric, softmax_temperature=1.5, backend="triton")
        return cost, *torch.autograd.grad(cost.square().sum(), (x, y))

    assert all(torch.equal(actual, expected) for actual, expected in zip(run(), run(), strict=True))


def test_masked_and_large_logits():
    x = torch.tensor([[0.0, 0.0, -float("inf")], [1e4, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([[-1e4, 0.0, 0.0]])
    options = {"metric": "l1", "softmax_temperature": 1.0, "backend": "triton"}
    cost, grads = gradients_guarded(lambda x, y: otkd_fast.cost_matrix(x, y, **options), (x, y))
    torch.testing.assert_close(cost, torch.tensor([[1.0], [2.0]]))
    assert grads[0].isfinite().all()


@pytest.mark.parametrize("metric", FEW)
def test_empty(metric):
    for x_shape, y_shape in (((0, 3, 4), (0, 2, 4)), ((0, 3, 4), (2, 4)), ((2, 0, 4), (2, 3, 4)), ((3, 4), (0, 4))):
        x, y = torch.ones(x_shape, requires_grad=True), torch.ones(y_shape, requires_grad=True)
        cost = otkd_fast.cost_matrix(x, y, metric=metric, backend="triton")
        assert cost.shape == (*max(x_shape[:-2], y_shape[:-2], key=len), x_shape[-2], y_shape[-2])
        cost.sum().backward()
        assert torch.equal(x.grad, torch.zeros(x_shape)) and torch.equal(y.grad, torch.zeros(y_shape))


def test_no_features():
    x, y = torch.ones(2, 3, 0, requires_grad=True), torch.ones(2, 0)
    cost = otkd_fast.cost_matrix(x, y, metric="l1", backend="triton")
    assert torch.equal(cost, torch.zeros(2, 3, 2))
    cost.sum().backward()
    assert x.grad.shape == x.shape
