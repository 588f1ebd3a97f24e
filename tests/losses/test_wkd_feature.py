"""WKD-F, and WKL's loss of features, against the published formulas."""

import pytest
import torch
import wkd_cases as cases
from wkd_cases import relative_error, value_and_gradient

from otkd_fast.losses import WKDFeature, WKLFeature, wkd_feature, wkl_feature
from otkd_fast.testing import tolerance

# name: (samples, channels, h, w) of student and teacher, ratio, grid; the published settings with fewer channels
SETTINGS = {
    "C100 res32x4": ((6, 32, 8, 8), (6, 32, 8, 8), 4.0, 1),
    "C100 wrn_40_2": ((6, 32, 8, 8), (6, 32, 8, 8), 3.0, 4),
    "IN ResNet34": ((3, 48, 7, 7), (3, 48, 7, 7), 2.0, 4),
    "two sizes": ((4, 12, 6, 5), (4, 12, 9, 7), 2.0, 3),
}
every_setting = pytest.mark.parametrize("setting", list(SETTINGS))


def maps(setting, dtype=torch.float64, seed=0):
    student_shape, teacher_shape, ratio, grid = SETTINGS[setting]
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + 0.3
        for shape, scale in ((student_shape, 1.0), (teacher_shape, 1.5))
    )
    return student.to(dtype), torch.relu(teacher).to(dtype), {"ratio": ratio, "grid": grid}


@every_setting
def test_diagonal_equals_the_formula(setting):
    student, teacher, options = maps(setting)
    value, gradient = value_and_gradient(WKDFeature(**options), student, teacher)
    expected, expected_gradient = value_and_gradient(cases.wkd_feature_rows, student, teacher, **options)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-9


@every_setting
def test_float32_is_near_float64(setting):
    student, teacher, options = maps(setting, torch.float32)
    value, gradient = value_and_gradient(WKDFeature(**options), student, teacher)
    expected, expected_gradient = value_and_gradient(
        cases.wkd_feature_rows, student.double(), teacher.double(), **options
    )
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0.0)
    assert relative_error(gradient, expected_gradient) < tolerance("feature_moments", "gradient", torch.float32).rtol


def position_rows(student, teacher, ratio):
    """Mean and standard deviation of each position over the channels."""
    (mean_s, std_s), (mean_t, std_t) = ((x.mean(1), (x.var(1, correction=1) + 1e-5).sqrt()) for x in (student, teacher))
    return (ratio * (mean_s - mean_t) ** 2 + (std_s - std_t) ** 2).flatten(1).sum(1)


