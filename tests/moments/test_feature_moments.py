"""feature_moments: torch's own reductions, WKD-F's windows, gradients, constant features, arguments."""

import pytest
import torch

import otkd_fast
from otkd_fast.testing import assert_close, backends

ALL = backends("feature_moments")
DTYPES = (torch.float64, torch.float32)
# shape, dim, grid
CASES = [
    ((16, 32), 0, None),
    ((5, 3), 1, None),
    ((7,), 0, None),
    ((2, 6, 8, 8), (-2, -1), None),
    ((2, 6, 8, 8), (2, 3), 1),
    ((2, 6, 8, 8), (2, 3), 4),
    ((3, 5, 7, 7), (-2, -1), 4),
    ((2, 3, 7, 9), (2, 3), (3, 5)),
    ((2, 3, 19), 2, 4),
    ((4, 3, 5, 2), (0, 2), (2, 3)),
    ((3, 2, 4, 5, 6), (1, 3), None),
    ((2, 70, 33), 1, 7),
    ((2, 4, 6, 5), (1, 2, 3), (2, 3, 1)),
]


def expected_moments(x, dim, grid, unbiased, eps):
    """In float64 by adaptive pooling of x and of squared deviations, a window at a time."""
    x = x.double()
    axes = [axis % x.dim() for axis in (dim if isinstance(dim, tuple) else (dim,))]
    counts = grid if isinstance(grid, tuple) else (grid or 1,) * len(axes)
    starts = [[i * x.shape[a] // g for i in range(g)] for a, g in zip(axes, counts, strict=True)]
    ends = [[-(-(i + 1) * x.shape[a] // g) for i in range(g)] for a, g in zip(axes, counts, strict=True)]
    shape = [counts[axes.index(axis)] if axis in axes else size for axis, size in enumerate(x.shape)]
    mean, std = torch.empty(shape, dtype=x.dtype), torch.empty(shape, dtype=x.dtype)
    for cell in torch.cartesian_prod(*(torch.arange(g) for g in counts)).reshape(-1, len(axes)).tolist():
        window, place = [slice(None)] * x.dim(), [slice(None)] * x.dim()
        for k, axis in enumerate(axes):
            window[axis] = slice(starts[k][cell[k]], ends[k][cell[k]])
            place[axis] = slice(cell[k], cell[k] + 1)
        part = x[tuple(window)]
        mean[tuple(place)] = part.mean(axes, keepdim=True)
        std[tuple(place)] = (part.var(axes, correction=int(unbiased), keepdim=True) + eps).sqrt()
    return (mean, std) if grid is not None else (mean.squeeze(axes), std.squeeze(axes))


@pytest.mark.parametrize("unbiased, eps", [(False, 0.0), (True, 1e-5)])
@pytest.mark.parametrize("shape, dim, grid", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_values_and_gradients(backend, dtype, shape, dim, grid, unbiased, eps, generator):
    x = (3 + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    wide = x.double().requires_grad_()
    expected = expected_moments(wide, dim, grid, unbiased, eps)
    x.requires_grad_()
    moments = otkd_fast.feature_moments(x, dim=dim, grid=grid, unbiased=unbiased, eps=eps, backend=backend)
    assert moments.mean.dtype == moments.std.dtype == dtype
    assert_close(moments.mean, expected[0], "feature_moments", "mean")
    assert_close(moments.std, expected[1], "feature_moments", "std")
    weights = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in expected]
    (exact,) = torch.autograd.grad(expected, wide, weights)
    (actual,) = torch.autograd.grad(tuple(moments), x, [w.to(dtype) for w in weights])
    assert_close(actual, exact, "feature_moments", "gradient")


@pytest.mark.parametrize("positions", [16, 17, 49, 64, 1030, 2500])
@pytest.mark.parametrize("features", [1, 5, 35])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends("feature_moments", compiled_only=True))
def test_a_window_that_is_a_row_of_memory(backend, dtype, features, positions, generator):
    x = (1e3 + torch.randn(features, positions, generator=generator, dtype=torch.float64)).to(dtype)
    x[0] = 0.25  # constant
    expected = expected_moments(x, 1, None, True, 0.0)
    x.requires_grad_()
    mean, std = otkd_fast.feature_moments(x, dim=1, unbiased=True, backend=backend)
    assert_close(mean, expected[0], "feature_moments", "mean")
    assert_close(std, expected[1], "feature_moments", "std")
    assert std[0] == 0
    of_mean, of_std = torch.randn(2, features, 1, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad((mean, std), x, (of_mean[:, 0].to(dtype), of_std[:, 0].to(dtype)))
    wide = x.detach().double()
    deviation = (wide - expected[0][:, None]) / ((positions - 1) * expected[1][:, None])
    deviation[0] = 0
    assert_close(grad, of_mean / positions + of_std * deviation, "feature_moments", "gradient")


@pytest.mark.parametrize("backend", ALL)
def test_windows_are_those_of_adaptive_pooling(backend, generator):
    x = torch.randn(2, 3, 7, 7, generator=generator)
    mean, _ = otkd_fast.feature_moments(x, dim=(-2, -1), grid=4, backend=backend)
    torch.testing.assert_close(mean, torch.nn.functional.adaptive_avg_pool2d(x, 4))
    row = torch.arange(7.0)
    mean, std = otkd_fast.feature_moments(row, dim=0, grid=4, unbiased=True, backend=backend)
    torch.testing.assert_close(mean, torch.tensor([0.5, 2.0, 4.0, 5.5]))  # (0, 2) (1, 4) (3, 6) (5, 7)
    torch.testing.assert_close(std, torch.tensor([0.5**0.5, 1.0, 1.0, 0.5**0.5]))


@pytest.mark.parametrize("backend", ALL)
def test_the_released_wkd_loss(backend, generator):
    """Mean and sqrt(unbiased variance + 1e-5) of each window and channel, squared differences, sums over channels."""
    student, teacher = torch.randn(2, 4, 6, 7, 7, generator=generator)
    loss = 0.0
    for i in range(4):
        for j in range(4):
            rows, columns = (slice(k * 7 // 4, -(-(k + 1) * 7 // 4)) for k in (i, j))
            parts = [x[..., rows, columns].flatten(2) for x in (student, teacher)]
            means = [part.mean(-1) for part in parts]
            stds = [(part.var(-1) + 1e-5).sqrt() for part in parts]
            loss += ((means[0] - means[1]).square().sum(1) + (stds[0] - stds[1]).square().sum(1)).mean() / 16
    moments = [
        part.flatten(2).mT
        for x in (student, teacher)
        for part in otkd_fast.feature_moments(x, dim=(-2, -1), grid=4, unbiased=True, eps=1e-5, backend=backend)
    ]
    torch.testing.assert_close(otkd_fast.gaussian_wasserstein_diagonal(*moments).mean(), loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_a_large_mean_costs_no_digits(backend, dtype, generator):
    x = (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) + 1e4).to(dtype)
    _, std = otkd_fast.feature_moments(x, dim=(-2, -1), grid=2, backend=backend)
    assert_close(std, expected_moments(x, (-2, -1), 2, False, 0.0)[1], "feature_moments", "std")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_constant_features_and_windows_of_one(backend, dtype):
    x = torch.full((2, 3, 4, 4), 0.1, dtype=dtype, requires_grad=True)
    for grid in (None, 2, 4):  # 4: windows of a single element
        mean, std = otkd_fast.feature_moments(x, dim=(2, 3), grid=grid, backend=backend)
        assert torch.equal(std, torch.zeros_like(std))
        (grad,) = torch.autograd.grad(std.sum(), x, retain_graph=True)
        assert torch.equal(grad, torch.zeros_like(x))
        assert torch.autograd.grad(mean.sum(), x)[0].isfinite().all()
        _, std = otkd_fast.feature_moments(x, dim=(2, 3), grid=grid, eps=1e-4, backend=backend)
        torch.testing.assert_close(std, torch.full_like(std, 1e-2))
        assert torch.equal(torch.autograd.grad(std.sum(), x)[0], torch.zeros_like(x))
    with pytest.raises(ValueError, match="unbiased: expected False, or windows of at least two elements"):
        otkd_fast.feature_moments(x, dim=(2, 3), grid=4, unbiased=True, backend=backend)
    with pytest.raises(ValueError, match="unbiased"):
        otkd_fast.feature_moments(x[:1], dim=0, unbiased=True, backend=backend)
    # 7 in 7 windows of one along an axis, but two rows in each
    assert otkd_fast.feature_moments(torch.randn(2, 7), dim=(0, 1), grid=(1, 7), unbiased=True).std.isfinite().all()


@pytest.mark.parametrize("shape, dim, grid", [((3, 4), 0, None), ((2, 5, 4), (1, 2), (3, 2)), ((2, 2, 5), 2, 3)])
@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend, shape, dim, grid, generator):
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"unbiased": dim == 0, "eps": 0.1}):

        def moments(x, options=options):
            return tuple(otkd_fast.feature_moments(x, dim=dim, grid=grid, backend=backend, **options))

        assert torch.autograd.gradcheck(moments, x)


@pytest.mark.parametrize("backend", ALL)
def test_layouts_nan_and_half_precision(backend, generator):
    x = torch.randn(3, 5, 6, 7, generator=generator)
    options = {"dim": (2, 3), "grid": (2, 3), "unbiased": True, "backend": backend}
    expected = otkd_fast.feature_moments(x, **options)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(tuple(otkd_fast.feature_moments(channels_last, **options)), tuple(expected))
    wide = otkd_fast.feature_moments(x[:, :1].expand(3, 5, 6, 7), **options)
    torch.testing.assert_close(wide.mean[:, 3], expected.mean[:, 0])
    x[1, 2, 0, 0] = torch.nan
    spoilt = otkd_fast.feature_moments(x, **options)
    for part, clean in zip(spoilt, expected, strict=True):
        assert part.isnan().nonzero().tolist() == [[1, 2, 0, 0]]
        torch.testing.assert_close(part.nan_to_num(), torch.where(part.isnan(), 0, clean))
    for dtype in (torch.float16, torch.bfloat16):
        half = otkd_fast.feature_moments(channels_last.to(dtype), **options)
        assert half.mean.dtype == half.std.dtype == torch.float32
        same = otkd_fast.feature_moments(channels_last.to(dtype).float(), **options)
        torch.testing.assert_close(tuple(half), tuple(same))


@pytest.mark.parametrize("backend", ALL)
def test_transforms(backend, generator):
    torch._dynamo.reset()
    x = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64)

    def loss(x):
        mean, std = otkd_fast.feature_moments(x, dim=(-2, -1), grid=2, unbiased=True, eps=1e-3, backend=backend)
        return (mean**2).sum() + (std**3).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), leaf)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x.float()), loss(x.float()))
        single = otkd_fast.feature_moments(x.float(), dim=0, backend=backend).std
    assert torch.equal(single, otkd_fast.feature_moments(x.float(), dim=0, backend=backend).std)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, ("x:", "tensor", "list")),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, ("x:", "float32", "torch.int64")),
        ({"x": torch.tensor(1.0)}, ValueError, ("x:", "at least one axis", "()")),
        ({"dim": 2}, ValueError, ("dim:", "2 axes", "got 2")),
        ({"dim": (0, -2)}, ValueError, ("dim:", "different", "(0, -2)")),
        ({"dim": ()}, ValueError, ("dim:", "one or more", "()")),
        ({"dim": 0.5}, TypeError, ("dim:", "int", "float")),
        ({"x": torch.ones(0, 3)}, ValueError, ("x:", "axis 0", "(0, 3)")),
        ({"grid": 5}, ValueError, ("grid:", "at most 4", "got 5")),
        ({"grid": 0}, ValueError, ("grid:", ">= 1", "0")),
        ({"grid": (2, 2)}, ValueError, ("grid:", "one number or 1", "(2, 2)")),
        ({"grid": 1.5}, TypeError, ("grid:", "int", "float")),
        ({"unbiased": "yes"}, TypeError, ("unbiased:", "bool", "str")),
        ({"eps": -1e-5}, ValueError, ("eps:", "-1e-05")),
        ({"eps": float("nan")}, ValueError, ("eps:", "finite", "nan")),
        ({"backend": "cuda"}, RuntimeError, ("'cuda'", "feature_moments")),
    ],
)
def test_wrong_argument(changes, error, words):
    arguments = {"x": torch.ones(4, 3), "dim": 0} | changes
    with pytest.raises(error) as caught:
        otkd_fast.feature_moments(arguments.pop("x"), **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)
