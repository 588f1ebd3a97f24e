"""KD2M's distances on checked inputs of at least float32; rows that do not count have been overwritten by zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._autocast import without_autocast
from ..functional.cost_matrix import cost_matrix
from ..functional.gaussian import gaussian_wasserstein_from_samples
from ..functional.gaussian_kl import gaussian_kl, gaussian_kl_diagonal
from ..functional.sinkhorn import sinkhorn
from ._common import one_hot
from ._exact import class_assignment, exact_plan

if TYPE_CHECKING:
    from .kd2m import _Options

# added to standard deviations by the released code for the Gaussian divergence
RELEASED_STD_GUARD = 1e-9


class Batch(NamedTuple):
    """student (n, d), teacher (m, d), their masses (n,) and (m,) summing to 1, and what the metric needs besides."""

    student: Tensor
    teacher: Tensor
    a: Tensor
    b: Tensor
    mask: Tensor | None
    labels: Tensor | None
    student_outputs: Tensor | None
    teacher_outputs: Tensor | None


def w2(batch: Batch, options: _Options) -> Tensor:
    """Eq. 2 of points with equal masses."""
    if options.solver == "sinkhorn":
        return _entropic(_square_distances(batch, options), batch.a, batch.b, options)
    rows, columns, mass = exact_plan(_square_distances(batch, options, constant=True), batch.a, batch.b)
    return (mass * _paired(batch.student[rows], batch.teacher[columns])).sum()


def cw2(batch: Batch, options: _Options) -> Tensor:
    """Eq. 3: the classes are the blocks of one problem, each with mass 1 / (number of classes) or, released, 1."""
    share, weight, classes = _classes(batch)
    if options.solver == "exact":
        cost = _square_distances(batch, options, constant=True)
        partner = class_assignment(cost, batch.labels, batch.a.ne(0))
        rows = weight * _paired(batch.student, batch.teacher[partner])
    else:
        same, cost = share > 0, _square_distances(batch, options)
        fixed = torch.where(same, cost.detach(), 0)
        unit = _positive((share * (share * fixed).sum(1)).sum(1, keepdim=True))  # (n, 1), mean cost of a row's class
        mass = weight / classes
        plan = _solve(torch.where(same, cost / unit, torch.inf), mass, mass, options).plan()
        if options.gradient == "detach":
            plan = plan.detach()
        rows = classes * (plan * torch.where(same, cost, 0)).sum(1)
    return _over_classes(rows, batch, classes, options)


def jw2(batch: Batch, options: _Options) -> Tensor:
    """Eq. 4, or the released form of its feature cost."""
    label_cost = _label_cost(batch, options)
    if options.variant == "released":
        with torch.no_grad():
            features = cost_matrix(batch.student, batch.student, metric="sqeuclidean", backend=options.backend)
            largest = torch.where(batch.a.ne(0)[:, None] & batch.a.ne(0), features, 0).max()
            features = features / _positive(largest)
        cost = features + label_cost
    elif options.solver == "sinkhorn":
        cost = _square_distances(batch, options) + options.beta * label_cost
    else:
        fixed = _square_distances(batch, options, constant=True) + options.beta * label_cost.detach()
        rows, columns, mass = exact_plan(fixed, batch.a, batch.b)
        matched = _paired(batch.student[rows], batch.teacher[columns]) + options.beta * label_cost[rows, columns]
        return (mass * matched).sum()
    if options.solver == "sinkhorn":
        return _entropic(cost, batch.a, batch.b, options)
    rows, columns, mass = exact_plan(cost, batch.a, batch.b)
    return (mass * cost[rows, columns]).sum()


def w2_gaussian(batch: Batch, options: _Options) -> Tensor:
    """Eq. 5, diagonal or full covariances."""
    if options.covariance == "full":
        student, teacher = _as_full_sample(batch.student, batch.a), _as_full_sample(batch.teacher, batch.b)
        return gaussian_wasserstein_from_samples(student, teacher, backend=options.backend)
    mean_s, std_s = _moments(batch.student, batch.a)
    mean_t, std_t = _moments(batch.teacher, batch.b)
    return ((mean_s - mean_t).square() + (std_s - std_t).square()).sum()


def cw2_gaussian(batch: Batch, options: _Options) -> Tensor:
    """Eq. 3 with Eq. 5 for each class."""
    if options.covariance == "full":
        return _cw2_gaussian_full(batch, options)
    share, weight, classes = _classes(batch)
    mean_s, std_s = _moments_of_classes(batch.student, share)  # (n, d), equal for the rows of a class
    mean_t, std_t = _moments_of_classes(batch.teacher, share)
    each = ((mean_s - mean_t).square() + (std_s - std_t).square()).sum(1)
    return _over_classes(weight * each, batch, classes, options)


def kl_gaussian(batch: Batch, options: _Options) -> Tensor:
    """Eq. 6. Without a row that counts, 0 as of two standard normals."""
    none_left = None if batch.mask is None else ~batch.mask.any()
    pairs = (batch.student, batch.a), (batch.teacher, batch.b)
    (x, x_mass), (y, y_mass) = pairs if options.kl_direction == "student_teacher" else pairs[::-1]
    if options.covariance == "full":
        (mean_x, cov_x), (mean_y, cov_y) = _mean_and_covariance(x, x_mass), _mean_and_covariance(y, y_mass)
        if none_left is not None:
            eye = torch.eye(x.shape[1], dtype=cov_x.dtype, device=x.device)
            cov_x, cov_y = torch.where(none_left, eye, cov_x), torch.where(none_left, eye, cov_y)
        return gaussian_kl(mean_x, cov_x, mean_y, cov_y, jitter=options.jitter).to(batch.student.dtype)
    (mean_x, std_x), (mean_y, std_y) = _moments(x.double(), x_mass.double()), _moments(y.double(), y_mass.double())
    if none_left is not None:
        std_x, std_y = torch.where(none_left, 1, std_x), torch.where(none_left, 1, std_y)
    if options.variant == "paper":
        return gaussian_kl_diagonal(mean_x, std_x, mean_y, std_y, jitter=options.jitter).to(batch.student.dtype)
    guarded = std_y + RELEASED_STD_GUARD
    terms = (std_x / guarded).square() + ((mean_x - mean_y) / guarded).square() - 1
    terms = terms + 2 * (std_y / (std_x + RELEASED_STD_GUARD)).log()
    value = terms.sum() / 2
    return (value if none_left is None else torch.where(none_left, 0, value)).to(batch.student.dtype)


def mmd(batch: Batch, options: _Options) -> Tensor:
    """Squared maximum mean discrepancy, pairs of a row with itself included."""
    if options.kernel == "linear":
        return (_mean(batch.student, batch.a) - _mean(batch.teacher, batch.b)).square().sum()
    x, y = batch.student, batch.teacher
    pairs = [(x, x, batch.a, batch.a), (y, y, batch.b, batch.b), (x, y, batch.a, batch.b)]
    squares = [cost_matrix(p, q, metric="sqeuclidean", backend=options.backend) for p, q, *_ in pairs]
    if options.bandwidth is None:
        with torch.no_grad():
            counts = [p.ne(0).to(x.dtype)[:, None] * q.ne(0).to(x.dtype) for *_, p, q in pairs]
            total = sum((count * square.sqrt()).sum() for count, square in zip(counts, squares, strict=True))
            variance = _positive(total / sum(count.sum() for count in counts)).square()
    else:
        variance = options.bandwidth**2
    similarities = [
        (p[:, None] * q * torch.exp(square / (-2 * variance))).sum()
        for square, (*_, p, q) in zip(squares, pairs, strict=True)
    ]
    return similarities[0] + similarities[1] - 2 * similarities[2]


def kl_gaussian_named(batch: Batch, options: _Options) -> Tensor:
    """:func:`kl_gaussian` whose errors name the arguments that the caller knows."""
    try:
        return kl_gaussian(batch, options)
    except ValueError as error:
        raise ValueError(
            "student_features, teacher_features: a feature that is constant in the batch, or for full covariances too "
            f"few rows, needs jitter > 0 ({error})"
        ) from None


METRICS = {
    "w2": w2,
    "cw2": cw2,
    "jw2": jw2,
    "w2_gaussian": w2_gaussian,
    "cw2_gaussian": cw2_gaussian,
    "kl_gaussian": kl_gaussian_named,
    "mmd": mmd,
}


def _square_distances(batch: Batch, options: _Options, constant: bool = False) -> Tensor:
    student, teacher = (x.detach() if constant else x for x in (batch.student, batch.teacher))
    return cost_matrix(student, teacher, metric="sqeuclidean", backend=options.backend)  # (n, m)


def _paired(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum(-1)


def _positive(value: Tensor) -> Tensor:
    """`value` >= 0 as a divisor: 1 where it is 0."""
    return torch.where(value > 0, value, 1)


def _entropic(cost: Tensor, a: Tensor, b: Tensor, options: _Options) -> Tensor:
    """<P, C> with epsilon in units of the mean cost."""
    unit = _positive((a[:, None] * b * cost.detach()).sum())
    return unit * _solve(cost / unit, a, b, options).transport_cost


def _solve(cost: Tensor, a: Tensor, b: Tensor, options: _Options):
    return sinkhorn(
        cost, a, b, epsilon=options.epsilon, num_iters=options.num_iters, gradient=options.gradient,
        backend=options.backend,
    )  # fmt: skip


def _classes(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are of one class, whatever the labels are called.

    Returns:
        share (n, n): row i averages over the class of i; weight (n,): 1 / (size of its class), so that each class has
        the total 1; classes: how many there are. Rows that do not count have weight 0 and share 0.
    """
    kept = batch.a.ne(0)
    same = (batch.labels[:, None] == batch.labels) & kept[:, None] & kept
    count = _positive(same.sum(1).to(batch.a.dtype))  # (n,)
    weight = kept.to(batch.a.dtype) / count
    return same.to(batch.a.dtype) / count[:, None], weight, weight.sum()


