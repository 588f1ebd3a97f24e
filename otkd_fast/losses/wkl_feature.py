"""WKL for feature maps: WKD-F early in the training, a divergence between Gaussians added towards its end."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..functional._validate import not_negative_float, positive_int
from ..functional.gaussian_kl import gaussian_kl_diagonal
from ..functional.moments import feature_moments
from ._common import Loss, check_backend, check_num_items, check_reduction, reduce_rows, zero
from .schedules import check_share, stage_share
from .wkd_feature import check_maps, diagonal_rows

__all__ = ["WKLFeature", "wkl_feature"]

KL_FACTOR = 0.04  # of the released code
KL_VARIANCE = 1.0  # added to the variances of the divergence by the released code


class _Options(NamedTuple):
    weight: float
    ratio: float
    grid: int
    decay_start: float
    kl_weight: float
    eps: float
    reduction: str
    backend: str | None
    statistics: str = "channel"
    unbiased: bool = True


def wkl_feature(
    student_maps: Tensor,
    teacher_maps: Tensor,
    progress: float | Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    *,
    weight: float = 0.08,
    ratio: float = 4.0,
    grid: int = 1,
    decay_start: float = 0.625,
    kl_weight: float = 2.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""WKL's loss of features: ``weight' L_F + kl_weight (1 - g) 0.04 KL_F``, ``g = (1 + cos(pi progress)) / 2``.

    L_F is :func:`otkd_fast.losses.wkd_feature` (diagonal, channel statistics), ``weight'`` is `weight`, from
    `decay_start` on decaying to 0 by half a cosine, and KL_F the divergence KL(teacher || student) of diagonal
    Gaussians over all positions (whatever the grid), with standard deviations sqrt(unbiased variance + 1):

        KL_F = 1/2 sum over channels of ((mean_t - mean_s) / std_s)^2 + (std_t / std_s)^2 - 2 log(std_t / std_s) - 1

    Args:
        student_maps, teacher_maps: (N, C, *positions), as in :func:`otkd_fast.losses.wkd_feature`.
        progress: epoch / epochs in [0, 1], a number or a tensor of one element.
        mask, num_items_in_batch, ratio, grid, eps, reduction, backend: as there.
        weight: >= 0. Published: 0.08 (CIFAR-100, ResNet-32x4).
        decay_start: in [0, 1]. Published: 150 of 240 epochs.
        kl_weight: >= 0. Published: 2.

    Returns:
        Scalar (or (N,) for "none") in float32, or float64 if an input is float64.

    Raises:
        TypeError, ValueError: as :func:`otkd_fast.losses.wkd_feature`; a progress or `decay_start` not in [0, 1].

    Source: the released code of WKL.

    >>> import torch
    >>> maps = torch.tensor([[[0.0, 2.0], [1.0, 1.0]]])
    >>> for progress in (0.0, 0.5, 1.0):
    ...     print(f"{wkl_feature(maps + 1, maps, progress):.4f}")
    0.6400
    0.6667
    0.0533
    """
    options = _options(weight, ratio, grid, decay_start, kl_weight, eps, reduction, backend)
    return _loss(student_maps, teacher_maps, progress, mask, num_items_in_batch, options)


class WKLFeature(Loss):
    """Module form of :func:`wkl_feature`: the parameters are given once,
    ``forward(student_maps, teacher_maps, progress, mask=None, num_items_in_batch=None)`` gives the loss.

    Has no parameters, no buffers and no other state. All parameters are keyword-only, checked here, and documented in
    :func:`wkl_feature`.

    >>> import torch
    >>> maps = torch.randn(2, 16, 8, 8)
    >>> WKLFeature(ratio=3.0, grid=4)(maps, maps, progress=0.25)
    tensor(0.)
    """

    def __init__(
        self,
        *,
        weight: float = 0.08,
        ratio: float = 4.0,
        grid: int = 1,
        decay_start: float = 0.625,
        kl_weight: float = 2.0,
        eps: float = 1e-5,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._options = _options(weight, ratio, grid, decay_start, kl_weight, eps, reduction, backend)

    def forward(
        self,
        student_maps: Tensor,
        teacher_maps: Tensor,
        progress: float | Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of maps (N, C, *positions); see :func:`wkl_feature`."""
        return _loss(student_maps, teacher_maps, progress, mask, num_items_in_batch, self._options)


def _options(weight, ratio, grid, decay_start, kl_weight, eps, reduction, backend) -> _Options:
    """The checked parameters."""
    return _Options(
        not_negative_float("weight", weight), not_negative_float("ratio", ratio), positive_int("grid", grid),
        check_share("decay_start", decay_start), not_negative_float("kl_weight", kl_weight),
        not_negative_float("eps", eps), check_reduction(reduction), check_backend(backend),
    )  # fmt: skip


def _loss(student, teacher, progress, mask, num_items_in_batch, options: _Options) -> Tensor:
    student, teacher = check_maps(student, teacher, mask, "channel")
    num_items_in_batch = check_num_items(num_items_in_batch, options.reduction)
    late, weight = 1 - stage_share(progress), options.weight * stage_share(progress, options.decay_start)
    if student.shape[0] == 0:
        nothing = zero(student, teacher)
        return nothing.expand(0) if options.reduction == "none" else nothing
    value = weight * diagonal_rows(student, teacher, options)
    value = value + options.kl_weight * KL_FACTOR * late * _divergence(student, teacher, options.backend)
    return reduce_rows(value, mask, options.reduction, num_items_in_batch)


def _divergence(student: Tensor, teacher: Tensor, backend: str | None) -> Tensor:
    """KL_F (N,)."""
    (mean_s, std_s), (mean_t, std_t) = (
        feature_moments(x, dim=tuple(range(2, x.dim())), unbiased=True, eps=KL_VARIANCE, backend=backend)
        for x in (student, teacher)
    )
    return gaussian_kl_diagonal(mean_t, std_t, mean_s, std_s)
