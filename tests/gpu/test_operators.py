"""Every operator on the device, by every backend that has kernels for it, against the reference in float64.

The same tests run on the CPU's backend where there is no GPU, which proves the tests; those marked `gpu` need one.
"""

import pytest
import torch

import otkd_fast
from otkd_fast import _dispatch, losses
from otkd_fast.testing import assert_close

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NAMES = ("cuda", "triton") if GPU else ("cpu",)
OPTIONS = {"epsilon": 0.1, "num_iters": 12}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(*shape, seed):
    weights = torch.softmax(2 * normal(*shape, seed=seed), -1)
    weights[..., 1] = 0
    return weights / weights.sum(-1, keepdim=True)


def sinkhorn(n, m, **options):
    def call(cost, backend):
        a, b = (masses(*cost.shape[:-2], k, seed=k).to(cost) for k in (n, m))
        result = otkd_fast.sinkhorn(cost, a, b, **OPTIONS | options, backend=backend)
        return result.regularized_cost if options.get("gradient") == "envelope" else result.transport_cost

    return call


def shared(cost, backend):
    a, b = (masses(7, k, seed=k).to(cost) for k in cost.shape)
    return otkd_fast.sinkhorn(cost, a, b, **OPTIONS, update_first="b", backend=backend).transport_cost


def ragged(cost, backend):
    sizes = torch.tensor([0, 3, 5, 12], device=cost.device)
    options = OPTIONS | {"row_offsets": sizes, "column_offsets": sizes, "backend": backend}
    return otkd_fast.sinkhorn_ragged(cost, **options).transport_cost


def points(gradient):
    def call(x, y, backend):
        options = {"metric": "sqeuclidean", "epsilon": 4.0, "num_iters": 8, "gradient": gradient, "backend": backend}
        result = otkd_fast.sinkhorn_points(x, y, **options)
        return result.regularized_cost if gradient == "envelope" else result.transport_cost

    return call


def moments(x, backend):
    mean, std = otkd_fast.feature_moments(x, dim=(-2, -1), grid=2, eps=1e-5, backend=backend)
    return (mean * std).sum((-2, -1))


def covariances(*shape):
    x = normal(*shape, 3 * shape[-1])
    return x @ x.mT / x.shape[-1]


SQUARE = normal(20, 20).abs()
CASES = {
    **{
        f"cost_matrix {metric}": ("cost_matrix", "value", lambda x, y, backend, m=metric: otkd_fast.cost_matrix(
            x, y, metric=m, backend=backend), (normal(2, 33, 17), normal(2, 9, 17, seed=1)))
        for metric in ("l1", "l2", "sqeuclidean", "cosine")
    },
    "cost_matrix softmax": ("cost_matrix", "value", lambda x, y, backend: otkd_fast.cost_matrix(
        x, y, metric="l1", softmax_temperature=2.0, backend=backend), (normal(21, 65), normal(30, 65, seed=1))),
    "sinkhorn small": ("sinkhorn", "transport_cost", sinkhorn(16, 13), (normal(3, 16, 13).abs(),)),
    "sinkhorn tiny": ("sinkhorn", "transport_cost", sinkhorn(4, 4), (normal(200, 4, 4).abs(),)),
    "sinkhorn middle": ("sinkhorn", "transport_cost", sinkhorn(100, 90), (normal(2, 100, 90).abs(),)),
    "sinkhorn large": ("sinkhorn", "transport_cost", sinkhorn(300, 270), (normal(300, 270).abs(),)),
    "sinkhorn columns first": ("sinkhorn", "transport_cost", sinkhorn(20, 20, update_first="b"), (SQUARE,)),
    "sinkhorn small epsilon": ("sinkhorn", "transport_cost", sinkhorn(20, 20, epsilon=1e-3), (SQUARE,)),
    "sinkhorn envelope": ("sinkhorn", "regularized_cost", sinkhorn(20, 20, gradient="envelope"), (SQUARE,)),
    "sinkhorn last step": ("sinkhorn", "transport_cost", sinkhorn(20, 20, gradient="last_step"), (SQUARE,)),
    "sinkhorn tol": ("sinkhorn", "transport_cost", sinkhorn(20, 20, tol=1e-2), (normal(4, 20, 20).abs(),)),
    "sinkhorn penalties": (
        "sinkhorn", "transport_cost", sinkhorn(15, 8, marginal_penalty=(1.0, 2.0)), (normal(15, 8).abs(),)),
    "sinkhorn_shared": ("sinkhorn_shared", "transport_cost", shared, (normal(40, 33).abs(),)),
    "sinkhorn_ragged": ("sinkhorn_ragged", "transport_cost", ragged, (normal(9 + 4 + 49).abs(),)),
    "sinkhorn_points": ("sinkhorn_points", "transport_cost", points("unroll"), (normal(70, 5), normal(45, 5, seed=1))),
    "sinkhorn_points envelope": (
        "sinkhorn_points", "regularized_cost", points("envelope"), (normal(70, 5), normal(45, 5, seed=1))),
    "sinkd": ("sinkd", "transport_cost", lambda s, t, backend: losses.sinkd(s, t, backend=backend), (
        3 * normal(48, 35), 3 * normal(48, 35, seed=1))),
    "feature_moments": ("feature_moments", "value", moments, (normal(3, 5, 7, 6),)),
    "gaussian_wasserstein": ("gaussian_wasserstein", "value", lambda x, y, backend:
        otkd_fast.gaussian_wasserstein_from_samples(x, y, backend=backend),
        (normal(4, 9, 20), normal(4, 9, 20, seed=1))),
    "sqrtm": ("sqrtm", "value", lambda a, backend: otkd_fast.sqrtm(a, backend=backend), (covariances(5, 12),)),
    "polar": ("polar", "value", lambda k, backend: otkd_fast.polar(k, backend=backend)[1], (normal(5, 12, 9),)),
}  # fmt: skip
HAVE_OWN_TOLERANCES = {"cost_matrix", "sinkhorn"}