def test_position_statistics():
    student, teacher, _ = maps("C100 res32x4")
    teacher = torch.cat([teacher, teacher.flip(1)], 1)  # another number of channels
    loss = WKDFeature(ratio=3.0, statistics="position")
    value, gradient = value_and_gradient(loss, student, teacher)
    expected, expected_gradient = value_and_gradient(position_rows, student, teacher, ratio=3.0)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-9


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def full_rows(student, teacher, ratio, grid, position=False):
    """The paper's form by covariance matrices and their roots, a window and a sample at a time."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for i in range(grid):
            for j in range(grid):
                cells = []
                for x in (s, t):
                    rows, columns = cases.windows(x.shape[1], grid)[i], cases.windows(x.shape[2], grid)[j]
                    cell = x[:, rows, columns].flatten(1)  # variables, observations
                    cells.append(cell.T if position else cell)
                (mean_s, cov_s), (mean_t, cov_t) = ((x.mean(1), torch.cov(x)) for x in cells)
                root_t = root(cov_t)
                bures = cov_s.trace() + cov_t.trace() - 2 * root(root_t @ cov_s @ root_t).trace()
                total = total + ratio * (mean_s - mean_t).square().sum() + bures
        values.append(total / grid**2)
    return torch.stack(values)


@pytest.mark.parametrize(("shape", "grid"), [((3, 5, 6, 6), 1), ((2, 3, 7, 7), 2)])
def test_full_covariance_equals_the_formula(shape, grid, generator):
    student, teacher = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = WKDFeature(covariance="full", ratio=2.0, grid=grid)
    value, gradient = value_and_gradient(loss, student, teacher)
    # the covariances have full rank here, so that the roots can be differentiated
    expected, expected_gradient = value_and_gradient(full_rows, student, teacher, ratio=2.0, grid=grid)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-9


def test_full_covariance_of_positions(generator):
    student, teacher = (torch.randn(2, 40, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = WKDFeature(covariance="full", statistics="position", ratio=2.0)
    value, gradient = value_and_gradient(loss, student, teacher)
    expected, expected_gradient = value_and_gradient(full_rows, student, teacher, ratio=2.0, grid=1, position=True)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-9


# A root of a singular matrix turns a rounding error of 1e-16 into 1e-8. With fewer observations than channels the
# printed formula is therefore followed in 60 digits, and in float64 by way of the factors: S = X X^T of X (C, n), and
# tr (S_t^(1/2) S_s S_t^(1/2))^(1/2) is the sum of the singular values of X_t^T X_s, of which none is squared.


def bures_in_60_digits(student, teacher):
    """tr S_s + tr S_t - 2 tr (S_t^(1/2) S_s S_t^(1/2))^(1/2) as printed, of mpmath matrices (C, n)."""
    import mpmath

    def covariance(x):
        centred = x.copy()
        for i in range(x.rows):
            mean = sum(x[i, k] for k in range(x.cols)) / x.cols
            for k in range(x.cols):
                centred[i, k] -= mean
        return centred * centred.T / (x.cols - 1)

    def root(matrix):
        values, vectors = mpmath.eigsy((matrix + matrix.T) / 2)
        return vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * vectors.T

    cov_s, cov_t = covariance(student), covariance(teacher)
    half = root(cov_t)
    cross = root(half * cov_s * half)
    return sum(cov_s[i, i] + cov_t[i, i] - 2 * cross[i, i] for i in range(student.rows))


def test_full_covariance_of_low_rank_in_60_digits(generator):
    """4 observations of 7 channels: rank 3. The gradient is a central difference in 60 digits."""
    mpmath = pytest.importorskip("mpmath")
    student, teacher = (torch.randn(1, 7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    value, gradient = value_and_gradient(WKDFeature(covariance="full", ratio=0.0), student, teacher)
    with mpmath.workdps(60):
        s, t = (mpmath.matrix(x[0].tolist()) for x in (student, teacher))
        assert abs(value.item() / bures_in_60_digits(s, t) - 1) < 1e-9
        step = mpmath.mpf(10) ** -15
        for i, k in ((0, 0), (3, 2), (6, 3)):
            values = []
            for sign in (1, -1):
                moved = s.copy()
                moved[i, k] += sign * step
                values.append(bures_in_60_digits(moved, t))
            slope = (values[0] - values[1]) / (2 * step)
            assert abs(gradient[0, i, k].item() - slope) < 1e-9 * gradient.abs().max().item()


def low_rank_rows(student, teacher, ratio, grid):
    """full_rows by the factors; a basis of the vectors that sum to 0 takes the place of the centred observations."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for i in range(grid):
            for j in range(grid):
                factors, means = [], []
                for x in (s, t):
                    rows, columns = cases.windows(x.shape[1], grid)[i], cases.windows(x.shape[2], grid)[j]
                    cell = x[:, rows, columns].flatten(1)
                    n = cell.shape[1]
                    ones = torch.ones(n, 1, dtype=x.dtype)
                    basis = torch.linalg.qr(torch.cat([ones, torch.eye(n, dtype=x.dtype)[:, 1:]], 1)).Q[:, 1:]
                    factors.append(cell @ basis / (n - 1) ** 0.5)  # (C, n - 1)
                    means.append(cell.mean(1))
                trace = factors[0].square().sum() + factors[1].square().sum()
                bures = trace - 2 * torch.linalg.svdvals(factors[1].T @ factors[0]).sum()
                total = total + ratio * (means[0] - means[1]).square().sum() + bures
        values.append(total / grid**2)
    return torch.stack(values)


@pytest.mark.parametrize(
    ("shape", "grid"), [((2, 256, 8, 8), 1), ((2, 128, 8, 8), 4), ((1, 512, 7, 7), 4), ((3, 5, 2, 3), 1)]
)
def test_full_covariance_at_the_published_shapes(shape, grid, generator):
    """49 or 64 positions (4 to 9 in a window) of 128 to 512 channels."""
    student, teacher = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if shape[2] == 2:  # full rank, where both oracles are exact
        torch.testing.assert_close(
            low_rank_rows(student, teacher, 2.0, 1), full_rows(student, teacher, 2.0, 1), rtol=1e-12, atol=0.0
        )
    value, gradient = value_and_gradient(WKDFeature(covariance="full", ratio=2.0, grid=grid), student, teacher)
    expected, expected_gradient = value_and_gradient(low_rank_rows, student, teacher, ratio=2.0, grid=grid)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-9


