"""WKD-F: Wasserstein distillation of feature maps, each described by a Gaussian."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional._matrices import check_flag
from ..functional._validate import check_choice, check_tensor, not_negative_float, positive_int
from ..functional.gaussian import gaussian_wasserstein_from_samples
from ..functional.moments import feature_moments
from ._common import (
    Loss,
    at_least_float32,
    check_backend,
    check_device,
    check_mask,
    check_num_items,
    check_reduction,
    overwrite,
    reduce_rows,
    zero,
)

__all__ = ["WKDFeature", "wkd_feature"]

COVARIANCES = ("diagonal", "full")
STATISTICS = ("channel", "position")


class _Options(NamedTuple):
    ratio: float
    grid: int
    covariance: str
    statistics: str
    unbiased: bool
    eps: float
    reduction: str
    backend: str | None


def wkd_feature(
    student_maps: Tensor,
    teacher_maps: Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    *,
    ratio: float = 4.0,
    grid: int = 1,
    covariance: str = "diagonal",
    statistics: str = "channel",
    unbiased: bool = True,
    eps: float = 1e-5,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""WKD-F: ``ratio |mean_s - mean_t|^2 + D_cov(s, t)`` of Gaussians fitted to feature maps.

    For each sample, its positions (h w of them) are the observations and the channels the variables:

        covariance="diagonal"  D_cov = sum over channels of (std_s - std_t)^2, std = sqrt(variance + eps); the released
                               code's form, and the paper's choice
        covariance="full"      D_cov = tr S_s + tr S_t - 2 tr (S_t^(1/2) S_s S_t^(1/2))^(1/2), the squared Bures
                               distance of the covariances, from the samples: the paper's general form

    With a grid each axis of positions is cut into that many windows, overlapping where they do not divide it (as
    torch.nn.functional.adaptive_avg_pool2d has them), each window has a Gaussian of its own, and the distances are
    averaged over the windows. ``statistics="position"`` exchanges the roles: the channels are the observations, each
    position is a variable (no grid).

    There is no projector inside: the published code puts convolutions, batch norm and ReLU on the student's side and
    trains them with it. Give the projected maps. Its weight (0.08 for ratio 4 on CIFAR-100) is the caller's too, e.g.
    ``cosine_decay(0.08, epoch, 240, start=150)``.

    Args:
        student_maps: (N, C, *positions) with at least one axis of positions; float16, bfloat16, float32 or float64.
        teacher_maps: with the same N and C, or (``statistics="position"``) the same N and positions; same device. The
            other sizes may differ.
        mask: bool (N,); samples that are False do not count, whatever they hold.
        num_items_in_batch: divisor of "mean" and "batchmean" in place of their own (gradient accumulation).
        ratio: >= 0, weight of the means. Published: 4, 3 (CIFAR-100), 2 (ImageNet).
        grid: >= 1, windows along each axis of positions. Published: 1, 4.
        covariance: "diagonal" or "full".
        statistics: "channel" or "position".
        unbiased: variances divide by the number of observations - 1, as published; a window of one position has none
            (ValueError; the published code gives NaN there): take ``unbiased=False``, whose variance is 0.
        eps: >= 0, added to the variances (covariance="diagonal").
        reduction: "mean" as published; "none" (N,), "sum" or "batchmean" (divided by N).
        backend: one of the package's backends, None chooses.

    Returns:
        Scalar (or (N,) for "none") in float32, or float64 if an input is float64. Gradients go to whatever requires
        them. No sample that counts: 0, gradient 0.

    Raises:
        TypeError: a tensor argument of the wrong kind, a parameter of the wrong type.
        ValueError: a wrong shape or device, an unknown word, a parameter out of range, a window of one position with
            unbiased=True.

    Source: "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation" (arXiv 2412.08139) and
    its released code.

    >>> import torch
    >>> maps = torch.tensor([[[0.0, 2.0], [1.0, 1.0]]])  # one sample, two channels, two positions
    >>> wkd_feature(maps + 1, maps, ratio=4.0)
    tensor(8.)
    >>> wkd_feature(torch.randn(2, 64, 7, 7), torch.randn(2, 64, 7, 7), grid=4, reduction="none").shape
    torch.Size([2])
    """
    options = _options(ratio, grid, covariance, statistics, unbiased, eps, reduction, backend)
    return _loss(student_maps, teacher_maps, mask, num_items_in_batch, options)


