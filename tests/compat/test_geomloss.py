"""SamplesLoss against geomloss itself: values, gradients, potentials."""

import inspect
import pickle

import pytest
import torch

from otkd_fast.compat.geomloss import SamplesLoss

geomloss = pytest.importorskip("geomloss")

OPTIONS = {
    "default": {},
    "p 1": {"p": 1},
    "biased": {"debias": False},
    "biased p 1": {"debias": False, "p": 1, "blur": 0.2},
    "unbalanced": {"reach": 0.5},
    "unbalanced biased": {"reach": 0.5, "debias": False, "p": 1},
    "slow": {"scaling": 0.9, "blur": 0.3},
    "diameter": {"diameter": 7.0, "blur": 0.1},
    "blur above diameter": {"diameter": 0.2, "blur": 0.5},
    "online": {"backend": "tensorized", "truncate": None},
    "energy": {"loss": "energy"},
    "gaussian": {"loss": "gaussian", "blur": 0.7},
    "laplacian": {"loss": "laplacian", "blur": 0.7},
}
every_option = pytest.mark.parametrize("name", list(OPTIONS))


def samples(*batch, n=9, m=7, d=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n * m + len(batch))
    x = torch.rand(*batch, n, d, generator=generator, dtype=torch.float64)
    y = torch.rand(*batch, m, d, generator=generator, dtype=torch.float64) + 0.3
    a, b = (torch.softmax(torch.randn(*batch, k, generator=generator, dtype=torch.float64), -1) for k in (n, m))
    return [z.to(dtype) for z in (a, x, b, y)]


def value_and_gradients(loss, tensors):
    leaves = [z.clone().requires_grad_() for z in tensors]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def compare(actual, expected, rtol=1e-9, atol=1e-10):
    (value, gradients), (expected_value, expected_gradients) = actual, expected
    assert value.shape == expected_value.shape
    torch.testing.assert_close(value, expected_value, rtol=rtol, atol=atol)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=10 * rtol, atol=10 * atol)


def test_same_signature():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (SamplesLoss, geomloss.SamplesLoss))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("batch", [(), (2,)])
@every_option
def test_with_masses(name, batch):
    tensors = samples(*batch)
    options = OPTIONS[name]
    compare(
        value_and_gradients(SamplesLoss(**options), tensors),
        value_and_gradients(geomloss.SamplesLoss(**options), tensors),
    )


@every_option
def test_without_masses(name):
    _, x, _, y = samples()
    options = OPTIONS[name]
    compare(
        value_and_gradients(SamplesLoss(**options), (x, y)),
        value_and_gradients(geomloss.SamplesLoss(**options), (x, y)),
    )


@every_option
def test_only_one_side_needs_a_gradient(name):
    a, x, b, y = samples()
    values = []
    for cls in (SamplesLoss, geomloss.SamplesLoss):
        leaf = y.clone().requires_grad_()
        values.append(torch.autograd.grad(cls(**OPTIONS[name])(a, x, b, leaf), leaf)[0])
    torch.testing.assert_close(*values, rtol=1e-8, atol=1e-9)
    assert not SamplesLoss(**OPTIONS[name])(a, x, b, y).requires_grad


@pytest.mark.parametrize("batch", [(), (2,)])
@every_option
def test_potentials(name, batch):
    tensors = samples(*batch)
    options = OPTIONS[name] | {"potentials": True}
    for got, wanted in zip(SamplesLoss(**options)(*tensors), geomloss.SamplesLoss(**options)(*tensors), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@every_option
def test_float32(name):
    """geomloss's expanded squares lose digits in float32: compared with its answer in float64."""
    tensors = samples(dtype=torch.float32)
    value = SamplesLoss(**OPTIONS[name])(*tensors)
    assert value.dtype == torch.float32
    expected = geomloss.SamplesLoss(**OPTIONS[name])(*(z.double() for z in tensors))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-6)


def test_masses_of_zero_and_masses_with_an_axis_of_one():
    a, x, b, y = samples()
    a = a * (torch.arange(9) > 2)
    a = a / a.sum()
    expected = geomloss.SamplesLoss()(a, x, b, y)
    torch.testing.assert_close(SamplesLoss()(a, x, b, y), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(SamplesLoss()(a[:, None], x, b[:, None], y), expected, rtol=1e-9, atol=1e-12)


def test_own_cost():
    tensors = samples(2)

    def cost(x, y):  # asymmetric
        return (x[:, :, None, :] - 0.5 * y[:, None, :, :]).abs().sum(-1)

    options = {"cost": cost, "blur": 0.3, "diameter": 3.0}
    compare(
        value_and_gradients(SamplesLoss(**options), tensors),
        value_and_gradients(geomloss.SamplesLoss(**options), tensors),
    )


def test_own_kernel():
    tensors = samples(2)

    def kernel(x, y, blur=None, use_keops=False, ranges=None):
        return 1 / (blur + (x[:, :, None, :] - y[:, None, :, :]).square().sum(-1))

    options = {"loss": "gaussian", "kernel": kernel, "blur": 0.3}
    compare(
        value_and_gradients(SamplesLoss(**options), tensors),
        value_and_gradients(geomloss.SamplesLoss(**options), tensors),
    )


def test_identical_samples_and_pickle():
    _, x, _, _ = samples()
    for options in OPTIONS.values():
        loss = SamplesLoss(**options)
        if loss.debias or loss.loss != "sinkhorn":
            value, gradients = value_and_gradients(lambda p, loss=loss: loss(p, x), (x,))
            assert abs(value) < 1e-12 and gradients[0].abs().max() < 1e-10
    loss = SamplesLoss("sinkhorn", p=1)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(x, x + 1), loss(x, x + 1))


def test_one_point():
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert SamplesLoss()(x, x) == 0


def test_half_precision():
    a, x, b, y = samples()
    value = SamplesLoss()(x.half(), y.half())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, SamplesLoss()(x.half().float(), y.half().float()))


X, Y = samples()[1::2]
WRONG = {
    "hausdorff": (lambda: SamplesLoss("hausdorff"), ValueError, "loss.*'hausdorff'"),
    "multiscale": (lambda: SamplesLoss(backend="multiscale"), ValueError, "backend.*'multiscale'"),
    "cluster_scale": (lambda: SamplesLoss(cluster_scale=0.1), ValueError, "cluster_scale"),
    "formula": (lambda: SamplesLoss(cost="Norm2(X-Y)"), ValueError, "cost"),
    "kernel": (lambda: SamplesLoss("gaussian", kernel="x"), ValueError, "kernel"),
    "p": (lambda: SamplesLoss(p=3), ValueError, "p"),
    "blur": (lambda: SamplesLoss(blur=0.0), ValueError, "blur"),
    "scaling": (lambda: SamplesLoss(scaling=1.0), ValueError, "scaling"),
    "labels": (lambda: SamplesLoss()(X, X, X, Y, Y, Y), ValueError, "labels"),
    "arguments": (lambda: SamplesLoss()(X), ValueError, "arguments"),
    "rank": (lambda: SamplesLoss()(X[None, None], Y[None, None]), ValueError, "x"),
    "dimension": (lambda: SamplesLoss()(X, Y[:, :2]), ValueError, "y"),
    "masses": (lambda: SamplesLoss()(X[:, 0], X, X[:, 0], Y), ValueError, "b"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_arguments(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
