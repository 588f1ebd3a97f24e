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


def test_full_covariance_of_positions_and_of_low_rank(generator):
    student, teacher = (torch.randn(2, 40, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    value = wkd_feature(student, teacher, covariance="full", statistics="position", ratio=2.0)
    torch.testing.assert_close(value, full_rows(student, teacher, 2.0, 1, True).mean(), rtol=1e-9, atol=0.0)
    # 6 observations of 40 channels: of rank 5; the roots of the oracle have a rounding error of 1e-8
    value, gradient = value_and_gradient(WKDFeature(covariance="full", ratio=2.0), student, teacher)
    torch.testing.assert_close(value, full_rows(student, teacher, 2.0, 1).mean(), rtol=1e-6, atol=0.0)
    assert gradient.isfinite().all()


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
