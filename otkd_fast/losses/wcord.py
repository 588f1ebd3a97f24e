"""WCoRD: Wasserstein contrastive representation distillation, global (dual form) and local (primal form).

The paper's text and code were not to be had: docs/losses.md says what is verified and what is a choice made here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import without_autocast
from .._values import values_readable
from ..functional._validate import check_choice, check_tensor, not_negative_float, positive_float, positive_int
from ..functional.cost_matrix import cost_matrix
from ..functional.sinkhorn import SinkhornResult, sinkhorn
from . import _common
from ._memory_bank import MemoryBank, SpectralLinear
from .ipot import ipot

__all__ = ["WCoRD", "wcord_global", "wcord_local"]

SOLVERS = ("sinkhorn", "ipot")
GRADIENTS = ("detach", "unroll", "last_step", "implicit")


class _LocalOptions(NamedTuple):
    solver: str
    epsilon: float
    beta: float
    num_iters: int
    gradient: str
    backend: str | None


_NO_SUM = "its {} compares the rows of the batch with each other"


def wcord_local(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: None = None,
    *,
    solver: str = "sinkhorn",
    epsilon: float = 0.1,
    beta: float = 0.5,
    num_iters: int = 50,
    gradient: str = "detach",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Primal form: ``<P, C>`` between the batch's student and teacher embeddings, ``C_ij = 1 - cos(x_i, y_j)``.

    P has the masses 1/n on both sides. It is the entropic plan (``solver="sinkhorn"``) or the approximately exact one
    of the proximal point method (``"ipot"``, :func:`otkd_fast.losses.ipot`), and a constant for the gradient unless
    `gradient` says otherwise.

    Verified from public sources: that there is a local part in the primal form within a mini-batch. Not verified, and
    chosen here: solver, cost, `epsilon`, `num_iters`, the constant plan; `beta` is that of an earlier public code of
    one of the authors.

    Args:
        student: (n, d), teacher: (m, d), m = n if there is a mask; any floating dtype.
        mask: bool (n,), rows that count on both sides.
        num_items_in_batch: there for the losses' common signature; only None: the plan is one of the whole batch.
        solver: "sinkhorn" or "ipot".
        epsilon: > 0, for "sinkhorn".
        beta: > 0, for "ipot".
        num_iters: >= 1, of either.
        gradient: of "sinkhorn": "detach", "unroll", "last_step" or "implicit". "ipot" has "detach" and "unroll".
        reduction: "mean": ``<P, C>``, the mean over the student's rows that count of what each of them pays, ``n sum_j
            P_ij C_ij``; "none": that (n,), "sum", "batchmean": the sum divided by n, whatever the mask.
        backend: one of the package's backends, None chooses.

    Returns:
        Scalar (or (n,) for "none"), at least float32; 0 where there are no rows.

    Raises:
        TypeError, ValueError: a wrong type, shape, device, word or number.

    >>> import torch
    >>> embeddings = torch.eye(3)
    >>> print(f"{wcord_local(embeddings, embeddings[[2, 0, 1]], solver='ipot'):.4f}")
    0.0000
    """
    options = _local_options(solver, epsilon, beta, num_iters, gradient, backend)
    _common.check_reduction(reduction)
    _common.refuse_num_items(num_items_in_batch, _NO_SUM.format("plan"))
    return _local(student, teacher, mask, reduction, options)