def test_diagonal_and_full_agree_for_one_channel(generator):
    student, teacher = (torch.randn(4, 1, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    options = {"ratio": 1.5, "eps": 0.0}
    torch.testing.assert_close(
        wkd_feature(student, teacher, **options), wkd_feature(student, teacher, covariance="full", **options)
    )


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_identical_maps_give_zero(covariance):
    _, teacher, options = maps("IN ResNet34")
    value, gradient = value_and_gradient(WKDFeature(covariance=covariance, **options), teacher, teacher.clone())
    assert abs(value.item()) < 1e-12 and gradient.abs().max() < 1e-7


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_windows_of_one_position(covariance):
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="unbiased"):
        wkd_feature(student, teacher, grid=4, covariance=covariance)
    loss = WKDFeature(grid=4, covariance=covariance, unbiased=False, ratio=2.0)
    value, gradient = value_and_gradient(loss, student, teacher)
    expected = 2.0 * (student - teacher).square().sum() / 2 / 16  # no deviation within a window: the means are left
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, 2.0 * (student - teacher) / 16)


def test_constant_maps_have_finite_gradients():
    student = torch.ones(2, 3, 4, 4)
    for options in ({}, {"covariance": "full"}, {"eps": 0.0}):
        value, gradient = value_and_gradient(WKDFeature(**options), student, torch.randn(2, 3, 4, 4))
        assert value.isfinite() and gradient.isfinite().all()


def test_tokens_and_volumes():
    student, teacher = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    tokens = wkd_feature(student, teacher)
    assert torch.equal(tokens, wkd_feature(student.reshape(2, 5, 3, 4), teacher.reshape(2, 5, 3, 4)))
    volumes = wkd_feature(student.reshape(2, 5, 3, 2, 2), teacher.reshape(2, 5, 3, 2, 2))
    torch.testing.assert_close(tokens, volumes)
    assert wkd_feature(torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4), grid=2).isfinite()


@pytest.mark.parametrize("progress", [1 / 240, 0.5, 0.625, 0.8, 1.0])
@pytest.mark.parametrize("setting", ["C100 res32x4", "C100 wrn_40_2"])
def test_wkl_feature_equals_the_formula(setting, progress):
    student, teacher, options = maps(setting)
    weight = 0.08 * cases.stage((progress - 0.625) / 0.375) if progress > 0.625 else 0.08

    def formula(s, t):
        transport = weight * cases.wkd_feature_rows(s, t, **options)
        return transport + 2.0 * (1 - cases.stage(progress)) * 0.04 * cases.gaussian_kl_rows(s, t)

    value, gradient = value_and_gradient(WKLFeature(**options), student, teacher, progress)
    expected, expected_gradient = value_and_gradient(formula, student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-9
    tensor = wkl_feature(student, teacher, torch.tensor(progress, dtype=torch.float64), **options)
    torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=0.0)


S = torch.randn(2, 3, 4, 4)
WRONG = {
    "student no tensor": (([1.0], S), {}, TypeError, "student_maps"),
    "integer teacher": ((S, S.long()), {}, TypeError, "teacher_maps"),
    "rank 2": ((S[:, :, 0, 0], S[:, :, 0, 0]), {}, ValueError, "student_maps"),
    "other channels": ((S, S[:, :2]), {}, ValueError, "teacher_maps"),
    "other samples": ((S, S[:1]), {}, ValueError, "teacher_maps"),
    "other rank": ((S, S.flatten(2)), {}, ValueError, "teacher_maps"),
    "other positions": ((S, S[..., :2]), {"statistics": "position"}, ValueError, "teacher_maps"),
    "no channels": ((S[:, :0], S[:, :0]), {}, ValueError, "student_maps"),
    "no positions": ((S, S[..., :0]), {}, ValueError, "teacher_maps"),
    "other device": ((S, S.to("meta")), {}, ValueError, "teacher_maps"),
    "mask of another length": ((S, S, torch.ones(3, dtype=torch.bool)), {}, ValueError, "mask"),
    "float mask": ((S, S, torch.ones(2)), {}, TypeError, "mask"),
    "too many windows": ((S, S), {"grid": 5}, ValueError, "grid"),
    "too many windows, full": ((S, S), {"grid": 5, "covariance": "full"}, ValueError, "grid"),
    "a grid of channels": ((S, S), {"grid": 2, "statistics": "position"}, ValueError, "grid"),
    "ratio": ((S, S), {"ratio": -1.0}, ValueError, "ratio"),
    "eps": ((S, S), {"eps": float("nan")}, ValueError, "eps"),
    "covariance": ((S, S), {"covariance": "low rank"}, ValueError, "covariance"),
    "statistics": ((S, S), {"statistics": "batch"}, ValueError, "statistics"),
    "unbiased": ((S, S), {"unbiased": 1}, TypeError, "unbiased"),
    "reduction": ((S, S), {"reduction": "max"}, ValueError, "reduction"),
    "backend": ((S, S), {"backend": 1}, TypeError, "backend"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(case):
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        wkd_feature(*arguments, **options)
    with pytest.raises(error, match=message):
        WKDFeature(**options)(*arguments)
