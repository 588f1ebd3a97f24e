"""sqrtm and polar among PyTorch's transforms: torch.compile, torch.func, vmap, autocast, TF32, second derivatives."""

import pytest
import torch
from torch.func import grad, jacrev, vmap

import otkd_fast
from otkd_fast.testing import backends, covariance

from .cases import RUNS


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def roots(backend, algorithm):
    """A loss of the root and of its inverse."""

    def loss(A):
        options = {"algorithm": algorithm, "backend": backend}
        return (otkd_fast.sqrtm(A, **options) ** 3).sum() + otkd_fast.sqrtm(A, inverse=True, **options).square().sum()

    return loss


def norm(backend):
    return lambda K: (otkd_fast.polar(K, backend=backend)[1] ** 2).sum()


DISTINCT = [run for run in RUNS if run != ("reference", "eigh")]  # which is 'auto'
LOSSES = [roots(*run) for run in DISTINCT] + [norm(backend) for backend in backends("polar")]
NAMES = ["-".join(run) for run in DISTINCT] + [f"polar-{backend}" for backend in backends("polar")]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=NAMES)


def matrices(generator):
    return covariance("geometric 1e2", 4, generator=generator, batch=(3,))


@each_loss
def test_compile(loss, generator):
    A = matrices(generator).float().requires_grad_()
    (expected,) = torch.autograd.grad(loss(A), A)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(A), A)[0], expected)


def test_compile_without_a_gradient(generator):
    loss = roots("reference", "auto")
    A = matrices(generator)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(A), loss(A))


@each_loss
def test_func_and_vmap(loss, generator):
    A = matrices(generator)
    leaf = A.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(A), expected)
    torch.testing.assert_close(jacrev(loss)(A), expected)
    torch.testing.assert_close(vmap(grad(loss))(A), expected)
    torch.testing.assert_close(vmap(grad(loss), in_dims=2, out_dims=2)(A.movedim(0, 2)), expected.movedim(0, 2))
    torch.testing.assert_close(vmap(loss)(A), torch.stack([loss(matrix) for matrix in A]))


@each_loss
def test_no_second_derivative(loss, generator):
    A = matrices(generator).requires_grad_()
    (first,) = torch.autograd.grad(loss(A), A, create_graph=True)
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        grad(lambda A: grad(loss)(A).sum())(A.detach())


@each_loss
def test_forward_mode_raises(loss, generator):
    A = matrices(generator)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(loss, (A,), (A,))


@each_loss
def test_autocast_and_tf32_change_nothing(loss, generator):
    A = covariance("geometric 1e2", 40, generator=generator, batch=(2,)).float().requires_grad_()
    value = loss(A)
    (expected,) = torch.autograd.grad(value, A)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = loss(A)
            assert torch.equal(again, value)
            (actual,) = torch.autograd.grad(again, A)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual, expected)