def _over_classes(rows: Tensor, batch: Batch, classes: Tensor, options: _Options) -> Tensor:
    """The reduction of the classes' distances; `rows` (n,) has the distance of each class as the sum over its rows, and
    0 for rows that do not count.
    """
    if options.reduction == "none":
        return torch.where(one_hot(batch.labels, options.num_classes), rows[:, None], 0).sum(0)  # (K,)
    return _reduced(rows.sum(), classes, options)


def _reduced(total: Tensor, classes: Tensor, options: _Options) -> Tensor:
    if options.reduction == "sum":
        return total
    return total / (classes if options.num_classes is None else options.num_classes)


def _mean(x: Tensor, mass: Tensor) -> Tensor:
    return (mass[:, None] * x).sum(0)


def _moments(x: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d,); a constant feature's deviation has gradient 0."""
    mean = _mean(x, mass)
    return mean, _root((mass[:, None] * (x - mean).square()).sum(0))


def _root(variance: Tensor) -> Tensor:
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1).sqrt(), 0)


def _moments_of_classes(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """For each row (n, d) the moments of its class; deviations are squared, so that a large mean is harmless."""
    with without_autocast(x.device):
        mean = share @ x
        return mean, _root(share @ (x - mean).square())


def _as_full_sample(x: Tensor, mass: Tensor) -> Tensor:
    """n points with the mean and biased covariance of those with mass: the others move to the mean."""
    mean = _mean(x, mass)
    kept = mass.ne(0)
    stretch = (x.shape[0] / _positive(kept.sum()).to(x.dtype)).sqrt()
    return mean + torch.where(kept[:, None], (x - mean) * stretch, 0)


def _mean_and_covariance(x: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    with without_autocast(x.device):
        x = x.double()
        mean = _mean(x, mass.double())
        rows = (x - mean) * mass.double().sqrt()[:, None]
        return mean, rows.mT @ rows


def _cw2_gaussian_full(batch: Batch, options: _Options) -> Tensor:
    """One problem for each class of the range, or of the batch (which waits for the device)."""
    kept = batch.a.ne(0)
    if options.num_classes is None:
        present = batch.labels[kept].unique()
    else:
        present = torch.arange(options.num_classes, device=batch.labels.device)
    members = (batch.labels == present[:, None]) & kept  # (K, n)
    sizes = members.sum(1)  # (K,)
    mass = members.to(batch.a.dtype) / _positive(sizes)[:, None]
    student, teacher = (torch.stack([_as_full_sample(x, row) for row in mass]) for x in (batch.student, batch.teacher))
    each = gaussian_wasserstein_from_samples(student, teacher, backend=options.backend)  # (K,)
    each = torch.where(sizes > 0, each, 0)
    return each if options.reduction == "none" else _reduced(each.sum(), (sizes > 0).sum().clamp(min=1), options)


def _label_cost(batch: Batch, options: _Options) -> Tensor:
    """(n, m) discrepancy of the outputs, or of labels where there are no outputs."""
    if options.variant == "released":
        if batch.student_outputs is None:
            return batch.student.new_zeros(batch.student.shape[0], batch.teacher.shape[0])
        student, teacher = batch.student_outputs, batch.teacher_outputs
    elif batch.student_outputs is None:
        differ = (batch.labels[:, None] != batch.labels).to(batch.student.dtype)
        return differ * (2.0 if options.label_cost == "sqeuclidean" else 2.0**0.5)
    else:
        student = torch.softmax(batch.student_outputs, -1)
        if batch.teacher_outputs is None:
            teacher = (batch.labels[:, None] == torch.arange(student.shape[1], device=student.device)).to(student.dtype)
        else:
            teacher = torch.softmax(batch.teacher_outputs, -1)
    if options.label_cost in ("euclidean", "sqeuclidean"):
        metric = {"euclidean": "l2"}.get(options.label_cost, "sqeuclidean")
        return cost_matrix(student, teacher, metric=metric, backend=options.backend)
    log_student = torch.log_softmax(batch.student_outputs, -1)
    with without_autocast(student.device):
        if options.label_cost == "cross_entropy":
            return -log_student @ teacher.mT
        probabilities = log_student.exp()
        entropy = (probabilities * log_student).sum(-1, keepdim=True)  # (n, 1), negative
        return entropy - probabilities @ torch.log_softmax(batch.teacher_outputs, -1).mT