def run(name, backend, device, dtype):
    """Value and gradients of a case."""
    _, _, call, inputs = CASES[name]
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    value = call(*leaves, backend=backend)
    weights = torch.linspace(0.5, 1.5, value.numel(), device=device, dtype=dtype).reshape(value.shape)
    return value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)


def available(name, backend):
    reason = _dispatch.availability()[CASES[name][0]][backend]
    if reason is not None:
        pytest.skip(f"{CASES[name][0]} by {backend}: {reason}")


def close(actual, expected, dtype):
    limit = 1e-9 if dtype == torch.float64 else 2e-4
    for got, want in zip(actual, expected, strict=True):
        error = (got.double().cpu() - want).norm() / want.norm().clamp(min=1e-30)
        assert error <= limit, f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, backend, dtype):
    available(name, backend)
    expected = run(name, "reference", torch.device("cpu"), torch.float64)
    actual = run(name, backend, DEVICE, dtype)
    close(actual, expected, dtype)
    op, quantity = CASES[name][:2]
    if op in HAVE_OWN_TOLERANCES:
        assert_close(actual[0], expected[0], op, quantity)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name, backend):
    available(name, backend)
    first = run(name, backend, DEVICE, torch.float32)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(name, backend, DEVICE, torch.float32), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("name", CASES)
def test_another_stream(name, backend):
    """Nothing waits for the default stream, and nothing runs on it."""
    available(name, backend)
    expected = run(name, backend, DEVICE, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = run(name, backend, DEVICE, torch.float32)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("name", CASES)
def test_no_synchronisation(name, backend):
    """Forward and backward are queued without waiting for the device."""
    available(name, backend)
    run(name, backend, DEVICE, torch.float32)
    *_, call, inputs = CASES[name]
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in inputs]
    if "sinkhorn" in name and "points" not in name and "ragged" not in name:
        pytest.skip("this test's own masses are copied to the device")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(call(*leaves, backend=backend).sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("backend", NAMES)
def test_compiled_with_graphs(backend):
    available("sinkhorn small", backend)
    cost = CASES["sinkhorn small"][3][0].to(DEVICE, torch.float32).requires_grad_()

    def loss(cost):
        return otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=12, backend=backend).transport_cost.sum()

    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    (expected,) = torch.autograd.grad(loss(cost), cost)
    for _ in range(3):
        (actual,) = torch.autograd.grad(compiled(cost), cost)
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("backend", NAMES)
def test_second_device(backend):
    available("sinkhorn small", backend)
    expected = run("sinkhorn small", backend, torch.device("cuda:0"), torch.float32)
    actual = run("sinkhorn small", backend, torch.device("cuda:1"), torch.float32)
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(expected, actual, strict=True))
