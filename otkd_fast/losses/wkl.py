"""WKL: Kullback-Leibler and Wasserstein losses of logits, mixed by the stage of the training."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..functional._validate import check_choice, not_negative_float, positive_float
from . import _wkd
from ._common import (
    IGNORE_INDEX,
    Loss,
    check_ignore_index,
    check_num_items,
    check_reduction,
    poison,
    reduce_rows,
    zero,
)
from ._wkl import kl_term, nckd_term, tckd_term
from .schedules import check_share, stage_share
from .wkd_logit import Rows, check_rows

__all__ = ["WKL", "wkl"]

MODES = ("dwkd_dkd", "kl", "dkd", "wkd", "dwkd", "wkd_kl")
ALONE = 10.0  # weight of the modes "kl" and "wkd" in the released code


class Options(NamedTuple):
    """The checked parameters."""

    mode: str
    temperature: float
    gamma: float
    decay_start: float
    kl_weight: float
    tckd_weight: float
    nckd_weight: float
    kl_temperature: float | None
    epsilon: float
    num_iters: int
    kappa: float
    variant: str
    gradient: str
    reduction: str
    ignore_index: int
    backend: str | None

    def transport(self) -> _wkd.Transport:
        return _wkd.Transport(self.temperature, self.epsilon, self.num_iters, self.variant, self.gradient, self.backend)


def wkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    progress: float | Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    *,
    cost: Tensor,
    mode: str = "dwkd_dkd",
    temperature: float = 8.0,
    gamma: float = 600.0,
    decay_start: float = 0.625,
    kl_weight: float = 0.5,
    tckd_weight: float = 1.0,
    nckd_weight: float = 2.0,
    kl_temperature: float | None = None,
    epsilon: float = 0.05,
    num_iters: int = 10,
    kappa: float = 0.0,
    variant: str = "released",
    gradient: str = "unroll",
    reduction: str = "mean",
    ignore_index: int = IGNORE_INDEX,
    backend: str | None = None,
) -> Tensor:
    r"""WKL: WKD-L early in the training, Kullback-Leibler divergences added towards its end.

    With ``g = (1 + cos(pi progress)) / 2``, which goes from 1 to 0, the default mode is

        dwkd_dkd   L_t + gamma' W + kl_weight (1 - g) (tckd_weight TCKD + nckd_weight NCKD)

    where L_t and W are the terms of :func:`otkd_fast.losses.wkd_logit`, ``gamma'`` is gamma, from `decay_start` on
    decaying to 0 by half a cosine, and TCKD and NCKD are those of decoupled distillation: T^2 times the divergence
    between (p_y, 1 - p_y) of teacher and student, and T^2 times that between their distributions over the other
    classes. So g does not multiply W. The other modes of the released code:

        dwkd       L_t + gamma' W                       wkd      10 W_full
        dkd        tckd_weight TCKD + nckd_weight NCKD   kl       10 KL
        wkd_kl     W_full + kl_weight (1 - g) KL

    with W_full over all C classes (no separation), and KL the softened divergence without T^2. The student's
    cross-entropy, which the published total adds with weight 1, is not in the loss.

    Args:
        student_logits, teacher_logits, labels, mask, num_items_in_batch: as in :func:`otkd_fast.losses.wkd_logit`.
        progress: epoch / epochs in [0, 1], epochs counted from 1; a number, or a tensor of one element, which is not
            looked at (and under torch.compile does not recompile).
        mode: see above.
        gamma: >= 0. Published: 600 (CIFAR-100, ResNet-32x4).
        decay_start: in [0, 1]. Published: 150 of 240 epochs (CIFAR-100), 0 (ImageNet).
        kl_weight: >= 0. Published: 0.5 (CIFAR-100, ResNet-32x4 logits), 1 elsewhere.
        tckd_weight, nckd_weight: >= 0.
        kl_temperature: > 0, of KL, TCKD and NCKD; None: `temperature`, as published.
        cost, temperature, epsilon, num_iters, kappa, variant, gradient, reduction, ignore_index, backend: as in
            :func:`otkd_fast.losses.wkd_logit`.

    Returns:
        Scalar (or the shape of the labels for "none") in float32, or float64 if an input is float64.

    Raises:
        TypeError, ValueError: as :func:`otkd_fast.losses.wkd_logit`; a progress or `decay_start` not in [0, 1].

    Source: the released code of WKL (stage-adaptive Kullback-Leibler and Wasserstein distillation). Decoupled
    distillation: Zhao et al., CVPR 2022.

    >>> import torch
    >>> cost = 0.5 * (1 - torch.eye(3))
    >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0, 1.0]])
    >>> for progress in (0.0, 0.5, 1.0):
    ...     loss = wkl(student, teacher, torch.tensor([0]), progress, cost=cost, temperature=1.0, gamma=1.0)
    ...     print(f"{loss:.4f}")
    0.5750
    0.8264
    0.8468
    """
    options = check_options(Options(
        mode, temperature, gamma, decay_start, kl_weight, tckd_weight, nckd_weight, kl_temperature, epsilon, num_iters,
        kappa, variant, gradient, reduction, ignore_index, backend,
    ))  # fmt: skip
    _wkd.check_cost(cost)
    cost = _wkd.finished_cost(cost, options.kappa)
    return _loss(student_logits, teacher_logits, labels, progress, mask, num_items_in_batch, cost, options)


class WKL(Loss):
    """Module form of :func:`wkl`: the cost and the parameters are given once,
    ``forward(student_logits, teacher_logits, labels, progress, mask=None, num_items_in_batch=None)`` gives the loss.

    The only state is the buffer `cost`, as it is used (sharpened, + 1e-8), without gradient. All parameters are
    keyword-only, checked here, and documented in :func:`wkl`.

    >>> import torch
    >>> distil = WKL(cost=1 - torch.eye(3), temperature=2.0, gamma=1.0)
    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> distil(logits, logits, torch.tensor([0]), progress=3 / 240).shape
    torch.Size([])
    """

    cost: Tensor

    def __init__(
        self,
        *,
        cost: Tensor,
        mode: str = "dwkd_dkd",
        temperature: float = 8.0,
        gamma: float = 600.0,
        decay_start: float = 0.625,
        kl_weight: float = 0.5,
        tckd_weight: float = 1.0,
        nckd_weight: float = 2.0,
        kl_temperature: float | None = None,
        epsilon: float = 0.05,
        num_iters: int = 10,
        kappa: float = 0.0,
        variant: str = "released",
        gradient: str = "unroll",
        reduction: str = "mean",
        ignore_index: int = IGNORE_INDEX,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._options = check_options(Options(
            mode, temperature, gamma, decay_start, kl_weight, tckd_weight, nckd_weight, kl_temperature, epsilon,
            num_iters, kappa, variant, gradient, reduction, ignore_index, backend,
        ))  # fmt: skip
        _wkd.check_cost(cost)
        _wkd.check_cost_values(cost, self._options.variant)
        self.register_buffer("cost", _wkd.finished_cost(cost.detach(), self._options.kappa))

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        progress: float | Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits (..., C) for labels (...); see :func:`wkl`."""
        return _loss(
            student_logits, teacher_logits, labels, progress, mask, num_items_in_batch, self.cost, self._options
        )


