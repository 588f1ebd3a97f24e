"""csrc/cuda/moments.cu on the emulator."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import assert_close

# shape, dim, grid: few and many positions, short and long inner axes, overlapping windows, axes apart
CASES = [
    ((7, 5), 0, None),
    ((300, 33), 0, None),
    ((2, 3, 7, 7), (-2, -1), 4),
    ((2, 3, 20, 30), (-2, -1), None),
    ((3, 19, 23, 2), (1, 2), (2, 3)),
    ((4, 6, 5, 7), (0, 2, 3), (2, 5, 3)),
    ((5, 4, 3), (0, 2), None),
    ((2, 700), 1, (1,)),
]


def check(x, guard, **options):
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    with guard:
        actual = otkd_fast.feature_moments(leaf, backend="cpu", **options)
    expected = otkd_fast.feature_moments(wide, backend="reference", **options)
    found = list(actual)
    for name, got, want in zip(("mean", "std"), actual, expected, strict=True):
        assert_close(got, want, "feature_moments", name)
    incoming = [torch.randn(part.shape, generator=generator, dtype=x.dtype) for part in actual]
    for chosen in ((0,), (1,), (0, 1)):
        outputs, weights = [actual[k] for k in chosen], [incoming[k] for k in chosen]
        with guard:
            (grad,) = torch.autograd.grad(outputs, leaf, weights, retain_graph=True)
        (want,) = torch.autograd.grad(
            [expected[k] for k in chosen], wide, [w.double() for w in weights], retain_graph=True
        )
        assert_close(grad, want, "feature_moments", "gradient")
        found.append(grad)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape, dim, grid", CASES, ids=str)
def test_moments(shape, dim, grid, dtype, guarded, emulated, generator):
    x = (3 + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    before = emulated.launches()
    check(x, guarded, dim=dim, grid=grid)
    check(x, guarded, dim=dim, grid=grid, eps=0.1)
    assert emulated.launches() > before + 10
    if shape[0] > 4:
        check(x, guarded, dim=dim, grid=grid, unbiased=True)


def test_constant_windows_and_large_means(guarded, generator):
    x = torch.full((3, 40, 5), 1e5) + torch.randn(3, 40, 5, generator=generator)
    x[1] = 7.3
    mean, std, *grads = check(x, guarded, dim=1)
    assert mean[1].eq(x[1, 0]).all() and std[1].eq(0).all()
    assert grads[1][1].eq(0).all()  # of the standard deviation


def test_the_order_of_threads_does_not_matter(guarded, emulated, generator):
    for shape, dim, grid in CASES:
        x = torch.randn(shape, generator=generator)
        emulated.set_order(0)
        first = check(x, guarded, dim=dim, grid=grid)
        for order in (1, 2):
            emulated.set_order(order)
            assert all(map(torch.equal, first, check(x, guarded, dim=dim, grid=grid)))
