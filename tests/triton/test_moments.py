"""feature_moments on Triton, interpreted in guarded memory, against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.testing import assert_close  # noqa: E402
from otkd_fast.testing.guarded import gradients_guarded  # noqa: E402

# shape, axes, windows: inner axis 1, short and long; overlapping windows; axes apart; up to three; one position
CASES = [
    ((3, 4), (0,), (1,)),
    ((2, 3, 7, 5), (2, 3), (4, 3)),
    ((2, 7, 5, 3), (1, 2), (2, 5)),
    ((2, 3, 4, 5), (1, 3), (2, 1)),
    ((2, 3, 4, 5), (1, 2, 3), (2, 3, 2)),
    ((2, 130), (1,), (1,)),
    ((3, 2, 65), (0, 1), (1, 1)),
    ((1,), (0,), (1,)),
]


WIDE = [(case, torch.float64) for case in CASES]  # the same masks again


@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in CASES] + WIDE[:2] + [pytest.param(*w, marks=pytest.mark.slow) for w in WIDE[2:]],
    ids=str,
)
def test_against_the_reference(case, dtype, generator):
    shape, dim, grid = case
    unbiased = shape in ((3, 4), (2, 130), (2, 3, 4, 5))
    x = (5 + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weights = [torch.randn((), generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    options = {"dim": dim, "grid": grid, "unbiased": unbiased, "eps": 1e-5}
    outputs, (grad,) = gradients_guarded(
        lambda x: tuple(otkd_fast.feature_moments(x, backend="triton", **options)), (x,), lambda i: weights[i]
    )
    wide = x.detach().double().requires_grad_()
    mean, std = reference.feature_moments(wide, **options)
    (want,) = torch.autograd.grad((mean * weights[0]).sum() + (std * weights[1]).sum(), wide)
    assert_close(outputs[0], mean, "feature_moments", "mean")
    assert_close(outputs[1], std, "feature_moments", "std")
    assert_close(grad, want, "feature_moments", "gradient")


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_and_a_large_mean(which, generator):
    x = (1000 + torch.randn(4, 9, generator=generator)).requires_grad_()
    call = {"dim": 1, "grid": 2}
    _, (grad,) = gradients_guarded(lambda x: otkd_fast.feature_moments(x, backend="triton", **call)[which], (x,))
    wide = x.detach().double().requires_grad_()
    expected = reference.feature_moments(wide, dim=(1,), grid=(2,), unbiased=False, eps=0.0)[which]
    assert_close(grad, torch.autograd.grad(expected.sum(), wide)[0], "feature_moments", "gradient")


def test_a_constant_window_has_gradient_0():
    x = torch.full((5, 2), 0.1, requires_grad=True)
    call = {"dim": 0, "backend": "triton"}
    (mean, std), (grad,) = gradients_guarded(lambda x: tuple(otkd_fast.feature_moments(x, **call)), (x,))
    assert torch.equal(std, torch.zeros(2)) and torch.equal(mean, torch.full((2,), 0.1))
    torch.testing.assert_close(grad, torch.full((5, 2), 0.2))


def test_no_elements():
    x = torch.empty(0, 4, requires_grad=True)
    mean, std = otkd_fast.feature_moments(x, dim=1, backend="triton")
    (mean.sum() + std.sum()).backward()
    assert mean.shape == std.shape == (0,) and x.grad.shape == x.shape