class WKDFeature(Loss):
    """Module form of :func:`wkd_feature`: the parameters are given once,
    ``forward(student_maps, teacher_maps, mask=None, num_items_in_batch=None)`` gives the loss.

    Has no parameters, no buffers and no other state. All parameters are keyword-only, checked here, and documented in
    :func:`wkd_feature`.

    >>> import torch
    >>> distil = WKDFeature(ratio=2.0, grid=4)
    >>> maps = torch.randn(2, 64, 7, 7)
    >>> distil(maps, maps)
    tensor(0.)
    """

    def __init__(
        self,
        *,
        ratio: float = 4.0,
        grid: int = 1,
        covariance: str = "diagonal",
        statistics: str = "channel",
        unbiased: bool = True,
        eps: float = 1e-5,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._options = _options(ratio, grid, covariance, statistics, unbiased, eps, reduction, backend)

    def forward(
        self,
        student_maps: Tensor,
        teacher_maps: Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of maps (N, C, *positions); see :func:`wkd_feature`."""
        return _loss(student_maps, teacher_maps, mask, num_items_in_batch, self._options)


def _options(ratio, grid, covariance, statistics, unbiased, eps, reduction, backend) -> _Options:
    """The checked parameters."""
    check_choice("covariance", covariance, COVARIANCES)
    check_choice("statistics", statistics, STATISTICS)
    check_flag("unbiased", unbiased)
    grid = positive_int("grid", grid)
    if statistics == "position" and grid != 1:
        raise ValueError(f"grid: expected 1 with statistics='position', got {grid}")
    return _Options(
        not_negative_float("ratio", ratio), grid, covariance, statistics, unbiased, not_negative_float("eps", eps),
        check_reduction(reduction), check_backend(backend),
    )  # fmt: skip


def check_maps(student: Tensor, teacher: Tensor, mask: Tensor | None, statistics: str) -> tuple[Tensor, Tensor]:
    """Raise for maps that do not fit; both in their common dtype, zeros in the samples that do not count."""
    check_tensor("student_maps", student, 3, "(N, C, *positions)")
    check_tensor("teacher_maps", teacher, 3, "(N, C, *positions)")
    check_device("teacher_maps", teacher, "student_maps", student)
    if 0 in student.shape[1:]:
        raise ValueError(f"student_maps: expected channels and positions, got shape {tuple(student.shape)}")
    channels = statistics == "channel"
    (samples, student_channels, *positions), (_, teacher_channels, *teacher_positions) = student.shape, teacher.shape
    expected = (samples, student_channels, *teacher_positions) if channels else (samples, teacher_channels, *positions)
    if teacher.dim() != student.dim() or tuple(teacher.shape) != expected or 0 in teacher.shape[1:]:
        what = "samples and channels" if channels else "samples and positions"
        raise ValueError(
            f"teacher_maps: expected the {what} of student_maps, {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    check_mask(mask, student.shape[:1], student, "student_maps")
    return at_least_float32(*overwrite(mask, student, teacher))


def _loss(student, teacher, mask, num_items_in_batch, options: _Options) -> Tensor:
    student, teacher = check_maps(student, teacher, mask, options.statistics)
    num_items_in_batch = check_num_items(num_items_in_batch, options.reduction)
    if student.shape[0] == 0:
        nothing = zero(student, teacher)
        return nothing.expand(0) if options.reduction == "none" else nothing
    rows = diagonal_rows if options.covariance == "diagonal" else _full_rows
    return reduce_rows(rows(student, teacher, options), mask, options.reduction, num_items_in_batch)


def diagonal_rows(student: Tensor, teacher: Tensor, options: _Options) -> Tensor:
    """The distance (N,) of diagonal Gaussians; student, teacher (N, C, *positions), float32 or float64 alike."""
    if options.statistics == "position":
        dim, grid, cells = 1, None, 1
    else:
        dim, grid = tuple(range(2, student.dim())), options.grid
        cells = grid ** len(dim)
    (mean_s, std_s), (mean_t, std_t) = (
        feature_moments(x, dim=dim, grid=grid, unbiased=options.unbiased, eps=options.eps, backend=options.backend)
        for x in (student, teacher)
    )
    means = (mean_s - mean_t).square().flatten(1).sum(1)
    return (options.ratio * means + (std_s - std_t).square().flatten(1).sum(1)) / cells


def _full_rows(student: Tensor, teacher: Tensor, options: _Options) -> Tensor:
    """The same for Gaussians with full covariances, from the samples."""
    values = []
    for cell_s, cell_t in zip(_cells(student, options.grid), _cells(teacher, options.grid), strict=True):
        if options.statistics == "channel":
            cell_s, cell_t = cell_s.mT, cell_t.mT  # observations in rows
        value = gaussian_wasserstein_from_samples(cell_s, cell_t, unbiased=options.unbiased, backend=options.backend)
        means = (cell_s.mean(-2) - cell_t.mean(-2)).square().sum(-1)
        values.append(value + (options.ratio - 1) * means)
    return torch.stack(values).mean(0)


def _cells(maps: Tensor, grid: int) -> Iterator[Tensor]:
    """The windows of maps (N, C, *positions), as (N, C, positions of the window)."""
    sizes = maps.shape[2:]
    for axis, size in enumerate(sizes):
        if grid > size:
            raise ValueError(f"grid: expected at most {size} windows along axis {axis + 2}, got {grid}")
    for index in itertools.product(range(grid), repeat=len(sizes)):
        window = [slice(i * size // grid, -(-(i + 1) * size // grid)) for i, size in zip(index, sizes, strict=True)]
        yield maps[(slice(None), slice(None), *window)].flatten(2)