def wcord_global(
    positive: Tensor,
    negative: Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    *,
    negative_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Dual form: ``-mean f(congruent pairs) + negative_weight mean f(incongruent pairs)`` for a critic's scores f.

    With weight 1 and a critic f that is 1-Lipschitz, minus this is a lower bound of the Wasserstein distance between
    the joint distribution of teacher and student embeddings and the product of their marginals (Kantorovich duality),
    which the critic and the student maximise together. CRD's objective, which this one follows, weighs the negatives by
    their number; with a weight other than 1 a constant added to f changes the value, which then has no lower end.

    Args:
        positive: scores (...) of congruent pairs, at least float32 in what follows.
        negative: (..., K), K >= 1: scores of incongruent pairs, as many for each congruent one. For "mean" without mask
            and `num_items_in_batch` of any shape, at least one each.
        mask: bool (...), congruent pairs that count, each with its incongruent ones.
        num_items_in_batch: divisor of "mean" and "batchmean" in place of their own (gradient accumulation).
        negative_weight: >= 0.
        reduction: "mean"; "none" (...): ``negative_weight mean_k negative_k - positive``; "sum", "batchmean".

    Returns:
        Scalar (or (...) for "none"), at least float32.

    Raises:
        TypeError, ValueError: a wrong type, shape, word or number.

    >>> import torch
    >>> wcord_global(torch.tensor([2.0]), torch.tensor([0.5, 0.0]))
    tensor(-1.7500)
    """
    negative_weight = not_negative_float("negative_weight", negative_weight)
    _common.check_reduction(reduction)
    num_items_in_batch = _common.check_num_items(num_items_in_batch, reduction)
    check_tensor("positive", positive, 0, "(...)")
    check_tensor("negative", negative, 0, "(..., K)")
    _common.check_device("negative", negative, "positive", positive)
    _common.check_mask(mask, positive.shape, positive, "positive")
    as_rows = negative.dim() > 0 and negative.shape[:-1] == positive.shape and negative.shape[-1] > 0
    if not as_rows:
        if reduction != "mean" or mask is not None or num_items_in_batch is not None:
            raise ValueError(
                f"negative: expected shape (*{tuple(positive.shape)}, K) with K >= 1, scores for each of positive, "
                f"got {tuple(negative.shape)}"
            )
        for name, scores in (("positive", positive), ("negative", negative)):
            if scores.numel() == 0:
                raise ValueError(f"{name}: expected at least one score, got shape {tuple(scores.shape)}")
    positive, negative = _common.at_least_float32(positive, negative)
    if not as_rows:
        return negative_weight * negative.mean() - positive.mean()
    return _common.reduce_rows(negative_weight * negative.mean(-1) - positive, mask, reduction, num_items_in_batch)


class WCoRD(nn.Module):
    r"""``global_weight * (dual form) + local_weight * (primal form)`` of embedded student and teacher features.

    Embeddings ``x_i = E_S(student_i)`` and ``y_i = E_T(teacher_i)``: a linear layer to `embedding_dim`, then unit
    length, as in CRD. Global part, for a critic f: see :func:`wcord_global`; the congruent pairs are (x_i, y_i). With
    `num_samples` the incongruent ones are CRD's: `num_negatives` uniformly drawn entries of a memory bank of teacher
    embeddings for each x_i, and of one of student embeddings for each y_i, and the mean of both directions is taken;
    the banks start uniform in +-sqrt(3 / embedding_dim) and in training take in the batch's embeddings by
    ``bank_i <- momentum bank_i + (1 - momentum) e_i``, scaled to unit length. Without `num_samples` they are all pairs
    (x_i, y_j), j != i, of the batch. Local part: :func:`wcord_local` of the embeddings.

    The critic has two layers, ``w . relu(A x + B y)``, each divided by its spectral norm (one power iteration a
    training step): f is 1-Lipschitz in (x, y).

    This loss, unlike the others, has parameters (the two embeddings and the critic: give them to the optimizer, with
    the student's) and buffers (banks, the power iteration's vectors). Gradients reach the student's features and those
    parameters, never the teacher's features.

    Verified from public sources: dual form for the global part, an objective that bounds mutual information from below,
    the primal form for the local part; spectral normalisation, CRD's banks and negatives and the weights 0.8 and 0.05
    are recollections of the paper, not verified; nor are the critic's form, the weight of the negatives, and what
    :func:`wcord_local` says.

    Args:
        student_dim, teacher_dim: numbers of features.
        num_samples: size of the training set; `index` in the call is then required. None: negatives of the batch.
        embedding_dim, num_negatives, momentum: 128, 16384 and 0.5 as in CRD.
        hidden_dim: width of the critic. critic: None, or a module of embeddings (..., d) and (..., d) that broadcast,
            which gives scores (...).
        global_weight, local_weight, negative_weight: >= 0. A part whose weight is 0 is not computed.
        solver, epsilon, beta, num_iters, gradient, backend: of the local part.
        reduction: "mean"; "none" (n,): what each row adds to the loss, its part of the dual form and what it pays in
            the primal form; "sum", "batchmean".

    Raises:
        TypeError, ValueError: a wrong type, word or number; in the call also shapes and devices that do not match, an
            `index` that is missing or (on the CPU) out of range, a batch of one row without a memory bank, a
            `num_items_in_batch` with a local part or without memory bank, where the loss is no sum over rows.

    Source: Wasserstein Contrastive Representation Distillation (arXiv 2012.08674); CRD (arXiv 1910.10699).

    >>> import torch
    >>> loss = WCoRD(8, 16, num_samples=100, num_negatives=32)
    >>> value = loss(torch.randn(4, 8), torch.randn(4, 16), torch.tensor([3, 14, 15, 92]))
    >>> value.shape, sum(p.numel() for p in loss.embed_student.parameters())
    (torch.Size([]), 1152)
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        num_samples: int | None = None,
        embedding_dim: int = 128,
        num_negatives: int = 16384,
        momentum: float = 0.5,
        hidden_dim: int = 128,
        critic: nn.Module | None = None,
        global_weight: float = 0.8,
        local_weight: float = 0.05,
        negative_weight: float = 1.0,
        solver: str = "sinkhorn",
        epsilon: float = 0.1,
        beta: float = 0.5,
        num_iters: int = 50,
        gradient: str = "detach",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.reduction = _common.check_reduction(reduction)
        embedding_dim = positive_int("embedding_dim", embedding_dim)
        self.num_negatives = positive_int("num_negatives", num_negatives)
        self.global_weight = not_negative_float("global_weight", global_weight)
        self.local_weight = not_negative_float("local_weight", local_weight)
        self.negative_weight = not_negative_float("negative_weight", negative_weight)
        self._local_options = _local_options(solver, epsilon, beta, num_iters, gradient, backend)
        if critic is not None and not isinstance(critic, nn.Module):
            raise TypeError(f"critic: expected a torch.nn.Module or None, got {type(critic).__name__}")
        self.embed_student = nn.Linear(positive_int("student_dim", student_dim), embedding_dim)
        self.embed_teacher = nn.Linear(positive_int("teacher_dim", teacher_dim), embedding_dim)
        self.critic = _Critic(embedding_dim, positive_int("hidden_dim", hidden_dim)) if critic is None else critic
        self.bank_student = self.bank_teacher = None
        if num_samples is not None:
            self.bank_student = MemoryBank(num_samples, embedding_dim, momentum)
            self.bank_teacher = MemoryBank(num_samples, embedding_dim, momentum)

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of features (n, student_dim) and (n, teacher_dim).

        Args:
            index: (n,) int64, the samples' positions in the training set, with `num_samples`.
            mask: bool (n,), samples that count, on both sides; the others may hold anything and enter no bank.
            num_items_in_batch: divisor of "mean" and "batchmean" in place of their own; only with memory banks and
                ``local_weight=0``, where the loss is a sum over rows.
        """
        num_items_in_batch = self._check(student_features, teacher_features, index, mask, num_items_in_batch)
        with without_autocast(student_features.device):
            student, teacher = _common.overwrite(mask, student_features, teacher_features.detach())
            x, y = _embedded(self.embed_student, student), _embedded(self.embed_teacher, teacher)
            if x.shape[0] == 0:
                return _common.zero(x).expand(0) if self.reduction == "none" else _common.zero(x)
            loss = _common.zero(x)
            if self.global_weight:
                loss = loss + self.global_weight * self._global(x, y, index, mask, num_items_in_batch)
            if self.local_weight:
                loss = loss + self.local_weight * _local(x, y, mask, self.reduction, self._local_options)
            return loss.expand(x.shape[:1]) if self.reduction == "none" else loss

    def _global(self, x, y, index, mask, num_items_in_batch) -> Tensor:
        positive = self.critic(x, y)  # (n,)
        if self.bank_student is None:
            scores = self.critic(x.unsqueeze(1), y)  # (n, n)
            others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
            if mask is not None:
                others = others & mask
            # the only row that counts has no negatives: NaN, where that could not be raised
            each = torch.where(others, scores, 0).sum(1) / others.sum(1)
            negative = (each if mask is None else torch.where(mask, each, 0)).unsqueeze(1)
        else:
            teachers = self.bank_teacher.draw(len(x), self.num_negatives)  # (n, K, d)
            students = self.bank_student.draw(len(x), self.num_negatives)
            negative = [self.critic(x.unsqueeze(1), teachers), self.critic(students, y.unsqueeze(1))]
            negative = torch.cat(negative, 1)  # (n, 2 K)
            if self.training:
                self.bank_student.update(index, x, mask)
                self.bank_teacher.update(index, y, mask)
        return wcord_global(
            positive, negative, mask, num_items_in_batch, negative_weight=self.negative_weight,
            reduction=self.reduction,
        )  # fmt: skip

    def _check(self, student, teacher, index, mask, num_items_in_batch) -> int | Tensor | None:
        pairs = ("student_features", student, self.embed_student), ("teacher_features", teacher, self.embed_teacher)
        for name, value, layer in pairs:
            check_tensor(name, value, 2, "(n, d)")
            if value.dim() != 2 or value.shape[1] != layer.in_features:
                raise ValueError(f"{name}: expected shape (n, {layer.in_features}), got {tuple(value.shape)}")
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(f"teacher_features: expected {student.shape[0]} rows, got shape {tuple(teacher.shape)}")
        _common.check_device("teacher_features", teacher, "student_features", student)
        _common.check_mask(mask, student.shape[:1], student, "student_features")
        if self.local_weight or (self.global_weight and self.bank_student is None):
            part = "local part" if self.local_weight else "global part without memory banks"
            _common.refuse_num_items(num_items_in_batch, _NO_SUM.format(part))
        if self.global_weight and self.bank_student is not None:
            self.bank_student.check(index, student, mask)
        elif self.global_weight:
            rows = student.shape[0]
            if mask is not None and values_readable(mask):
                rows = int(mask.sum())
            if rows == 1:
                raise ValueError("student_features: expected at least two rows for the negatives of the batch, got one")
        return _common.check_num_items(num_items_in_batch, self.reduction)

    def extra_repr(self) -> str:
        weights = "global_weight", "local_weight", "negative_weight", "num_negatives", "reduction"
        local = (f"{name}={value!r}" for name, value in self._local_options._asdict().items())
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in weights), *local])


class _Critic(nn.Module):
    """w . relu(A x + B y + c): the first layer sees (x, y) as one vector."""

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.joint = SpectralLinear(2 * embedding_dim, hidden_dim)
        self.score = SpectralLinear(hidden_dim, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., d), y (..., d) that broadcast -> (...): each side is multiplied once, before it is repeated."""
        weight_x, weight_y = self.joint.normalised_weight().chunk(2, dim=1)
        hidden = F.linear(x, weight_x) + F.linear(y, weight_y, self.joint.bias)
        return self.score(torch.relu(hidden)).squeeze(-1)


def _embedded(layer: nn.Linear, features: Tensor) -> Tensor:
    return F.normalize(layer(features.to(layer.weight.dtype)), dim=-1)


def _local_options(solver, epsilon, beta, num_iters, gradient, backend) -> _LocalOptions:
    check_choice("solver", solver, SOLVERS)
    check_choice("gradient", gradient, GRADIENTS)
    if solver == "ipot" and gradient not in ("detach", "unroll"):
        raise ValueError(f"gradient: expected 'detach' or 'unroll' for solver 'ipot', got {gradient!r}")
    return _LocalOptions(
        solver, positive_float("epsilon", epsilon), positive_float("beta", beta), positive_int("num_iters", num_iters),
        gradient, _common.check_backend(backend),
    )  # fmt: skip


def _local(student, teacher, mask: Tensor | None, reduction: str, options: _LocalOptions) -> Tensor:
    for name, value in (("student", student), ("teacher", teacher)):
        check_tensor(name, value, 2, "(n, d)")
        if value.dim() != 2 or value.shape[1] == 0:
            raise ValueError(f"{name}: expected shape (n, d) with d >= 1, got {tuple(value.shape)}")
    if teacher.shape[1] != student.shape[1]:
        raise ValueError(f"teacher: expected {student.shape[1]} features as student, got shape {tuple(teacher.shape)}")
    _common.check_device("teacher", teacher, "student", student)
    _common.check_mask(mask, student.shape[:1], student)
    if mask is not None and teacher.shape[0] != student.shape[0]:
        raise ValueError(f"teacher: expected {student.shape[0]} rows with a mask, got shape {tuple(teacher.shape)}")
    student, teacher = _common.at_least_float32(student, teacher)
    if student.shape[0] == 0 or teacher.shape[0] == 0:
        nothing = _common.zero(student, teacher)
        return nothing.expand(student.shape[:1]) if reduction == "none" else nothing
    a = None
    if mask is not None:
        student, teacher = _common.overwrite(mask, student, teacher)
        counted = mask | ~mask.any()
        a = counted.to(student.dtype) / counted.sum()
    cost = cost_matrix(student, teacher, metric="cosine", backend=options.backend)  # (n, m)
    rows = student.shape[0] if mask is None else mask.sum()
    if reduction == "none":
        return rows * (_plan(cost, a, options) * cost).sum(1)
    if options.solver == "sinkhorn":
        value = _sinkhorn(cost, a, options).transport_cost
    else:
        value = (_plan(cost, a, options) * cost).sum()
    if mask is not None:
        value = torch.where(mask.any(), value, 0)  # zero rows have cosine cost 1, not 0
    return value if reduction == "mean" else _common.divide(value * rows, student.shape[:1], mask, reduction)


def _sinkhorn(cost: Tensor, a: Tensor | None, options: _LocalOptions) -> SinkhornResult:
    return sinkhorn(
        cost, a, a, epsilon=options.epsilon, num_iters=options.num_iters, gradient=options.gradient,
        backend=options.backend,
    )  # fmt: skip


def _plan(cost: Tensor, a: Tensor | None, options: _LocalOptions) -> Tensor:
    """(n, m), a constant for gradient="detach"."""
    if options.gradient == "detach":
        cost = cost.detach()
    if options.solver == "ipot":
        return ipot(cost, a, a, beta=options.beta, num_iters=options.num_iters)
    return _sinkhorn(cost, a, options).plan()
