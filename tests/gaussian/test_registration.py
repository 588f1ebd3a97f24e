"""The Gaussian distances among PyTorch's transforms: torch.compile, torch.func, vmap, autocast, second derivatives."""

import pytest
import torch
from torch.func import grad, vmap

import otkd_fast
from otkd_fast.testing import backends, covariance

ALL = backends("gaussian_wasserstein")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def from_samples(backend):
    return lambda x, y: (otkd_fast.gaussian_wasserstein_from_samples(x, y, backend=backend) ** 2).sum()


def bures(backend):
    return lambda x, y: (otkd_fast.bures_distance(x, y, backend=backend) ** 2).sum()


def kl(x, y):
    return otkd_fast.gaussian_kl(x[..., 0], x, y[..., 1], y).sum()


def samples(generator):
    return [torch.randn(3, n, 6, generator=generator, dtype=torch.float64) for n in (4, 5)]


def tall_samples(generator):
    return [torch.randn(3, n, 3, generator=generator, dtype=torch.float64) for n in (7, 8)]


def covariances(generator):
    return [covariance("geometric 1e2", 4, generator=generator, batch=(3,)) for _ in range(2)]


CASES = [(from_samples(backend), make) for backend in ALL for make in (samples, tall_samples)]
CASES += [(bures(backend), covariances) for backend in ALL] + [(kl, covariances)]
NAMES = [f"{name}-{backend}" for backend in ALL for name in ("samples", "tall")]
NAMES += [f"bures-{backend}" for backend in ALL] + ["kl"]
each_case = pytest.mark.parametrize("loss, make", CASES, ids=NAMES)


def gradients(loss, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


@each_case
def test_compile(loss, make, generator):
    tensors = [tensor.float() for tensor in make(generator)]
    expected = gradients(loss, tensors)
    torch.testing.assert_close(gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), tensors), expected)


@pytest.mark.parametrize("backend", ALL)
def test_compile_with_other_sizes_without_gradient_and_one_tensor_twice(backend, generator):
    def function(x, y):
        return otkd_fast.gaussian_wasserstein_from_samples(x, y, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (3, 4, 6):
        x, y = torch.randn(2, n, 5, generator=generator)
        torch.testing.assert_close(compiled(x, y), function(x, y))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(leaf, leaf), leaf)
    assert float(grad.abs().max()) < 1e-5


@each_case
def test_func_and_vmap(loss, make, generator):
    tensors = make(generator)
    expected = gradients(loss, tensors)
    torch.testing.assert_close(grad(loss, (0, 1))(*tensors), expected)
    torch.testing.assert_close(vmap(grad(loss, (0, 1)))(*tensors), expected)
    x, y = tensors
    shared = vmap(grad(loss, (0, 1)), in_dims=(0, None))(x, y[0])
    for k in range(3):
        torch.testing.assert_close([t[k] for t in shared], list(gradients(loss, (x[k], y[0]))))
    torch.testing.assert_close(vmap(loss, in_dims=(None, 0))(x[0], y), torch.stack([loss(x[0], z) for z in y]))


@pytest.mark.parametrize("loss, make", CASES[:-1], ids=NAMES[:-1])
def test_no_second_derivative_and_no_forward_mode(loss, make, generator):
    x, y = (tensor.requires_grad_() for tensor in make(generator))
    (first,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        first.sum().backward()
    y = y.detach()
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        grad(lambda x: grad(loss)(x, y).sum())(x.detach())
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: loss(x, y), (x.detach(),), (x.detach(),))


@each_case
def test_autocast_and_tf32_change_nothing(loss, make, generator):
    tensors = [tensor.float() for tensor in make(generator)]
    expected = gradients(loss, tensors)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = gradients(loss, tensors)
    finally:
        torch.set_float32_matmul_precision(before)
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)