def check_options(given: Options) -> Options:
    """The same, checked and as the kinds of numbers they are."""
    check_choice("mode", given.mode, MODES)
    transport = _wkd.check_transport(
        given.temperature, given.epsilon, given.num_iters, given.variant, given.gradient, given.backend
    )
    weights = {
        name: not_negative_float(name, getattr(given, name))
        for name in ("gamma", "kl_weight", "tckd_weight", "nckd_weight", "kappa")
    }
    kl_temperature = given.kl_temperature
    if kl_temperature is not None:
        kl_temperature = positive_float("kl_temperature", kl_temperature)
    check_ignore_index(given.ignore_index)
    check_reduction(given.reduction)
    return given._replace(
        **transport._asdict(), **weights, kl_temperature=kl_temperature,
        decay_start=check_share("decay_start", given.decay_start),
    )  # fmt: skip


def _loss(student, teacher, labels, progress, mask, num_items_in_batch, cost, options: Options) -> Tensor:
    rows = check_rows(student, teacher, labels, mask, cost, options.ignore_index)
    num_items_in_batch = check_num_items(num_items_in_batch, options.reduction)
    late, gamma = shares(progress, options)
    if rows.target.numel() == 0:
        nothing = zero(rows.student, rows.teacher)
        return nothing.expand(rows.shape) if options.reduction == "none" else nothing
    value = poison(_value(rows, late, gamma, options), rows.wrong).reshape(rows.shape)
    return reduce_rows(value, rows.mask, options.reduction, num_items_in_batch)


def shares(progress: float | Tensor, options: Options) -> tuple[float | Tensor, float | Tensor]:
    """1 - g, and gamma'."""
    return 1 - stage_share(progress), options.gamma * stage_share(progress, options.decay_start)


def _value(rows: Rows, late: float | Tensor, gamma: float | Tensor, options: Options) -> Tensor:
    """The loss (N,) of each row in the mode."""
    mode = options.mode
    if mode in ("kl", "wkd_kl"):
        kl = kl_term(rows.student, rows.teacher, options.kl_temperature or options.temperature)
        return ALONE * kl if mode == "kl" else full(rows, options) + options.kl_weight * late * kl
    if mode == "wkd":
        return ALONE * full(rows, options)
    if mode == "dkd":
        return sum(decoupled(rows, options))
    value = _wkd.target_term(rows.student, rows.teacher, rows.target) + gamma * separated(rows, options)
    return value if mode == "dwkd" else value + options.kl_weight * late * sum(decoupled(rows, options))


def full(rows: Rows, options: Options) -> Tensor:
    """W_full (N,)."""
    return _wkd.transport_term(rows.student, rows.teacher, None, rows.cost, options.transport())


def separated(rows: Rows, options: Options) -> Tensor:
    """W (N,)."""
    return _wkd.transport_term(rows.student, rows.teacher, rows.target, rows.cost, options.transport())


def decoupled(rows: Rows, options: Options) -> tuple[Tensor, Tensor]:
    """The weighted TCKD and NCKD (N,)."""
    arguments = rows.student, rows.teacher, rows.target, options.kl_temperature or options.temperature
    return options.tckd_weight * tckd_term(*arguments), options.nckd_weight * nckd_term(*arguments)
