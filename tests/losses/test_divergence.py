"""The Sinkhorn divergence as a loss: against three plain loops, its masks and its zero."""

import pickle

import pytest
import torch
from sinkd_cases import BACKENDS, value_and_gradient

from otkd_fast.losses import SinkhornDivergenceLoss, sinkhorn_divergence_loss

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def features(*sizes, d=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*size, d, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def regularised_cost(x, y, epsilon, num_iters, plan=False):
    """Dual value after `num_iters` iterations with equal masses, in the log domain, rows first; or the plan then."""
    cost = (x[:, None] - y[None]).square().sum(-1)
    log_a, log_b = -torch.tensor(float(len(x))).double().log(), -torch.tensor(float(len(y))).double().log()
    g = torch.zeros(len(y), dtype=torch.float64)
    for _ in range(num_iters):
        f = epsilon * (log_a - ((g - cost) / epsilon).logsumexp(1))
        g = epsilon * (log_b - ((f[:, None] - cost) / epsilon).logsumexp(0))
    masses = ((f[:, None] + g - cost) / epsilon).exp()
    if plan:
        return masses
    mass = masses.sum()
    return (f - epsilon * log_a).mean() + (g - epsilon * log_b).mean() - epsilon * (mass - 1)


def divergence(x, y, epsilon=0.5, num_iters=30):
    own = (regularised_cost(z, z, epsilon, num_iters) for z in (x, y))
    return regularised_cost(x, y, epsilon, num_iters) - sum(own) / 2


def envelope_divergence(x, y, epsilon=0.5, num_iters=30):
    """Its value, with the gradient of transport costs by constant plans (OT(x, x) / 2 counts one of its two x)."""

    def surrogate(p, q):
        plan = regularised_cost(p.detach(), q.detach(), epsilon, num_iters, plan=True)
        return (plan * (p[:, None] - q[None]).square().sum(-1)).sum()

    gradient = surrogate(x, y) - surrogate(x, x.detach()) - surrogate(y.detach(), y)
    return divergence(x, y, epsilon, num_iters).detach() + gradient - gradient.detach()


@every_backend
def test_equals_the_formula(backend):
    x, y = features((7,), (5,))
    options = {"epsilon": 0.5, "num_iters": 30, "backend": backend}
    loss = SinkhornDivergenceLoss(gradient="unroll", **options)
    actual, expected = value_and_gradient(loss, x, y), value_and_gradient(divergence, x, y)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    single = loss(x.float(), y.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected[0], rtol=1e-5, atol=1e-5)
    envelope = SinkhornDivergenceLoss(**options)
    wanted = value_and_gradient(envelope_divergence, x, y)
    torch.testing.assert_close(value_and_gradient(envelope, x, y), wanted, rtol=1e-9, atol=1e-12)
    # at convergence it is the gradient of the value; 2000 iterations leave 1e-7 of it
    converged = value_and_gradient(lambda z: divergence(z, y, num_iters=2000), x)
    envelope = SinkhornDivergenceLoss(epsilon=0.5, num_iters=2000, backend=backend)
    torch.testing.assert_close(value_and_gradient(envelope, x, y), converged, rtol=1e-6, atol=1e-8)


@every_backend
def test_the_same_features_give_zero(backend):
    (x,) = features((6,))
    value, gradient = value_and_gradient(SinkhornDivergenceLoss(backend=backend), x, x.clone())
    assert abs(value.item()) < 1e-12 and gradient.abs().max() < 1e-12


@every_backend
def test_masks_and_reductions(backend):
    x, y = features((3, 6), (3, 6))
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    other = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    x[0, 2], x[2, 3], y[1, 1] = float("nan"), float("inf"), float("nan")
    options = {"epsilon": 0.5, "gradient": "unroll", "backend": backend}
    each = [sinkhorn_divergence_loss(x[k][mask[k]], y[k][other[k]], **options) for k in (0, 1)]
    rows = sinkhorn_divergence_loss(x, y, mask, None, other, reduction="none", **options)
    torch.testing.assert_close(rows, torch.stack([*each, torch.zeros_like(each[0])]), rtol=1e-9, atol=1e-12)
    for reduction, expected in (("mean", sum(each) / 2), ("sum", sum(each)), ("batchmean", sum(each) / 3)):
        loss = SinkhornDivergenceLoss(reduction=reduction, **options)
        value, gradient = value_and_gradient(loss, x, y, mask, None, other)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        assert gradient.isfinite().all() and not gradient[~mask].any()
    both = sinkhorn_divergence_loss(x[:2], y[:2], mask[:2] & other[:2], **options)
    torch.testing.assert_close(
        both, sinkhorn_divergence_loss(x[:2], y[:2], mask[:2] & other[:2], teacher_mask=mask[:2] & other[:2], **options)
    )
    assert sinkhorn_divergence_loss(x[:0], y[:0], **options).item() == 0.0
    assert sinkhorn_divergence_loss(x, y[:, :0], **options).item() == 0.0


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_autocast_and_compile(dtype, backend):
    x, y = features((6,), (5,), dtype=dtype)
    loss = pickle.loads(pickle.dumps(SinkhornDivergenceLoss(epsilon=0.5, num_iters=4, backend=backend)))
    value, gradient = value_and_gradient(loss, x, y)
    expected, expected_gradient = value_and_gradient(loss, x.float(), y.float())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(loss(x.float(), y.float()), expected)
    if dtype == torch.bfloat16:
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, y), expected)


X, Y = features((6,), (5,))
WRONG = {
    "student no tensor": (([1.0], Y), {}, TypeError, "student_features"),
    "integer teacher": ((X, Y.long()), {}, TypeError, "teacher_features"),
    "rank 1": ((X[0], Y[0]), {}, ValueError, "student_features"),
    "other features": ((X, Y[:, :3]), {}, ValueError, "teacher_features"),
    "other batch": ((X[None], Y), {}, ValueError, "teacher_features"),
    "elsewhere": ((X, Y.to("meta")), {}, ValueError, "teacher_features"),
    "mask": ((X, Y, torch.ones(5, dtype=torch.bool)), {}, ValueError, "mask"),
    "metric": ((X, Y), {"metric": "l3"}, ValueError, "metric"),
    "epsilon": ((X, Y), {"epsilon": -1.0}, ValueError, "epsilon"),
    "tol": ((X, Y), {"tol": 0.0}, ValueError, "tol"),
    "gradient": ((X, Y), {"gradient": "detach"}, ValueError, "gradient"),
    "reduction": ((X, Y), {"reduction": "max"}, ValueError, "reduction"),
    "backend": ((X, Y), {"backend": "tpu"}, ValueError, "backend"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(case):
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        sinkhorn_divergence_loss(*arguments, **options)
    with pytest.raises(error, match=message):
        SinkhornDivergenceLoss(**options)(*arguments)
